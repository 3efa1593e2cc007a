"""Two processes under DeepSpeed end with the weights of one process on the same global batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
from safetensors.torch import load_file

SCRIPT = Path(ranks.__file__)
CASES = [(variant, zero, a) for variant in ("wgan-gp", "pggan") for zero in (0, 1, 2) for a in (1, 2)]
CASES += [("dcgan", 0, 1), ("dcgan", 2, 2)]  # with batch norm in the critic and a penalty on real images alone
# At 8 px a batch that one of the two ranks takes alone, in one micro-batch or two.
IDLE = [(zero, a) for zero in (0, 1, 2) for a in (1, 2)]


def _idle(name: str, zero: int, accumulation: int) -> dict:
    case = ranks.case(name, "pggan", zero, accumulation)
    return {**case, "flags": [*case["flags"], "--batch-at", "8", str(accumulation)]}


def _channels_last(name: str, variant: str, accumulation: int) -> dict:
    case = ranks.case(name, variant, 0, accumulation)
    return {**case, "flags": [*case["flags"], "--memory-format", "channels_last"]}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("ranks")
    pairs = sorted({(v, a) for v, _, a in CASES})
    one = [ranks.case(f"one-{v}-{a}", v, 0, ranks.one_process(v, 2, a)) for v, a in pairs]
    one += [_idle(f"one-idle-{a}", 0, a) for a in (1, 2)]
    one += [_channels_last(f"one-last-{v}", v, ranks.one_process(v, 2, 1)) for v in ("wgan-gp", "pggan")]
    ranks.launch(SCRIPT, one, out, 1)
    two = [ranks.case(f"two-{v}-{z}-{a}", v, z, a) for v, z, a in CASES]
    two += [_idle(f"two-idle-{z}-{a}", z, a) for z, a in IDLE]
    two += [_channels_last(f"two-last-{v}", v, 1) for v in ("wgan-gp", "pggan")]
    ranks.launch(SCRIPT, two, out, 2)
    return {file.stem: load_file(file) for file in out.glob("*.safetensors")}


@pytest.mark.parametrize(("variant", "zero", "accumulation"), CASES)
def test_two_ranks_equal_one_process(weights: dict, variant: str, zero: int, accumulation: int) -> None:
    one = weights[f"one-{variant}-{accumulation}"]
    two = weights[f"two-{variant}-{zero}-{accumulation}"]
    ranks.assert_same_weights(one, two)
    if variant == "pggan":
        assert "g.to_rgb.8.weight" in one  # the run has grown


@pytest.mark.parametrize("variant", ["wgan-gp", "pggan"])
def test_channels_last(weights: dict, variant: str) -> None:
    ranks.assert_same_weights(weights[f"one-last-{variant}"], weights[f"two-last-{variant}"])


@pytest.mark.parametrize(("zero", "accumulation"), IDLE)
def test_ranks_without_a_share_change_nothing(weights: dict, zero: int, accumulation: int) -> None:
    ranks.assert_same_weights(weights[f"one-idle-{accumulation}"], weights[f"two-idle-{zero}-{accumulation}"])
