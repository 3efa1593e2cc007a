"""benchmarks/studies/cheaper_penalties.py: arms, variance of the estimates, the table, one tiny run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.studies import cheaper_penalties as study


def test_arms_are_those_that_a_regularizer_has() -> None:
    assert study.arms_of("wgan-gp") == ["exact", "every 4", "every 16"]
    assert study.arms_of("r3gan") == list(study.ARMS)


def test_estimates_have_the_mean_of_the_exact_gradient_and_more_variance() -> None:
    exact, noisy = (study.penalty_gradients("dcgan", arm, None, 4) for arm in ("exact", "differences"))
    assert exact.shape == noisy.shape
    # |a - b|^2 of two means of 4 is about the sum of their variances / 8.
    expected = (exact.var(dim=0).sum() + noisy.var(dim=0).sum()) / 4
    assert (exact.mean(0) - noisy.mean(0)).square().sum() < 3 * expected
    assert study.relative_variance(noisy, 1) > study.relative_variance(exact, 1) > 0
    assert study.relative_variance(exact, 4) == pytest.approx(4 * study.relative_variance(exact, 1))


def test_relative_variance_on_paper() -> None:
    assert study.relative_variance(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), 1) == pytest.approx(2 / 4)


def test_equal_time_and_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    cache = study.ResultCache(file)
    times = {arm: 1.0 + i for i, arm in enumerate(reversed(study.arms_of("wgan-gp")))}
    cache.store("speed/wgan-gp", times)
    kimg = study.kimg_at_equal_time("wgan-gp", "every 16", times, 1.0)
    assert kimg == 3 * study.kimg_at_equal_time("wgan-gp", "exact", times, 1.0)
    for seed in range(2):
        cache.store(f"digits/wgan-gp/every 16/seed{seed}/{kimg:g}kimg", {"kimg": kimg, "frechet_distance": 10.0 + seed})
    cache.store(f"digits/wgan-gp/every 16/seed2/{kimg:g}kimg", {"kimg": kimg, "diverged": "step 3"})
    assert study.main(["--table", "--variants", "wgan-gp", "--results", str(file)]) == 0
    assert "| `wgan-gp` | every 16 | 3.00x | - | 1620 | 3 | 10.5 (10.0 to 11.0) |" in capsys.readouterr().out


def test_without_times_nothing_is_trained(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        study.main(["--variants", "wgan-gp", "--results", str(tmp_path / "none.json")])


@pytest.mark.slow
def test_a_tiny_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--variants", "r3gan", "--results", str(tmp_path / "r.json"), "--runs", str(tmp_path / "runs")]
    common += ["--seeds", "1", "--threads", "1", "--share", "0.002", "--images", "64", "--batches", "2"]
    assert study.main([*common, "--speed", "--measure-seconds", "0.1"]) == 0
    assert study.main(common) == 0
    assert study.main([*common, "--variance"]) == 0
    table = capsys.readouterr().out.splitlines()[-6:]
    assert all(len(line.split("|")) == 9 and " - |" not in line for line in table)
