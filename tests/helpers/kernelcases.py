"""Kernels of ops on feature maps against float64: which run here, inputs in every layout, both derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from fastgan import ops

Op = Callable[..., Tensor]

gpu = [pytest.mark.gpu]
# (implementation, device); `kernel` takes one of them, "cuda" and "triton" with `pytest -m gpu`.
KERNELS = [
    pytest.param(("cpp", "cpu"), id="cpp"),
    pytest.param(("cuda", "cuda"), id="cuda", marks=gpu),
    pytest.param(("triton", "cuda"), id="triton", marks=gpu),
]
each_kernel = pytest.mark.parametrize("kernel", KERNELS)

SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (3, 1, 4, 5),
    (1, 17, 3, 3),
    (1, 2, 33, 34),  # planes longer than a tile
    (2, 600, 3, 5),  # many features
    (2, 40, 19, 20),
    (5, 130),
    (2, 5, 3),
    (2, 3, 2, 2, 3),
]
LAYOUTS = ["contiguous", "channels_last", "sliced", "transposed", "expanded", "offset"]


def dtypes(device: str) -> list[torch.dtype]:
    return [torch.float32, torch.bfloat16] + [torch.float16] * (device == "cuda")


def need(kernel: tuple[str, str], op: Op, *inputs: Tensor) -> None:
    """Skip where the implementation cannot run at all: no compiler, no such kernel."""
    name, device = kernel
    reason = ops.backend.OPS[op.__name__].implementations[name].unsupported_reason(*inputs)
    if reason is not None:
        pytest.skip(f"{name} on {device}: {reason}")


def random(shape: Sequence[int], seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The numbers of x (of its first sample, in "expanded") in the named layout."""
    if layout == "channels_last" and x.ndim in (4, 5):
        return x.to(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    if layout == "sliced":
        return torch.stack([x, x + 1], dim=-1)[..., 0]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "offset":  # no alignment beyond that of an element
        moved = x.new_empty(x.numel() + 1)[1:].view(x.shape)
        return moved.copy_(x)
    return x


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative root mean square, absolute where everything expected is 0; NaN is inf."""
    assert actual.shape == expected.shape
    scale = expected.square().mean().sqrt().item() or 1.0
    found = (actual.detach().cpu().double() - expected).square().mean().sqrt().item() / scale
    return found if found == found else float("inf")


# What a rounding may cost: with few numbers the native error is small by luck now and then.
FLOOR = {torch.float32: 6e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}
FEW = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def all_orders(f: Op, inputs: list[Tensor], dy: Tensor, cotangents: list[Tensor]) -> list[Tensor | None]:
    """y; its gradients for dy in every input; their gradients for `cotangents` in dy and every input, and in dy alone,
    for which an op may have a shorter way."""
    y = f(*inputs)
    first = grad(y, inputs, dy, create_graph=True)
    second = grad(first, [dy, *inputs], cotangents, allow_unused=True, retain_graph=True)
    alone = grad(first, [dy], cotangents)
    return [y, *first, *second, *alone]


def derivatives(op: Callable[..., Tensor], inputs: list[Tensor], order: int) -> list[Tensor]:
    """Values and derivatives of a function that curves in every input, up to `order`, each through the one before."""
    y = op(*inputs)
    found = [y]
    value = (y * y).sum()
    for i in range(order):
        gradients = torch.autograd.grad(value, inputs, create_graph=i + 1 < order)
        found += gradients
        value = sum(((g * g).sum() for g in gradients), torch.zeros((), dtype=y.dtype))
    return found


def check_against_float64(
    op: Op,
    kernel: tuple[str, str],
    inputs: list[Tensor],
    dtype: torch.dtype,
    layout: str = "contiguous",
    floors: dict[torch.dtype, float] | None = None,
    **arguments: Any,
) -> None:
    """Every result of `all_orders` has at most twice the error of plain PyTorch in the same dtype.

    `inputs` are float64; all forms get their values rounded to `dtype`, the first in `layout`, and so do gradients.
    """
    name, device = kernel
    floors = floors or (FLOOR if inputs[0].numel() > 5000 else FEW)
    rounded = [laid_out(x.to(dtype), layout if i == 0 else "contiguous") for i, x in enumerate(inputs)]
    shape = op(*rounded, backend="torch", **arguments).shape
    seeds = [random(s, seed=10 + i).to(dtype) for i, s in enumerate([shape, *(x.shape for x in inputs)])]
    seeds = [laid_out(s, layout if i < 2 else "contiguous") for i, s in enumerate(seeds)]

    def run(backend: str, place: str, cast: torch.dtype) -> list[Tensor | None]:
        made = [x.to(place, cast).detach().requires_grad_() for x in rounded]
        dy, *cotangents = (s.to(place, cast) for s in seeds)
        return all_orders(
            lambda *x: op(*x, backend=backend, **arguments), made, dy.detach().requires_grad_(), cotangents
        )

    need(kernel, op, rounded[0].to(device))
    expected, native = run("torch", "cpu", torch.float64), run("torch", "cpu", dtype)
    for at, (found, plain, exact) in enumerate(zip(run(name, device, dtype), native, expected, strict=True)):
        if found is None:
            assert exact is None or not exact.any(), f"result {at} is missing"
            continue
        assert found.dtype == dtype and exact is not None and plain is not None
        limit = max(2 * error(plain, exact), floors[dtype])
        assert error(found, exact) <= limit, f"result {at}: error {error(found, exact):.2g}, may be {limit:.2g}"


def penalty_weight_gradients(op: Op, dtype: torch.dtype, device: str, **arguments: Any) -> list[Tensor]:
    """Weight gradients of a gradient-norm penalty through two convolutions, each followed by `op`, with constant seeds.

    A backward that cannot be differentiated, or is differentiated wrongly, changes these numbers and nothing else.
    """
    x, w1 = random((4, 3, 6, 5), 1), random((8, 3, 3, 3), 2) / 5
    channels = op(torch.zeros(4, 8, 6, 5), backend="torch").shape[1]
    w2, w3 = random((8, channels, 3, 3), 3) / 8, random((channels * 30,), 4)
    x, w1, w2, w3 = (t.to(device, dtype).requires_grad_() for t in (x, w1, w2, w3))
    y = op(torch.nn.functional.conv2d(x, w1, padding=1), **arguments)
    y = op(torch.nn.functional.conv2d(y, w2, padding=1), **arguments)
    (gradient,) = grad(y.flatten(1) @ w3, x, torch.ones(4, device=device, dtype=dtype), create_graph=True)
    penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
    return list(grad(penalty, [w1, w2, w3]))


def check_penalty(op: Op, kernel: tuple[str, str], **arguments: Any) -> None:
    """`penalty_weight_gradients` of a float32 kernel against plain PyTorch in float64."""
    name, device = kernel
    need(kernel, op, torch.zeros(1, 1, 1, 1, device=device))
    expected = penalty_weight_gradients(op, torch.float64, "cpu", backend="torch", **arguments)
    found = penalty_weight_gradients(op, torch.float32, device, backend=name, **arguments)
    for actual, exact in zip(found, expected, strict=True):
        assert exact.abs().max() > 1e-3
        assert error(actual, exact) < 5e-6


def check_threads(op: Op, *inputs: Tensor, **arguments: Any) -> None:
    """One and two threads give the same bits."""
    need(("cpp", "cpu"), op, *inputs)
    shape = op(*inputs, backend="torch", **arguments).shape
    dy, *cotangents = (random(s, 20 + i).float() for i, s in enumerate([shape, *(x.shape for x in inputs)]))
    dy.requires_grad_()
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made = [x.detach().requires_grad_() for x in inputs]
            found.append(all_orders(lambda *x: op(*x, backend="cpp", **arguments), made, dy, cotangents))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert (one is None and two is None) or torch.equal(one, two)


def opcheck(op: Any, arguments: tuple[Any, ...]) -> None:
    """The schema tells the truth, and the fake kernel gives the shapes, strides and dtypes of the real one."""
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def check_compiled(op: Op, *inputs: Tensor, **arguments: Any) -> None:
    """Forward and backward under torch.compile, as chosen there and with the kernel by name."""
    need(("cpp", "cpu"), op, *inputs)
    made = [x.detach().requires_grad_() for x in inputs]
    torch._dynamo.reset()  # else what was compiled for other ops counts against a limit
    for backend in (None, "cpp"):

        def f(*x: Tensor, backend: str | None = backend) -> Tensor:
            return op(*x, backend=backend, **arguments) * 2

        compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
        for way in (compiled, f):
            y = way(*made)
            found = [y, *grad(y.sin().sum(), made)]
            if way is compiled:
                expected = found
            else:
                torch.testing.assert_close(found, expected)


def check_third_order(op: Op, kernel: tuple[str, str], *inputs: Tensor, raises: bool = True, **arguments: Any) -> None:
    """A third derivative, in an input or in the first gradient's seed, raises in a kernel."""
    name, device = kernel
    made = [x.to(device, torch.float32).requires_grad_() for x in inputs]
    need(kernel, op, made[0])
    y = op(*made, backend=name, **arguments)
    dy = random(y.shape, 30).to(y).requires_grad_()
    first = grad(y, made, dy, create_graph=True)
    second = grad(sum(g.square().sum() for g in first), made[0], create_graph=True)[0]
    for target in (made[0], dy):
        with pytest.raises(NotImplementedError, match=f"third derivative of {op.__name__} is not implemented; backend"):
            grad(second.square().sum(), target, retain_graph=True)


def saved_bytes(f: Callable[[], Tensor]) -> int:
    """Memory that the graph of a call keeps."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        f()
    return sum(kept.values())
