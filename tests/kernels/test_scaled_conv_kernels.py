"""scaled_conv kernels, and the ops on them, against float64; and compiled ahead of time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_offline import (
    DEVICES,
    DTYPES,
    QUICK,
    WITH_PRODUCTS,
    assert_accurate,
    assert_compiles_without_spills,
    compiled_cases,
    random,
    running,
)

from fastgan import ops
from fastgan.kernels import launch, scaled_conv, tiles
from fastgan.ops import scaled_conv as op_module
from fastgan.ops.bias_act import ACTS
from fastgan.ops.dispatch.backend import Implementation

OPS = ("scaled_conv_down", "scaled_conv_up", "scaled_conv_weight")
# (N, C, K, H, W) of the small images. Interpreted with tiles of 16 x 16; on a GPU with those of tiles.json.
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 5, 2, 3), (1, 17, 2, 3, 5), (3, 2, 19, 4, 1), (1, 16, 32, 4, 4)]
LARGE = [(16, 16, 16, 8, 8), (3, 59, 111, 13, 7), (8, 128, 64, 32, 32), (2, 512, 512, 4, 4), (1, 3, 100, 65, 63)]
EVERY_SHAPE = [*SHAPES, *(pytest.param(*shape, marks=pytest.mark.gpu) for shape in LARGE)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def inputs(n: int, c: int, k: int, h: int, w: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """large, small, weight."""
    sizes = [(n, c, 2 * h, 2 * w), (n, k, h, w), (k, c, 4, 4)]
    large, small, weight = (random(*size, seed=i).to(device, dtype) for i, size in enumerate(sizes))
    return large, small, weight


def plain(large: Tensor, small: Tensor, w: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The results of `down`, `up` and `weight`, by PyTorch in `dtype`."""
    large, small, w = (x.to(dtype) for x in (large, small, w))
    gw = torch.nn.grad.conv2d_weight(large, w.shape, small, stride=2, padding=1)
    return [F.conv2d(large, w, stride=2, padding=1), F.conv_transpose2d(small, w, stride=2, padding=1), gw]


def ours(large: Tensor, small: Tensor, w: Tensor) -> list[Tensor]:
    device = large.device.type
    tile = tiles.Tile(16, 16, 4, 1, 16)
    with running(device), tiles.override(dict.fromkeys(OPS, tile) if device == "cpu" else {}):
        return [scaled_conv.down(large, w), scaled_conv.up(small, w), scaled_conv.weight(small, large)]


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def compare(large: Tensor, small: Tensor, w: Tensor) -> list[Tensor]:
    results = ours(large, small, w)
    exact, simple = (plain(large, small, w, dtype) for dtype in (torch.float64, w.dtype))
    for name, a, b, c in zip(OPS, results, exact, simple, strict=True):
        assert_accurate(a, b, c, name, (large, small, w))
    return results


@pytest.mark.parametrize(("device", "dtype"), DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("n", "c", "k", "h", "w"), EVERY_SHAPE)
def test_products_are_as_accurate_as_pytorch(
    device: str, dtype: torch.dtype, layout: torch.memory_format, n: int, c: int, k: int, h: int, w: int
) -> None:
    large, small, weight = inputs(n, c, k, h, w, device, dtype)
    down, up, _ = compare(large.contiguous(memory_format=layout), small.contiguous(memory_format=layout), weight)
    assert down.is_contiguous(memory_format=layout) and up.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("device", DEVICES)
def test_any_strides(device: str) -> None:
    large, small, w = inputs(2, 4, 3, 3, 2, device, torch.float32)
    with_gaps = torch.full((2, 4, 6, 8), torch.nan, device=device)
    with_gaps[..., 1::2] = large
    compare(with_gaps[..., 1::2], small[:1, :, :1].expand(2, 3, 3, 2), w.transpose(2, 3))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("act", ["linear", "relu", "lrelu"])
