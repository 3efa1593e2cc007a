"""Commands as a user starts them: outside of the checkout, without the paths and settings of the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import fastgan

REPOSITORY = Path(fastgan.__file__).resolve().parents[1]
PARTS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "hubconf.py", "fastgan", "kernels", "csrc")
"""What the package is built from, and torch.hub's door."""


def copy_checkout(folder: Path) -> Path:
    """Copy what a clone has of the package, nothing that git ignores; returns `folder`."""
    for part in PARTS:
        source = REPOSITORY / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(source, folder)
    return folder


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    """What a command prints to stdout, started in `folder`; it must succeed."""
    own = ("PYTHONPATH", "FASTGAN_BUILD", "XDG_CACHE_HOME")
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**inherited, "FASTGAN_QUALIFY": "0", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout
