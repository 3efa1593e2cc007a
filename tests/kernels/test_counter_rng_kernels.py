"""The kernels of random numbers: interpreted, they have the bits of the definition; and compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton_offline import ARCHITECTURES, QUICK, assert_launches_do_not_spill, compiled_cases, running

from fastgan.kernels import counter_rng as kernels
from fastgan.kernels.ahead_of_time import compile_launch, record_launches
from fastgan.utils import counter_kernels
from fastgan.utils.counter_rng import DEFINITION

KEY = -0x6789ABCDEF012345
INDEX = torch.tensor([0, 1, 2, -1, 77, 2**31, 2**40, 2**62, -(2**63)])
SIZES = (1, 2, 5)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has no functions of CUDA's library; NumPy's in their place."""
    functions = SimpleNamespace(
        log=lambda x: tl.log(x), cos=lambda x: tl.cos(x), sin=lambda x: tl.sin(x), sqrt_rn=lambda x: tl.sqrt_rn(x)
    )
    monkeypatch.setattr(kernels, "libdevice", functions)
    monkeypatch.setattr(kernels, "BLOCK", 16)  # several programs, the last one not full


def drawn(name: str, index: Tensor, size: int, key: int = KEY) -> Tensor:
    with running("cpu"):
        found: Tensor = getattr(kernels, name)(key, index, size)
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("index", [INDEX, INDEX[1::2], torch.arange(40, dtype=torch.int32), INDEX[:0]])
def test_interpreted_kernels_draw_the_numbers_of_the_definition(interpreted: None, index: Tensor, size: int) -> None:
    for key in (KEY, 0x7FFFFFFF):
        assert torch.equal(drawn("uniform", index, size, key), DEFINITION["uniform"](key, index, size))
        assert torch.equal(drawn("integers", index, size, key), DEFINITION["integers"](key, index, size))
        found, expected = drawn("normal", index, size, key), DEFINITION["normal"](key, index, size)
        # NumPy's logarithm and cosine differ from torch's by a rounding.
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_interpreted_kernel_on_extreme_bits(interpreted: None) -> None:
    """The largest and smallest radius and angle, which no ordinary draw has."""
    ends = torch.tensor([0, 1, 2**23 - 1])
    bits = (ends[:, None] << 41) + (ends << 1)
    index = counter_kernels.index_of(bits.flatten(), KEY)
    assert torch.equal(drawn("uniform", index, 1), DEFINITION["uniform"](KEY, index, 1))
    torch.testing.assert_close(drawn("normal", index, 2), DEFINITION["normal"](KEY, index, 2), rtol=1e-6, atol=1e-6)


def launches(index: Tensor) -> list[Tensor]:
    return [kernels.uniform(KEY, index, 5), kernels.normal(KEY, index, 512), kernels.integers(KEY, index, 10)]


@pytest.mark.parametrize(
    "architecture", compiled_cases(ARCHITECTURES, share=1, quick=lambda architecture: architecture in QUICK)
)
def test_compiles_without_spills(architecture: str, record_property: Callable[[str, object], None]) -> None:
    index = torch.empty(16, dtype=torch.int64, device="meta")
    uniform, normal, integers = record_launches(architecture, partial(launches, index))
    assert_launches_do_not_spill(architecture, [uniform, integers], record_property)
    # CUDA's cosine and sine keep seven words in local memory to reduce angles beyond 10^5, which there are none of.
    needed = compile_launch(normal, architecture)
    assert needed.spilled <= 32 and needed.registers <= 48


def test_every_draw_is_one_launch() -> None:
    index = torch.empty(16, dtype=torch.int64, device="meta")
    assert len(record_launches("sm_90", partial(launches, index))) == 3
    assert record_launches("sm_90", partial(launches, index[:0])) == []


@pytest.mark.gpu
def test_bits_are_those_of_torch_on_a_gpu() -> None:
    assert counter_kernels.first_difference(kernels, DEFINITION, torch.device("cuda", 0)) is None
