from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from fastgan.kernels import tiles, tune
from fastgan.kernels.tiles import Tile
from triton_offline import running

CPU = torch.device("cpu")
OPS = [op for ops in tune.PASSES.values() for op in ops]


def test_every_operation_has_a_tile_for_every_kind_and_size() -> None:
    for op, kind, size in itertools.product(OPS, tiles.KINDS, tune.SIZES):
        tile = tiles.find(op, kind, size, CPU)
        assert min(tile.rows, tile.cols) >= 16 and tile.warps in (1, 2, 4, 8, 16) and tile.stages >= 1
        assert tile.chunk == 0 or tile.chunk >= 16
    assert {op for ops in tiles.table().values() for op in ops} == set(OPS)


def test_an_architecture_has_its_own_tiles_or_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"op": {"half/16": Tile(1, 2, 3, 4)}}
    table = {"default": {"op": {"half/16": Tile(5, 6, 7, 8), "half/32": Tile(9, 9, 9, 9)}}, "sm_90": mine}
    monkeypatch.setattr(tiles, "table", lambda: table)
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_90")
    assert tiles.find("op", "half", 16, CPU) == (1, 2, 3, 4, 0)
    assert tiles.find("op", "half", 32, CPU) == (9, 9, 9, 9, 0)
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_86")
    assert tiles.find("op", "half", 16, CPU) == (5, 6, 7, 8, 0)
    # Odd strides have entries of their own where the others' would spill.
    table["default"]["op"]["half/16/odd"] = Tile(4, 4, 4, 4)
    assert tiles.find("op", "half", 16, CPU, odd=True) == (4, 4, 4, 4, 0)
    assert tiles.find("op", "half", 32, CPU, odd=True) == (9, 9, 9, 9, 0)
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_90")
    assert tiles.find("op", "half", 16, CPU, odd=True) == (1, 2, 3, 4, 0)  # it needs none there
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_86")
    with tiles.using({"op": Tile(0, 0, 0, 0)}):
        assert tiles.find("op", "half", 16, CPU) == (0, 0, 0, 0, 0)
    assert tiles.find("op", "half", 16, CPU) == (5, 6, 7, 8, 0)


def test_what_was_tuned_is_merged_into_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tiles.table()
    monkeypatch.setattr(tiles, "TABLE", tmp_path / "tiles.json")
    tune.write("sm_77", {"attention_forward": {"half/64": Tile(16, 32, 4, 2), "half/64/odd": Tile(16, 16, 4, 2)}})
    try:
        assert tiles.table()["sm_77"]["attention_forward"]["half/64"] == Tile(16, 32, 4, 2)
        assert tiles.table()["sm_77"]["attention_forward"]["half/64/odd"] == Tile(16, 16, 4, 2)
        assert {name: ops for name, ops in tiles.table().items() if name != "sm_77"} == before
    finally:
        tiles.table.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune on")
def test_tuning_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 1
    assert "there is no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", tiles.KINDS)
def test_there_are_candidates_to_tune(op: str, kind: str) -> None:
    for size in tune.SIZES:
        assert len(list(tune.candidates(op, kind, size))) > 5


def test_new_tensors_are_full_of_nan_where_kernels_are_tested() -> None:
    with running("cpu"):
        assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((10, 0), "sm_100"), ((10, 3), "sm_100")]
)
def test_the_name_of_an_architecture(capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert tiles.architecture.__wrapped__(torch.device("cuda", 0)) == name