def test_down_and_up_apply_bias_and_act(device: str, act: str) -> None:
    large, small, w = inputs(2, 3, 5, 2, 3, device, torch.float32)
    code = ACTS.index(act)
    for name, x, channels, stage in (("down", large, 5, 0), ("up", small, 3, 1)):
        bias = random(channels, seed=9).to(device, torch.float32)
        tile = tiles.Tile(16, 16, 4, 1, 16)
        with running(device), tiles.override(dict.fromkeys(OPS, tile) if device == "cpu" else {}):
            y = getattr(scaled_conv, name)(x, w, bias, code, 0.1, 1.5)
        expected = []
        for dtype in (torch.float64, torch.float32):
            z = plain(large, small, w, dtype)[stage] + bias.to(dtype).view(-1, 1, 1)
            slope = {"linear": 1.0, "relu": 0.0, "lrelu": 0.1}[act]
            expected.append(torch.where(z < 0, z * slope, z) * 1.5)
        assert_accurate(y, *expected, name, (large, small, w, bias))


@pytest.mark.parametrize("device", DEVICES)
def test_weight_gradient_is_summed_in_parts(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    large, small, w = inputs(3, 2, 3, 11, 13, device, torch.float32)
    seen: list[int] = []
    empty = torch.empty

    def watched(*shape: int, **options: object) -> Tensor:
        seen.append(shape[0])
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", watched)
    compare(large, small, w)
    assert seen[-1] > 1


@pytest.mark.parametrize("device", DEVICES)
def test_bit_identical_between_runs_and_with_64_bit_offsets(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs(2, 5, 3, 5, 4, device, torch.float16)
    first, again = ours(*arguments), ours(*arguments)
    monkeypatch.setattr(scaled_conv, "needs_int64_offsets", lambda *layouts, dims: True)
    monkeypatch.setattr(scaled_conv, "_plan", scaled_conv._plan.__wrapped__)  # what is cached has 32 bits
    for a, b, c in zip(first, again, ours(*arguments), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


SETTINGS = {  # what a user sets in torch.backends: what convolutions and matrix products then are
    "cudnn.conv.fp32_precision = 'ieee'": "ieee ieee",
    "cudnn.conv.fp32_precision = 'tf32'": "tf32 ieee",
    "cuda.matmul.fp32_precision = 'tf32'": "tf32 tf32",  # TF32 is cuDNN's default
    "cudnn.fp32_precision = 'tf32'": "tf32 tf32",
    "fp32_precision = 'tf32'": "tf32 tf32",
    "fp32_precision = 'ieee'": "ieee ieee",
    "cudnn.allow_tf32 = False": "ieee ieee",
    "cudnn.allow_tf32 = False; backends.fp32_precision = 'tf32'": "tf32 tf32",
    "cudnn.allow_tf32 = False; backends.cuda.matmul.allow_tf32 = True": "ieee tf32",
}


def test_float32_precision_follows_torch() -> None:
    """Whichever of torch's settings a user sets: each in a process of its own, as some cannot be taken back."""
    code = f"""
import os
from torch import backends
from fastgan.kernels.launch import float32_precision
if os.fork() == 0:
    backends.fp32_precision = "ieee"
    print(backends.cudnn.conv.fp32_precision, flush=True)
    os._exit(0)
os.wait()
for setting in {list(SETTINGS)!r}:
    if os.fork() == 0:
        exec("backends." + setting)
        print(float32_precision("conv"), float32_precision("matmul"), flush=True)
        os._exit(0)
    os.wait()
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    of_parent, *lines = found.stdout.splitlines()
    # torch 2.11 keeps cuDNN's default of its own when only the parent is set, and says so.
    expected = {**SETTINGS, "fp32_precision = 'ieee'": f"{of_parent} ieee"}
    assert of_parent in ("ieee", "tf32") and dict(zip(SETTINGS, lines, strict=True)) == expected


def derivatives(name: str, act: str, arguments: list[Tensor], backend: str) -> list[Tensor]:
    """Output, first derivatives, and the derivatives of the sum of their squares."""
    y = getattr(ops, name)(*arguments, act, 0.3, 1.5, backend=backend)
    seed = random(*y.shape, seed=7).to(y.device, y.dtype).requires_grad_()
    first = torch.autograd.grad(y, arguments, seed, create_graph=True)
    penalty = sum((g.square().mean() for g in first), torch.zeros((), device=y.device))
    second = torch.autograd.grad(penalty, [seed, *arguments], allow_unused=True)
    return [y.detach(), *(g.detach() for g in first), *(g for g in second if g is not None and g.any())]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("act", ["linear", "lrelu"])
@pytest.mark.parametrize("name", ["upsample_conv2d", "conv2d_downsample"])
def test_ops_and_derivatives(name: str, act: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for op in (op_module.UPSAMPLE_CONV2D, op_module.CONV2D_DOWNSAMPLE):  # without the check for a GPU
        monkeypatch.setitem(op.implementations, "triton", Implementation())
    sizes = [(2, 3, 4, 2), (5, 3, 3, 3), (5,)]
    exact, plain, mine = (
        [random(*size, seed=i).to(device, dtype).requires_grad_() for i, size in enumerate(sizes)]
        for dtype in (torch.float64, torch.float32, torch.float32)
    )
    with running(device), tiles.override(dict.fromkeys(OPS, tiles.Tile(16, 16, 4, 1, 16)) if device == "cpu" else {}):
        results = derivatives(name, act, mine, "triton")
    expected, simple = derivatives(name, act, exact, "torch"), derivatives(name, act, plain, "torch")
    assert len(results) == 7  # y, three first derivatives, those of the seed, the input and the weight
    for i, (a, b, c) in enumerate(zip(results, expected, simple, strict=True)):
        assert_accurate(a, b, c, f"{name} {i}", mine)


@pytest.mark.parametrize("device", DEVICES)
def test_only_needed_products_are_computed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for op in (op_module.UPSAMPLE_CONV2D, op_module.CONV2D_DOWNSAMPLE):
        monkeypatch.setitem(op.implementations, "triton", Implementation())
    calls: list[str] = []

    def counted(name: str, product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def count(*arguments: object) -> Tensor:
            calls.append(name)
            return product(*arguments)

        return count

    for name in ("down", "up", "weight"):
        monkeypatch.setattr(scaled_conv, name, counted(name, getattr(scaled_conv, name)))
    x, w = (random(*size, seed=1).to(device, torch.float32).requires_grad_() for size in ((1, 2, 2, 2), (3, 2, 3, 3)))
    with running(device), tiles.override(dict.fromkeys(OPS, tiles.Tile(16, 16, 4, 1, 16)) if device == "cpu" else {}):
        with torch.no_grad():
            ops.upsample_conv2d(x, w, backend="triton")
        assert calls == ["up"]
        calls.clear()
        y = ops.upsample_conv2d(x, w, act="lrelu", backend="triton")
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        torch.autograd.grad(g.square().sum(), w)
    assert calls == ["up", "down", "weight"]  # no other layer is needed


def test_triton_is_not_the_default_and_gives_a_reason() -> None:
    assert next(iter(ops.backends("upsample_conv2d"))) in ("lean", "winograd")
    reason = op_module.UPSAMPLE_CONV2D.implementations["triton"].not_preferred_reason()
    assert reason is not None and "cuDNN" in reason
    x, w = random(1, 2, 4, 4, seed=0).float(), random(3, 2, 3, 3, seed=1).float()
    with pytest.raises(ValueError, match=r"triton.*runs on cuda, not cpu"):
        ops.conv2d_downsample(x, w, backend="triton")
    y = ops.conv2d_downsample(x, w, act="silu", gain=2.0)
    torch.testing.assert_close(y, 2 * F.silu(F.avg_pool2d(F.conv2d(x, w, padding=1), 2)))


COMPILED = compiled_cases(
    WITH_PRODUCTS, tiles.KINDS, (torch.channels_last, torch.contiguous_format), (64, 16, 32, 128, 256, 59), share=6,
    quick=lambda name, kind, layout, c: (
        name in QUICK and kind == "half" and layout == torch.channels_last and c == 64
    ),
)  # fmt: skip


@pytest.mark.parametrize(("architecture", "kind", "layout", "c"), COMPILED)
def test_compiles_without_spills(
    architecture: str,
    kind: str,
    layout: torch.memory_format,
    c: int,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.setattr(launch, "float32_precision", lambda products: "tf32" if kind == "tf32" else "ieee")
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    sides = (31, 62) if c == 59 else (64, 128)

    def products() -> None:
        small, large = (torch.empty(16, c, s, s, dtype=dtype, device="meta").to(memory_format=layout) for s in sides)
        w, bias = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ((c, c, 4, 4), (c,)))
        for y, product, x in ((small, scaled_conv.down, large), (large, scaled_conv.up, small)):
            assert product(x, w, bias, ACTS.index("lrelu"), 0.2, 1.4).shape == y.shape
        scaled_conv.weight(small, large)

    assert_compiles_without_spills(architecture, products, record_property)
