"""Pages of the documentation, and the blocks of code in them."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def pages() -> list[str]:
    """README, CONTRIBUTING, SECURITY and docs/, as paths below the root."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "csrc" / "README.md"]
    return sorted(str(page.relative_to(ROOT)) for page in found)


def text(page: str) -> str:
    return (ROOT / page).read_text()


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@dataclass
class Block:
    """A block of code.

    Attributes:
        page, line: where it starts.
        language: python, sh, text, yaml ...
        code: without indentation.
        not_run: the reason in the comment `<!-- not run: REASON -->` before it, if there is one.
    """

    page: str
    line: int
    language: str
    code: str
    not_run: str | None


COMMANDS = "FASTGAN_QUALIFY=0 deepspeed export fastgan make pip pytest python python3 torchrun".split()


def _language(code: str) -> str:
    """Of an indented block, which does not name it."""
    if code.split()[0] in COMMANDS:
        return "sh"
    try:
        ast.parse(code)
    except SyntaxError:
        return "text"
    return "python"


def blocks(page: str) -> list[Block]:
    """All blocks of a page, fenced or indented."""
    found, lines = [], text(page).splitlines()
    i, reason = 0, None
    while i < len(lines):
        line, start = lines[i], i
        marker = re.fullmatch(r"<!-- not run: (.+) -->", line)
        after_blank = i == 0 or not lines[i - 1].strip()
        if marker is not None:
            reason = marker[1]
        elif line.startswith("```"):
            i += 1
            while lines[i] != "```":
                i += 1
            code = "\n".join(lines[start + 1 : i])
            found.append(Block(page, start + 1, line[3:].strip(), code, reason))
            reason = None
        elif line.startswith("    ") and after_blank:
            while i < len(lines) and (lines[i].startswith("    ") or not lines[i].strip()):
                i += 1
            code = "\n".join(line[4:] for line in lines[start:i]).strip()
            found.append(Block(page, start + 1, _language(code), code, reason))
            reason = None
            continue
        elif line.strip():
            assert reason is None, f"{page}:{i + 1}: the comment `not run` belongs to no block"
        i += 1
    return found
