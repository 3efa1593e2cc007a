"""The record of measured step times: interpolation, and its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from timings import SMALL, step_times

from fastgan.errors import ArgumentError
from fastgan.planning.step_times import StepTimes, read, write
from fastgan.utils.old_names import current_names

ROOT = Path(__file__).resolve().parents[2]
TIMES = step_times(SMALL, [(8, 4, False, 1.0), (8, 16, False, 3.0)])


@pytest.mark.parametrize(
    ("micro", "seconds", "note"),
    [
        (4, 1.0, ""),
        (10, 2.0, "linear through micro-batches of 4 and 16"),
        (16, 3.0, ""),
        (28, 5.0, "linear"),
        (1, 0.5, "linear"),
    ],
)
def test_interpolation_over_micro_batches(micro: int, seconds: float, note: str) -> None:
    timing, how = TIMES.at(8, micro, False) or (None, "")
    assert timing is not None and timing.d.seconds + timing.g.seconds == pytest.approx(seconds)
    assert how.startswith(note) and bool(how) == bool(note)
    assert TIMES.at(16, micro, False) is None


def test_a_single_micro_batch_is_scaled() -> None:
    timing, how = replace(TIMES, timings=TIMES.timings[:1]).at(8, 2, False) or (None, "")
    assert timing is not None and timing.d.seconds + timing.g.seconds == pytest.approx(0.5)
    assert how == "scaled from a micro-batch of 4"


def test_a_file_reads_back_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    write(TIMES, str(file))
    assert read(str(file), TIMES.recipe) == TIMES
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(ArgumentError, match=r"--write-step-times .*no/times.json': cannot be written \(No such file"):
        write(TIMES, str(tmp_path / "no" / "times.json"))


def test_the_measured_file_of_the_repository_reads() -> None:
    file = ROOT / "benchmarks" / "results" / "step_times_cpu.json"
    recipe = current_names(json.loads(file.read_text())["recipe"])
    assert isinstance(read(str(file), recipe), StepTimes)


def edited(*path: str | int, value: Any) -> bytes:
    """The file with one value replaced."""
    content = json.loads(json.dumps(TIMES, default=vars))
    target = content
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xff\xfe", "must be a file written by --write-step-times, got '{}'; content: invalid json"),
        (b"[]", "must be a file written by --write-step-times, got '{}'; content: "),
        (b'{"schema": 1}', "must be a file written by --write-step-times, got '{}'; device: field required"),
        (edited("timings", 0, "micro", value=0), "got '{}'; timings.0.micro: input should be greater than 0"),
        (edited("timings", 1, "d", "seconds", value=0.0), "got '{}'; timings.1.d.seconds: input should be greater"),
        (edited("timings", 0, "g", "seconds", value=float("nan")), "got '{}'; timings.0.g.seconds: "),
        (edited("timings", 0, "g", "gradients", value=[]), "got '{}'; timings.0.g.gradients: "),
        (edited("schema", value=9), "'{}': has schema 9; this version reads schema 1"),
        (edited("recipe", "fmap_max", value="a\nb"), r"'{}': was measured with fmap_max 'a\nb'; the run has 8"),
        (edited("recipe", value={}), "'{}': was measured with model None; the run has 'pggan'"),
        (edited("timings", value=[]), "'{}': contains no timings"),
    ],
)
def test_other_content_is_refused_in_one_line(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "times.json"
    file.write_bytes(content)
    with pytest.raises(ArgumentError) as error:
        read(str(file), TIMES.recipe)
    line = str(error.value)
    assert line.startswith("--step-times ") and problem.format(file) in line and len(line.splitlines()) == 1, line
