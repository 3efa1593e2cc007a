"""Several hosts, started by DeepSpeed over ssh, end with the weights of one process on the same global batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks
import torch
from hosts import Hosts
from safetensors.torch import load_file
from torch import Tensor

from fastgan.training.world import World

SCRIPT = Path(ranks.__file__)
Results = dict[str, dict[str, Tensor]]


def _trained(hosts: Hosts, out: Path, cases: list[dict]) -> Results:
    """What the cases end with on all hosts in one job; nothing of it is left running."""
    file = out / f"cases{hosts.count}.json"
    file.write_text(json.dumps(cases))
    job = hosts.deepspeed(SCRIPT, str(file), str(out))
    output = job.communicate(timeout=280)[0]
    assert job.returncode == 0, output
    assert [hosts.processes(host) for host in range(hosts.count)] == [{}] * hosts.count
    return {case["name"]: load_file(out / f"{case['name']}.safetensors") for case in cases}


def _alone(out: Path, cases: list[dict]) -> Results:
    """What the cases end with in this process."""
    world = World(0, 1, torch.device("cpu"), "torch", "alone")
    for case in cases:
        ranks.train(case, world, out)
    return {case["name"]: load_file(out / f"{case['name']}.safetensors") for case in cases}


def test_two_hosts_equal_one_process(make_hosts: Callable[..., Hosts], tmp_path: Path) -> None:
    """A growing run under ZeRO 2; the slow test has all."""
    hosts = make_hosts(2)
    one = _alone(tmp_path, [ranks.case("one", "pggan", 0, 1)])["one"]
    two = _trained(hosts, tmp_path, [ranks.case("two", "pggan", 2, 1)])["two"]
    ranks.assert_same_weights(one, two)
    assert "g.to_rgb.8.weight" in one  # the run has grown
    hosts.close()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_hosts_equal_one_process(make_hosts: Callable[..., Hosts], tmp_path: Path, count: int) -> None:
    hosts = make_hosts(count)
    both = [(v, a) for v in ("wgan-gp", "pggan") for a in (1, 2)]
    one = _alone(tmp_path, [ranks.case(f"one-{v}-{a}", v, 0, ranks.one_process(v, count, a)) for v, a in both])
    many = _trained(hosts, tmp_path, [ranks.case(f"many-{v}-{a}-{z}", v, z, a) for v, a in both for z in (0, 1, 2)])
    for name, weights in many.items():
        ranks.assert_same_weights(one[name.replace("many", "one")[:-2]], weights)
    assert len(many) == 12
    hosts.close()
