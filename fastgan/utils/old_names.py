"""Names that flags and keys of files had in earlier versions; what has them stays readable."""

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
    """A copy of what a JSON or YAML file holds, with keys of mappings, at any depth, as this version calls them."""
    if isinstance(content, dict):
        return {RENAMED.get(key, key): current_names(value) for key, value in content.items()}
    return [current_names(value) for value in content] if isinstance(content, list) else content


def current_flags(argv: list[str]) -> list[str]:
    """A command line with its flags, `--NAME` or `--NAME=VALUE`, as this version calls them."""
    found = []
    for word in argv:
        flag, equals, value = word.partition("=")
        name = RENAMED.get(flag.removeprefix("--")) if flag.startswith("--") else None
        found.append(f"--{name.replace('_', '-')}{equals}{value}" if name else word)
    return found
