from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stubs import Stub, draw
from torch import Tensor

from fastgan.evaluation import collect, ranks
from fastgan.evaluation.collect import (
    FeatureRows,
    ImageStatistics,
    collect_statistics,
    read_tensors,
    remove_partial,
    write_tensors,
)


def empty(*metrics: str) -> ImageStatistics:
    return ImageStatistics(set(metrics), Stub(), generated=True, channels=1, swd_images=8, seed=0)


def collected(images: Callable[[Tensor], Tensor] = draw, total: int = 10, **changes: Any) -> ImageStatistics | None:
    """Images in batches of 4."""
    settings: dict[str, Any] = {"batch": 4, "partial": None, "progress": lambda count: None, **changes}
    return collect_statistics(lambda: empty("fid", "is"), images, total, **settings)


@pytest.fixture
def every_batch_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that advances so fast that writing never takes a twentieth of the time."""
    monkeypatch.setattr(collect.time, "monotonic", (100.0**i for i in itertools.count()).__next__)


@pytest.fixture
def rank_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes this process one rank of several; the first gets its own statistics only."""

    def be(rank: int, size: int) -> None:
        monkeypatch.setattr(ranks, "rank_and_size", lambda: (rank, size))
        monkeypatch.setattr(ranks, "gather", lambda value: [value] if rank == 0 else None)

    return be


def test_two_processes_write_one_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, tensors = os.replace, {"a": torch.ones(2)}

    def concurrently(one: Path, other: Path) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(os, "getpid", lambda: 1)
        write_tensors(tensors, tmp_path / "cache")
        replace(one, other)

    monkeypatch.setattr(os, "replace", concurrently)
    write_tensors(tensors, tmp_path / "cache")
    assert read_tensors(tmp_path / "cache") is not None
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


def test_a_file_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    write_tensors({"a": torch.arange(6).view(2, 3).T}, tmp_path / "whole")
    whole = read_tensors(tmp_path / "whole")
    assert whole is not None and torch.equal(whole["a"], torch.arange(6).view(2, 3).T)
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-1])
    (tmp_path / "empty").touch()
    for name in ("cut", "empty", "missing", "."):
        assert read_tensors(tmp_path / name) is None


def test_rows_are_of_the_first_images_in_order() -> None:
    one, other = FeatureRows(5), FeatureRows(5)
    one.update(torch.tensor([4, 5, 0]), torch.tensor([[4.0], [5.0], [0.0]]))
    other.update(torch.tensor([3, 6, 1, 2]), torch.tensor([[3.0], [6.0], [1.0], [2.0]]))
    one.merge(other)
    assert one.rows().flatten().tolist() == [0, 1, 2, 3, 4]


def test_kid_and_prdc_store_rows() -> None:
    assert empty("kid").rows is not None and empty("prdc").rows is not None and empty("fid").rows is None


def test_ranks_without_images_add_nothing() -> None:
    """With fewer batches than ranks: the number of classes is known only after an image."""
    for first in (True, False):
        one, other, whole = (empty("fid", "is", "kid", "swd") for _ in range(3))
        for kept in (one if first else other, whole):
            kept.update(torch.arange(4), draw(torch.arange(4)))
        one.merge(other)
        assert one.count == 4
        a, b = one.state(), whole.state()
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.usefixtures("every_batch_is_stored")
def test_progress_counts_each_image_once(tmp_path: Path, rank_of: Callable[[int, int], None]) -> None:
    counts: list[int] = []

    def failing(indices: Tensor) -> Tensor:
        if len(counts) == 3:
            raise KeyboardInterrupt
        return draw(indices)

    with pytest.raises(KeyboardInterrupt):
        collected(failing, partial=tmp_path / "p", progress=counts.append)
    assert counts == [0, 4, 4]
    counts.clear()
    assert collected(partial=tmp_path / "p", progress=counts.append) is not None
    assert counts == [8, 2]
    counts.clear()
    assert collected(partial=tmp_path / "p", progress=counts.append) is not None  # the metrics were interrupted
    assert counts == [10]
    counts.clear()
    rank_of(0, 2)
    collected(progress=counts.append)
    assert counts == [0, 8, 2]


@pytest.mark.usefixtures("every_batch_is_stored")
def test_a_rank_does_not_resume_from_files_of_other_ranks(tmp_path: Path, rank_of: Callable[[int, int], None]) -> None:
    """With two ranks each has every other batch; a run on one rank needs them all."""
    for rank, images in ((0, 6), (1, 4)):
        rank_of(rank, 2)
        drawn: list[int] = []

        def counting(indices: Tensor, drawn: list[int] = drawn) -> Tensor:
            drawn.extend(indices.tolist())
            return draw(indices)

        collected(counting, partial=tmp_path / "p")
        assert len(drawn) == images
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.rank0of2", "p.rank1of2"]
    remove_partial(tmp_path / "p")
    remove_partial(tmp_path / "p")  # and where there is nothing
    assert [file.name for file in tmp_path.iterdir()] == ["p.rank0of2"]
    rank_of(0, 1)
    whole = collected(partial=tmp_path / "p")
    assert whole is not None and whole.count == 10


@pytest.mark.usefixtures("every_batch_is_stored")
def test_a_full_disk_does_not_end_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    kept, plain = collected(partial=tmp_path / "p"), collected()
    assert kept is not None and plain is not None and kept.count == 10
    assert all(torch.equal(tensor, plain.state()[key]) for key, tensor in kept.state().items())
    assert not list(tmp_path.iterdir())  # nothing half-written either
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/w'"):
        write_tensors({"a": torch.ones(1)}, tmp_path / "w")
