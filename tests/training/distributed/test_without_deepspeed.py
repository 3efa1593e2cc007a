"""torchrun where DeepSpeed cannot be imported: the ranks train with plain torch and say why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastgan import checkpoint
from fastgan.cli import train

FLAGS = (
    "--variant pggan --fmap-base 32 --fmap-max 8 --latent 8 --resolution 8 --batch 8 --fade-kimg 0.016 "
    "--stable-kimg 0.016 --kimg 0.064 --samples 4 --threads 1 --device cpu"
).split()


def _torchrun(run: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line += [*FLAGS, "--out", str(run), *flags]
    return subprocess.run(line, capture_output=True, text=True, timeout=200, env=environment)


@pytest.mark.parametrize("flags", [[], pytest.param(["--engine", "torch"], marks=pytest.mark.slow)])
def test_torchrun_trains_with_plain_torch(tmp_path: Path, flags: list[str]) -> None:
    done = _torchrun(tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    reason = "--engine" if flags else "deepspeed is not installed (pip install 'fastgan[train]')"
    assert f"engine torch ({reason}), 2 x cpu" in done.stdout, done.stdout
    saved = checkpoint.read(tmp_path / "run", "--resume")
    assert saved.meta["images"] == 64 and saved.meta["world_size"] == 2


@pytest.mark.slow
def test_zero_needs_deepspeed(tmp_path: Path) -> None:
    done = _torchrun(tmp_path / "run", "--zero", "1")
    assert (
        done.returncode != 0
        and "--engine 'auto': --zero needs DeepSpeed, and deepspeed is not installed" in done.stderr
    )


if __name__ == "__main__":
    sys.modules["deepspeed"] = None  # type: ignore[assignment]
    sys.exit(train.main(sys.argv[1:]))
