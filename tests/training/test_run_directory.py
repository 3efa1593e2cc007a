"""The folder of a run: which may be begun in, what it is called, which is meant."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from fastgan.errors import ArgumentError
from fastgan.training import run_directory


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "evaluation.jsonl", "samples"])
def test_what_a_run_left_is_no_place_for_another(tmp_path: Path, name: str) -> None:
    run_directory.check_free(tmp_path / "not there")
    if "." in name:
        (tmp_path / name).touch()
    else:
        (tmp_path / name).mkdir()
        run_directory.check_free(tmp_path)  # an empty folder is nothing
        (tmp_path / name / "one").touch()
    with pytest.raises(ArgumentError, match=rf"--out .* holds {name} and no config\.yaml"):
        run_directory.check_free(tmp_path)


def test_a_file_is_no_folder_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ArgumentError, match="must be a folder"):
        run_directory.check_free(file)
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    for parent in (file, dangling):
        for named in (True, False):
            with pytest.raises(ArgumentError, match=r"--out must be a folder that can be written"):
                run_directory.make(parent / "run", named)


def test_only_a_name_that_was_given_is_taken_twice(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "wgan-now"
    assert [run_directory.make(run, named=False).name for _ in range(3)] == ["wgan-now", "wgan-now.2", "wgan-now.3"]
    assert run_directory.make(run, named=True) == run


def test_a_run_is_named_by_itself_or_by_a_checkpoint_in_it(tmp_path: Path) -> None:
    saved = tmp_path / "checkpoints" / "kimg-000001.000"
    saved.mkdir(parents=True)
    assert run_directory.newest(str(tmp_path), "wgan") is None
    with pytest.raises(ArgumentError, match=r"--resume must be a run directory"):
        run_directory.of(str(saved))
    (tmp_path / "config.yaml").touch()
    assert (
        run_directory.of(str(tmp_path))
        == run_directory.of(str(saved))
        == run_directory.newest(str(tmp_path), "wgan")
        == tmp_path
    )


def test_that_a_run_is_held_can_be_told_another_rank() -> None:
    held = run_directory.RunLocked("--resume", "runs/1", "must be another")
    again = copy.copy(held)
    assert (
        type(again) is run_directory.RunLocked and str(again) == str(held) == "--resume must be another, got 'runs/1'"
    )
