"""`fastgan plan`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from timings import SMALL, step_times

from fastgan.cli import main
from fastgan.cli.train import parse
from fastgan.config.growth import stages_of
from fastgan.data import open_source
from fastgan.planning.step_times import recipe_of, write
from fastgan.training.footprint import footprint


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_plan_measures_writes_and_reads(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", *SMALL, "--batch", "8", "--nodes", "2", "--gpus-per-node", "1", "--bandwidth", "0.001"]
    assert main.main([*command, "--measure-seconds", "0.2", "--write-step-times", "times.json"]) == 0
    first = capsys.readouterr().out.splitlines()
    assert "1 kimg to 8 px on 2 x 1 = 2 ranks" in first[0] and "thread" in first[1]
    assert "0.001 GB/s and 5 us between hosts" in first[2]
    content = json.loads((working_folder / "times.json").read_text())
    assert {(t["resolution"], t["micro"], t["fading"]) for t in content["timings"]} == {
        (px, micro, fading) for px, fading in ((4, False), (8, True), (8, False)) for micro in (1, 4)
    }
    sent = sum(size for size, _ in content["timings"][0]["d"]["gradients"])
    config = parse(SMALL).config
    assert sent == 4 * footprint(config, open_source("digits", 8), stages_of(config)[0], 1, 1, fading=False).trained_d
    assert main.main([*command, "--step-times", "times.json"]) == 0
    again = capsys.readouterr().out.splitlines()
    assert again[1].endswith(", times.json") and again[2:] == first[2:]
    row = next(line for line in again if line.startswith("    8"))
    assert row.split()[:5] == ["8", "0.5", "8", "2", "4"] and row.endswith("GiB")
    # 10 ranks: the batch of 8 is for 8 of them, with one image each, and the file has a step on one image.
    assert main.main([*command, "--gpus-per-node", "5", "--step-times", "times.json"]) == 0
    text = capsys.readouterr().out
    assert "4, 8 px: the batch is too small for 10 ranks; active ranks: 8, 8; the others" in text
    assert "minibatch standard deviation" in text
    assert sorted(p.name for p in working_folder.iterdir()) == ["times.json"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--nodes", "0"], ("--nodes must be at least 1, got 0",)),
        (["--gpus-per-node", "-1"], ("--gpus-per-node must be at least 1, got -1",)),
        (["--bandwidth", "0"], ("--bandwidth must be above 0, in GB/s, got 0.0",)),
        (["--bandwidth-inside", "nan"], ("--bandwidth-inside must be above 0, in GB/s, got nan",)),
        (["--latency", "-1"], ("--latency must be at least 0, in microseconds, got -1.0",)),
        (["--measure-seconds", "0"], ("--measure-seconds must be above 0, got 0.0",)),
        (["--step-times", "missing.json"], ("--step-times must be", "--write-step-times, got 'missing.json'; No such")),
        (["--step-times", "other.json"], ("--step-times 'other.json': was measured with fmap_max 8; the run has 16",)),
        (["--step-times", "larger.json"], ("--step-times 'larger.json': has no timing of any stage of this run",)),
        (["--write-step-times", "no/folder.json"], ("--write-step-times must be", "folder, got 'no/folder.json'")),
        (
            ["--write-step-times", "new.json", "--step-times", "other.json"],
            ("--write-step-times 'new.json': cannot be combined with --step-times",),
        ),
        (["--nodes", "3", "--batch", "32"], ("--batch", "32", "multiple of 24")),
        (["--accumulation", "64", "--batch", "32"], ("--batch", "32", "multiple of")),
    ],
)
def test_plan_refuses(
    working_folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: tuple[str, ...]
) -> None:
    run = [*SMALL, "--fmap-max", "16"]
    write(step_times(run, [(64, 4, False, 1.0)]), "larger.json")
    write(step_times(SMALL, [(4, 4, False, 1.0)]), "other.json")
    before = sorted(working_folder.iterdir())
    assert main.main(["plan", *run, *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and all(word in error for word in words), error
    assert sorted(working_folder.iterdir()) == before


def test_plan_without_data_is_of_the_published_recipe(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--data", "synthetic"]
    times = step_times(run, [(4, 1, False, 1.0)])
    write(replace(times, recipe=recipe_of(parse(run).config, 3)), "times.json")
    command = ["plan", "--variant", "pggan", "--resolution", "16", "--nodes", "16", "--step-times", "times.json"]
    assert main.main(command) == 0
    text = capsys.readouterr().out
    assert "pggan, paper preset: 12000 kimg to 16 px on 16 x 8 = 128 ranks" in text
    assert "* 8, 16 px: estimated from operation and parameter counts" in text
