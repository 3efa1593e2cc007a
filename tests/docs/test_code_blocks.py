"""The blocks of code in README and docs: Python runs, and so do commands of fastgan; what does not says why.

Of commands that do not run, names, flags and files are compared with what there is.
"""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
import torch
import yaml
from markdown_blocks import ROOT, Block, blocks, pages, text
from PIL import Image

import fastgan
from fastgan.cli import main as cli
from fastgan.cli import train
from fastgan.cli.main import COMMANDS
from fastgan.errors import ArgumentError

WITH_BLOCKS = [page for page in pages() if blocks(page)]
HELP = dict(re.findall(r"^## fastgan (\w+)$(.*?)(?=^## |\Z)", text("docs/commands.md"), re.MULTILINE | re.DOTALL))
CRITIC = """
import torch
from torch import nn
critic = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(64, 1))
images = real = torch.randn(2, 3, 8, 8)
fake, weight = torch.randn(2, 3, 8, 8), torch.rand(2, 1, 1, 1)
optimizer = torch.optim.Adam(critic.parameters())
"""
# Page -> what its blocks take for given.
GIVEN = {
    "README.md": CRITIC
    + """
w1, b1, w2 = torch.randn(8, 3, 3, 3), torch.zeros(8, requires_grad=True), torch.randn(1, 128, requires_grad=True)
def critic_loss(real, fake, weight):
    x = torch.lerp(real, fake, weight).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return critic(fake).mean() - critic(real).mean() + gradient.square().sum()
""",
    "docs/compile.md": CRITIC + "import fastgan\n",
    "docs/drop-in.md": CRITIC,
}


