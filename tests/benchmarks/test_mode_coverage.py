"""benchmarks/studies/mode_coverage.py: what it counts, and that its cells are kept and gone on with."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastgan.config.variants import VARIANTS

FILE = Path(__file__).parents[2] / "benchmarks" / "studies" / "mode_coverage.py"


@pytest.fixture(scope="module")
def modes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("modes", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["modes"] = module  # dataclasses and pickles look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("task", "number", "deviation"), [("grid", 25, 0.05), ("ring", 8, 0.02)])
def test_real_points_hit_every_mode(modes: ModuleType, task: str, number: int, deviation: float) -> None:
    means, given = modes.centers(task)
    assert tuple(means.shape) == (number, 2) and given == deviation
    closest = torch.cdist(means, means).fill_diagonal_(9).min()
    assert closest > 20 * deviation  # no point is of two modes
    points = modes.real_points(task, 0, torch.arange(20_000))
    found = modes.coverage(task, points)
    assert found["modes"] == 1
    assert found["near"] == pytest.approx(1 - math.exp(-4.5), abs=0.004)  # Rayleigh's distribution at 3
    nearest = torch.cdist(points, means).argmin(dim=1)
    assert torch.bincount(nearest).float().std() < 5 * (20_000 / number) ** 0.5
    assert torch.equal(points[30:40], modes.real_points(task, 0, torch.arange(30, 40)))
    assert not torch.equal(points[:10], modes.real_points(task, 1, torch.arange(10)))


def test_collapsed_and_stray_points(modes: ModuleType) -> None:
    means, deviation = modes.centers("grid")
    points = torch.cat([means[:5].repeat(10, 1), means[:5] + 1.0])
    assert modes.coverage("grid", points) == pytest.approx({"modes": 0.2, "near": 50 / 55})
    assert modes.coverage("grid", means + torch.tensor([2.99 * deviation, 0]))["modes"] == 1
    assert modes.coverage("grid", means + torch.tensor([3.01 * deviation, 0])) == {"modes": 0, "near": 0}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_variant_trains_on_points(modes: ModuleType, variant: str) -> None:
    first, second = (modes.points_cell("ring", variant, 3, 2.56) for _ in range(2))
    assert first["modes"] == second["modes"] and first["near"] == second["near"]
    assert 0 <= first["near"] <= 1


@pytest.mark.slow
def test_wgan_gp_finds_the_ring(modes: ModuleType) -> None:
    found = modes.points_cell("ring", "wgan-gp", 0, 640.0)
    assert found["modes"] == 1 and found["near"] > 0.03  # by chance about 0.005


def test_cells_are_kept_and_gone_on_with(
    modes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = f"grid --variants gan lsgan --seeds 2 --kimg 1 --cells {tmp_path / 'cells.json'}".split()
    cell = modes.points_cell
    calls: list[tuple[str, int]] = []

    def stopping(task: str, variant: str, seed: int, kimg: float) -> dict[str, float]:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append((variant, seed))
        return cell(task, variant, seed, kimg)

    monkeypatch.setattr(modes, "points_cell", stopping)
    assert modes.main(asked) == 0
    said = capsys.readouterr()
    assert "stopped in grid/lsgan/seed1/1kimg; the same command goes on" in said.err
    assert "| `gan` | 2 |" in said.out and "| `lsgan` | 1 |" in said.out and "wgan" not in said.out
    monkeypatch.setattr(modes, "points_cell", lambda *args: (calls.append(args[1:3]), cell(*args))[1])
    assert modes.main(asked) == 0
    assert calls == [("gan", 0), ("lsgan", 0), ("gan", 1), ("lsgan", 1)]
    done = json.loads((tmp_path / "cells.json").read_text())
    assert sorted(done) == [f"grid/{v}/seed{s}/1kimg" for v in ("gan", "lsgan") for s in (0, 1)]
    before = capsys.readouterr().out.split("\n\n", 1)[1]
    assert modes.main([*asked, "--table"]) == 0
    assert capsys.readouterr().out.split("\n\n", 1)[1] == before and len(calls) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["cells.json"]


def test_mean_and_range(modes: ModuleType) -> None:
    cells = modes.Cells(Path("none.json"))
    for seed, (hit, near) in enumerate([(0.2, 0.5), (1.0, 0.7), (0.6, 0.9)]):
        cells.done[f"grid/wgan/seed{seed}/9kimg"] = {"modes": hit, "near": near}
    cells.done["grid/wgan/seed3/10kimg"] = {"modes": 0.0, "near": 0.0}  # another budget is another comparison
    text = modes.report(cells, ["grid"], {"grid": 9.0})
    assert "| `wgan` | 3 | 60 (20 to 100) | 70.0 (50.0 to 90.0) |" in text


@pytest.mark.slow
def test_stacked_digits_are_trained_gone_on_with_and_counted(modes: ModuleType, tmp_path: Path) -> None:
    """The trainer in processes of its own."""
    flags = ["--threads", "1", "--width", "4", "--max-width", "4"]
    modes.STACKED_SAMPLES = 300
    found = modes.stacked_cell("dcgan", 0, 0.064, tmp_path, flags)
    assert found["modes_of"] == 1000 and 0 <= found["modes"] <= 300 and found["kl"] > 0
    (run,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert run.name == "stacked-dcgan-seed0-0.064kimg"
    assert "3 channels" in (tmp_path / f"{run.name}.log").read_text()
    again = modes.stacked_cell("dcgan", 0, 0.064, tmp_path, flags)
    assert again | {"minutes": 0} == found | {"minutes": 0}
    assert "going on at 0.064 kimg" in (tmp_path / f"{run.name}.log").read_text()


def test_an_unknown_task(modes: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        modes.main(["circle"])
    assert "TASK must be grid, ring, stacked, got 'circle'" in capsys.readouterr().err
