"""Several ranks, under DeepSpeed or plain torch, end with the weights of one process on the same global batch."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file

from fastgan import checkpoint

SCRIPT = Path(ranks.__file__)
CASES = [(variant, zero, a) for variant in ("wgan-gp", "pggan") for zero in (0, 1, 2) for a in (1, 2)]
CASES += [("dcgan", 0, 1), ("dcgan", 2, 2)]  # with batch norm in the critic and a penalty on real images alone
CASES += [("r3gan", 2, 2)]  # real images in the generator's step
TORCH = [*((variant, a) for variant in ("wgan-gp", "pggan") for a in (1, 2)), ("r3gan", 2)]
# At 8 px one of the two ranks takes the whole batch, in one micro-batch or two.
IDLE = [(zero, a) for zero in (0, 1, 2) for a in (1, 2)]


def _idle(name: str, zero: int, accumulation: int) -> dict:
    case = ranks.case(name, "pggan", zero, accumulation)
    return {**case, "flags": [*case["flags"], "--batch-at", "8", str(accumulation)]}


def _channels_last(name: str, variant: str, accumulation: int) -> dict:
    case = ranks.case(name, variant, 0, accumulation)
    return {**case, "flags": [*case["flags"], "--memory-format", "channels_last"]}


def _augmented(name: str, variant: str, accumulation: int) -> dict:
    """With a strength that changes after every second or fourth step."""
    case = ranks.case(name, variant, 0, accumulation)
    flags = "--batch 64 --kimg 1.28 --fade-kimg 0.32 --stable-kimg 0.64 --augment ada --augment-kimg 20".split()
    if variant == "wgan-gp":
        flags = [*flags[:4], *flags[8:]]
    return {**case, "flags": [*case["flags"], *flags], "strength": 0.4}


# A penalty in steps of its own, by finite differences whose step is large beside the rounding of scores.
LAZY = {
    "wgan-gp": "--penalty-every 3",
    "r3gan": "--penalty-every 2 --penalty-method finite-difference --penalty-sigma 0.3",
}


def _lazy(name: str, variant: str, zero: int, accumulation: int) -> dict:
    case = ranks.case(name, variant, zero, accumulation)
    return {**case, "flags": [*case["flags"], *LAZY[variant].split()]}


# All of four ranks share the batches at 4 and 16 px; two of them share those of two images at 8 px.
FOUR = "--batch 16 --batch-at 8 2 --resolution 16 --fade-kimg 0.008 --stable-kimg 0.032 --kimg 0.112".split()
FOUR += "--lr-g 1e-4 --lr-d 1e-4".split()
STOPPED = "--log-kimg 0.002 --checkpoint-kimg 0.01 --evaluate-kimg 0.016 --evaluate-n 16".split()


def _four(name: str, accumulation: int) -> dict:
    case = ranks.case(name, "pggan", 0, accumulation)
    return {**case, "flags": [*case["flags"], *FOUR], "steps": 25}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Of all cases, by name. One of pytest's workers trains them, the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"
    out.mkdir(exist_ok=True)
    with (out / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "done").exists():
            _train_all(out)
            (out / "done").touch()
    return {file.stem: load_file(file) for file in out.glob("*.safetensors")}


def _train_all(out: Path) -> None:
    pairs = sorted({(v, a) for v, _, a in CASES})
    one = [ranks.case(f"one-{v}-{a}", v, 0, ranks.one_process(v, 2, a)) for v, a in pairs]
    one += [_idle(f"one-idle-{a}", 0, a) for a in (1, 2)]
    one += [_channels_last(f"one-last-{v}", v, ranks.one_process(v, 2, 1)) for v in ("wgan-gp", "pggan")]
    one += [_augmented(f"one-augmented-{v}", v, ranks.one_process(v, 2, 1)) for v in ("wgan-gp", "pggan")]
    one += [_lazy(f"one-lazy-{v}", v, 0, ranks.one_process(v, 2, 2)) for v in LAZY]
    ranks.launch(SCRIPT, one, out, 1)
    two = [ranks.case(f"two-{v}-{z}-{a}", v, z, a) for v, z, a in CASES]
    two += [_idle(f"two-idle-{z}-{a}", z, a) for z, a in IDLE]
    two += [_channels_last(f"two-last-{v}", v, 1) for v in ("wgan-gp", "pggan")]
    two += [_augmented(f"two-augmented-{v}", v, 1) for v in ("wgan-gp", "pggan")]
    two += [_lazy(f"two-lazy-{v}-{z}", v, z, 2) for v in LAZY for z in (0, 2)]
    ranks.launch(SCRIPT, two, out, 2)
    torch_cases = [ranks.case(f"torch-{v}-{a}", v, 0, a) for v, a in TORCH]
    torch_cases += [_idle(f"torch-idle-{a}", 0, a) for a in (1, 2)]
    torch_cases += [_augmented(f"torch-augmented-{v}", v, 1) for v in ("wgan-gp", "pggan")]
    torch_cases += [_channels_last(f"torch-last-{v}", v, 1) for v in ("wgan-gp", "pggan")]
    torch_cases += [_lazy(f"torch-lazy-{v}", v, 0, 2) for v in LAZY]
    ranks.launch(SCRIPT, torch_cases, out, 2, engine="torch")


@pytest.mark.parametrize(("variant", "zero", "accumulation"), CASES)
def test_two_ranks_equal_one_process(weights: dict, variant: str, zero: int, accumulation: int) -> None:
    one = weights[f"one-{variant}-{accumulation}"]
    two = weights[f"two-{variant}-{zero}-{accumulation}"]
    ranks.assert_same_weights(one, two)
    if variant == "pggan":
        assert "g.to_rgb.8.weight" in one  # the run has grown


@pytest.mark.parametrize(("variant", "accumulation"), TORCH)
def test_two_ranks_of_plain_torch_equal_one_process(weights: dict, variant: str, accumulation: int) -> None:
    ranks.assert_same_weights(weights[f"one-{variant}-{accumulation}"], weights[f"torch-{variant}-{accumulation}"])


@pytest.mark.parametrize("engine", ["torch-lazy-{}", "two-lazy-{}-0", "two-lazy-{}-2"])
@pytest.mark.parametrize("variant", LAZY)
def test_penalty_steps_of_two_ranks_equal_those_of_one_process(weights: dict, variant: str, engine: str) -> None:
    ranks.assert_same_weights(weights[f"one-lazy-{variant}"], weights[engine.format(variant)])


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("four")
    stopped = _four("stopped", 1)
    stopped = {**stopped, "flags": [*stopped["flags"], *STOPPED], "stop": 60}
    ranks.launch(SCRIPT, [_four("one", 2)], out, 1)
    ranks.launch(SCRIPT, [_four("four", 1), stopped], out, 4)
    return out


@pytest.mark.parametrize("engine", ["two", "torch"])
@pytest.mark.parametrize("variant", ["wgan-gp", "pggan"])
def test_channels_last(weights: dict, variant: str, engine: str) -> None:
    ranks.assert_same_weights(weights[f"one-last-{variant}"], weights[f"{engine}-last-{variant}"])


@pytest.mark.parametrize("engine", ["two", "torch"])
@pytest.mark.parametrize("variant", ["wgan-gp", "pggan"])
def test_augmented(weights: dict, variant: str, engine: str) -> None:
    """The strength comes from the scores of all ranks, and is the same to the bit."""
    one, several = weights[f"one-augmented-{variant}"], weights[f"{engine}-augmented-{variant}"]
    strength = one["augmentation.strength"]
    assert 0 < strength != torch.tensor(0.4) and torch.equal(several["augmentation.strength"], strength)
    ranks.assert_same_weights(one, several)


@pytest.mark.parametrize(("zero", "accumulation"), IDLE)
def test_idle_rank_changes_nothing(weights: dict, zero: int, accumulation: int) -> None:
    ranks.assert_same_weights(weights[f"one-idle-{accumulation}"], weights[f"two-idle-{zero}-{accumulation}"])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_idle_rank_of_plain_torch_changes_nothing(weights: dict, accumulation: int) -> None:
    ranks.assert_same_weights(weights[f"one-idle-{accumulation}"], weights[f"torch-idle-{accumulation}"])


@pytest.mark.slow
def test_idle_ranks_rejoin_at_the_next_stage(four: Path) -> None:
    """Meanwhile the two ranks that share a batch average among themselves."""
    ranks.assert_same_weights(load_file(four / "one.safetensors"), load_file(four / "four.safetensors"))


@pytest.mark.slow
def test_idle_ranks_have_the_weights_at_a_save(four: Path) -> None:
    """Stopped by a signal to an idle rank, at 8 px, after logs, an evaluation and a checkpoint."""
    first = load_file(four / "stopped-0.safetensors")
    assert "0.to_rgb.8.weight" in first and first["ema.steps"] > 15
    for rank in (1, 2, 3):
        other = load_file(four / f"stopped-{rank}.safetensors")
        assert all(torch.equal(value, other[name]) for name, value in first.items())
    saved = checkpoint.read(checkpoint.existing(four / "stopped")[-1], "--resume")
    assert 60 <= saved.meta["images"] <= 64
    assert all(torch.equal(first[f"2.{name}"], value) for name, value in saved.generator().items())
    rows = [json.loads(line) for line in (four / "stopped" / "metrics.jsonl").read_text().splitlines()]
    slowest = {row["slowest_rank"] for row in rows if row.get("resolution") == 8}
    assert slowest and slowest <= {0, 1}
    assert (four / "stopped" / "evaluation.jsonl").is_file()
