from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastgan import ops
from fastgan.ops.dispatch import backend
from fastgan.ops.dispatch.backend import Implementation, Op


@pytest.fixture
def op() -> Iterator[Op]:
    """An op with a kernel for float32, the default from 100 elements on, and a kernel that cannot run here."""

    def float32_only(*inputs: Tensor) -> str | None:
        wrong = [str(x.dtype) for x in inputs if x.dtype != torch.float32]
        return f"it takes float32, not {wrong[0]}" if wrong else None

    def large(*inputs: Tensor) -> str | None:
        return "plain PyTorch is faster below 100 elements" if sum(x.numel() for x in inputs) < 100 else None

    yield Op(
        "an_op",
        {
            "triton": Implementation(unsupported_reason=lambda *inputs: "there is no GPU", note="Triton"),
            "cpp": Implementation(unsupported_reason=float32_only, not_preferred_reason=large, note="C++"),
        },
    )
    del backend.OPS["an_op"]


SMALL, LARGE, DOUBLE = torch.zeros(3), torch.zeros(300), torch.zeros(300, dtype=torch.float64)


def test_first_supported_and_preferred_implementation_runs(op: Op) -> None:
    assert op.choose(None, LARGE) == "cpp"
    assert op.choose(None, SMALL) == "torch"
    assert op.choose(None, DOUBLE) == "torch"


def test_requested_backend_runs_or_raises(op: Op) -> None:
    assert op.choose("cpp", SMALL) == "cpp"
    assert op.choose("torch", LARGE) == "torch"
    with pytest.raises(ValueError, match=r"^backend 'triton': there is no GPU; can run this call: cpp, torch$"):
        op.choose("triton", LARGE)
    with pytest.raises(
        ValueError, match=r"^backend 'cpp': it takes float32, not torch.float64; can run this call: torch$"
    ):
        op.choose("cpp", DOUBLE)
    with pytest.raises(ValueError, match=r"^backend must be triton, cpp, torch for an_op, got 'gpu'$"):
        op.choose("gpu", LARGE)


def test_use_backend_applies_to_every_op_that_has_it(op: Op) -> None:
    other = backend.OPS["gradient_penalty"]
    with ops.use_backend("cpp"):
        assert op.choose(None, SMALL) == "cpp"
        assert other.choose(None, SMALL) == "torch"
        assert op.choose("torch", LARGE) == "torch"
        with ops.use_backend(an_op="torch"):
            assert op.choose(None, LARGE) == "torch"
            with ops.use_backend("cpp"):
                assert op.choose(None, SMALL) == "cpp"
        with pytest.raises(ValueError, match=r"^backend 'cpp': "):
            op.choose(None, DOUBLE)
    assert op.choose(None, SMALL) == "torch"


def test_use_backend_is_undone_by_an_exception_and_checks_names(op: Op) -> None:
    with pytest.raises(RuntimeError, match="mine"), ops.use_backend(an_op="torch"):
        raise RuntimeError("mine")
    assert op.choose(None, LARGE) == "cpp"
    with (
        pytest.raises(ValueError, match=r"^backend must be one of triton, cuda, .* lean, torch, got 'flash'$"),
        ops.use_backend("flash"),
    ):
        pass
    with pytest.raises(ValueError, match=r"^op must be one of .*, got 'softmax'$"), ops.use_backend(softmax="torch"):
        pass


def test_explanations_begin_with_the_default_and_give_reasons(op: Op) -> None:
    found = ops.backends("an_op", SMALL)
    assert list(found) == ["torch", "triton", "cpp"]
    assert found["triton"] == "Triton; cannot run: there is no GPU"
    assert found["cpp"] == "C++; can run, not the default: plain PyTorch is faster below 100 elements"
    assert ops.backends("an_op", LARGE) == {
        "cpp": "C++; by the shipped table",
        "triton": "Triton; cannot run: there is no GPU",
        "torch": "the reference, in plain PyTorch; can run, not the default: cpp comes first",
    }
    with pytest.raises(ValueError, match=r"^op must be one of .*pixel_norm.*, got 'softmax'$"):
        ops.backends("softmax")


def test_transforms_and_compilers_get_plain_pytorch(op: Op) -> None:
    seen = []

    def f(x: Tensor) -> Tensor:
        seen.append(op.choose(None, x))
        return x.sum()

    torch.func.grad(f)(LARGE)
    torch.vmap(f)(torch.zeros(2, 300))
    assert seen == ["torch", "torch"]

    with forward_ad.dual_level():
        assert op.choose(None, LARGE) == "torch"
        op.supports_forward_mode = True
        assert op.choose(None, LARGE) == "cpp"

    def g(x: Tensor) -> Tensor:
        return x + 1 if op.choose(None, x) == "torch" else x + 2

    assert torch.compile(g, backend="eager", fullgraph=True)(LARGE)[0] == 1


def test_backends_knows_every_public_op() -> None:
    public = {name for name in ops.__all__ if name not in ("backends", "use_backend")}
    assert public == set(backend.OPS)
    assert all("torch" in ops.backends(name) for name in public)
