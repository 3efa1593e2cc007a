"""A GPU machine as it is met: older torch and Triton, little else installed, the checkout on PYTHONPATH alone.

The environment is made once under the user's cache, from the package index, 4 GB: torch 2.11 (with Triton 3.6), numpy
and what the tests themselves import. A second folder adds what training needs, without DeepSpeed and DALI.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastgan
from fastgan.utils.system import cache_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(fastgan.__file__).resolve().parents[1]
BARE = ("torch==2.11.*", "numpy", "pytest", "pytest-timeout", "hypothesis", "expecttest")
TRAINING = ("pydantic", "pyyaml", "tyro", "tqdm", "safetensors", "scikit-learn", "pillow", "tensorboard")
OPS = """
import importlib.util, torch
import fastgan.ops
from fastgan.ops.dispatch import extension
from fastgan.ops.dispatch.backend import OPS
from fastgan.ops.qualification.beforehand import calls
from fastgan.ops.qualification.measurement import _oracles, _compare, in_thread
from fastgan.ops.qualification.cases import cases_of
for name in ("deepspeed", "nvidia.dali", "pydantic", "tyro", "yaml", "torchvision"):
    try:
        there = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        there = False
    assert not there, name
assert extension.cpu() is None, extension.cpu()
seen = set()
for dtype in (torch.float32, torch.bfloat16):
    for name, inputs, options in calls(torch.device("cpu"), dtype):
        op, key = OPS[name], (name, dtype, inputs[0].is_contiguous())
        if key in seen:
            continue
        seen.add(key)
        which = op.class_of(*inputs, **options)
        oracles = _oracles(which, cases_of(name, which, inputs, options))
        for form, it in op.implementations.items():
            if it.unsupported_reason(*inputs, **options) is None:
                found = _compare(op, which, oracles, form)
                assert found.wrong is None, (name, form, dtype, found.wrong)
                print(name, form, dtype)
print("compared", len(seen), torch.__version__)
"""
PRETENDED = """
import torch
torch.cuda.is_available = lambda: True
import fastgan.ops
from fastgan.ops.dispatch.backend import OPS
from fastgan.ops.dispatch.kernel_registry import kernel_implementations
kernels = ("pixel_norm", "bias_act", "bias_act_pixel_norm", "minibatch_stddev", "attention", "scaled_conv")
for op in kernels:
    assert kernel_implementations(op)["triton"].unsupported_reason() is None, op
print("found", len(kernels))
"""


def _pip(python: Path, *words: str) -> None:
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        pytest.skip(f"the package index is not reachable, or has no such release: {(errors or ['?'])[-1]}")


@pytest.fixture(scope="module")
def bare() -> Path:
    """Python of the bare environment."""
    folder = cache_folder("tests") / f"torch-2.11-python-{sys.version_info.major}.{sys.version_info.minor}"
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        _pip(python, *BARE)
        complete.touch()
    return python


@pytest.fixture(scope="module")
def packages(bare: Path) -> Path:
    """A folder with what training needs besides."""
    folder = bare.parents[1] / "training"
    if not (folder / "complete").exists():
        _pip(bare, "--target", str(folder), "--upgrade", *TRAINING)
        (folder / "complete").touch()
    return folder


def run(python: Path, *words: str, path: tuple[Path, ...] = (ROOT,), cwd: Path = ROOT, seconds: float = 3000) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHON", "VIRTUAL"))}
    environment = {**kept, "PYTHONPATH": os.pathsep.join(map(str, path)), "CUDA_VISIBLE_DEVICES": ""}
    environment["FASTGAN_BUILD"] = "force"
    done = subprocess.run(
        [str(python), *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def test_all_ops_to_second_order(bare: Path, tmp_path: Path) -> None:
    found = run(bare, "-c", OPS, cwd=tmp_path)
    assert "compared" in found and " 2.11." in found and "pixel_norm cpp" in found


def test_kernels_are_found_on_a_machine_that_seems_to_have_a_gpu(bare: Path, tmp_path: Path) -> None:
    assert "found 6" in run(bare, "-c", PRETENDED, cwd=tmp_path)


def test_quick_half_of_the_kernels_tests(bare: Path) -> None:
    """Interpreted, and compiled ahead of time by Triton 3.6."""
    found = run(bare, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu", "tests/kernels")
    assert " passed" in found and "skipped" not in found.splitlines()[-1]


def test_tiles_of_exact_attention_fit_under_triton_3_6(bare: Path) -> None:
    """On the architectures whose GPUs people have; tiles.json has others there than under Triton 3.8."""
    words = [word for it in ("sm_80", "sm_90", "sm_100", "sm_120") for word in ("--ahead-of-time", it)]
    found = run(bare, "-m", "fastgan.kernels.tune", *words, "--kind", "float32", "--size", "64", "--check")
    assert found.splitlines()[-1].startswith("48 of 48 entries fit, compiled with triton 3.6")


def test_training_without_deepspeed(bare: Path, packages: Path, tmp_path: Path) -> None:
    words = (
        "train --data digits --variant pggan --resolution 8 --fmap-base 32 --fmap-max 8 --latent 8 --batch 8 --kimg 0.4"
    )
    out = tmp_path / "run"
    run(bare, "-m", "fastgan", *words.split(), "--out", str(out), path=(ROOT, packages), cwd=tmp_path)
    assert (out / "metrics.jsonl").stat().st_size and list((out / "checkpoints").iterdir())
