"""The documentation: the site builds strictly, links and names of files hold, and what is generated is up to date."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from markdown_blocks import ROOT, pages, prose, text

from scripts import architecture_picture, commands_page

DOCS = ROOT / "docs"


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as Python-Markdown and GitHub name them where no heading comes twice."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    names = (re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower() for heading in headings)
    return {re.sub(r"[\s\-]+", "-", name) for name in names}


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    """Unknown pages, anchors and names of the API, and pages that are not in the navigation, are errors."""
    pytest.importorskip("zensical", reason="pip install 'fastgan[docs]'")
    shutil.copytree(DOCS, tmp_path / "docs")
    config = (ROOT / "mkdocs.yml").read_text()
    assert config.count("paths: [.]") == config.count("site_dir: build/site") == 1
    config = config.replace("paths: [.]", f"paths: [{ROOT}]").replace("build/site", "site")
    (tmp_path / "mkdocs.yml").write_text(config)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    html = (tmp_path / "site" / "reference" / "ops.html").read_text()
    assert 'id="fastgan.ops.scaled_dot_product_attention"' in html


def test_every_page_is_in_the_navigation() -> None:
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    entries = [entry for group in navigation for entries in group.values() for entry in entries]
    listed = [page for entry in entries for page in (entry.values() if isinstance(entry, dict) else [entry])]
    assert len(set(listed)) == len(listed)
    assert set(listed) == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


@pytest.mark.parametrize("page", pages(), ids=str)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(ROOT / page)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / file if file else ROOT / page
        assert linked.exists(), f"{page}: {target} does not exist"
        if page.startswith("docs/"):
            assert DOCS in linked.resolve().parents, f"{page}: {target} is not part of the site"
        if anchor:
            assert anchor in anchors(linked), f"{page}: {linked.name} has no heading {anchor!r}"


@pytest.mark.parametrize("page", pages(), ids=str)
def test_files_that_are_named_exist(page: str) -> None:
    for name in re.findall(r"`((?:fastgan|tests|benchmarks|kernels|csrc|scripts|examples|docs)/[\w./-]+)`", text(page)):
        assert "NAME" in name or "OP" in name or (ROOT / name).exists(), f"{page}: there is no {name}"


def test_the_picture_of_the_rooms_is_that_of_the_code() -> None:
    assert architecture_picture.PICTURE.read_text() == architecture_picture.picture(), "run `make docs`"


def test_the_picture_leaves_out_what_other_arrows_imply() -> None:
    arrows = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert architecture_picture.reduced(arrows) == {"a": {"b"}, "b": {"c"}, "c": set()}
    found, steps = architecture_picture.rows({"a": {"b", "d"}, "b": {"c"}, "c": set(), "d": set()})
    assert found == [["c", "d"], ["b", "d@1"], ["a"]] and steps["a"] == {"b", "d@1"} and steps["d@1"] == {"d"}


def test_help_is_that_of_the_commands() -> None:
    """Compared word by word: where lines break depends on the version of the library that prints them."""
    assert commands_page.PAGE.read_text().split() == commands_page.page().split(), "run `make docs`"


NAME = re.compile(r"[A-Z][A-Z0-9]+(_[A-Z0-9]+)*_?")
NOT_VARIABLES = {"KINDS"}


def variables_of_the_code() -> set[str]:
    """Upper-case strings in the files that use the environment."""
    found = set()
    files = [*(ROOT / "fastgan").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), ROOT / "setup.py"]
    for file in files:
        code = file.read_text()
        if "environ" in code or "getenv" in code:
            constants = (node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant))
            found |= {value for value in constants if isinstance(value, str) and NAME.fullmatch(value)}
    return found - NOT_VARIABLES


def test_environment_variables_are_those_of_the_code() -> None:
    cells = [line.split("|")[1] for line in text("docs/environment.md").splitlines() if line.startswith("| `")]
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == variables_of_the_code()
    assert "getenv" not in "".join(file.read_text() for file in (ROOT / "csrc").rglob("*") if file.is_file())


def test_the_readme_is_short_and_its_first_screen_has_a_picture_three_numbers_and_the_status() -> None:
    lines = text("README.md").splitlines()
    assert len(lines) <= 110
    first = "\n".join(lines[:24])
    assert "](docs/samples/front.png)" in first
    assert len(re.findall(r"\| \*\*\d+\.\dx\*\* \|", first)) == 3
    assert "GPU" in first
