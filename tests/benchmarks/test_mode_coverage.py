"""benchmarks/studies/mode_coverage.py: coverage, the result cache, and resuming."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.studies import mode_coverage as modes
from fastgan.config.variants import VARIANTS


@pytest.mark.parametrize(("task", "number", "deviation"), [("grid", 25, 0.05), ("ring", 8, 0.02)])
def test_real_points_hit_every_mode(task: str, number: int, deviation: float) -> None:
    means, given = modes.centers(task)
    assert tuple(means.shape) == (number, 2) and given == deviation
    closest = torch.cdist(means, means).fill_diagonal_(9).min()
    assert closest > 20 * deviation  # modes do not overlap
    points = modes.real_points(task, 0, torch.arange(20_000))
    result = modes.coverage(task, points)
    assert result["modes"] == 1
    assert result["near"] == pytest.approx(1 - math.exp(-4.5), abs=0.004)  # Rayleigh distribution at 3 sigma
    nearest = torch.cdist(points, means).argmin(dim=1)
    assert torch.bincount(nearest).float().std() < 5 * (20_000 / number) ** 0.5
    assert torch.equal(points[30:40], modes.real_points(task, 0, torch.arange(30, 40)))
    assert not torch.equal(points[:10], modes.real_points(task, 1, torch.arange(10)))


def test_collapsed_and_stray_points() -> None:
    means, deviation = modes.centers("grid")
    points = torch.cat([means[:5].repeat(10, 1), means[:5] + 1.0])
    assert modes.coverage("grid", points) == pytest.approx({"modes": 0.2, "near": 50 / 55})
    assert modes.coverage("grid", means + torch.tensor([2.99 * deviation, 0]))["modes"] == 1
    assert modes.coverage("grid", means + torch.tensor([3.01 * deviation, 0])) == {"modes": 0, "near": 0}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_variant_trains_on_points(variant: str) -> None:
    first, second = (modes.train_points("ring", variant, 3, 2.56) for _ in range(2))
    assert first["modes"] == second["modes"] and first["near"] == second["near"]
    assert 0 <= first["near"] <= 1


@pytest.mark.slow
def test_wgan_gp_finds_the_ring() -> None:
    result = modes.train_points("ring", "wgan-gp", 0, 640.0)
    assert result["modes"] == 1 and result["near"] > 0.03  # by chance about 0.005


def test_results_are_stored_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"grid --variants gan lsgan --seeds 2 --kimg 1 --results {tmp_path / 'results.json'}".split()
    train_points = modes.train_points
    calls: list[tuple[str, int]] = []

    def interrupted(task: str, variant: str, seed: int, kimg: float) -> dict[str, float]:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append((variant, seed))
        return train_points(task, variant, seed, kimg)

    monkeypatch.setattr(modes, "train_points", interrupted)
    assert modes.main(flags) == 0
    output = capsys.readouterr()
    assert "interrupted in grid/lsgan/seed1/1kimg; the same command resumes" in output.err
    assert "| `gan` | 2 |" in output.out and "| `lsgan` | 1 |" in output.out and "wgan" not in output.out
    monkeypatch.setattr(modes, "train_points", lambda *args: (calls.append(args[1:3]), train_points(*args))[1])
    assert modes.main(flags) == 0
    assert calls == [("gan", 0), ("lsgan", 0), ("gan", 1), ("lsgan", 1)]
    stored = json.loads((tmp_path / "results.json").read_text())
    assert sorted(stored) == [f"grid/{v}/seed{s}/1kimg" for v in ("gan", "lsgan") for s in (0, 1)]
    before = capsys.readouterr().out.split("\n\n", 1)[1]
    # --cells is the old name of --results.
    assert modes.main([*("--cells" if flag == "--results" else flag for flag in flags), "--table"]) == 0
    assert capsys.readouterr().out.split("\n\n", 1)[1] == before and len(calls) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_mean_and_range() -> None:
    cache = modes.ResultCache(Path("none.json"))
    for seed, (hit, near) in enumerate([(0.2, 0.5), (1.0, 0.7), (0.6, 0.9)]):
        cache.results[f"grid/wgan/seed{seed}/9kimg"] = {"modes": hit, "near": near}
    cache.results["grid/wgan/seed3/10kimg"] = {"modes": 0.0, "near": 0.0}  # another budget
    text = modes.report(cache, ["grid"], {"grid": 9.0})
    assert "| `wgan` | 3 | 60 (20 to 100) | 70.0 (50.0 to 90.0) |" in text


@pytest.mark.slow
def test_stacked_digits_are_trained_resumed_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains in subprocesses."""
    flags = ["--threads", "1", "--width", "4", "--max-width", "4"]
    monkeypatch.setattr(modes, "STACKED_SAMPLES", 300)
    result = modes.train_stacked("dcgan", 0, 0.064, tmp_path, flags)
    assert result["modes_of"] == 1000 and 0 <= result["modes"] <= 300 and result["kl"] > 0
    (run,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert run.name == "stacked-dcgan-seed0-0.064kimg"
    assert "3 channels" in (tmp_path / f"{run.name}.log").read_text()
    again = modes.train_stacked("dcgan", 0, 0.064, tmp_path, flags)
    assert again | {"minutes": 0} == result | {"minutes": 0}
    assert " at 0.064 kimg" in (tmp_path / f"{run.name}.log").read_text()  # resumed


def test_unknown_task(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        modes.main(["circle"])
    assert "TASK must be grid, ring, stacked, got 'circle'" in capsys.readouterr().err
