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


def current_names(content: Any) -> Any:
    """A copy of the content of a JSON or YAML file, with the current names of all keys, at any depth."""
    if isinstance(content, dict):
        return {RENAMED.get(key, key): current_names(value) for key, value in content.items()}
    return [current_names(value) for value in content] if isinstance(content, list) else content


def current_flags(argv: list[str]) -> list[str]:
    """A command line with the current names of its flags, `--NAME` or `--NAME=VALUE`."""
    words = []
    for word in argv:
        flag, equals, value = word.partition("=")
        name = RENAMED.get(flag.removeprefix("--")) if flag.startswith("--") else None
        words.append(f"--{name.replace('_', '-')}{equals}{value}" if name else word)
    return words
