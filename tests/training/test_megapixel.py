"""One full pggan step at 1024 px, at the paper's widths, in the memory of a workstation."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, resource, sys, time
import torch
from pathlib import Path
from fastgan import data
from fastgan.cli.train import parse
from fastgan.training.distributed import process_group as processes
from fastgan.training.trainer import Trainer

from PIL import Image

images = Path(sys.argv[1]) / "images"
images.mkdir()
for i in range(8):
    Image.effect_noise((1024, 1024), 64).convert("RGB").save(images / f"{i}.png", compress_level=1)
request = parse(["--variant", "pggan", "--preset", "paper", "--data", f"folder:{images}"])
source = data.open_source(f"folder:{images}", 1024, 3)
world = processes.ProcessGroup(0, 1, torch.device("cpu"), "torch", "test")
trainer = Trainer(request.config, "pggan", world, source, Path(sys.argv[1]))
trainer.images = 9_300_000  # in the middle of the last fade-in
began = time.monotonic()
trainer.train_step()
trainer.raise_if_nonfinite()
print(json.dumps({
    "resolution": trainer.stage.resolution,
    "batch": trainer.images - 9_300_000,
    "parameters": [sum(p.numel() for p in m.parameters()) for m in trainer.stage.modules[:2]],
    "seconds": time.monotonic() - began,
    "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
}))
"""


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_step_at_1024_px(tmp_path: object) -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=2900)
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    print(seen)
    assert seen["resolution"] == 1024 and seen["batch"] == 4
    assert all(round(n / 1e6, 1) == 23.1 for n in seen["parameters"])
    assert seen["gib"] < 24
