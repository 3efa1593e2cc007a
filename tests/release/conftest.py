"""A wheel and an sdist of this checkout, and environments with the packages of this one but another fastgan."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from installs import copy_checkout, run


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone has of the package: nothing that git ignores."""
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


Build = Callable[..., Path]


@pytest.fixture(scope="session")
def build(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Builds a wheel or an sdist, with the setuptools of this environment; returns the file."""

    def make(kind: str, source: Path | None = None, **environment: str) -> Path:
        source = source or checkout
        target = tmp_path_factory.mktemp("dist")
        for left in (source / "build", *source.glob("*.egg-info")):
            shutil.rmtree(left, ignore_errors=True)
        code = f"from setuptools import build_meta as b; b.build_{kind}({str(target)!r})"
        run(sys.executable, "-c", code, folder=source, **environment)
        (file,) = target.iterdir()
        return file

    return make


@pytest.fixture
def install(tmp_path: Path) -> Callable[[Path], Path]:
    """Installs a wheel or an sdist with pip into a new environment; returns its Python.

    The environment finds the other packages of this one. It does not see this one's fastgan, which is in a checkout or
    an editable install: .pth files of a folder that is itself named by a .pth file are not read.
    """

    def make(file: Path) -> Path:
        folder = tmp_path / f"environment-{len(list(tmp_path.glob('environment-*')))}"
        run(sys.executable, "-m", "venv", folder, folder=tmp_path)
        python = next(path for path in (folder / "bin" / "python", folder / "Scripts" / "python.exe") if path.exists())
        # Older Pythons put a setuptools there that is too old for our build; that of this environment is found instead.
        run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools", folder=tmp_path)
        site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=tmp_path).strip()
        Path(site, "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", file,
            folder=tmp_path, FASTGAN_BUILD="0", XDG_CACHE_HOME=str(tmp_path / "cache"))  # fmt: skip
        return python

    return make
