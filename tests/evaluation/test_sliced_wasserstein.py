from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from fastgan.evaluation.sliced_wasserstein import (
    Patches,
    bytes_of_patches,
    laplacian_pyramid,
    patch_distances,
    sliced_wasserstein,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_equal_sets_in_any_order() -> None:
    x = random(50, 3, 4, 4)
    assert sliced_wasserstein(x, x) == 0.0
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert sliced_wasserstein(x, x[order]) == pytest.approx(0.0, abs=1e-6)


def test_one_dimension_is_the_wasserstein_distance() -> None:
    a, b = torch.tensor([[0.0], [10.0], [3.0]]), torch.tensor([[4.0], [1.0], [12.0]])
    assert sliced_wasserstein(a, b) == pytest.approx((1 + 1 + 2) / 3)


@pytest.mark.parametrize("dimension", [2, 12])
def test_a_shift(dimension: int) -> None:
    """The mean over directions u of |u . v| is |v| gamma(d/2) / (sqrt(pi) gamma((d+1)/2))."""
    x = random(30, dimension)
    shift = random(dimension, seed=1)
    expected = shift.norm().item() * math.gamma(dimension / 2) / (math.sqrt(math.pi) * math.gamma((dimension + 1) / 2))
    distance = sliced_wasserstein(x, x + shift, projections=20_000)
    assert distance == pytest.approx(expected, rel=0.03)
    assert sliced_wasserstein(x, x + 3 * shift) == pytest.approx(3 * sliced_wasserstein(x, x + shift), rel=1e-4)


def test_symmetric_and_reproducible() -> None:
    a, b = random(40, 6), random(40, 6, seed=1) * 2
    assert sliced_wasserstein(a, b) == sliced_wasserstein(b, a) == sliced_wasserstein(a, b) > 0.1
    assert sliced_wasserstein(a, b, seed=1) != sliced_wasserstein(a, b, seed=2)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    sliced_wasserstein(a, b)
    assert torch.equal(torch.get_rng_state(), state)


def test_distance_grows_with_the_difference() -> None:
    a = random(200, 8)
    distances = [sliced_wasserstein(a, random(200, 8, seed=1) * scale) for scale in (1.0, 2.0, 4.0)]
    assert distances == sorted(distances) and distances[0] < 0.3 * distances[2]


def test_images_are_flattened_and_every_dtype_works() -> None:
    a, b = random(10, 3, 2, 2), random(10, 3, 2, 2, seed=1)
    assert sliced_wasserstein(a, b) == sliced_wasserstein(a.flatten(1), b.flatten(1))
    assert sliced_wasserstein(a.double(), b.double()) == pytest.approx(sliced_wasserstein(a, b), rel=1e-6)


def test_shapes_must_be_equal() -> None:
    with pytest.raises(ValueError, match=r"b must have shape \(4, 2\), as a has, got \(3, 2\)"):
        sliced_wasserstein(torch.zeros(4, 2), torch.zeros(3, 2))


def pyramid_of_scipy(image: np.ndarray) -> list[np.ndarray]:
    """One channel, by two-dimensional convolutions."""
    kernel = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    levels = []
    while image.shape[0] >= 32:
        half = ndimage.convolve(image, kernel, mode="mirror")[::2, ::2]
        spread = np.zeros_like(image)
        spread[::2, ::2] = half
        levels.append(image - ndimage.convolve(spread, 4 * kernel, mode="mirror"))
        image = half
    return [*levels, image]


def test_pyramid_against_scipy() -> None:
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    levels = laplacian_pyramid(images)
    assert [tuple(level.shape) for level in levels] == [(2, 3, 64, 64), (2, 3, 32, 32), (2, 3, 16, 16)]
    for image in range(2):
        for channel in range(3):
            direct = pyramid_of_scipy(images[image, channel].double().numpy())
            for level, expected in zip(levels, direct, strict=True):
                assert np.allclose(level[image, channel].numpy(), expected, atol=1e-3)


@pytest.mark.parametrize(("size", "levels"), [(8, 1), (16, 1), (32, 2), (128, 4)])
def test_levels_and_their_memory(size: int, levels: int) -> None:
    patches = Patches(0, "real", limit=2)
    patches.update(torch.arange(3), torch.zeros(3, 1, size, size, dtype=torch.uint8))
    cut = patches.levels()
    assert [tuple(level.shape) for level in cut] == [(2, 128, 1, 7, 7)] * levels  # image 2 is past the limit
    assert sum(level.numel() * 4 for level in cut) == 2 * bytes_of_patches(size, 1)


def test_patches_cover_the_image_and_depend_on_its_index() -> None:
    """With images whose pixel values are positions."""
    ramp = (torch.arange(16)[:, None] * 16 + torch.arange(16)).to(torch.uint8)
    images = ramp.expand(40, 1, 16, 16).clone()
    patches = Patches(3, "real", limit=100)
    patches.update(torch.arange(40), images)
    corner = patches.levels()[0][:, :, 0, 0, 0].long()
    assert corner.unique().tolist() == [16 * y + x for y in range(10) for x in range(10)]
    offset = torch.arange(7)[:, None] * 16 + torch.arange(7)
    assert torch.equal(patches.levels()[0][:, :, 0].long(), corner[:, :, None, None] + offset)
    counts = torch.bincount(corner.flatten(), minlength=160)[corner.unique()]
    assert counts.min() > 20 and counts.max() < 100  # 51 expected of each
    # Another batching, in another order, stored and merged: the same patches.
    later, first = Patches(3, "real", limit=100), Patches(3, "real", limit=100)
    later.update(torch.arange(25, 40), images[25:])
    for part in torch.arange(25).split(10):
        first.update(part, images[part])
    stored = Patches(3, "real", limit=100)
    stored.load_state(first.state())
    later.merge(stored)
    assert torch.equal(later.levels()[0], patches.levels()[0])


def test_positions_differ_between_seeds_streams_levels_and_images() -> None:
    """Equal positions in two sets would make their images look more alike."""

    def left(seed: int, stream: str, size: int) -> torch.Tensor:
        """Left edges of the patches of two images, float32 [2, 128]."""
        ramp = torch.arange(float(size)).expand(2, 1, size, size)
        return Patches(seed, stream, limit=2)._cut(ramp, torch.arange(2))[:, :, 0, 0, 0]

    one = left(0, "real", 16)
    assert torch.equal(one, left(0, "real", 16))
    others = [one[1], left(1, "real", 16)[0], left(0, "generated", 16)[0], left(0, "real", 32)[0]]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([one[0], other]))[0, 1]) < 0.4


