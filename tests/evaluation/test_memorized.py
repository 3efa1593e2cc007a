"""The memorized share, the picture of nearest real neighbors, and evaluation against a part of the real images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan.data import open_source
from fastgan.evaluation.features import open_extractor
from fastgan.evaluation.measure import Evaluation
from fastgan.evaluation.neighbor_sheet import save_neighbors
from fastgan.evaluation.neighbors import memorized_share, nearest_real, own_distances


def test_neighbors_by_hand() -> None:
    real = torch.tensor([[0.0], [1.0], [5.0]])
    assert own_distances(real).tolist() == [1, 1, 4]
    distance, index = nearest_real(torch.tensor([[0.9], [7.0]]), real, 2)
    assert index.tolist() == [[1, 0], [2, 1]]
    torch.testing.assert_close(distance, torch.tensor([[0.1, 0.9], [2.0, 6.0]], dtype=torch.float64), rtol=0, atol=1e-6)
    # 0.9 is nearer to 1 than 0 is; 7 nearer to 5 than 1 is; 2.9 is farther from 1 than 0 is.
    assert memorized_share(torch.tensor([[0.9], [7.0], [2.9]]), real) == pytest.approx(2 / 3)


def test_share_of_copies_and_of_a_second_set() -> None:
    generator = torch.Generator().manual_seed(0)
    real, fresh = (torch.randn(1500, 16, generator=generator) for _ in range(2))
    copies = real[:1200] + 1e-3 * torch.randn(1200, 16, generator=generator)
    assert memorized_share(copies, real) == 1
    new = memorized_share(fresh, real)
    assert 0.2 < new < 0.6
    assert memorized_share(torch.cat([fresh[:600], copies[:600]]), real) == pytest.approx((new + 1) / 2, abs=0.04)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sheet(tmp_path: Path, channels: int) -> None:
    """Left the first images, right those nearest to a real one, each with its real neighbors and its ratio."""
    values = torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(-1, channels, 8, 8)
    real = torch.arange(20.0)[:, None] * 10
    generated = torch.full((20, 1), 1000.0)
    generated[13] = 50.1
    save_neighbors(generated, real, lambda i: 100 + values[i], lambda i: values[i], tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (8 * 64, 16 * (64 + 14))
        pixels = np.asarray(image.convert("RGBA"))
    first_row = pixels[10, 10 : 8 * 64 : 64, 0]
    if channels < 4:  # straight alpha: all colors are white
        assert first_row.tolist() == [100, 19, 18, 17, 113, 5, *first_row[6:]]
        assert set(first_row[6:].tolist()) == {4, 6}
    else:
        assert pixels[10, 10, 3] == 100 and pixels[10, 4 * 64 + 10, 3] == 113


def test_few_images(tmp_path: Path) -> None:
    values = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    rows = torch.tensor([[0.0], [1.0]])
    save_neighbors(rows, rows, lambda i: values[i], lambda i: values[i], tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (2 * 3 * 64, 2 * 78)


def test_a_part_of_the_real_images_is_always_the_same(tmp_path: Path) -> None:
    source, extractor = open_source("digits", 16), open_extractor("digits", 1)
    draw = lambda indices: torch.stack([torch.from_numpy(source.read(int(i), 16)) for i in indices])  # noqa: E731
    cache, sheet = tmp_path / "cache", tmp_path / "neighbors.png"
    few = Evaluation(["fid", "prdc"], extractor, 100, cache=cache, real=300, neighbors=sheet)
    found = few(draw, source, 16, lambda text: None)
    assert found is not None and found["images"] == {"generated": 100, "real": 300, "neighbors": 100}
    assert few(draw, source, 16, lambda text: None) == found  # from the cache
    assert sheet.is_file() and len(list(cache.iterdir())) == 1
    whole = Evaluation(["fid", "prdc"], extractor, 100, cache=cache)(draw, source, 16, lambda text: None)
    assert whole is not None and whole["images"]["real"] == 1797
    assert whole["metrics"]["memorized"] == 1  # each drawn image is one of the real ones
    assert found["metrics"]["memorized"] < 1
    assert whole["metrics"]["frechet_distance"] != found["metrics"]["frechet_distance"]


def test_a_sheet_that_cannot_be_written_costs_no_numbers(tmp_path: Path) -> None:
    source, extractor = open_source("digits", 8), open_extractor("digits", 1)
    draw = lambda indices: torch.stack([torch.from_numpy(source.read(int(i), 8)) for i in indices])  # noqa: E731
    warnings: list[str] = []
    evaluation = Evaluation(["prdc"], extractor, 20, real=40, neighbors=tmp_path / "missing" / "a.png")
    assert evaluation(draw, source, 8, warnings.append) is not None
    assert "missing/a.png cannot be written (No such file or directory)" in warnings[0]
