"""tiles.json: lookup, tuning, and the tiles fitted ahead of time."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from triton_offline import running

from fastgan.kernels import tile_candidates, tiles, tune, tune_ahead_of_time
from fastgan.kernels.ahead_of_time import Resources
from fastgan.kernels.tiles import Tile

CPU = torch.device("cpu")
OF_VERSION = tiles.of_version


@pytest.fixture(autouse=True)
def newer_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles are those of the newer Triton, whichever is installed."""
    monkeypatch.setattr(tiles, "of_version", lambda: "")


OPS = [op for ops in tile_candidates.PASSES.values() for op in ops]


def here(op: str = "op") -> tiles.Place:
    return tiles.place(op, CPU)


def test_every_kernel_has_a_tile_for_every_kind_and_size() -> None:
    for op, kind, size in itertools.product(OPS, tiles.KINDS, tile_candidates.SIZES):
        tile = tiles.lookup(op, kind, size, here(op))
        assert min(tile.rows, tile.cols) >= 16 and tile.warps in (1, 2, 4, 8, 16) and tile.stages >= 1
        assert tile.chunk == 0 or tile.chunk >= 16
    assert {op for ops in tiles.table().values() for op in ops} == set(OPS)


def test_lookup_falls_back_to_default(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"op": {"half/16": Tile(1, 2, 3, 4)}}
    table = {"default": {"op": {"half/16": Tile(5, 6, 7, 8), "half/32": Tile(9, 9, 9, 9)}}, "sm_90": mine}
    monkeypatch.setattr(tiles, "table", lambda: table)
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_90")
    assert tiles.lookup("op", "half", 16, here()) == (1, 2, 3, 4, 0)
    assert tiles.lookup("op", "half", 32, here()) == (9, 9, 9, 9, 0)
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_86")
    assert tiles.lookup("op", "half", 16, here()) == (5, 6, 7, 8, 0)
    # Odd strides have their own entry if the other tile would spill.
    table["default"]["op"]["half/16/odd"] = Tile(4, 4, 4, 4)
    assert tiles.lookup("op", "half", 16, here(), odd=True) == (4, 4, 4, 4, 0)
    assert tiles.lookup("op", "half", 32, here(), odd=True) == (9, 9, 9, 9, 0)
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_90")
    assert tiles.lookup("op", "half", 16, here(), odd=True) == (1, 2, 3, 4, 0)  # no entry of its own
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_86")
    with tiles.override({"op": Tile(0, 0, 0, 0)}):
        assert tiles.lookup("op", "half", 16, here()) == (0, 0, 0, 0, 0)
    assert tiles.lookup("op", "half", 16, here()) == (5, 6, 7, 8, 0)


def test_an_older_triton_has_tiles_of_its_own_where_the_others_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"3.6.0": ", triton 3.6", "3.7.1+git": ", triton 3.6", "3.8.0": "", "3.10.0": "", "4.0.0": ""}
    for version, suffix in versions.items():
        monkeypatch.setattr("importlib.metadata.version", lambda name, version=version: version)
        assert OF_VERSION.__wrapped__() == suffix, version
    table = {
        "default": {"op": {"half/16": Tile(1, 1, 1, 1)}},
        "default, triton 3.6": {"op": {"half/16": Tile(2, 2, 2, 2)}},
        "sm_90": {"op": {"half/16": Tile(3, 3, 3, 3), "half/32": Tile(4, 4, 4, 4)}},
        "sm_90, triton 3.6": {"op": {"half/32": Tile(5, 5, 5, 5)}},
    }
    monkeypatch.setattr(tiles, "table", lambda: table)
    found = {}
    for suffix in ("", ", triton 3.6"):
        monkeypatch.setattr(tiles, "of_version", lambda suffix=suffix: suffix)
        asked = (("sm_90", 16), ("sm_90", 32), ("sm_86", 16))
        found[suffix] = [tiles.lookup_for(name, "op", "half", size).rows for name, size in asked]
    assert found == {"": [3, 4, 1], ", triton 3.6": [3, 5, 2]}


def test_tiles_for_an_older_triton_can_be_launched_and_each_changes_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "of_version", lambda: ", triton 3.6")
    table = json.loads(tiles.TABLE.read_text())
    older = {name.split(",")[0]: ops for name, ops in tiles.table().items() if name.endswith(", triton 3.6")}
    assert older.keys() == {"default", "sm_80", "sm_90", "sm_100", "sm_120"}
    monkeypatch.setattr(
        tiles, "table", lambda: {name: {op: _tiles(it) for op, it in ops.items()} for name, ops in table.items()}
    )
    for name, ops in older.items():
        for op, entries in ops.items():
            for key, tile in entries.items():
                kind, size, *odd = key.split("/")
                assert kind == "float32" and tile in set(tile_candidates.candidates(op, kind, int(size)))
                mine = table[f"{name}, triton 3.6"][op]
                values = mine.pop(key)
                assert tile != tiles.lookup_for(name, op, kind, int(size), bool(odd)), f"{name} {op} {key}"
                mine[key] = values


def _tiles(entries: dict[str, list[int]]) -> dict[str, Tile]:
    return {key: Tile(*it) for key, it in entries.items()}


