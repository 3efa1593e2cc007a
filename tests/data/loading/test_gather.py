"""Rows by index and bytes to floats: C++ and NumPy give what NumPy's own indexing and torch's own arithmetic give."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgan.data.loading import gather
from fastgan.data.loading.gather import Rows, finish


@pytest.fixture(params=["c++", "numpy"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(gather.extension, "cpu", lambda: "switched off")
    elif (reason := gather.extension.cpu()) is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def image_rows(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)


# The smallest there is, a row of 255, 256 and 257 bytes, several pieces, and a part of one.
SHAPES = [(1, 1, 1), (1, 4, 4), (3, 5, 17), (1, 16, 16), (1, 1, 257), (3, 16, 16), (2, 19, 27)]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("place", ["memory", "mapped"])
def test_rows_are_those_of_numpy(way: str, tmp_path: Path, shape: tuple[int, ...], place: str) -> None:
    """Any number of rows, above and below the four that are copied together, some of them twice."""
    whole = image_rows(13, *shape)
    arrays = [whole[:5], whole[5:5], whole[5:12], whole[12:]]
    if place == "mapped":
        for i, array in enumerate(arrays):
            np.save(tmp_path / f"{i}.npy", array)
        # An empty file cannot be mapped; there is none in a prepared set either.
        arrays = [np.load(tmp_path / f"{i}.npy", mmap_mode="r" if len(arrays[i]) else None) for i in range(4)]
    for rows, n in itertools.product((Rows(arrays), Rows([whole])), (0, 1, 3, 4, 5, 8, 23)):
        indices = np.random.default_rng(n).integers(0, 13, n)
        assert rows.bytes == whole.nbytes
        taken = rows.take(indices)
        assert taken.dtype == torch.uint8 and taken.is_contiguous()
        np.testing.assert_array_equal(taken, whole[indices])
        taken.zero_()  # the batch is its own memory
    np.testing.assert_array_equal(whole, image_rows(13, *shape))


def test_rows_that_are_not_in_one_piece(way: str, tmp_path: Path) -> None:
    whole = image_rows(6, 3, 4, 5)
    np.save(tmp_path / "other.npy", np.asfortranarray(whole))
    mapped = np.load(tmp_path / "other.npy", mmap_mode="r")
    assert not mapped.flags.c_contiguous
    for arrays in ([mapped], [mapped, whole], [whole[::-1], whole[:, :, :, ::2][:0].reshape(0, 3, 4, 5)]):
        indices = np.array([5, 0, 3, 3])
        np.testing.assert_array_equal(Rows(arrays).take(indices), np.concatenate(arrays)[indices])


@pytest.mark.parametrize("index", [13, -14, 2**40])
def test_rows_beyond_the_last_are_refused(way: str, index: int) -> None:
    whole = image_rows(13, 3, 4, 4)
    for rows in (Rows([whole[:5], whole[5:]]), Rows([whole])):
        with pytest.raises((IndexError, RuntimeError)):
            rows.take(np.array([0, index, 1]))


def test_c_looks_at_what_it_is_given() -> None:
    """An address is read without a look, so all else is looked at."""
    if (reason := gather.extension.cpu()) is not None:
        pytest.skip(reason)
    one, two = torch.zeros(1, dtype=torch.int64), torch.tensor([0, 3])
    for arguments, words in {
        (one, one, one, 4): "starts",
        (one, two, one - 1, 4): "indices must be 0 to 2, got -1",
        (one, two, one, 0): "bytes must be at least 1, got 0",
        (one, two, one.int(), 4): "Int",
    }.items():
        with pytest.raises(RuntimeError, match=words):
            torch.ops.fastgan.gather_rows(*arguments)
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    for arguments, words in {
        (images, torch.zeros(3, dtype=torch.int64)): "flips",
        (images.float(), None): "Float",
        (images[..., ::2], None): "dense",
        (images[0], None): "3 dimensions",
    }.items():
        with pytest.raises(RuntimeError, match=words):
            torch.ops.fastgan.finish_images(*arguments)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    "shape", [(1, 1, 4, 4), (5, 3, 8, 8), (4, 1, 16, 16), (3, 2, 5, 33), (7, 3, 32, 32), (2, 4, 3, 2)]
)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mirror", ["no", "none", "all", "some"])
def test_finish_is_what_torch_computes(
    way: str, shape: tuple[int, ...], order: torch.memory_format, mirror: str
) -> None:
    images = torch.from_numpy(image_rows(*shape)).contiguous(memory_format=order)
    before = images.clone()
    flips = {"no": None, "none": np.zeros(shape[0]), "all": np.ones(shape[0]), "some": np.arange(shape[0]) % 2}[mirror]
    flips = None if flips is None else flips.astype(np.int64)
    finished = finish(images, flips)
    expected = images.float().div_(127.5).sub_(1)
    if flips is not None:
        expected = torch.where(torch.from_numpy(flips).bool()[:, None, None, None], expected.flip(3), expected)
    assert finished.dtype == torch.float32 and finished.stride() == images.stride()
    torch.testing.assert_close(finished, expected, rtol=0, atol=0)
    assert torch.equal(images, before)


def test_every_byte(way: str) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    torch.testing.assert_close(finish(values, None), values.float().div_(127.5).sub_(1), rtol=0, atol=0)
