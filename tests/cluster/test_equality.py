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

from fastgan.training.distributed.process_group import ProcessGroup

SCRIPT = Path(ranks.__file__)
Results = dict[str, dict[str, Tensor]]


def _trained(hosts: Hosts, out: Path, cases: list[dict]) -> Results:
    """The results of the cases on all hosts, in one job that leaves no process."""
    file = out / f"cases{hosts.count}.json"
    file.write_text(json.dumps(cases))
    job = hosts.deepspeed(SCRIPT, str(file), str(out))
    output = job.communicate(timeout=280)[0]
    assert job.returncode == 0, output
    assert [hosts.processes(host) for host in range(hosts.count)] == [{}] * hosts.count
    return {case["name"]: load_file(out / f"{case['name']}.safetensors") for case in cases}


def _in_one_process(out: Path, cases: list[dict]) -> Results:
    """The results of the cases in this process."""
    world = ProcessGroup(0, 1, torch.device("cpu"), "torch", "one process")
    for case in cases:
        ranks.train(case, world, out)
    return {case["name"]: load_file(out / f"{case['name']}.safetensors") for case in cases}


@pytest.mark.slow
def test_two_hosts_equal_one_process(make_hosts: Callable[..., Hosts], tmp_path: Path) -> None:
    """A growing run under ZeRO 2; the slow test has all cases."""
    hosts = make_hosts(2)
    one = _in_one_process(tmp_path, [ranks.case("one", "pggan", 0, 1)])["one"]
    two = _trained(hosts, tmp_path, [ranks.case("two", "pggan", 2, 1)])["two"]
    ranks.assert_same_weights(one, two)
    assert "g.to_rgb.8.weight" in one  # the run has grown
    hosts.close()


def _case(name: str, variant: str, zero: int, accumulation: int, parts: int) -> dict:
    """A case whose batch is cut into `parts`.

    The minibatch standard deviation of two images is nearly the absolute value of their difference, which has a kink at
    0: even in one process, weights that start half a bit apart end 2e-5 apart. So a pggan batch that would be cut into
    parts of two images is doubled.
    """
    case = ranks.case(name, variant, zero, accumulation)
    larger = ["--batch", "32", "--kimg", "0.64"] if variant == "pggan" and parts > 4 else []
    return {**case, "flags": [*case["flags"], *larger]}


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_hosts_equal_one_process(make_hosts: Callable[..., Hosts], tmp_path: Path, count: int) -> None:
    hosts = make_hosts(count)
    both = [(v, a) for v in ("wgan-gp", "pggan") for a in (1, 2)]
    # pggan in parts of at least four images gives the same as the whole batch in one process.
    accumulations = {(v, a): a if v == "pggan" else ranks.one_process(v, count, a) for v, a in both}
    one = _in_one_process(tmp_path, [_case(f"one-{v}-{a}", v, 0, accumulations[v, a], count * a) for v, a in both])
    cases = [_case(f"many-{v}-{a}-{z}", v, z, a, count * a) for v, a in both for z in (0, 1, 2)]
    many = _trained(hosts, tmp_path, cases)
    for name, weights in many.items():
        ranks.assert_same_weights(one[name.replace("many", "one")[:-2]], weights)
    assert len(many) == 12
    hosts.close()
