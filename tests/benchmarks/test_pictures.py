"""The study of picture sets: its cells, its table, and a tiny one for real."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.studies import pictures
from fastgan.cli import train
from fastgan.config.variants import VARIANTS


def test_every_cell_is_a_run_that_the_command_takes() -> None:
    found = pictures.groups("FOLDER")
    assert set(found["fashion-mnist"].variants) == set(VARIANTS)
    for group in found.values():
        for variant in group.variants:
            for own in group.arms.values():
                flags = ["--preset", "auto", "--variant", variant, "--hours", "1", *group.flags, *own, "--seed", "2"]
                assert train.parse(flags).config.run.seed == 2


def test_table_of_finished_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cells.json"
    values = {"frechet_distance": 30.0, "precision": 0.5, "recall": 0.25, "coverage": 0.5, "memorized": 0.0}
    whole = {"kimg": 400.0, "minutes": 20.5, "1000": values, "5000": values | {"frechet_distance": 20.0}}
    cells = {"avatars/pggan/seed0": whole, "avatars/pggan/seed1": {"diverged": "step 3"}}
    cells |= {"few/pggan/300-ada/seed0": whole, "avatars/wgan/seed0": {"diverged": "step 1"}}
    file.write_text(json.dumps(cells))
    assert pictures.main(["avatars", "--table", "--results", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| avatars/pggan | 2 | 1 | 400 | 20 | 30.0 | 20.0 | 0.50 | 0.25 | 0.50 | 0.00 |"
    assert lines[3].startswith("| avatars/wgan | 1 | 1 | - |") and len(lines) == 4


@pytest.mark.parametrize("argv", [["nothing"], ["avatars", "--set", "lr-g", "0.1"], ["fashion-mnist"]])
def test_a_wrong_command_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pictures.main(argv)
    assert "error: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_tiny_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    draw = np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / f"{number:02}.png")
    data = ("--data", str(tmp_path), "--resolution", "8", "--device", "cpu")
    monkeypatch.setattr(pictures, "IMAGES", (20,))
    group = pictures.Group(0.05, ("lsgan",), data, {"": ()})
    monkeypatch.setattr(pictures, "groups", lambda _: {"tiny": group})
    runs = tmp_path / "runs"
    line = ["--results", str(runs / "cells.json"), "--runs", str(runs), "--threads", "1", "--seeds", "1"]
    assert pictures.main(line) == 0
    cells = json.loads((runs / "cells.json").read_text())
    assert cells["tiny/lsgan/seed0"]["kimg"] > 0 and cells["tiny/lsgan/seed0"]["20"]["frechet_distance"] > 0
    assert pictures.main([*line, "--label", "slower", "--set", "lr-g", "0.0001"]) == 0
    cells = json.loads((runs / "cells.json").read_text())
    assert set(cells) == {"tiny/lsgan/seed0", "tiny/lsgan/slower/seed0"}
