"""`--keep-best`: which checkpoint is kept, that it is whole, and that nothing else of a run changes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgan import checkpoint, load
from fastgan.cli.main import main
from fastgan.training.best import BestCheckpoint

FLAGS = (
    "--variant wgan-gp --data digits --resolution 8 --width 8 --latent 8 --batch 16 --kimg 0.64 --samples 4 "
    "--threads 1 --checkpoint-kimg 0.3 --evaluate-kimg 0.16 --evaluate-n 64 --keep 1 --deterministic"
)


def record(resolution: int, distance: float, kimg: float = 1.0) -> dict[str, Any]:
    measure = {"features": "digits", "feature_weights": "w", "fingerprint": "f", "images": {"real": 5}}
    return {"resolution": resolution, "metrics": {"frechet_distance": distance}, "kimg": kimg, **measure}


def save(run: Path, images: int) -> Path:
    tensors = {"w": torch.full((3,), float(images))}
    return checkpoint.save(run, {"images": images}, tensors, {"random": tensors}, keep=1)


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    return SimpleNamespace(run_path=tmp_path, world=SimpleNamespace(main=True, broadcast=lambda value: value))


def test_which_evaluation_is_the_best(trainer: Any) -> None:
    best = BestCheckpoint(True)
    kept = []
    for i, (resolution, distance) in enumerate([(8, 9.0), (8, 10.0), (8, 8.5), (16, 50.0), (16, 60.0), (16, 49.9)], 1):
        best.consider(trainer, record(resolution, distance))
        kept.append(best.is_due)
        best.keep(trainer, save(trainer.run_path, 1000 * i))
        assert not best.is_due
    assert kept == [True, False, True, True, False, True]
    stored = checkpoint.read(trainer.run_path / "checkpoints" / "best", "RUN")
    assert stored.meta["images"] == 6000 and stored.generator()["w"][0] == 6000
    assert [path.name for path in checkpoint.existing(trainer.run_path)] == ["kimg-000006.000"]


def test_a_resumed_run_goes_on_comparing(trainer: Any) -> None:
    first, second = BestCheckpoint(True), BestCheckpoint(True)
    first.consider(trainer, record(8, 5.0))
    first.keep(trainer, save(trainer.run_path, 1000))
    second.consider(trainer, record(8, 6.0))
    assert not second.is_due
    second.consider(trainer, {**record(8, 6.0), "features": "inception-v3-compat"})
    assert second.is_due  # distances of other features compare with nothing


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"frechet_distance": "3", "resolution": 8}', b"[" * 10**5])
def test_a_damaged_record_is_replaced(trainer: Any, content: bytes) -> None:
    best = BestCheckpoint(True)
    best.consider(trainer, record(8, 5.0))
    best.keep(trainer, save(trainer.run_path, 1000))
    (trainer.run_path / "checkpoints" / "best" / "best.json").write_bytes(content)
    best.consider(trainer, record(8, 6.0))
    assert best.is_due


def test_a_distance_that_is_no_number_is_never_the_best(trainer: Any) -> None:
    best = BestCheckpoint(True)
    best.consider(trainer, record(8, math.nan))
    assert not best.is_due
    best.consider(trainer, record(8, 5.0))
    assert best.is_due
    best.keep(trainer, save(trainer.run_path, 1000))
    stored = trainer.run_path / "checkpoints" / "best" / "best.json"
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {"frechet_distance": math.nan}))
    best.consider(trainer, record(8, 6.0))
    assert best.is_due


def test_the_mark_of_a_checkpoint_is_not_copied(tmp_path: Path) -> None:
    path = save(tmp_path, 1000)
    assert checkpoint.mark(tmp_path, 1000, "a leap") == path
    assert not (checkpoint.keep_best(tmp_path, path) / checkpoint.KEEP).exists()


def test_not_enabled(trainer: Any) -> None:
    best = BestCheckpoint(False)
    best.consider(trainer, record(8, 5.0))
    assert not best.is_due


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_failed_replacement_keeps_the_best_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    checkpoint.keep_best(tmp_path, save(tmp_path, 1000))
    newer = save(tmp_path, 2000)
    renames = [0]
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        renames[0] += 1
        if renames[0] == fails_at:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="No space"):
            checkpoint.keep_best(tmp_path, newer)
    assert checkpoint.read(tmp_path / "checkpoints" / "best", "RUN").meta["images"] == 1000
    assert checkpoint.keep_best(tmp_path, newer).name == "best"
    assert checkpoint.read(tmp_path / "checkpoints" / "best", "RUN").meta["images"] == 2000
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best", "kimg-000002.000"]


def test_without_hard_links_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    best = checkpoint.keep_best(tmp_path, save(tmp_path, 1000))
    save(tmp_path, 2000)  # deletes the checkpoint it was copied from
    assert checkpoint.read(best, "RUN").generator()["w"][0] == 1000


def test_a_run_keeps_its_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distances = iter([9.0, 3.0, 4.0, 5.0] * 2)

    class Scripted:
        @classmethod
        def of(cls, *args: object) -> Scripted:
            return cls()

        def __call__(self, generator: object, meta: dict[str, Any]) -> dict[str, Any]:
            return record(8, next(distances), meta["images"] / 1000)

    monkeypatch.setattr("fastgan.training.trainer.Evaluator", Scripted)
    for name, flag in (("plain", "--no-keep-best"), ("best", "--keep-best")):
        assert main(["train", *FLAGS.split(), flag, "--out", str(tmp_path / name)]) == 0
    run = tmp_path / "best"
    lines = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    best = run / "checkpoints" / "best"
    assert checkpoint.read(best, "RUN").meta["images"] == 1000 * lines[1]["kimg"] < 1000 * lines[-1]["kimg"]
    assert load(best).sample(1).shape == (1, 1, 8, 8)
    assert not (tmp_path / "plain" / "checkpoints" / "best").exists()
    ends = [checkpoint.existing(tmp_path / name) for name in ("plain", "best")]
    assert [len(one) for one in ends] == [1, 1]
    one, two = (checkpoint.read(path, "RUN").generator() for (path,) in ends)
    assert all(torch.equal(one[key], two[key]) for key in one)