def test_patches_of_one_color_have_distance_zero() -> None:
    flat, other = torch.full((2, 128, 1, 7, 7), 9.0), torch.full((2, 128, 1, 7, 7), 200.0)
    assert patch_distances([flat], [other]) == {0: 0.0}


def direct_distance(a: np.ndarray, b: np.ndarray, directions: np.ndarray) -> float:
    def vectors(x: np.ndarray) -> np.ndarray:
        x = x.reshape(-1, *x.shape[2:])
        x = (x - x.mean((0, 2, 3), keepdims=True)) / x.std((0, 2, 3), keepdims=True)
        return x.reshape(len(x), -1)

    one, two = vectors(a), vectors(b)
    return float(np.mean([stats.wasserstein_distance(one @ u, two @ u) for u in directions.T]))


@pytest.mark.parametrize("seed", [0, 1])
def test_distance_of_patches_against_scipy(seed: int) -> None:
    """Different seeds use different directions."""
    a, b = random(3, 128, 2, 7, 7) * 5 + 1, random(3, 128, 2, 7, 7, seed=1) ** 3 - 2
    directions = []
    for repeat in range(4):
        u = torch.randn(98, 128, generator=torch.Generator().manual_seed(4 * seed + repeat))
        directions.append((u / u.norm(dim=0)).numpy())
    direct = direct_distance(a.double().numpy(), b.double().numpy(), np.concatenate(directions, axis=1))
    assert patch_distances([a, a], [b, a], seed) == pytest.approx({0: direct, 1: 0.0}, rel=1e-5, abs=1e-9)
    assert direct > 0.01
