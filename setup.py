"""Everything is declared in pyproject.toml; this file adds the compiled CPU library to a wheel.

Where torch can be imported (`pip install --no-build-isolation .`) and there is a compiler, the wheel carries csrc/cpu
compiled for each instruction set. Anywhere else it carries the sources alone, and they are compiled on first use.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def _extension():
    """fastgan/ops/extension.py, by its path: nothing of fastgan, nor torch, is imported here."""
    spec = importlib.util.spec_from_file_location("fastgan_extension", ROOT / "fastgan" / "ops" / "extension.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _prebuild(folder: Path) -> bool:
    """Compile the CPU library into `folder`; whether all went well. Only FASTGAN_BUILD=force makes failing an error."""
    wish = os.environ.get("FASTGAN_BUILD", "").strip().lower()
    if wish == "0" or os.name == "nt":
        return False
    extension = _extension()
    try:
        sources = extension.source_folder()
        for level in extension.instructions():
            extension.compile_library("cpu", folder / extension.prebuilt_name("cpu", level, sources), level, sources)
    except extension.BuildError as error:
        if wish == "force":
            raise
        print(f"fastgan: no compiled library in this wheel, it is built on first use: {error}", file=sys.stderr)
        for file in folder.glob("*.so"):
            file.unlink()
        return False
    return True


class BuildPackages(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib) / "fastgan" / "ops" / "lib"
            for old in folder.glob("*.so"):  # of an earlier build, from other sources
                old.unlink()
            _prebuild(folder)


class BuildWheel(bdist_wheel):
    def get_tag(self):
        """py3-none-PLATFORM where the wheel carries a library: it uses no Python headers, so any Python 3 loads it."""
        python, abi, system = super().get_tag()
        return ("py3", "none", system) if not self.root_is_pure else (python, abi, system)

    def run(self):
        self.run_command("build")
        built = Path(self.get_finalized_command("build").build_lib) / "fastgan" / "ops" / "lib"
        self.root_is_pure = not any(built.glob("*.so"))
        self.distribution.has_ext_modules = lambda: not self.root_is_pure
        self.skip_build = True
        super().run()


setup(cmdclass={"build_py": BuildPackages, "bdist_wheel": BuildWheel})
