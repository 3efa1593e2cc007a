"""Ranks that would not compute the same are refused before they start: two processes, each with settings of its own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
from PIL import Image

from fastgan import __version__
from fastgan.cli import prepare, train
from fastgan.data.preparation.verification import spot_check
from fastgan.data.prepared import read_manifest
from fastgan.errors import ArgumentError
from fastgan.training.distributed import process_group as processes
from fastgan.training.distributed import rank_consistency

# What the second rank has otherwise than the first; of a version, what it finds.
DIFFERENT = {
    "--seed": ["--seed", "1"],
    "--lr-g": ["--lr-g", "0.5"],
    "--batch": ["--batch", "32"],
    "--timeout": ["--timeout", "60"],
    "fastgan's version": "0.0.1",
}
# How many threads compute and load is a host's own affair.
ALIKE = {"nothing": [], "--threads": ["--threads", "1"], "--workers": ["--workers", "1"]}


# Where the second rank finds its images; the first has data-0.
COPIES = {"equal": "data-1", "other pixels": "data-2", "an image less": "data-3", "no folder": "data-4"}


def _answers(folder: Path) -> dict[str, str | None]:
    """What this rank is told of each difference: None, where it may go on."""
    world = processes.join("cpu")
    told: dict[str, str | None] = {}
    for name, other in {**DIFFERENT, **ALIKE, **COPIES}.items():
        mine = other if world.rank == 1 else None
        rank_consistency.__version__ = mine if isinstance(mine, str) and name in DIFFERENT else __version__
        flags = mine if isinstance(mine, list) else []
        config = train.parse(["--variant", "wgan-gp", "--resolution", "8", *flags]).config
        try:
            if name in COPIES:
                images = folder / (mine if isinstance(mine, str) else "data-0")
                train._open_source(train.replace(config, data={"data": f"folder:{images}"}), world)
            else:
                rank_consistency.same(world, rank_consistency.settings(config))
            told[name] = None
        except ArgumentError as error:
            told[name] = str(error)
        except SystemExit as error:
            told[name] = f"exit {error.code}"
    processes.stop()
    return told


def _make_images(folder: Path, values: range) -> None:
    folder.mkdir()
    for value in values:
        Image.fromarray(np.full((8, 8), 10 * value, dtype=np.uint8)).save(folder / f"{value % 8}.png")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    folder = tmp_path_factory.mktemp("agreement")
    for name, values in (("0", range(8)), ("1", range(8)), ("2", range(8, 16)), ("3", range(7))):
        _make_images(folder / f"data-{name}", values)
    ranks.launch(Path(__file__), [], folder, 2)
    return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", [*DIFFERENT, "other pixels", "an image less", "no folder"])
def test_a_rank_that_differs_is_refused(told: list[dict[str, str | None]], name: str) -> None:
    """The first rank names what differs, where, and both values; the other one ends with it."""
    line, other = told[0][name], told[1][name]
    argument = name if name in DIFFERENT else "--data"
    assert line is not None and line.startswith(f"{argument} on ") and "(rank 1): was " in line, line
    assert "it may be " in line and "(rank 0)" in line and "\n" not in line, line
    assert other == "exit 2"


@pytest.mark.parametrize("name", [*ALIKE, "equal"])
def test_what_does_not_matter_may_differ(told: list[dict[str, str | None]], name: str) -> None:
    assert told[0][name] is None and told[1][name] is None


def test_a_copy_that_is_not_what_its_manifest_says_is_found(tmp_path: Path) -> None:
    assert prepare.main(["digits", str(tmp_path / "set"), "--resolution", "8"]) == 0
    manifest = read_manifest(tmp_path / "set")
    assert spot_check(manifest, 8) is None
    file = next((tmp_path / "set").glob("cache/0008/*.npy"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = spot_check(manifest, 8)
    assert found is not None and manifest.path / found.name == file and "has been changed" in found.problem
    assert spot_check(manifest, 4) is None  # what is not read does not matter
    assert spot_check(manifest, 8, limit=file.stat().st_size - 1) is None


if __name__ == "__main__":
    out = Path(sys.argv[-1])
    (out / f"told-{os.environ['RANK']}.json").write_text(json.dumps(_answers(out)))
