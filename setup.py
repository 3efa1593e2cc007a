"""Finds the packages, and adds the compiled CPU library to a wheel; everything else is declared in pyproject.toml.

If torch can be imported (`pip install --no-build-isolation .`) and there is a compiler, the wheel contains csrc/cpu
compiled for each instruction set. Otherwise it contains only the sources, which are compiled on first use.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def _extension():
    """Load fastgan/ops/dispatch/extension.py by path, without importing fastgan or torch."""
    spec = importlib.util.spec_from_file_location(
        "fastgan_extension", ROOT / "fastgan" / "ops" / "dispatch" / "extension.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _prebuild(folder: Path) -> None:
    """Compile the CPU library into `folder`. A failure raises only with FASTGAN_BUILD=force."""
    preference = os.environ.get("FASTGAN_BUILD", "").strip().lower()
    if preference == "0" or os.name == "nt":
        return
    extension = _extension()
    try:
        sources = extension.source_folder()
        for level in extension.instructions():
            extension.compile_library("cpu", folder / extension.prebuilt_name("cpu", level, sources), level, sources)
    except extension.BuildError as error:
        if preference == "force":
            raise
        print(f"fastgan: the wheel has no compiled library, it is built on first use: {error}", file=sys.stderr)
        for file in folder.glob("*.so"):
            file.unlink()


class BuildPackages(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib) / "fastgan" / "ops" / "lib"
            for old in folder.glob("*.so"):  # from an earlier build
                old.unlink()
            _prebuild(folder)


class BuildWheel(bdist_wheel):
    def get_tag(self):
        """py3-none-PLATFORM if the wheel contains a library: it uses no Python headers, so any Python 3 loads it."""
        python, abi, system = super().get_tag()
        return ("py3", "none", system) if not self.root_is_pure else (python, abi, system)

    def run(self):
        self.run_command("build")
        built = Path(self.get_finalized_command("build").build_lib) / "fastgan" / "ops" / "lib"
        self.root_is_pure = not any(built.glob("*.so"))
        self.distribution.has_ext_modules = lambda: not self.root_is_pure
        self.skip_build = True
        super().run()


# Found, not listed: a list in pyproject.toml would miss the next folder. kernels/ and csrc/ lie beside fastgan/ and are
# packages inside it, so that `fastgan.kernels` is found in an installation too.
setup(
    package_dir={"fastgan": "fastgan", "fastgan.kernels": "kernels", "fastgan.csrc": "csrc"},
    packages=[
        *find_packages(include=["fastgan", "fastgan.*"]),
        *("fastgan.csrc", "fastgan.csrc.cpu", "fastgan.csrc.cuda"),
    ],
    cmdclass={"build_py": BuildPackages, "bdist_wheel": BuildWheel},
)
