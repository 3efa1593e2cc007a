"""Commands as a user starts them: outside of the checkout, without the paths and settings of the tests."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import fastgan

REPOSITORY = Path(fastgan.__file__).resolve().parents[1]
PARTS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fastgan", "kernels", "csrc")
"""What the package is built from."""


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
