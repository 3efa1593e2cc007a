"""A checkpoint whose two runs of a part take different forms of an op: the right gradient, or an error."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable

import pytest
import torch
from op_calls import CALLS, Call
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint

from fastgan import ops
from fastgan.ops.dispatch import backend
from fastgan.ops.dispatch.backend import PREFERENCE

SMALL, LARGE = (2, 3, 8, 8), (4, 16, 64, 64)


def _behind(call: Call, last: Call) -> Call:
    return lambda x: last(call(x * 1.0))


# Between the op and the input, and behind the op, stand nodes that save tensors of the same shape.
CASES: dict[str, tuple[Call, tuple[int, ...]]] = {
    **{name: (_behind(call, torch.sin), SMALL) for name, call in CALLS.items()},
    **{f"{name}, at the end": (_behind(call, torch.clone), SMALL) for name, call in CALLS.items() if "act" in name},
    **{f"{name}, at the end": (_behind(CALLS[name], torch.clone), SMALL) for name in ("relu", "leaky_relu in place")},
    "bias_act, large": (_behind(ops.bias_act, torch.clone), LARGE),
    "avg_pool2d, large": (_behind(ops.avg_pool2d, torch.sin), LARGE),
    "relu in place, large": (_behind(CALLS["relu in place"], torch.clone), LARGE),
}


def under(form: str) -> contextlib.AbstractContextManager[None]:
    return ops.use_backend(form) if form != "default" else contextlib.nullcontext()


def gradient(f: Callable[[Tensor], Tensor], x: Tensor, forward: str, backward: str) -> Tensor:
    x = x.clone().requires_grad_()
    with under(forward):
        y = checkpoint(f, x, use_reentrant=False).square().sum()
    with under(backward):
        return torch.autograd.grad(y, x)[0]


def runs(f: Callable[[Tensor], Tensor], x: Tensor, form: str) -> bool:
    """Whether this form can run the call here."""
    try:
        with under(form):
            f(x)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", CASES)
def test_a_mix_of_forms_is_right_or_raises(name: str) -> None:
    f, shape = CASES[name]
    x = torch.randn(shape)
    forms = [form for form in ("default", *PREFERENCE) if runs(f, x, form)]
    assert {"default", "torch"} <= set(forms)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf).square().sum(), leaf)
    for forward, backward in itertools.product(forms, forms):
        try:
            found = gradient(f, x, forward, backward)
        except CheckpointError:
            assert forward != backward
            continue
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_backward_on_another_thread_sees_the_block_of_the_forward() -> None:
    """As on a GPU, whose backward pass autograd runs on a thread of its own."""
    f, shape = CASES["bias_act"]
    x = torch.randn(shape, requires_grad=True)
    found: list[Tensor] = []
    with ops.use_backend("torch"):
        y = checkpoint(f, x, use_reentrant=False).square().sum()
        thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(y, x)))
        thread.start()
        thread.join()
        elsewhere: list[str | None] = []
        other = threading.Thread(target=lambda: elsewhere.append(backend.OPS["bias_act"].requested(None)))
        other.start()
        other.join()
    (expected,) = torch.autograd.grad(f(x).square().sum(), x)
    torch.testing.assert_close(found, [expected])
    assert elsewhere == [None]  # a thread that is in no backward pass has requests of its own alone


def test_open_blocks_end_in_any_order() -> None:
    first, second = ops.use_backend("torch"), ops.use_backend("lean")
    first.__enter__()
    second.__enter__()
    second.__exit__(None, None, None)
    first.__exit__(None, None, None)
    assert backend._open == []
