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
    world = ProcessGroup(0, 1, torch.device("cpu"), "torch", "alone")
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


def _case(name: str, variant: str, zero: int, accumulation: int, parts: int) -> dict:
    """With batches that are cut into at most `parts`. Of two images the minibatch standard deviation is nearly their
    difference, with a kink at none: there weights that begin half a last bit apart end 2e-5 apart in one process alone,
    so that a batch which would be cut so small is doubled, and the comparison made where it says something."""
    case = ranks.case(name, variant, zero, accumulation)
    larger = ["--batch", "32", "--kimg", "0.64"] if variant == "pggan" and parts > 4 else []
    return {**case, "flags": [*case["flags"], *larger]}


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_hosts_equal_one_process(make_hosts: Callable[..., Hosts], tmp_path: Path, count: int) -> None:
    hosts = make_hosts(count)
    both = [(v, a) for v in ("wgan-gp", "pggan") for a in (1, 2)]
    # A batch of pggan's that is not cut below four images is the same for one process as a whole.
    alone = {(v, a): a if v == "pggan" else ranks.one_process(v, count, a) for v, a in both}
    one = _alone(tmp_path, [_case(f"one-{v}-{a}", v, 0, alone[v, a], count * a) for v, a in both])
    cases = [_case(f"many-{v}-{a}-{z}", v, z, a, count * a) for v, a in both for z in (0, 1, 2)]
    many = _trained(hosts, tmp_path, cases)
    for name, weights in many.items():
        ranks.assert_same_weights(one[name.replace("many", "one")[:-2]], weights)
    assert len(many) == 12
    hosts.close()
