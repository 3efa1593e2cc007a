"""What a first start compiles, and the launches of a step, counted without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed (it is for Linux only)")

from benchmarks.ops import count_launches, count_specializations

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_random_numbers_are_a_launch_each() -> None:
    step = next(count_specializations.steps("wgan-gp"))
    step.run()  # what happens once
    before, after = (count_launches.count(step, kernels=kernels) for kernels in (False, True))
    assert before.draws == after.draws == after.noise == 3 < before.noise
    assert before.all - after.all == before.noise - after.noise


@pytest.mark.slow
def test_a_filled_cache_leaves_nothing_to_compile(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.ops.count_specializations", "wgan-gp", "--fill", str(tmp_path)]
    found = []
    for _ in range(2):
        done = subprocess.run(words, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True)
        found += [int(re.findall(rf"(\d+) {word}", done.stdout)[0]) for word in ("kernels", "compiled")]
    assert found[0] == found[1] == found[2] > 0 == found[3]
