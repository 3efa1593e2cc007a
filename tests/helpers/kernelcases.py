"""Tests of the kernels of feature-map ops: which run here, inputs in every layout, errors against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan.ops.dispatch.backend import OPS

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
    """Skip a test whose implementation cannot run here: no compiler, no such kernel."""
    name, device = kernel
    reason = OPS[op.__name__].implementations[name].unsupported_reason(*inputs)
    if reason is not None:
        pytest.skip(f"{name} on {device}: {reason}")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, drawn in float64 whatever the dtype."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


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


def rms(x: Tensor) -> float:
    """Root mean square; NaN is infinity."""
    value = x.detach().cpu().double().square().mean().sqrt().item() if x.numel() else 0.0
    return value if value == value else float("inf")


def error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference; NaN is infinity."""
    assert actual.shape == expected.shape
    return rms(actual.detach().cpu().double() - expected)


class _Rounding(TorchDispatchMode):
    """Changes every result of an op by a random relative error of about `STEP`."""

    STEP = 1e-6

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if all(value.alias_info is None for value in op._schema.returns):  # neither a view nor in place
            for x in result if isinstance(result, tuple | list) else (result,):
                if isinstance(x, Tensor) and x.is_floating_point() and 0 not in x.stride():
                    noise = torch.empty(x.shape, dtype=x.dtype).normal_(generator=self.generator)
                    x.mul_(noise.mul_(self.STEP).add_(1))
        return result


def rounding_effects(run: Callable[[], Sequence[Tensor | None]], exact: Sequence[Tensor | None]) -> list[float]:
    """What rounding costs: the root mean square change of each result of `run`, per relative error of every step.

    `run` computes `exact` in float64 on the CPU and converts its inputs there. A result that is small because its terms
    cancel has an error of the size of its terms, which this measures; its error relative to its own size means nothing.
    """
    draws = 8 if sum(x.numel() for x in exact if x is not None) < 10_000 else 2
    squares = [0.0] * len(exact)
    for seed in range(draws):
        with _Rounding(seed):
            results = run()
        for i, (result, expected) in enumerate(zip(results, exact, strict=True)):
            if result is not None and expected is not None:
                squares[i] += error(result, expected) ** 2
    return [(total / draws) ** 0.5 / _Rounding.STEP for total in squares]


# What `check_errors` allows in any case, in units of `rounding_effects` times the precision of the dtype: the root mean
# square error of few numbers varies more.
FEW, MANY = {torch.float32: 4.0, torch.bfloat16: 1.0, torch.float16: 1.0}, 0.25


def check_errors(
    results: Sequence[Tensor | None],
    exact: Sequence[Tensor | None],
    effects: Sequence[float],
    dtype: torch.dtype,
    plain: Sequence[Tensor | None] | None = None,
) -> None:
    """Every result has at most twice the error of `plain` in the same dtype or, if that is more, of a few roundings."""
    for i, (result, expected, effect) in enumerate(zip(results, exact, effects, strict=True)):
        if result is None:
            assert expected is None or not expected.any(), f"result {i} is missing"
            continue
        assert result.dtype == dtype and expected is not None
        limit = (FEW[dtype] if expected.numel() < 1000 else MANY) * torch.finfo(dtype).eps * effect
        if plain is not None and (native := plain[i]) is not None:
            limit = max(limit, 2 * error(native, expected))
        found = error(result, expected)
        assert found <= limit, f"result {i}: error {found:.2g} exceeds {limit:.2g}; the result is {rms(expected):.2g}"


def all_orders(f: Op, inputs: list[Tensor], dy: Tensor, cotangents: list[Tensor]) -> list[Tensor | None]:
    """y; its gradients for dy in every input; their gradients for `cotangents` in dy and every input, and in dy alone,
    for which an op may have a shorter way."""
    y = f(*inputs)
    first = grad(y, inputs, dy, create_graph=True)
    second = grad(first, [dy, *inputs], cotangents, allow_unused=True, retain_graph=True)
    alone = grad(first, [dy], cotangents)
    return [y, *first, *second, *alone]


