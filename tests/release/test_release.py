"""What is released: the content of wheel and sdist, and that both work where they are installed."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path

import pytest
from installs import REPOSITORY, run
from packaging.requirements import Requirement

import fastgan
from fastgan import trained

Build = Callable[..., Path]

WORKS = """
import importlib, pkgutil, sys
import fastgan, torch
from fastgan.ops.dispatch import extension
assert fastgan.__file__.startswith(sys.prefix), fastgan.__file__
for module in pkgutil.walk_packages(fastgan.__path__, "fastgan."):  # everything that was packed can be imported
    if not module.name.startswith(("fastgan.kernels.", "fastgan.train", "fastgan.evaluate", "fastgan.__main__")):
        importlib.import_module(module.name)
x = torch.randn(2, 4, 5, 5)
assert torch.allclose(fastgan.ops.pixel_norm(x), x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8), atol=1e-5)
print(fastgan.__version__, extension.file("cpu"))
"""


def files_of(file: Path) -> set[str]:
    """Names in a wheel or an sdist; of the latter without the first folder."""
    if file.suffix == ".whl":
        return set(zipfile.ZipFile(file).namelist())
    with tarfile.open(file) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def expected() -> set[str]:
    """Every file of the package in this checkout, by its name in a wheel."""
    names = set()
    for folder, prefix in (("fastgan", "fastgan"), ("kernels", "fastgan/kernels"), ("csrc", "fastgan/csrc")):
        for path in (REPOSITORY / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so":
                names.add(f"{prefix}/{path.relative_to(REPOSITORY / folder).as_posix()}")
    return names


def test_the_wheel_has_every_file_of_the_package(build: Build) -> None:
    """A folder that nobody listed, a table, a generator: what is not packed fails only where it is installed."""
    names = files_of(build("wheel", FASTGAN_BUILD="0"))
    assert not expected() - names
    assert {"fastgan/py.typed", "fastgan/training/compiling/__init__.py"} <= names
    assert {f"fastgan/trained/{name}.{kind}" for name in trained.names() for kind in ("md", "safetensors")} <= names
    others = {name for name in names - expected() if ".dist-info/" not in name}
    assert not others


def test_the_sdist_has_every_file_of_the_package(build: Build) -> None:
    names = files_of(build("sdist", FASTGAN_BUILD="0"))
    of_source = {re.sub("^fastgan/(?=kernels/|csrc/)", "", name) for name in expected()}
    of_source.discard("kernels/__init__.py")
    # fastgan/kernels/__init__.py stands for the folder kernels/ in a checkout; a package is made from the folder.
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "PKG-INFO", "kernels/__init__.py"} <= names
    assert not of_source - names


def test_versions_agree(build: Build) -> None:
    with zipfile.ZipFile(build("wheel", FASTGAN_BUILD="0")) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["Version"] == fastgan.__version__
    first = re.search(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None and first[1] == fastgan.__version__
    only_linux = {"deepspeed", "nvidia-dali-cuda130", "triton"}
    for system in ("darwin", "win32"):
        for extra in ("", *metadata.get_all("Provides-Extra")):
            of_system = {"sys_platform": system, "platform_system": system, "extra": extra}
            found = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
            needed = {it.name for it in found if it.marker is None or it.marker.evaluate(of_system)}
            assert not needed & only_linux, f"pip on {system} would look for {needed & only_linux} ({extra})"


def has_compiler() -> bool:
    from fastgan.ops.dispatch import extension

    try:
        return bool(extension._compiler("cpu"))
    except extension.BuildError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")
def test_a_wheel_with_kernels_works_where_it_is_installed(
    build: Build, install: Callable[[Path], Path], tmp_path: Path
) -> None:
    wheel = build("wheel", FASTGAN_BUILD="force")
    assert re.fullmatch(rf"fastgan-{re.escape(fastgan.__version__)}-py3-none-(?!any)\w+\.whl", wheel.name), wheel.name
    libraries = [name for name in files_of(wheel) if name.endswith(".so")]
    if platform.machine() == "x86_64":
        assert sorted(Path(name).name.split("-")[1] for name in libraries) == [
            "avx2",
            "avx512",
            "avx512_bf16",
            "baseline",
        ]
    python = install(wheel)
    output = run(python, "-c", WORKS, folder=tmp_path, CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path / "cache"))
    version, library = output.split()[-2:]
    assert version == fastgan.__version__ and Path(library).parent.parts[-2:] == ("ops", "lib")
    program = python.with_name("fastgan")
    for name in trained.names():
        assert f"{name}-sample-seed0.png" in run(program, "sample", name, folder=tmp_path)
        assert (tmp_path / f"{name}-sample-seed0.png").is_file()
    assert "done: 0.1" in run(program, "train", "--variant", "dcgan", "--kimg", "0.1", "--out", "run", folder=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_an_sdist_works_where_it_is_installed(build: Build, install: Callable[[Path], Path], tmp_path: Path) -> None:
    """Built without a compiler, as on most machines: it falls back to plain PyTorch and says so."""
    sdist = build("sdist", FASTGAN_BUILD="0")
    python = install(sdist)
    environment = {"CXX": "no-such-compiler", "FASTGAN_BUILD": "0", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert run(python, "-c", WORKS, folder=tmp_path, **environment).split()[-2:] == [fastgan.__version__, "None"]
    assert "done: 0.1" in run(
        python, "-m", "fastgan", "train", "--variant", "gan", "--kimg", "0.1", "--out", "run",
        folder=tmp_path, **environment,
    )  # fmt: skip


@pytest.mark.slow
def test_types_are_seen_by_mypy(build: Build, install: Callable[[Path], Path], tmp_path: Path) -> None:
    python = install(build("wheel", FASTGAN_BUILD="0"))
    (tmp_path / "use.py").write_text("import fastgan\nreveal_type(fastgan.load('RUN').sample(1))\nfastgan.load(1)\n")
    command = [sys.executable, "-m", "mypy", "--python-executable", str(python), "--follow-imports=silent", "use.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert 'Revealed type is "torch._tensor.Tensor"' in done.stdout, done.stdout
    assert "incompatible type" in done.stdout and "missing library stubs" not in done.stdout
