"""Ranks that would compute different things are refused at the start: two processes with different settings."""

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
from fastgan.config import replace
from fastgan.data.preparation.verification import spot_check
from fastgan.data.prepared import read_manifest
from fastgan.errors import ArgumentError
from fastgan.training import run_setup
from fastgan.training.distributed import rank_consistency, rendezvous
from fastgan.training.observability import rank_log

# What differs on rank 1: flags, or a version.
DIFFERENT = {
    "--seed": ["--seed", "1"],
    "--lr-g": ["--lr-g", "0.5"],
    "--batch": ["--batch", "32"],
    "--timeout": ["--timeout", "60"],
    "fastgan's version": "0.0.1",
}
# The numbers of threads may differ between hosts.
ALIKE = {"nothing": [], "--threads": ["--threads", "1"], "--workers": ["--workers", "1"]}


# The images of rank 1; rank 0 has data-0.
COPIES = {"equal": "data-1", "other pixels": "data-2", "an image less": "data-3", "no folder": "data-4"}


def _answers(folder: Path) -> dict[str, str | None]:
    """The result of each difference on this rank: its error, or None if the ranks may train."""
    world = rendezvous.join("cpu")
    results: dict[str, str | None] = {}
    for name, other in {**DIFFERENT, **ALIKE, **COPIES}.items():
        mine = other if world.rank == 1 else None
        rank_log.__version__ = mine if isinstance(mine, str) and name in DIFFERENT else __version__
        flags = mine if isinstance(mine, list) else []
        config = train.parse(["--variant", "wgan-gp", "--resolution", "8", *flags]).config
        try:
            if name in COPIES:
                images = folder / (mine if isinstance(mine, str) else "data-0")
                run_setup.open_images(replace(config, data={"data": f"folder:{images}"}), world)
            else:
                rank_consistency.require_same_on_all_ranks(world, rank_consistency.shared_settings(config))
            results[name] = None
        except ArgumentError as error:
            results[name] = str(error)
        except SystemExit as error:
            results[name] = f"exit {error.code}"
    rendezvous.stop()
    return results


def _make_images(folder: Path, values: range) -> None:
    folder.mkdir()
    for value in values:
        Image.fromarray(np.full((8, 8), 10 * value, dtype=np.uint8)).save(folder / f"{value % 8}.png")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    folder = tmp_path_factory.mktemp("agreement")
    for name, values in (("0", range(8)), ("1", range(8)), ("2", range(8, 16)), ("3", range(7))):
        _make_images(folder / f"data-{name}", values)
    ranks.launch(Path(__file__), [], folder, 2)
    return [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", [*DIFFERENT, "other pixels", "an image less", "no folder"])
def test_a_different_rank_is_refused(results: list[dict[str, str | None]], name: str) -> None:
    """Rank 0 names what differs, on which host, and both values; rank 1 exits silently."""
    line, other = results[0][name], results[1][name]
    argument = name if name in DIFFERENT else "--data"
    assert line is not None and line.startswith(f"{argument} on ") and "(rank 1) must be " in line, line
    assert "(rank 0), got " in line and "\n" not in line, line
    assert other == "exit 2"


@pytest.mark.parametrize("name", [*ALIKE, "equal"])
def test_what_does_not_change_the_result_may_differ(results: list[dict[str, str | None]], name: str) -> None:
    assert results[0][name] is None and results[1][name] is None


def test_a_copy_that_contradicts_its_manifest_is_found(tmp_path: Path) -> None:
    assert prepare.main(["digits", str(tmp_path / "set"), "--resolution", "8"]) == 0
    manifest = read_manifest(tmp_path / "set")
    assert spot_check(manifest, 8) is None
    file = next((tmp_path / "set").glob("cache/0008/*.npy"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    fault = spot_check(manifest, 8)
    assert fault is not None and manifest.path / fault.name == file and "has been changed" in fault.problem
    assert spot_check(manifest, 4) is None  # files that are not read are not checked
    assert spot_check(manifest, 8, limit=file.stat().st_size - 1) is None


if __name__ == "__main__":
    out = Path(sys.argv[-1])
    (out / f"results-{os.environ['RANK']}.json").write_text(json.dumps(_answers(out)))
