"""Bytes that leave a host in a training step, counted on its network interface, against those of a ring all-reduce."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import collectives
import pytest
from hosts import Hosts

SCRIPT = Path(collectives.__file__)
STEPS = 10
# 1.9 million parameters: 7 MB for each of two optimizer steps.
FLAGS = "--width 64 --max-width 256 --latent 64 --batch 8 --resolution 16 --n-critic 1".split()


def case(zero: int, accumulation: int) -> dict:
    flags = [*FLAGS, "--zero", str(zero), "--accumulation", str(accumulation)]
    return {"name": f"{zero}-{accumulation}", "variant": "wgan-gp", "flags": flags, "steps": STEPS}


def sent(hosts: Hosts, out: Path, cases: list[dict]) -> dict[str, float]:
    """Bytes that a host sent in each case, as a multiple of 2 (n-1)/n times the parameters' bytes in each step."""
    file = out / "cases.json"
    file.write_text(json.dumps(cases))
    job = hosts.deepspeed(SCRIPT, str(file), str(out))
    output = job.communicate(timeout=280)[0]
    assert job.returncode == 0, output
    counts = [json.loads((out / f"counts-{rank}.json").read_text()) for rank in range(hosts.count)]
    ratios = {}
    for name, first in counts[0].items():
        nbytes = STEPS * (first["trained"]["d"] + first["trained"]["g"])
        ring = 2 * (hosts.count - 1) / hosts.count * nbytes
        ratios[name] = sum(count[name]["wire"] for count in counts) / hosts.count / ring
    return ratios


@pytest.mark.slow
@pytest.mark.parametrize(("count", "zero"), [(2, 1.25), (4, 1.125)])
def test_bytes_on_the_wire(make_hosts: Callable[..., Hosts], tmp_path: Path, count: int, zero: float) -> None:
    """`zero`: the multiple under ZeRO 1 and 2, whose reductions gloo sends as a reduce-scatter and then to one rank.

    The quick test_communication.py counts the bytes of the tensors.
    """
    hosts = make_hosts(count)
    ratios = sent(hosts, tmp_path, [case(0, 1), case(0, 2), case(1, 1), case(2, 1)])
    hosts.close()
    print({name: round(ratio, 3) for name, ratio in ratios.items()})
    assert ratios == pytest.approx({"0-1": 1.0, "0-2": 1.0, "1-1": zero, "2-1": zero}, rel=0.1)