def python_blocks(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: RUN, PHOTOS, a prepared SET with 64 px decoded and 128 encoded, CHECKOUT."""
    runs.make_run(tmp_path / "RUN")
    (tmp_path / "PHOTOS").mkdir()
    for i in range(3):
        picture = torch.randint(256, (130, 140, 3), dtype=torch.uint8)
        Image.fromarray(picture.numpy()).save(tmp_path / "PHOTOS" / f"{i}.png")
    (tmp_path / "CHECKOUT").symlink_to(ROOT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fastgan.compile_step` without its compiler, which takes half a minute."""
    compile_step = fastgan.compile_step
    monkeypatch.setattr(fastgan, "compile_step", lambda loss, of, **kw: compile_step(loss, of, **kw, compile=False))


def run_fastgan(line: str) -> None:
    assert cli.main(shlex.split(line, comments=True)[1:]) == 0, line


@pytest.mark.parametrize("page", [page for page in WITH_BLOCKS if python_blocks(page)])
def test_python_runs(page: str, folder: Path, interpreted: None) -> None:
    """The blocks of a page one after the other, in one namespace."""
    if page == "docs/data.md":
        run_fastgan("fastgan prepare PHOTOS SET --resolution 128 --cache-to 64 --workers 1")
    names: dict[str, object] = {"__name__": "a_page"}
    exec(GIVEN.get(page, ""), names)
    for block in python_blocks(page):
        code = compile("\n" * block.line + block.code, page, "exec")
        if block.not_run is None:
            exec(code, names)


def commands(block: Block) -> Iterator[str]:
    for line in block.code.replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("#"):
            yield line


RUN_HERE = ("data", "prepare", "sample")  # in a second, and they end
SHELL = [page for page in WITH_BLOCKS if any(block.language in ("sh", "bash") for block in blocks(page))]


@pytest.mark.parametrize("page", SHELL)
def test_commands_run(page: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        line for block in blocks(page) if block.language == "sh" and block.not_run is None for line in commands(block)
    ]
    if any(" SET" in line for line in lines):
        run_fastgan("fastgan prepare PHOTOS SET --resolution 128 --cache-to 64 --workers 1")
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[0] == "fastgan" and words[1] in RUN_HERE:
            run_fastgan(line)
        else:
            assert words[:2] == ["python", "-c"], f"{page}: {line!r} does not run here: say why before the block"
            exec(words[2], {})


def check_flags(words: list[str], known: str, line: str) -> None:
    for word in words:
        flag = re.match(r"--[a-z][\w-]*", word)
        assert flag is None or re.search(rf"{flag[0]}(?![\w-])", known), f"{line}: there is no {flag[0]}"


def check_module(name: str, words: list[str], line: str) -> None:
    if name == "fastgan":
        check_fastgan(words, line)
    elif name == "pytest":
        check_pytest(words, line)
    else:
        path = name.removeprefix("fastgan.").replace(".", "/") if name.startswith("fastgan.kernels") else name
        file = ROOT / f"{path.replace('.', '/')}.py"
        assert file.is_file(), f"{line}: there is no module {name}"
        shared = (ROOT / "benchmarks").rglob("*.py") if "benchmarks" in name else ()
        check_flags(words, "".join(f.read_text().replace("_", "-") for f in (file, *shared)), line)


def check_fastgan(words: list[str], line: str) -> None:
    assert words[0] in COMMANDS, f"{line}: there is no command {words[0]}"
    check_flags(words[1:], HELP[words[0]], line)
    if words[0] == "train" and not {"--resume", "--init-from", "--config"} & set(words):
        train.parse(words[1:])


def check_pytest(words: list[str], line: str) -> None:
    for word in words:
        if "/" in word and not word.startswith("-"):
            assert (ROOT / word.partition("::")[0]).exists(), f"{line}: there is no {word}"


def check_make(words: list[str], line: str) -> None:
    targets = re.findall(r"^([\w-]+):", text("Makefile"), re.MULTILINE)
    assert words[0] in targets, f"{line}: make has no target {words[0]}"


def check_pip(words: list[str], line: str) -> None:
    extras = tomllib.loads(text("pyproject.toml"))["project"]["optional-dependencies"]
    for names in re.findall(r"\[([\w,]+)\]", line):
        assert set(names.split(",")) <= extras.keys(), f"{line}: pyproject.toml lacks an extra"


def check_python(words: list[str], line: str) -> None:
    if words[0] == "-m":
        if words[1] != "venv":
            check_module(words[1], words[2:], line)
    elif words[0] == "-c":
        ast.parse(words[1])
    else:
        assert (ROOT / words[0]).is_file(), f"{line}: there is no {words[0]}"


CHECKS = {
    "fastgan": check_fastgan,
    "pytest": check_pytest,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "python3": check_python,
}


def check(line: str) -> None:
    for part in shlex.split(line, comments=True) and re.split(r" && ", line):
        words = shlex.split(part, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if not words or words[0] in (".", "export", "git"):
            continue
        script = next((i for i, word in enumerate(words) if re.fullmatch(r"fastgan/(train|evaluate)\.py", word)), None)
        if script is not None:  # behind a launcher, whose own flags stand before it
            check_fastgan([Path(words[script]).stem, *words[script + 1 :]], line)
        else:
            assert words[0] in CHECKS, f"{line}: what is {words[0]}?"
            CHECKS[words[0]](words[1:], line)


@pytest.mark.parametrize("page", SHELL)
def test_commands_have_names_flags_and_files_that_exist(page: str) -> None:
    for block in blocks(page):
        for line in commands(block) if block.language in ("sh", "bash") else ():
            check(line)


@pytest.mark.parametrize(
    "line",
    [
        "fastgan trian",
        "fastgan train --rate 1",
        "fastgan train --augment adaptive",
        "fastgan train --batch 0",
        "torchrun --nproc_per_node 2 fastgan/train.py --rate 1",
        "pytest tests/none.py",
        "python -m benchmarks.none",
        "python -m benchmarks.studies.compare_variants --none",
        "make none",
        "pip install '.[none]'",
        "python none.py",
        "none",
    ],
)
def test_what_does_not_exist_is_found(line: str) -> None:
    with pytest.raises((AssertionError, ArgumentError, SystemExit)):
        check(line)


def test_blocks_are_found_with_the_reason_why_they_do_not_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "text\n\n    fastgan doctor\n\n```python\nx = 1\n\ny = 2\n```\n\n<!-- not run: why -->\n\n    make gpu\n"
        "\n    x = 3\n\n    a: b c\n"
    )
    found = [(block.line, block.language, block.code, block.not_run) for block in blocks(str(page))]
    assert found == [
        (3, "sh", "fastgan doctor", None),
        (5, "python", "x = 1\n\ny = 2", None),
        (13, "sh", "make gpu\n\nx = 3\n\na: b c", "why"),
    ]
    page.write_text("<!-- not run: why -->\ntext\n\n    make gpu\n")
    with pytest.raises(AssertionError, match="belongs to no block"):
        blocks(str(page))


@pytest.mark.parametrize("page", WITH_BLOCKS)
def test_blocks_name_their_language(page: str) -> None:
    for block in blocks(page):
        assert block.language in ("python", "sh", "bash", "text", "yaml"), f"{page}:{block.line}"
        if block.language == "yaml":
            assert list(yaml.safe_load_all(block.code))
        if block.language == "bash":
            assert block.not_run, f"{page}:{block.line}: say why it does not run"
