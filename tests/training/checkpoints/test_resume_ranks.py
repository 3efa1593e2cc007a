"""A run's checkpoint is not bound to the number of ranks that wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import resumes
import torch

from fastgan.training.distributed.process_group import ProcessGroup

SCRIPT = Path(resumes.__file__)


@pytest.mark.slow
def test_a_run_moves_to_one_rank_and_back(tmp_path: Path) -> None:
    """pggan, in the fade after a growth; two ranks under ZeRO 2, one with plain torch."""
    ranks.launch(SCRIPT, [resumes.case(None, "two", "pggan", 2, 12)], tmp_path, 2)
    world = ProcessGroup(0, 1, torch.device("cpu"), "torch", "alone")
    for case in (resumes.case("two", "moved", "pggan", 0, 0), resumes.case("two", "alone", "pggan", 0, 4)):
        resumes.resume(case, world, tmp_path)
    resumes.assert_moved(tmp_path / "two", tmp_path / "moved")
    back = [resumes.case("alone", "back", "pggan", 1, 0), resumes.case("two", "stayed", "pggan", 2, 4)]
    ranks.launch(SCRIPT, back, tmp_path, 2)
    resumes.assert_moved(tmp_path / "alone", tmp_path / "back")
    (alone, where), (stayed, there) = resumes.stored(tmp_path / "alone"), resumes.stored(tmp_path / "stayed")
    assert where == there and where["resolution"] == 8
    ranks.assert_same_weights(stayed, alone)