def test_tuned_tiles_are_merged_into_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tiles.table()
    monkeypatch.setattr(tiles, "TABLE", tmp_path / "tiles.json")
    tile_candidates.write_tiles(
        "sm_77", {"attention_forward": {"half/64": Tile(16, 32, 4, 2), "half/64/odd": Tile(16, 16, 4, 2)}}
    )
    try:
        assert tiles.table()["sm_77"]["attention_forward"]["half/64"] == Tile(16, 32, 4, 2)
        assert tiles.table()["sm_77"]["attention_forward"]["half/64/odd"] == Tile(16, 16, 4, 2)
        assert {name: ops for name, ops in tiles.table().items() if name != "sm_77"} == before
    finally:
        tiles.table.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune on")
def test_tuning_without_a_gpu_reports_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 1
    assert "torch sees no GPU" in capsys.readouterr().err


@pytest.fixture
def copied_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, dict[str, dict[str, list[int]]]]]:
    """The contents of tiles.json. `tiles.TABLE` is a copy of it, for the test to overwrite."""
    table = json.loads(tiles.TABLE.read_text())
    monkeypatch.setattr(tiles, "TABLE", tmp_path / "tiles.json")
    tiles.TABLE.write_text(json.dumps(table))
    tiles.table.cache_clear()
    yield table
    tiles.table.cache_clear()


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_missing_entry_is_fitted_by_compiling(
    real: bool,
    copied_table: dict[str, dict[str, dict[str, list[int]]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    op, kind, size = "attention_backward_columns", "half", 16
    entries = copied_table["default"][op]
    expected = entries.pop("half/16/odd")
    tiles.TABLE.write_text(json.dumps(copied_table))
    tiles.table.cache_clear()
    entry = tune_ahead_of_time.Entry("default", op, kind, size, odd=True)
    assert [*entry.tile()] == entries["half/16"] != expected  # falls back to even strides, which spills
    if not real:
        spilled = Resources(255, 98_560, 40, 0)
        fits = dataclasses.replace(spilled, spilled=0)
        monkeypatch.setattr(
            tune_ahead_of_time, "compile_isolated", lambda entry, form, tile: fits if [*tile] == expected else spilled
        )
    command = ["--ahead-of-time", "default", "--kind", kind, "--size", str(size)]
    monkeypatch.setattr(tune_ahead_of_time, "entries", lambda *arguments: [entry])
    assert tune.main([*command, "--check"]) == 1
    assert json.loads(tiles.TABLE.read_text()) == copied_table
    output = capsys.readouterr().out
    assert f"{entry}: (128, 128, 8, 2, 0) does not fit (odd: 255 registers" in output and "0 of 1 entries fit" in output
    assert tune.main(command) == 0
    entries["half/16/odd"] = expected
    assert json.loads(tiles.TABLE.read_text()) == copied_table
    assert tune.main([*command, "--check"]) == 0
    assert "1 of 1 entries fit" in capsys.readouterr().out


def test_entries_are_complete_and_start_with_the_default() -> None:
    entries = tune_ahead_of_time.entries(["sm_90", "default"], ("half",), (16, 32))
    assert len(set(entries)) == len(entries) == 2 * 2 * 2 * 6
    assert [it.architecture for it in entries] == ["default"] * 24 + ["sm_90"] * 24
    assert [it.odd for it in entries[:24]] == [False] * 12 + [True] * 12
    with pytest.raises(SystemExit):
        tune.main(["--check"])


def test_fit_takes_the_nearest_tile_that_fits_in_all_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = tune_ahead_of_time.Entry("sm_90", "op", "half", 64, odd=False)
    monkeypatch.setattr(tiles, "table", lambda: {"sm_90": {"op": {"half/64": Tile(64, 32, 8, 2)}}})
    tried: list[Tile] = []

    def compile_one(entry: tune_ahead_of_time.Entry, form: str, tile: Tile) -> Resources | str:
        tried.append(tile)
        if tile.warps == 8:
            return "crashed"
        return Resources(
            200, shared=40_000 * tile.stages, spilled=8 * (form == "narrow" and tile[:2] != (32, 16)), tensor_columns=0
        )

    fitted = tune_ahead_of_time.fit(entry, compile_one)
    assert (fitted.tile, fitted.why) == (Tile(32, 16, 4, 2), "even: crashed")
    # Stages and warps are reduced before rows and columns.
    assert list(dict.fromkeys(tried))[:4] == [Tile(64, 32, *it) for it in ((8, 2), (8, 1), (4, 2), (4, 1))]
    assert tune_ahead_of_time.Entry("sm_90", "op", "half", 32, odd=True).tile() == Tile(128, 128, 8, 3)  # none yet
    none = tune_ahead_of_time.fit(entry, lambda entry, form, tile: Resources(255, 10**6, 8, 0))
    assert none.tile is None and none.why == "even: 255 registers, 1000000 bytes shared, 8 bytes spilled"


def test_compiler_that_hangs_is_stopped() -> None:
    entry = tune_ahead_of_time.Entry("default", "attention_forward", "half", 16, odd=False)
    assert "more than 0 s" in str(tune_ahead_of_time.compile_isolated(entry, "even", entry.tile(), seconds=0))
    assert "power of 2" in str(tune_ahead_of_time.compile_isolated(entry, "even", Tile(17, 16, 4, 1)))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", tiles.KINDS)
def test_there_are_candidates(op: str, kind: str) -> None:
    for size in tile_candidates.SIZES:
        assert len(list(tile_candidates.candidates(op, kind, size))) > 5


def test_uninitialized_tensors_are_nan_in_kernel_tests() -> None:
    with running("cpu"):
        assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((10, 0), "sm_100"), ((10, 3), "sm_100")]
)
def test_architecture_name(capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert tiles.architecture.__wrapped__(torch.device("cuda", 0)) == name