def derivatives(op: Callable[..., Tensor], inputs: list[Tensor], order: int) -> list[Tensor]:
    """Value and derivatives up to `order` of a function that is nonlinear in every input."""
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
    **arguments: Any,
) -> None:
    """`check_errors` for every result of `all_orders`, beside plain PyTorch in the same dtype.

    `inputs` are float64; all implementations get their values rounded to `dtype`, the first in `layout`, and so do
    gradients.
    """
    name, device = kernel
    rounded = [laid_out(x.to(dtype), layout if i == 0 else "contiguous") for i, x in enumerate(inputs)]
    shape = op(*rounded, backend="torch", **arguments).shape
    seeds = [random(*s, seed=10 + i).to(dtype) for i, s in enumerate([shape, *(x.shape for x in inputs)])]
    seeds = [laid_out(s, layout if i < 2 else "contiguous") for i, s in enumerate(seeds)]

    def run(backend: str, place: str, cast: torch.dtype) -> list[Tensor | None]:
        made = [x.to(place, cast).detach().requires_grad_() for x in rounded]
        dy, *cotangents = (s.to(place, cast) for s in seeds)
        return all_orders(
            lambda *x: op(*x, backend=backend, **arguments), made, dy.detach().requires_grad_(), cotangents
        )

    need(kernel, op, rounded[0].to(device))
    exact, native = run("torch", "cpu", torch.float64), run("torch", "cpu", dtype)
    effects = rounding_effects(lambda: run("torch", "cpu", torch.float64), exact)
    check_errors(run(name, device, dtype), exact, effects, dtype, native)


def penalty_weight_gradients(op: Op, dtype: torch.dtype, device: str, **arguments: Any) -> list[Tensor]:
    """Weight gradients of a gradient-norm penalty through two convolutions, each followed by `op`, with constant seeds.

    A backward whose derivative is missing or wrong changes these numbers without an error.
    """
    x, w1 = random(4, 3, 6, 5, seed=1), random(8, 3, 3, 3, seed=2) / 5
    channels = op(torch.zeros(4, 8, 6, 5), backend="torch").shape[1]
    w2, w3 = random(8, channels, 3, 3, seed=3) / 8, random(channels * 30, seed=4)
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

    def reference() -> list[Tensor]:
        return penalty_weight_gradients(op, torch.float64, "cpu", backend="torch", **arguments)

    exact = reference()
    assert all(x.abs().max() > 1e-3 for x in exact)
    found = penalty_weight_gradients(op, torch.float32, device, backend=name, **arguments)
    check_errors(found, exact, rounding_effects(reference, exact), torch.float32)


def check_threads(op: Op, *inputs: Tensor, **arguments: Any) -> None:
    """One and two threads give the same bits."""
    need(("cpp", "cpu"), op, *inputs)
    shape = op(*inputs, backend="torch", **arguments).shape
    dy, *cotangents = (random(*s, seed=20 + i).float() for i, s in enumerate([shape, *(x.shape for x in inputs)]))
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
    """The schema is right, and the fake kernel returns the shapes, strides and dtypes of the real one."""
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def check_compiled(op: Op, *inputs: Tensor, **arguments: Any) -> None:
    """Forward and backward under torch.compile, with the default and with the kernel requested by name."""
    need(("cpp", "cpu"), op, *inputs)
    made = [x.detach().requires_grad_() for x in inputs]
    torch.compiler.reset()  # else what was compiled for other ops counts against a limit
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
    dy = random(*y.shape, seed=30).to(y).requires_grad_()
    first = grad(y, made, dy, create_graph=True)
    second = grad(sum(g.square().sum() for g in first), made[0], create_graph=True)[0]
    for target in (made[0], dy):
        with pytest.raises(NotImplementedError, match=f"third derivative of {op.__name__} is not implemented; backend"):
            grad(second.square().sum(), target, retain_graph=True)


def saved_bytes(f: Callable[[], Tensor]) -> int:
    """Bytes that the graph of a call keeps."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        f()
    return sum(kept.values())
