"""A checkpoint whose two runs of a part take different forms of an op: the right gradient, or an error."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint

from fastgan import ops
from fastgan.ops.dispatch import backend
from fastgan.ops.dispatch.backend import PREFERENCE

generator = torch.Generator().manual_seed(0)
W, BIAS = torch.randn(8, 3, 3, 3, generator=generator) * 0.3, torch.randn(3, generator=generator)
SMALL, LARGE, ROWS = (2, 3, 8, 8), (4, 16, 64, 64), (2, 20, 8)

# Between the op and the input, and behind the op, stand nodes that save or do not save tensors of the same shape.
CASES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "bias_act": (lambda x: ops.bias_act(x * 1.0), SMALL),
    "bias_act, large": (lambda x: ops.bias_act(x * 1.0), LARGE),
    "bias_act with bias": (lambda x: ops.bias_act(x * 1.0, BIAS), SMALL),
    "bias_act relu": (lambda x: ops.bias_act(x * 1.0, None, "relu"), SMALL),
    "bias_act silu": (lambda x: ops.bias_act(x * 1.0, None, "silu"), SMALL),
    "bias_act tanh": (lambda x: ops.bias_act(x * 1.0, None, "tanh"), SMALL),
    "conv2d": (lambda x: ops.conv2d(x * 1.0, W, padding=1).sin(), SMALL),
    "conv_transpose2d": (lambda x: ops.conv_transpose2d(x * 1.0, W.transpose(0, 1)).sin(), SMALL),
    "pixel_norm": (lambda x: ops.pixel_norm(x * 1.0).sin(), SMALL),
    "minibatch_stddev": (lambda x: ops.minibatch_stddev(x * 1.0).sin(), SMALL),
    "bias_act_pixel_norm": (lambda x: ops.bias_act_pixel_norm(x * 1.0).sin(), SMALL),
    "avg_pool2d": (lambda x: ops.avg_pool2d(x * 1.0).sin(), SMALL),
    "avg_pool2d, large": (lambda x: ops.avg_pool2d(x * 1.0).sin(), LARGE),
    "attention": (lambda x: ops.scaled_dot_product_attention(x * 1.0, x * 2.0, x * 3.0).sin(), ROWS),
    "upsample_conv2d": (lambda x: ops.upsample_conv2d(x * 1.0, W).sin(), SMALL),
    "relu": (lambda x: ops.relu(x * 1.0), SMALL),
    "relu in place": (lambda x: ops.relu(x * 1.0, inplace=True), LARGE),
    "leaky_relu": (lambda x: ops.leaky_relu(x * 1.0), SMALL),
    "leaky_relu in place": (lambda x: ops.leaky_relu(x * 1.0, 0.2, True), SMALL),
    "hardtanh": (lambda x: ops.hardtanh(x * 1.0), SMALL),
    "hardtanh in place": (lambda x: ops.hardtanh(x * 1.0, inplace=True), SMALL),
    "relu6": (lambda x: ops.relu6(x * 1.0), SMALL),
    "threshold": (lambda x: ops.threshold(x * 1.0, 0.1, 0.3), SMALL),
    "threshold in place": (lambda x: ops.threshold(x * 1.0, 0.1, 0.3, True), SMALL),
    "abs": (lambda x: ops.abs(x * 1.0), SMALL),
    "prelu": (lambda x: ops.prelu(x * 1.0, BIAS), SMALL),
    "reflection": (lambda x: ops.pad(x * 1.0, (1, 1, 1, 1), "reflect").sin(), SMALL),
    "replication": (lambda x: ops.pad(x * 1.0, (1, 1, 1, 1), "replicate").sin(), SMALL),
    "max_pool2d": (lambda x: ops.max_pool2d(x * 1.0, 2).sin(), SMALL),
    "max_pool2d, same size": (lambda x: ops.max_pool2d(x * 1.0, 3, 1, 1).sin(), SMALL),
    "avg_pool2d, same size": (lambda x: ops.avg_pool2d(x * 1.0, 3, 1, 1).sin(), SMALL),
    "adaptive_avg_pool2d": (lambda x: ops.adaptive_avg_pool2d(x * 1.0, 8).sin(), SMALL),
    "adaptive_max_pool2d": (lambda x: ops.adaptive_max_pool2d(x * 1.0, 8).sin(), SMALL),
    "interpolate": (lambda x: ops.interpolate(x * 1.0, (8, 8), mode="area").sin(), SMALL),
    "blur": (lambda x: ops.blur(x * 1.0).sin(), SMALL),
    "conv2d_downsample": (lambda x: ops.conv2d_downsample(x * 1.0, W).sin(), SMALL),
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
