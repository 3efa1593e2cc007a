"""Writes docs/commands.md: what `--help` of every command says.

python -m scripts.commands_page
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
from pathlib import Path
from unittest import mock

from fastgan.cli.main import COMMANDS, module_of

PAGE = Path(__file__).parent.parent / "docs" / "commands.md"
WIDTH = 100
SUBCOMMANDS = {"data": ("info", "verify", "show")}
HEAD = """\
# Commands

What `fastgan COMMAND --help` prints. `make docs` writes this page, and a test compares it with the commands. The
defaults of `train` and `plan` are those of `--variant pggan`, which is the default; `--variant NAME --help` shows
those of another.
"""


def help_of(command: str, *words: str) -> str:
    """What `fastgan COMMAND WORDS --help` prints, without the rules around groups of options."""
    main = importlib.import_module(f"fastgan.cli.{module_of(command)}").main
    printed = io.StringIO()
    terminal = {"COLUMNS": str(WIDTH), "NO_COLOR": "1"}
    with mock.patch.dict(os.environ, terminal), contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    lines = (line.rstrip() for line in printed.getvalue().splitlines())
    return "\n".join(line for line in lines if not re.fullmatch(" *-{20,}", line)).strip()


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for command, purpose in COMMANDS.items():
        parts.append(f"## fastgan {command}\n\n{purpose[0].upper()}{purpose[1:]}.\n\n{_fenced(help_of(command))}")
        for word in SUBCOMMANDS.get(command, ()):
            parts.append(f"### fastgan {command} {word}\n\n{_fenced(help_of(command, word))}")
    return "\n".join(parts)


def _fenced(text: str) -> str:
    return f"```text\n{text}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(page())
