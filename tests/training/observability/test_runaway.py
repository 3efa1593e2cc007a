"""A run that goes wrong with finite numbers is told of; one that only learns fast is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastgan import checkpoint
from fastgan.cli import train
from fastgan.training.observability.runaway import Leap, RunawayDetector
from fastgan.training.trainer import Trainer

TINY = (
    "--variant dcgan --width 8 --max-width 8 --latent 4 --batch 8 --resolution 8 --kimg 0.16 --samples 1 "
    "--log-kimg 0.008 --checkpoint-kimg 0.008 --keep 1"
).split()


def feed(detector: RunawayDetector, values: list[float], first: int = 0) -> list[Leap | None]:
    rows = enumerate(values, first)
    return [detector.update(1000 * i, {"loss_d": value, "score_real": 0.1, "penalty": 1e9}) for i, value in rows]


def test_a_leap_that_stays_is_told_and_ends_the_run() -> None:
    """The case that was seen: 1.35, then 981."""
    leaps = feed(RunawayDetector(), [1.3, 1.4, 1.35, 1.35, 981, 900, 981, 1e4, 981])
    assert leaps[:4] == [None] * 4
    first, *later = leaps[4:]
    assert first == Leap("loss_d", 981, 1.35, 3000, 1)
    assert str(first) == "loss_d leaped to 981 after 3 kimg; before, it was about 1.35"
    assert [leap.stays for leap in (first, *later) if leap] == [False, False, False, False, True]


@pytest.mark.parametrize(
    "values", [[50, 981, 2e4, 4e5, 8e6, 1e8, 1e9], [130, *[981] * 6], [0.5, 5, 50, 500, *[5e4] * 5]]
)
def test_a_leap_on_a_way_of_several_rows_is_told(values: list[float]) -> None:
    """The rows on the way up do not become what is usual."""
    leaps = [leap for leap in feed(RunawayDetector(), [1.3, 1.4, 1.35, 1.35, 1.3, 1.4, *values]) if leap]
    assert leaps[0].usual < 2 and leaps[-1].stays


def test_a_leap_that_goes_back_is_over() -> None:
    detector = RunawayDetector()
    leaps = feed(detector, [1.0, 1.0, 1.0, -500, 1.2, 1.0])
    assert leaps[3] is not None and leaps[3].value == -500
    assert leaps[4] is not None and leaps[4].over and str(leaps[4]) == "loss_d is back at 1.2"
    assert leaps[5] is None
    assert feed(detector, [500], 6)[0] is not None


@pytest.mark.parametrize(
    "values",
    [
        [1e-6, 1e-4, 1e-2, 1.0, 50.0],  # a critic with clipped weights, which begins near zero
        [1.0 * 1.5**n for n in range(20)],  # growth, not a leap
        [90_000.0, 0.1, 0.1, 0.1, 99.0],  # the first rows of a run
    ],
)
def test_what_good_runs_do_is_no_leap(values: list[float]) -> None:
    assert feed(RunawayDetector(), values) == [None] * len(values)


def test_a_resumed_run_remembers() -> None:
    whole, before, after = RunawayDetector(), RunawayDetector(), RunawayDetector()
    values = [1.3, 1.4, 1.35, 981, 900, 981, 981, 981]
    expected = feed(whole, values)
    for cut in range(len(values)):
        before = RunawayDetector()
        feed(before, values[:cut])
        after.load(json.loads(json.dumps(before.state())))
        assert feed(after, values[cut:], cut) == expected[cut:]


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"recent": 3, "images": 0, "leap": None},
        {"recent": [{"loss_d": "many"}], "images": 0, "leap": None},
        {"recent": [{"loss_d": float("nan")}], "images": 0, "leap": None},
        {"recent": [], "images": 0, "leap": {"name": "x", "images": 0, "rows": 1}},
    ],
)
def test_a_state_that_was_edited_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"Error|float|finite|watched"):
        RunawayDetector().load(state)


def test_a_run_keeps_the_checkpoint_before_a_leap_and_ends_if_it_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, step = tmp_path / "run", Trainer.train_step

    def leaping(self: Trainer) -> None:
        step(self)
        if self.images > 48:
            self.meters._sums["loss_d"] = self.meters._sums["loss_d"] * 0 + 981

    monkeypatch.setattr(Trainer, "train_step", leaping)
    assert train.main([*TINY, "--out", str(run)]) == 1
    out, error = capsys.readouterr()
    kept = run / "checkpoints" / "kimg-000000.048"
    assert "warning: loss_d leaped to 981 after 0.048 kimg; before, it was about" in out
    assert f"{kept} is kept" in out
    (line,) = error.strip().splitlines()
    assert line.startswith("fastgan: step 11: loss_d leaped to 981") and "stays for 5 rows" in line
    assert f"{kept} is kept; --init-from it" in line
    found = checkpoint.existing(run)
    assert found[0] == kept and (kept / checkpoint.KEEP).read_text().startswith("loss_d leaped")
    assert len(found) == 2  # --keep 1, and the marked one
    monkeypatch.undo()
    again = [*TINY, "--init-from", str(kept), "--kimg", "0.016", "--out", str(tmp_path / "again")]
    assert train.main(again) == 0
