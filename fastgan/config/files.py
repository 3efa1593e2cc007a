"""Configurations as files and nested dicts."""

from __future__ import annotations

import dataclasses
import difflib
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from fastgan.config.sections import Config, to_dict
from fastgan.errors import ArgumentError
from fastgan.utils.files import write_atomic
from fastgan.utils.old_names import current_names

SCHEMA = 1
_DEFAULTS = Config()


@cache
def _adapter() -> TypeAdapter[Config]:
    return TypeAdapter(Config)


def merge(base: Config, values: dict[str, Any], where: str) -> Config:
    """`base` overlaid with a nested dict as read from a file named `where`.

    Raises:
        ArgumentError: an unknown section or key, or a value of the wrong type.
    """
    merged = to_dict(base)
    for section, content in values.items():
        if section not in merged:
            raise ArgumentError(f"{where}: section", section, f"must be one of {', '.join(merged)}")
        if not isinstance(content, dict):
            raise ArgumentError(f"{where}: {section}", content, "must be a mapping of keys to values")
        for key in content:
            if key not in merged[section]:
                near = difflib.get_close_matches(str(key), merged[section], n=1)
                hint = f"did you mean {near[0]}?" if near else f"keys are {', '.join(merged[section])}"
                raise ArgumentError(f"{where}: unknown key in {section}", key, hint)
        merged[section].update(content)
    return from_dict(merged, where)


def from_dict(values: dict[str, Any], where: str) -> Config:
    """The `Config` of a complete nested dict; `where` names its origin in errors."""
    for section in dataclasses.fields(Config):
        _refuse_switches(values.get(section.name), type(getattr(_DEFAULTS, section.name)), f"{where}: {section.name}")
    try:
        return _adapter().validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ArgumentError(f"{where}: {name}", first["input"], first["msg"].lower()) from None


def _refuse_switches(values: Any, section: type, where: str) -> None:
    """Refuse true and false where another value belongs: pydantic takes true for 1."""
    if not isinstance(values, dict):
        return
    kinds = get_type_hints(section)
    for key, value in values.items():
        inner = [*value, *value.values()] if isinstance(value, dict) else [value]
        if kinds.get(key) is not bool and any(isinstance(one, bool) for one in inner):
            raise ArgumentError(f"{where}.{key}", value, "must not be true or false; write a number or a text")


class _Loader(yaml.SafeLoader):
    """Plain values alone. Aliases are refused: a few lines of them can stand for any number of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "aliases are not supported", event.start_mark)
        return super().compose_node(parent, index)


def read_yaml(path: Path, flag: str) -> dict[str, Any]:
    """The sections of a configuration file, not checked against a `Config` yet, and its "variant" and "preset".

    Args:
        path: the file.
        flag: what the user named it by, for errors.

    Raises:
        ArgumentError: the file cannot be read, is not a YAML mapping, or has another schema version.
    """
    try:
        content = _Loader(path.read_text(encoding="utf-8-sig")).get_single_data()
    except OSError as error:
        raise ArgumentError(flag, str(path), f"must be a readable YAML file; {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ArgumentError(flag, str(path), f"must be a YAML file; {line}{error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ArgumentError(flag, str(path), f"must be a YAML file; {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise ArgumentError(flag, str(path), "must be a YAML mapping of sections")
    schema = content.pop("schema", SCHEMA)
    if schema != SCHEMA:
        raise ArgumentError(f"{path}: schema", schema, f"must be {SCHEMA}; this version reads no other")
    return current_names(content)


def write_yaml(config: Config, variant: str, preset: str, path: Path) -> None:
    """Write `config` so that `read_yaml` and `merge` give it back; `path` is replaced whole or not at all."""
    content = {"schema": SCHEMA, "variant": variant, "preset": preset, **to_dict(config)}
    write_atomic(path, yaml.safe_dump(content, sort_keys=False).encode())
