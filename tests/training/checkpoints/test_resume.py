"""Runs that are killed, stopped, resumed, refused: through the command, as a user has them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastgan import checkpoint
from fastgan.cli import train as program
from fastgan.training.distributed.process_group import ProcessGroup
from fastgan.training.resilience.signals import SignalHandler

ROOT = Path(__file__).resolve().parents[3]
PGGAN = (
    "--variant pggan --fmap-base 32 --fmap-max 8 --latent 8 --batch 8 --resolution 16 --kimg 1.2 --grown-at 0.6 "
    "--checkpoint-kimg 0.1 --keep 50 --samples 4 --deterministic --threads 1"
).split()
SAGAN = (
    "--variant sagan --width 8 --max-width 8 --latent 8 --batch 8 --resolution 16 --kimg 0.4 --checkpoint-kimg 0.1 "
    "--keep 50 --samples 4 --deterministic --threads 1 --n-critic 2 --accumulation 2"
).split()


def command(*flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "fastgan" / "train.py"), *flags]


def train(*flags: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*flags), capture_output=True, text=True, timeout=200, cwd=cwd)


def wait_for(run: Path, checkpoints: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while len(checkpoint.existing(run)) < checkpoints:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def final_state(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    newest = checkpoint.existing(run)[-1]
    return load_file(newest / "generator.safetensors"), load_file(newest / "training.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    result = train(*PGGAN, "--out", str(run))
    assert result.returncode == 0, result.stderr
    return run


def assert_same_end(a: Path, b: Path) -> None:
    for ours, theirs in zip(final_state(a), final_state(b), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name


def rows(run: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without what they say of time."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: row[name] for name in sorted(row) if name not in ("images_per_second", "data_share")} for row in found
    ]


# In the 4 px stage, in the fade to 8, in the 16 px stage.
@pytest.mark.parametrize("after", [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 6)), 10])
def test_killed_and_resumed_is_bit_identical(whole: Path, tmp_path: Path, after: int) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(command(*PGGAN, "--out", str(run)), stdout=subprocess.DEVNULL)
    wait_for(run, after, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not checkpoint.existing(run)[-1].name.endswith("1.200")
    result = train("--resume", str(run))
    assert result.returncode == 0, result.stderr
    assert "resuming at" in result.stdout
    assert_same_end(whole, run)
    # Also the row of the interval in which the checkpoint was written: it has the steps before the kill.
    assert rows(run) == rows(whole)


@pytest.mark.slow
def test_spectral_norm_labels_and_accumulation_resume(tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(*SAGAN, "--conditional", "--out", str(whole)).returncode == 0
    process = subprocess.Popen(command(*SAGAN, "--conditional", "--out", str(run)), stdout=subprocess.DEVNULL)
    wait_for(run, 2, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = train("--resume", "auto", "--out", str(run))
    assert result.returncode == 0, result.stderr
    assert_same_end(whole, run)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGHUP))]
)
def test_signal_saves_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    flags = [*PGGAN, "--kimg", "200", "--checkpoint-kimg", "0.1", "--out", str(run)]
    # Of tests that run under nohup it would inherit to ignore SIGHUP.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    process = subprocess.Popen(command(*flags), stdout=subprocess.PIPE, text=True)
    signal.signal(signal.SIGHUP, before)
    wait_for(run, 1, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert f"stopped by {number.name}" in output and f"--resume {run}" in output
    assert checkpoint.read(run, "run").meta["images"] > 100


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_stops_a_run_unless_nohup_has_it_ignored(ignored: bool) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with SignalHandler(ProcessGroup(0, 1, torch.device("cpu"), "torch", "alone"), 5) as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.should_stop() is not ignored
            assert signals.signal == (None if ignored else signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_launcher_starts_and_stops_a_run(tmp_path: Path) -> None:
    """`deepspeed` as a user types it: one process on a machine without a GPU, stopped by its own signal handling."""
    run = tmp_path / "run"
    launcher = Path(sys.executable).with_name("deepspeed")
    line = [str(launcher), str(ROOT / "fastgan" / "train.py"), *PGGAN, "--kimg", "200", "--checkpoint-kimg", "0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{launcher.parent}:{os.environ['PATH']}"}
    process = subprocess.Popen([*line, "--out", str(run)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=environment, start_new_session=True)  # fmt: skip
    wait_for(run, 1, process)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
    output, _ = process.communicate(timeout=60)
    assert "engine deepspeed" in output
    assert f"--resume {run}" in output, output
    assert checkpoint.read(run, "run").meta["images"] > 100


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert program.main(list(flags)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_resume_of_another_variant_or_setting_is_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, words in (
        (("--variant", "dcgan"), "--variant must be pggan"),
        (("--latent", "16"), "--latent"),
        (("--seed", "3"), "--seed"),
        (("--data", "synthetic", "--channels", "1"), "--data"),
    ):
        assert words in refused(capsys, "--resume", str(whole), *flags)


def test_older_checkpoint_of_a_run_is_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older = checkpoint.existing(whole)[2]
    assert "newer" in refused(capsys, "--resume", str(older))
    assert len(checkpoint.existing(whole)) > 3


def test_longer_run_that_would_move_the_growth_is_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--fade-kimg" in refused(capsys, "--resume", str(whole), "--kimg", "30")


@pytest.mark.slow
def test_longer_run_goes_on_from_a_finished_one(whole: Path, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(whole, run)
    flags = ("--kimg", "1.3", "--fade-kimg", "0.18", "--stable-kimg", "0.18")
    result = train("--resume", str(run), *flags)
    assert result.returncode == 0, result.stderr
    assert checkpoint.read(run, "run").meta["images"] == 1304
