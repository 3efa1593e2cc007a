"""Two processes under DeepSpeed end with the weights of one process on the same global batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

RANKS = Path(__file__).with_name("ranks.py")
STEPS = {"wgan-gp": 10, "dcgan": 10, "pggan": 16}
FLAGS = {
    # The paper's optimiser: rounding that differs in the last bit grows with the learning rate and the steps.
    "wgan-gp": "--width 8 --max-width 16 --latent 8 --batch 8 --resolution 16 --n-critic 2 --lr-g 1e-4 --lr-d 1e-4 "
    "--beta2 0.9",
    "dcgan": "--width 8 --max-width 16 --latent 8 --batch 8 --resolution 16 --lr-g 1e-4 --lr-d 1e-4 "
    "--regulariser zero-centered --penalty-weight 1",
    # Grows from 4 to 8 px after 10 of its 16 steps. The bias of a Wasserstein critic's output has no gradient but the
    # drift's; at the preset's 0.001 that is the rounding error of a sum of +-1, which Adam then normalises, so the
    # comparison is made where the gradient is one.
    "pggan": "--fmap-base 32 --fmap-max 8 --latent 8 --batch 16 --resolution 8 --kimg 0.32 --drift 1 "
    "--lr-g 1e-3 --lr-d 1e-3",
}

CASES = [(variant, zero, a) for variant in ("wgan-gp", "pggan") for zero in (0, 1, 2) for a in (1, 2)]
CASES += [("dcgan", 0, 1), ("dcgan", 2, 2)]  # with batch norm in the critic and a penalty on real images alone


def _case(name: str, variant: str, zero: int, accumulation: int) -> dict:
    # One layout for all: convolutions round differently in another, and Adam with beta1 = 0 amplifies that.
    flags = [
        *FLAGS[variant].split(),
        "--memory-format",
        "contiguous",
        "--zero",
        str(zero),
        "--accumulation",
        str(accumulation),
    ]
    return {"name": name, "variant": variant, "flags": flags, "steps": STEPS[variant]}


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _run(cases: list[dict], out: Path, world: int) -> None:
    file = out / f"cases{world}.json"
    file.write_text(json.dumps(cases))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if world > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world)}
    processes = []
    for rank in range(world):
        own = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {})
        processes.append(
            subprocess.Popen([sys.executable, str(RANKS), str(file), str(out)], env=own, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True)
        )  # fmt: skip
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("ranks")
    # Batch norm (wgan-gp's generator, both networks of dcgan) is per rank, so one process takes the ranks' shares as
    # micro-batches. pggan has none, and its minibatch-stddev groups fall within the ranks' strided slices: it takes the
    # batch whole.
    pairs = sorted({(v, a) for v, _, a in CASES})
    one = [_case(f"one-{v}-{a}", v, 0, a if v == "pggan" else 2 * a) for v, a in pairs]
    _run(one, out, 1)
    two = [_case(f"two-{v}-{z}-{a}", v, z, a) for v, z, a in CASES]
    _run(two, out, 2)
    return {file.stem: load_file(file) for file in out.glob("*.safetensors")}


@pytest.mark.parametrize(("variant", "zero", "accumulation"), CASES)
def test_two_ranks_equal_one_process(weights: dict, variant: str, zero: int, accumulation: int) -> None:
    one = weights[f"one-{variant}-{accumulation}"]
    two = weights[f"two-{variant}-{zero}-{accumulation}"]
    assert one.keys() == two.keys()
    compared = 0
    for name, expected in one.items():
        if "running_" in name or "num_batches" in name:
            continue  # batch-norm statistics are a rank's own
        difference = (expected - two[name]).norm() / expected.norm().clamp_min(1e-30)
        assert difference < 1e-5, f"{name}: {difference:.1e}"
        compared += 1
    assert compared > 20
    if variant == "pggan":
        assert "g.to_rgb.8.weight" in one  # the run has grown
