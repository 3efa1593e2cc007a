from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from fastgan.evaluation.frechet import Moments, frechet_distance


def features(n: int, d: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing * scale + seed


def moments(x: Tensor, batch: int) -> Moments:
    result = Moments(x.shape[1])
    for part in x.split(batch):
        result.update(part)
    return result


def test_moments_equal_numpy_for_every_batch_size() -> None:
    x = features(203, 7, 0) + 1e6  # far from zero, where a sum of squares would lose half its digits
    whole = x.numpy()
    for batch in (1, 10, 203):
        result = moments(x, batch)
        assert result.count == 203
        assert np.allclose(result.mean, whole.mean(0), rtol=1e-14)
        assert np.allclose(result.covariance, np.cov(whole, rowvar=False), rtol=1e-8, atol=1e-8)


def test_merged_moments_and_stored_ones() -> None:
    x = features(100, 5, 1)
    merged = Moments(5)
    merged.merge(Moments(5))  # of a rank without images
    merged.merge(moments(x[:30], 8))
    merged.merge(Moments(5))
    merged.update(x[:0])
    merged.merge(moments(x[30:], 9))
    stored = Moments(5)
    stored.load_state({k: v.clone() for k, v in merged.state().items()})
    assert stored.count == 100
    assert torch.allclose(stored.covariance, moments(x, 100).covariance, rtol=1e-12)


def test_distance_equals_the_matrix_square_root_and_torch_fidelity() -> None:
    a, b = features(400, 24, 2), features(500, 24, 3, scale=0.7)
    ca, cb = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(ca @ cb).real
    direct = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(ca + cb - 2 * root)
    result = frechet_distance(moments(a, 64), moments(b, 64))
    assert result == pytest.approx(direct, rel=1e-9)
    theirs = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), False)
    assert result == pytest.approx(theirs[KEY_METRIC_FID], rel=1e-9)
    assert result == pytest.approx(frechet_distance(moments(b, 64), moments(a, 64)), rel=1e-9)


def test_two_gaussians_by_the_formula() -> None:
    """Diagonal covariances commute: the distance is |m|^2 + sum (s_a - s_b)^2."""
    a, b = Moments(3), Moments(3)
    for result, mean, deviation in ((a, [0.0, 0, 0], [1.0, 2, 3]), (b, [1.0, 0, 2], [4.0, 2, 1])):
        result.count, result.mean = 101, torch.tensor(mean, dtype=torch.float64)
        result.scatter = torch.diag(torch.tensor(deviation, dtype=torch.float64) ** 2) * 100
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 9 + 0 + 4)


def test_singular_covariances() -> None:
    few = features(6, 20, 4)
    assert frechet_distance(moments(few, 3), moments(few, 3)) == pytest.approx(0, abs=1e-4)
    other = frechet_distance(moments(few, 3), moments(features(300, 20, 5), 100))
    assert np.isfinite(other) and other > 1


def test_refusals() -> None:
    with pytest.raises(ValueError, match="count must be at least 2 for a covariance, got 1"):
        frechet_distance(moments(features(1, 3, 0), 1), moments(features(9, 3, 0), 9))
    with pytest.raises(ValueError, match="b must have 3 features, as a has, got 4"):
        frechet_distance(moments(features(9, 3, 0), 9), moments(features(9, 4, 0), 9))
