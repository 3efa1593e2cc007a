"""Runs that are killed at random moments, again and again, end bit-identical to those that were not."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastgan import checkpoint

ROOT = Path(__file__).resolve().parents[3]
KILLS = 10
SMALL = "--checkpoint-kimg 0.1 --samples 4 --log-kimg 0.05 --deterministic --threads 1 --batch 8 --keep 2"
TINY = "--width 8 --max-width 8 --latent 8 --resolution 16"
RUNS = {
    "pggan": "--fmap-base 32 --fmap-max 8 --latent 8 --resolution 16 --kimg 2.4 --grown-at 0.6 --augment ada",
    "sagan": f"{TINY} --kimg 0.8 --n-critic 2 --accumulation 2 --conditional",
    "wgan-gp": f"{TINY} --kimg 2 --compile on",
    "r3gan": f"{TINY} --kimg 0.8 --augment diffaugment",
    "lsgan": f"{TINY} --kimg 2 --precision fp16",
}


def command(*flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "fastgan" / "train.py"), *flags]


def final_state(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.existing(run)[-1]
    return load_file(newest / "generator.safetensors") | load_file(newest / "training.safetensors")


def rows(run: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without what they say of time."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if name not in ("images_per_second", "data_share")} for row in found]


@pytest.mark.slow
@pytest.mark.parametrize("variant", RUNS)
def test_killed_at_random_moments(tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # the program of --compile is made once
    flags = ["--variant", variant, *RUNS[variant].split(), *SMALL.split()]
    whole, run = tmp_path / "whole", tmp_path / "run"
    for folder in (tmp_path / "warm", whole):
        started = time.monotonic()
        result = subprocess.run(command(*flags, "--out", str(folder)), capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        seconds = time.monotonic() - started
    moments, kills = random.Random(variant), 0
    while kills < KILLS:
        process = subprocess.Popen(command(*flags, "--resume", "auto", "--out", str(run)), stdout=subprocess.DEVNULL)
        try:
            assert process.wait(moments.uniform(0.1, 0.9) * seconds) == 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        if run.is_dir():  # it came to its end before the last kill: from the start again
            assert_same(whole, run)
            run.rename(tmp_path / f"run-{len(list(tmp_path.iterdir()))}")
    resume = command(*flags, "--resume", "auto", "--out", str(run))
    result = subprocess.run(resume, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert_same(whole, run)


def assert_same(whole: Path, run: Path) -> None:
    expected, state = final_state(whole), final_state(run)
    assert expected.keys() == state.keys()
    for name in expected:
        assert torch.equal(expected[name], state[name]), name
    assert rows(run) == rows(whole)
