from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve1d
from torch import Tensor

from fastgan.evaluation.similarity import PairSimilarity, scales


def images(n: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(n, 1, size // 4, size // 4, generator=generator)
    smooth = torch.nn.functional.interpolate(small, size=(size, size), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().to(torch.uint8)


def blur(x: np.ndarray) -> np.ndarray:
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window /= window.sum()
    return convolve1d(convolve1d(x, window, axis=0, mode="mirror"), window, axis=1, mode="mirror")


def parts(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """SSIM over the whole image, and the contrast term where the window fits (Wang et al. 2003)."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ma, mb = blur(a), blur(b)
    va, vb = np.maximum(blur(a * a) - ma**2, 0), np.maximum(blur(b * b) - mb**2, 0)
    contrast = (2 * (blur(a * b) - ma * mb) + c2) / (va + vb + c2)
    whole = (2 * ma * mb + c1) / (ma**2 + mb**2 + c1) * contrast
    return whole.mean(), contrast[5:-5, 5:-5].mean()


def test_scales() -> None:
    assert [scales(r) for r in (8, 16, 32, 64, 128, 256, 1024)] == [0, 1, 2, 3, 4, 5, 5]
    assert [scales(r) for r in (10, 11, 21, 22, 175, 176)] == [0, 1, 1, 2, 4, 5]  # the window just fits


@pytest.mark.parametrize("size", [16, 32])
def test_against_a_direct_computation(size: int) -> None:
    pair = images(2, size)
    pair[1] = (0.6 * pair[0].float() + 0.4 * pair[1].float()).to(torch.uint8)
    a, b = (x[0].double().numpy() for x in pair)
    whole, contrast = parts(a, b)
    total = 0.0448 + 0.2856 + 0.3001 + 0.2363 + 0.1333
    direct = whole**total
    if size == 32:
        half_a, half_b = (x.reshape(16, 2, 16, 2).mean((1, 3)) for x in (a, b))
        beta = [v / (0.0448 + 0.2856) * total for v in (0.0448, 0.2856)]
        direct = contrast ** beta[0] * parts(half_a, half_b)[0] ** beta[1]
    similarity = PairSimilarity()
    similarity.update(pair)
    assert similarity.result() == pytest.approx(direct, abs=2e-4) and 0.2 < direct < 0.99


def test_equal_pairs_give_one_and_sets_merge() -> None:
    same = images(3, 32).repeat_interleave(2, dim=0)
    one = PairSimilarity()
    one.update(same)
    assert one.result() == pytest.approx(1, abs=1e-5)
    two = PairSimilarity()
    two.update(images(6, 32, seed=1))
    other = two.result()
    assert other < 0.7
    stored = PairSimilarity()
    stored.load_state(two.state())
    one.merge(stored)
    assert one.result() == pytest.approx((1 + other) / 2, abs=1e-5)


def test_too_small() -> None:
    with pytest.raises(ValueError, match="images must have at least 11 px, got 8"):
        PairSimilarity().update(images(2, 8))
