"""`fastgan.kernels` is found, however fastgan is made importable; on a machine that seems to have a GPU and triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from installs import copy_checkout

CHECK = """
import importlib.util, sys, types, torch
torch.cuda.is_available = lambda: True
if importlib.util.find_spec("triton") is None:
    sys.modules["triton"] = types.ModuleType("triton")
    sys.modules["triton"].__spec__ = importlib.util.spec_from_loader("triton", None)
import fastgan
from fastgan.ops.dispatch import backend, kernel_registry
for op in ("pixel_norm", "bias_act", "bias_act_pixel_norm", "minibatch_stddev", "attention", "scaled_conv"):
    reason = kernel_registry.kernel_implementations(op)["triton"].unsupported_reason()
    assert reason is None, (op, reason)
assert backend.OPS["pixel_norm"].implementations["triton"].unsupported_reason() is None
assert kernel_registry.kernel_implementations("nothing")["triton"].unsupported_reason() is not None
found = importlib.util.find_spec("fastgan.kernels.pixel_norm")
assert found is not None and found.origin is not None
print(fastgan.__file__, found.origin)
"""

# An editable install is a .pth file, which Python reads in site folders, not on PYTHONPATH. The environment of the
# tests may have one of its own, which would come first.
ADD_EDITABLE = """
import site, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
sys.path.insert(0, {target!r})  # its finder may have the name of the other one
site.addsitedir({target!r})
"""


def run(folder: Path, *command: str, **environment: str) -> str:
    """What Python prints, started in `folder` without the paths of this process."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env={**inherited, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def require_files_of(root: Path, output: str, kernels: Path | None = None) -> None:
    package, kernel = map(Path, output.split()[-2:])
    assert package.resolve() == (root / "fastgan" / "__init__.py").resolve()
    assert kernel.resolve() == ((kernels or root / "kernels") / "pixel_norm.py").resolve()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a checkout has of the package."""
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """An empty folder to start Python in."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def test_checkout_on_pythonpath(checkout: Path, elsewhere: Path) -> None:
    require_files_of(checkout, run(elsewhere, "-c", CHECK, PYTHONPATH=str(checkout)))


def test_torch_hub(checkout: Path, elsewhere: Path) -> None:
    """torch.hub puts the folder with hubconf.py on sys.path while it calls an entry point."""
    hubconf = checkout / "hubconf.py"
    before = hubconf.read_text()
    hubconf.write_text(f"dependencies = ['torch']\ndef check():\n    exec({CHECK!r}, {{}})\n")
    try:
        code = f"import torch; torch.hub.load({str(checkout)!r}, 'check', source='local')"
        require_files_of(checkout, run(elsewhere, "-c", code))
    finally:
        hubconf.write_text(before)


def test_script(checkout: Path, elsewhere: Path) -> None:
    """`python fastgan/train.py`, whose own folder is the first on sys.path."""
    train = checkout / "fastgan" / "cli" / "train.py"
    before = train.read_text()
    train.write_text(f"def main(arguments):\n    exec({CHECK!r}, {{}})\n")
    try:
        require_files_of(checkout, run(elsewhere, str(checkout / "fastgan" / "train.py")))
    finally:
        train.write_text(before)


def install(checkout: Path, target: Path, *options: str) -> None:
    base = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    run(target.parent, *base, *options, FASTGAN_BUILD="0")


def test_editable_install(checkout: Path, tmp_path: Path, elsewhere: Path) -> None:
    target = tmp_path / "target"
    install(checkout, target, "--no-build-isolation", "--editable", str(checkout))
    require_files_of(checkout, run(elsewhere, "-c", f"{ADD_EDITABLE.format(target=str(target))}\n{CHECK}"))


def test_wheel(checkout: Path, tmp_path: Path, elsewhere: Path) -> None:
    wheels, target = tmp_path / "wheels", tmp_path / "target"
    wheels.mkdir()
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(wheels), "."]
    run(checkout, *command, FASTGAN_BUILD="0")
    install(checkout, target, *map(str, wheels.glob("*.whl")))
    output = run(elsewhere, "-c", CHECK, PYTHONPATH=str(target))
    require_files_of(target, output, target / "fastgan" / "kernels")
