"""Flags and keys of files whose names changed: files and command lines of earlier versions stay readable."""

from __future__ import annotations

from typing import Any

RENAMED = {
    "every": "evaluate_kimg",
    "licence": "license",
    "optimiser": "optimizer",
    "optimiser_d": "optimizer_d",
    "optimiser_g": "optimizer_g",
    "regulariser": "regularizer",
}


# Precision was three settings: `precision` fp32 or bf16, `tf32`, and `penalty_precision`, which could be fp32 in bf16.
_OLD_PRECISION = ("tf32", "penalty_precision")


def _one_precision(precision: Any, tf32: Any, penalty: Any) -> Any:
    """The one setting that stands for three. What asked for exact products in the penalty gets them everywhere."""
    if precision == "bf16":
        return "fp32" if penalty == "fp32" else "bf16"
    if isinstance(tf32, bool) and precision in (None, "fp32"):
        return "tf32" if tf32 else "fp32"
    return precision


def current_names(content: Any) -> Any:
    """A copy of the content of a JSON or YAML file, with the current names of all keys, at any depth."""
    if isinstance(content, dict):
        if any(key in content for key in _OLD_PRECISION):
            tf32, penalty = (content.get(key) for key in _OLD_PRECISION)
            precision = _one_precision(content.get("precision"), tf32, penalty)
            content = {key: value for key, value in content.items() if key not in (*_OLD_PRECISION, "precision")}
            content |= {} if precision is None else {"precision": precision}
        return {RENAMED.get(key, key): current_names(value) for key, value in content.items()}
    return [current_names(value) for value in content] if isinstance(content, list) else content


def current_flags(argv: list[str]) -> list[str]:
    """A command line with the current names of its flags, `--NAME` or `--NAME=VALUE`."""
    words = []
    for word in argv:
        flag, equals, value = word.partition("=")
        name = RENAMED.get(flag.removeprefix("--")) if flag.startswith("--") else None
        words.append(f"--{name.replace('_', '-')}{equals}{value}" if name else word)
    return _with_one_precision(words)


def _with_one_precision(words: list[str]) -> list[str]:
    """A command line in which `--precision` stands for the three flags that there were."""
    if not any(w.split("=")[0].replace("_", "-") in ("--tf32", "--no-tf32", "--penalty-precision") for w in words):
        return words
    values: dict[str, Any] = {}
    rest, i = [], 0
    while i < len(words):
        flag, equals, value = words[i].partition("=")
        flag = flag.replace("_", "-")
        if flag in ("--tf32", "--no-tf32"):
            values["tf32"] = flag == "--tf32"
        elif flag in ("--precision", "--penalty-precision"):
            i += not equals
            values[flag] = value if equals else words[i] if i < len(words) else ""
        else:
            rest.append(words[i])
        i += 1
    precision = _one_precision(values.get("--precision"), values.get("tf32"), values.get("--penalty-precision"))
    return rest if precision is None else [*rest, "--precision", precision]
