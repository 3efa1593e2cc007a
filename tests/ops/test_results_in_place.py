"""A result may be changed in place before the backward, in every form that runs on a CPU and at every size."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from op_calls import CALLS, Call
from torch import Tensor

from fastgan import ops
from fastgan.ops import autograd
from fastgan.ops.autograd import kept
from fastgan.ops.dispatch.backend import PREFERENCE

LEAST, SMALL, LARGE = (2, 3, 8, 8), (2, 3, 64, 64), (4, 3, 128, 128)  # below 2^12, below and above 2^17 elements
generator = torch.Generator().manual_seed(0)


def bias(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, x.shape[1], dtype=x.dtype)


CASES: dict[str, Call] = CALLS | {
    f"bias_act {act} gain {gain}": lambda x, act=act, gain=gain: ops.bias_act(x, bias(x), act, gain=gain)
    for act in ("linear", "relu", "lrelu", "tanh", "sigmoid", "silu")
    for gain in (1.0, 1.5)
}


def derivatives(f: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Value and derivatives to second order, with a weight before the op."""
    x, weight = x.clone().requires_grad_(), torch.tensor(1.25, requires_grad=True)
    y = f(x * weight)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return [y, g, *torch.autograd.grad(g.square().sum(), (x, weight))]


@pytest.mark.parametrize("name", CASES)
def test_a_result_may_be_changed_in_place(name: str) -> None:
    """As a copy of it, in all forms; where torch's own function raises as well, as of relu, this one works too."""
    call, ran = CASES[name], []
    formats = (torch.contiguous_format, torch.channels_last)
    for shape, form, memory_format in itertools.product((LEAST, LARGE), (None, *PREFERENCE), formats):
        if form == "torch":
            continue
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=memory_format)
        with ops.use_backend(form):
            try:
                expected = derivatives(lambda x: call(x).clone().mul_(0.5).add_(1), x)
            except ValueError as error:  # a form that does not run here
                assert "can run this call" in str(error)
                continue
            found = derivatives(lambda x: call(x).mul_(0.5).add_(1), x)
        torch.testing.assert_close(found, expected)
        ran.append(form)
    assert ran.count(None) == 4


@pytest.mark.parametrize("shape", [LEAST, SMALL, LARGE])
def test_a_residual_sum_in_place(shape: tuple[int, ...]) -> None:
    def block(act: Call) -> Call:
        def run(x: Tensor) -> Tensor:
            y = act(x)
            y += x
            y *= 0.5**0.5
            return y

        return run

    x = torch.randn(shape, generator=generator)
    found = derivatives(block(lambda x: ops.bias_act(x, bias(x))), x)
    expected = derivatives(block(lambda x: F.leaky_relu(x + bias(x)[:, None, None], 0.2)), x)
    torch.testing.assert_close(found, expected)


def test_relu_works_where_its_input_is_changed_in_place() -> None:
    def run(relu: Call) -> list[Tensor]:
        x = torch.linspace(-1, 1, 24).view(2, 3, 4).requires_grad_()
        inner = x * 2
        y = relu(inner)
        inner.add_(5)
        return list(torch.autograd.grad((y * inner).sum(), x))

    torch.testing.assert_close(run(ops.relu), run(F.relu))


def test_what_is_kept_takes_no_memory_until_it_is_changed() -> None:
    y = torch.arange(6.0)
    address = y.data_ptr()
    copy = kept(y)
    for reader in (torch.sum, torch.exp, lambda t: t.view(2, 3) @ t.view(3, 2), lambda t: F.leaky_relu(t)):
        reader(y), reader(copy)
    assert torch._C._is_cow_tensor(y) and torch._C._is_cow_tensor(copy)
    y.mul_(2)
    assert copy.tolist() == [0, 1, 2, 3, 4, 5] and y.tolist() == [0, 2, 4, 6, 8, 10]
    assert copy.data_ptr() == address
    del copy
    other = kept(y)
    del other
    address = y.data_ptr()  # nothing else has it: it is not copied
    y.mul_(2)
    assert y.data_ptr() == address


@pytest.mark.parametrize("op", [lambda x: ops.bias_act(x, bias(x)), ops.pixel_norm])
def test_layers_read_a_result_without_a_copy(op: Call) -> None:
    """The layers that follow an op in networks; one that asks for an address to write to would make the copy."""
    x = torch.randn(4, 16, 64, 64, generator=generator).requires_grad_()
    w, shift = torch.randn(16, 16, 3, 3, generator=generator), torch.zeros(16, requires_grad=True)
    readers: dict[str, Call] = {
        "conv2d": lambda y: ops.conv2d(y, w, padding=1),
        "torch's conv2d": lambda y: F.conv2d(y, w, padding=1),
        "strided": lambda y: F.conv2d(y, w, stride=2),
        "avg_pool2d": lambda y: ops.avg_pool2d(y),
        "minibatch_stddev": lambda y: ops.minibatch_stddev(y),
        "pixel_norm": lambda y: ops.pixel_norm(y),
        "bias_act": lambda y: ops.bias_act(y, shift),
        "linear": lambda y: F.linear(y.flatten(1)[:, :64], w.view(-1, 64)),
        "interpolate": lambda y: ops.interpolate(y, scale_factor=2),
        "batch norm": lambda y: F.batch_norm(y, None, None, training=True),
        "sum": lambda y: y + x,
        "max_pool2d": lambda y: ops.max_pool2d(y, 2),
        "pad": lambda y: ops.pad(y, (1, 1, 1, 1), "reflect"),
    }
    for name, reader in readers.items():
        y = op(x)
        reader(y).square().sum().backward()
        assert torch._C._is_cow_tensor(y), name


def test_without_copies_on_write_a_change_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: never a wrong gradient."""
    on_meta = torch.empty(2, device="meta")
    assert kept(on_meta) is on_meta
    monkeypatch.setattr(autograd, "lazy_clone", None)
    x = torch.randn(LARGE, generator=generator).requires_grad_()
    for op in (ops.pixel_norm, lambda x: ops.bias_act(x, bias(x))):
        y = op(x).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    torch.testing.assert_close(
        torch.autograd.grad(ops.bias_act(x).add_(1).sum(), x), torch.autograd.grad(F.leaky_relu(x, 0.2).sum(), x)
    )
