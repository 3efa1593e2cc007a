"""The files that a platform or a tool reads, and the list of rooms in CONTRIBUTING."""

from __future__ import annotations

import re

import yaml
from markdown_blocks import ROOT, text

from scripts.import_graph import MODULES, room_of


def test_forms_of_issues_have_what_their_platform_wants() -> None:
    forms = [yaml.safe_load(file.read_text()) for file in (ROOT / ".github" / "ISSUE_TEMPLATE").iterdir()]
    assert len(forms) >= 3
    for form in forms:
        assert form["name"] and form["description"]
        identifiers = [field["id"] for field in form["body"]]
        assert len(set(identifiers)) == len(identifiers)
        assert all(field["attributes"]["label"] for field in form["body"])


def test_the_citation_has_the_required_keys() -> None:
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}
    assert citation["license"] in text("pyproject.toml")


def test_hooks_run_what_make_lint_runs() -> None:
    (repository,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    entries = [hook["entry"].removeprefix("python -m ") for hook in repository["hooks"]]
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", text("Makefile"), re.MULTILINE)
    assert lint is not None
    assert [entry.split(" --")[0] for entry in entries] == re.findall(r"\$\(BIN\)/([a-z]+(?: [a-z]+)?)", lint[1])


def test_contributing_lists_every_room() -> None:
    table = text("CONTRIBUTING.md")
    for room in {room_of(name) for name in MODULES} - {"", "__main__", "kernels"}:
        folder, _, part = room.partition(".")
        known = {f"fastgan/{folder}/", f"fastgan/{folder}.py"}
        assert any(f"`{name}" in table for name in known) and f"{part or folder}" in table, f"CONTRIBUTING lacks {room}"
