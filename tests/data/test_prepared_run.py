"""`fastgan train --data SET`, with resolutions from the cache and from encoded files."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastgan import checkpoint
from fastgan.cli import train
from fastgan.data.prepared.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]
# 4 and 8 px lie decoded in the set; 16 px does not, and is not let into memory.
RUN = (
    "--variant pggan --fmap-base 32 --fmap-max 8 --latent 8 --batch 8 --kimg 0.5 --fade-kimg 0.1 --stable-kimg 0.1 "
    "--checkpoint-kimg 0.08 --keep 50 --samples 4 --mirror --resident-gb 0 --deterministic --threads 1"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, prepared_set: Callable[..., Manifest]) -> Path:
    path = tmp_path_factory.mktemp("prepared")
    images = np.random.default_rng(0).integers(0, 256, (21, 3, 16, 16), dtype=np.uint8)
    prepared_set(path, images, cache_to=8)
    return path


def command(*flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "fastgan" / "train.py"), *RUN, *flags]


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(folder: Path, tmp_path: Path) -> None:
    """Killed while the images come from the cache; later ones come from DALI."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    result = subprocess.run(command("--data", str(folder), "--out", str(whole)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "at 4 px by cache: memory-mapped (1.01 kB); prepared" in result.stdout
    assert "at 8 px by cache" in result.stdout and "at 16 px by dali" in result.stdout
    process = subprocess.Popen(command("--data", str(folder), "--out", str(run)), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(checkpoint.existing(run)) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stored = checkpoint.read(run, "run").meta
    assert stored["images"] < 400 and stored["data"]["position"] == stored["images"]
    result = subprocess.run(command("--resume", str(run)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "resuming at" in result.stdout and "at 16 px by dali" in result.stdout
    for name in ("generator.safetensors", "training.safetensors"):
        ours, theirs = (load_file(checkpoint.existing(one)[-1] / name) for one in (whole, run))
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), key
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert rows and all(0 < row["data_share"] < 1 for row in rows)


def test_a_set_limits_the_presets_resolution(folder: Path) -> None:
    for spec in (str(folder), f"prepared:{folder}"):
        assert train.parse(["--data", spec]).config.schedule.resolution == 16
    assert train.parse(["--data", str(folder), "--resolution", "8"]).config.schedule.resolution == 8
    assert train.parse(["--data", str(folder), "--preset", "digits"]).config.schedule.resolution == 16
    assert train.parse(["--data", "synthetic", "--preset", "digits"]).config.schedule.resolution == 32


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--pipeline", "cache", "--resident-gb", "0"], ["--pipeline 'cache': ", "--cache-to 16"]),
        (["--pipeline", "fast"], ["--pipeline"]),
        (["--resolution", "32"], ["--resolution", "prepared up to 16 px"]),
        (["--resident-gb", "-1"], ["--resident-gb", "at least 0"]),
        (["--workers", "-1"], ["--workers", "0"]),
    ],
)
def test_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: list[str]
) -> None:
    try:
        code = train.main(["--data", str(folder), "--out", str(tmp_path / "run"), *flags])
    except SystemExit as exit:  # what the parser of the command line refuses
        code = exit.code
    assert code == 2 and not (tmp_path / "run").exists()
    error = capsys.readouterr().err
    assert all(word in error for word in words)
