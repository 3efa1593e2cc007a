"""PyTorch's own sample inputs of every function with a name of torch's: value, gradient and second derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from fastgan import functional as L
from fastgan import ops
from fastgan.ops import norms

pytest.importorskip("expecttest", reason="PyTorch's sample inputs need it: pip install 'fastgan[dev]'")
op_db = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
# That import freezes torch.backends for the process, and with it what `fastgan train` and other tests set there.
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True

NAMES = [
    *("adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "conv2d", "conv_transpose2d", "hardtanh"),
    *("group_norm", "instance_norm", "layer_norm"),
    *("leaky_relu", "linear", "max_pool2d", "prelu", "relu", "relu6", "scaled_dot_product_attention", "threshold"),
]
VARIANTS = [("pad", "reflect"), ("pad", "replicate"), ("pad", "circular"), ("pad", "constant"), ("interpolate", "area")]
VARIANTS += [("interpolate", "nearest"), ("interpolate", "bilinear")]
CASES = [*((name, "") for name in NAMES), *VARIANTS, ("abs", "")]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex128)
# Samples in the default suite of each op: the first ones, and others at a distance.
FEW = 6


@pytest.fixture(autouse=True)
def norms_of_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples are smaller than what the norms' own forms run by default."""
    monkeypatch.setattr(norms, "SMALL_NUMEL", 0)


def info(name: str, variant: str) -> Any:
    for op in op_db:
        if op.name in (f"nn.functional.{name}", name) and op.variant_test_name == variant:
            return op
    raise AssertionError(f"PyTorch has no samples of {name} {variant}")


def samples(op: Any, dtype: torch.dtype, every: bool) -> Iterator[Any]:
    torch.manual_seed(0)
    found = list(op.sample_inputs("cpu", dtype, requires_grad=True))
    return iter(found if every else found[:: max(1, len(found) // FEW)])


def derivatives(function: Callable[..., Any], sample: Any) -> list[Tensor] | str:
    """The results, the gradients and the gradients of those; or "refused"."""

    def fresh(value: Any) -> Any:
        return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    x, args, kwargs = (tree_map(fresh, part) for part in (sample.input, sample.args, sample.kwargs))
    leaves = [t for t in tree_flatten((x, args, kwargs))[0] if isinstance(t, Tensor) and t.requires_grad]
    inplace = kwargs.get("inplace", False)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            torch.manual_seed(0)  # dropout
            result = function(x * 1.0 if inplace else x, *args, **kwargs)
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return "refused"
    results = [y for y in tree_flatten(result)[0] if y.is_floating_point() or y.is_complex()]
    value = sum((y * y.conj()).real.sum() for y in results)
    first = _gradients(value, leaves, create_graph=True)
    second = _gradients(sum((g * g.conj()).real.sum() for g in first), leaves)
    return [*results, *first, *second]


def _gradients(value: Any, leaves: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    """Zeros for a leaf that the value does not depend on."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return [torch.zeros_like(t) for t in leaves]
    found = torch.autograd.grad(value, leaves, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)]


def check(name: str, variant: str, dtype: torch.dtype, every: bool) -> int:
    op = info(name, variant)
    if dtype not in op.supported_dtypes("cpu"):
        return 0
    ours = ops.abs if name == "abs" else getattr(L, name)
    theirs = torch.abs if name == "abs" else getattr(F, name)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}.get(dtype, 1e-8)
    count = 0
    for sample in samples(op, dtype, every):
        found, expected = derivatives(ours, sample), derivatives(theirs, sample)
        if isinstance(found, str) or isinstance(expected, str):
            assert found == expected, sample
            continue
        for a, b in zip(found, expected, strict=True):
            if dtype == torch.float16:  # squares overflow, in PyTorch more often
                a, b = a[b.isfinite()], b[b.isfinite()]
            scale = max(1.0, b.abs().nan_to_num(0, 0, 0).max().item()) if b.numel() else 1.0
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
        count += 1
    return count


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_few_samples(name: str, variant: str) -> None:
    assert check(name, variant, torch.float64, every=False) > 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_every_sample(name: str, variant: str, dtype: torch.dtype) -> None:
    check(name, variant, dtype, every=True)
