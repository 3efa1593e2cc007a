"""A run moves from two hosts to one and to four, and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks
import resumes
import torch
from hosts import Hosts

from fastgan.training.distributed.process_group import ProcessGroup

SCRIPT = Path(resumes.__file__)
VARIANTS = ("wgan-gp", "pggan")


@pytest.mark.slow
def test_a_run_moves_from_two_hosts_to_one_and_four_and_back(make_hosts: Callable[..., Hosts], tmp_path: Path) -> None:
    hosts = make_hosts(4)

    def on(count: int, *cases: tuple[str | None, str, int, int]) -> None:
        """Resume runs (from, to, ZeRO stage, steps) on `count` hosts, for each variant."""
        made = [
            resumes.case(before and f"{before}-{variant}", f"{to}-{variant}", variant, zero if count > 1 else 0, steps)
            for before, to, zero, steps in cases
            for variant in VARIANTS
        ]
        if count == 1:
            for case in made:
                resumes.resume(case, ProcessGroup(0, 1, torch.device("cpu"), "torch", "one process"), tmp_path)
            return
        file = tmp_path / "cases.json"
        file.write_text(json.dumps(made))
        hosts.hostfile = hosts.write_hostfile(tmp_path / "hosts", range(count))
        job = hosts.deepspeed(SCRIPT, str(file), str(tmp_path))
        output = job.communicate(timeout=200)[0]
        assert job.returncode == 0, output

    on(2, (None, "two", 2, 12))
    on(1, ("two", "two-on-one", 0, 0), ("two", "one", 0, 4))
    on(4, ("two", "two-on-four", 1, 0), ("two", "four", 2, 4))
    on(2, ("one", "one-on-two", 0, 0), ("four", "four-on-two", 1, 0), ("two", "stayed", 2, 4))
    for variant in VARIANTS:
        for before, after in (("two", "one"), ("two", "four"), ("one", "two"), ("four", "two")):
            resumes.assert_moved(tmp_path / f"{before}-{variant}", tmp_path / f"{before}-on-{after}-{variant}")
        for other in ("one", "four") if variant == "pggan" else ("one",):
            (moved, there), (stayed, here) = (
                resumes.stored(tmp_path / f"{name}-{variant}") for name in (other, "stayed")
            )
            assert there == here
            ranks.assert_same_weights(stayed, moved)
    hosts.close()
