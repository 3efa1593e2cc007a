"""The CUDA kernels, on a GPU (`pytest -m gpu`) and on any machine as plain C++, one fiber per thread (csrc/emulator.h).

The emulation does not show hardware effects: races, alignment faults, speed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgan
from fastgan.ops.bias_act import ACTS, LINEAR, LRELU, RELU, SILU
from fastgan.ops.bias_act import PYTORCH_KERNELS as BIAS_ACT
from fastgan.ops.bias_act_pixel_norm import PYTORCH_KERNELS as BIAS_ACT_PIXEL_NORM
from fastgan.ops.dispatch import extension
from fastgan.ops.minibatch_stddev import PYTORCH_KERNELS as MINIBATCH_STDDEV
from fastgan.ops.pixel_norm import PYTORCH_KERNELS as PIXEL_NORM

CSRC = Path(fastgan.__file__).parents[1] / "csrc"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    try:
        extension._compiler("cpu")
    except extension.BuildError as reason:
        pytest.skip(str(reason))
    folder = tmp_path_factory.mktemp("emulated")
    sources = folder / "cpu"
    sources.mkdir()
    shutil.copy(CSRC / "common.h", folder)
    shutil.copy(Path(__file__).parent / "csrc" / "emulator.h", sources)
    names = {"FASTGAN_EMULATED": "", "FASTGAN_LIBRARY": "fastgan_emulated", "FASTGAN_KEY": "CPU"}
    head = "".join(f"#define {name} {value}\n" for name, value in names.items()) + '#pragma GCC optimize("O1")\n'
    for file in (CSRC / "cuda").iterdir():
        name = f"{file.stem}.cpp" if file.suffix == ".cu" else file.name
        (sources / name).write_text(head + file.read_text())
    texts = (file.read_text() for file in (CSRC / "cpu").glob("*.cpp"))
    schemas = re.findall(r'FASTGAN_OP\((\w+),\s*((?:"[^"]*"\s*)+)\);', "".join(texts))
    assert schemas
    with open(sources / "library.cpp", "a") as file:
        defined = "".join(f'm.def("{name}" {schema});\n' for name, schema in schemas)
        file.write(f'STABLE_TORCH_LIBRARY(fastgan_emulated, m) {{\nm.def("cuda_refusal() -> str");\n{defined}}}\n')
    # In the cache, to share it between workers and runs.
    library = extension.cached_library("cpu", "baseline", folder, extension.cache_folder() / "tests")
    torch.ops.load_library(str(library))
    return torch.ops.fastgan_emulated


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest) -> Iterator[Any]:
    """(functions, device)."""
    if request.param == "emulated":
        yield request.getfixturevalue("emulated"), "cpu"
        return
    reason = extension.cuda()
    if reason is not None:
        pytest.skip(reason)
    yield torch.ops.fastgan, "cuda"


def tensor(shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: str, seed: int, shift: int = 0) -> Tensor:
    """Normal random numbers, contiguous or channels_last, `shift` elements off the alignment of a new allocation."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    order = [0, *range(2, len(shape)), 1] if last else list(range(len(shape)))
    memory = torch.full((x.numel() + shift,), torch.nan, dtype=dtype, device=device)
    flat = memory[shift:].view([shape[i] for i in order])
    return flat.permute([order.index(i) for i in range(len(shape))]).copy_(x)


def assert_accurate(actual: Any, expected: Any, dtype: torch.dtype, like: Tensor | None = None) -> None:
    """Compare with float64, relative to the largest expected number, since sums cancel."""
    actual, expected = (r if isinstance(r, tuple) else (r,) for r in (actual, expected))
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        if a.numel() == 0:
            continue
        # The reference sums results as stored, in `dtype`.
        eps = torch.finfo(dtype if a.ndim == 1 else a.dtype).eps
        scale = max(float(e.abs().max()), 0.1)
        assert float((a.double().cpu() - e).abs().max()) <= 4 * max(eps, 2e-6) * scale
        if like is not None and a.shape == like.shape:
            assert a.dtype == dtype and a.stride() == like.stride()


def double(*arguments: Any) -> list[Any]:
    return [a.double().cpu() if isinstance(a, Tensor) else a for a in arguments]


# Sizes that allow 16-byte accesses, sizes that do not, and sizes of 1.
LAYOUTS = [
    ((2, 8, 4, 4), False, 0),
    ((2, 8, 4, 4), True, 0),
    ((2, 8, 4, 4), False, 1),
    ((2, 16, 2, 2), True, 1),
    ((3, 5, 3, 3), False, 0),
    ((3, 5, 3, 3), True, 0),
    ((1, 1, 1, 1), False, 0),
    ((5, 1, 7), False, 0),
    ((40, 7), False, 0),
    ((9, 64), False, 0),
    ((3, 1, 6, 16), False, 0),
    ((2, 3, 11, 10), True, 0),
]
# More channels than fit in registers.
MANY_CHANNELS = [((1, 1300, 1, 4), False, 0), ((1, 1304, 1, 3), True, 0), ((1, 140, 1, 3), False, 0)]


@pytest.mark.parametrize("act", range(len(ACTS)))
@pytest.mark.parametrize(("shape", "last", "shift"), LAYOUTS)
def test_bias_act(kernels: Any, act: int, shape: tuple[int, ...], last: bool, shift: int) -> None:
    f, device = kernels
    dtype = DTYPES[(act + len(shape) + shape[0]) % 3]
    u, dy, x = (tensor(shape, dtype, last, device, seed, shift) for seed in range(3))
    bias_dtype = torch.float32 if act % 2 else dtype
    bias = tensor(shape[1:2], bias_dtype, False, device, 3)
    options = (act, 0.2, 1.3)
    y = f.bias_act_forward(x, bias, *options)
    assert_accurate(y, BIAS_ACT.bias_act_forward(*double(x, bias), *options), dtype, x)
    assert_accurate(
        f.bias_act_forward(x, None, *options), BIAS_ACT.bias_act_forward(*double(x, None), *options), dtype, x
    )
    ref = {LINEAR: None, SILU: x}.get(act, y)
    bias = bias if act == SILU else None
    for want in (True, False):
        result = f.bias_act_backward(dy, ref, bias, *options, want)
        assert_accurate(result, BIAS_ACT.bias_act_backward(*double(dy, ref, bias), *options, want), dtype, dy)
        if act not in (LINEAR, RELU, LRELU):
            result = f.bias_act_second_backward(u, dy, ref, bias, *options, want)
            assert_accurate(
                result, BIAS_ACT.bias_act_second_backward(*double(u, dy, ref, bias), *options, want), dtype, dy
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "last", "shift"), LAYOUTS + MANY_CHANNELS)
def test_pixel_norm(kernels: Any, dtype: torch.dtype, shape: tuple[int, ...], last: bool, shift: int) -> None:
    f, device = kernels
    u, dy, x = (tensor(shape, dtype, last, device, seed, shift) for seed in range(3))
    y, r = f.pixel_norm_forward(x, 1e-2)
    assert_accurate((y, r), PIXEL_NORM.pixel_norm_forward(*double(x), 1e-2), dtype, x if x.shape[1] > 1 else None)
    assert_accurate(f.pixel_norm_backward(dy, y, r), PIXEL_NORM.pixel_norm_backward(*double(dy, y, r)), dtype, x)
    result = f.pixel_norm_second_backward(u, dy, y, r)
    assert_accurate(result, PIXEL_NORM.pixel_norm_second_backward(*double(u, dy, y, r)), dtype, x)


@pytest.mark.parametrize("act", [LINEAR, RELU, LRELU])
@pytest.mark.parametrize(("shape", "last", "shift"), LAYOUTS + MANY_CHANNELS)
def test_bias_act_pixel_norm(kernels: Any, act: int, shape: tuple[int, ...], last: bool, shift: int) -> None:
    f, device = kernels
    dtype = DTYPES[(act + len(shape) + shape[0]) % 3]
    u, dy, x = (tensor(shape, dtype, last, device, seed, shift) for seed in range(3))
    bias = tensor(shape[1:2], torch.float32 if act else dtype, False, device, 3)
    options = (act, 0.2, 1.3)
    y, r = f.bias_act_pixel_norm_forward(x, bias, *options, 1e-2)
    expected = BIAS_ACT_PIXEL_NORM.bias_act_pixel_norm_forward(*double(x, bias), *options, 1e-2)
    assert_accurate((y, r), expected, dtype, x if x.shape[1] > 1 else None)
    for want in (True, False):
        result = f.bias_act_pixel_norm_backward(dy, y, r, *options, want)
        expected = BIAS_ACT_PIXEL_NORM.bias_act_pixel_norm_backward(*double(dy, y, r), *options, want)
        assert_accurate(result, expected, dtype, x)
        result = f.bias_act_pixel_norm_second_backward(u, dy, y, r, *options, want)
        expected = BIAS_ACT_PIXEL_NORM.bias_act_pixel_norm_second_backward(*double(u, dy, y, r), *options, want)
        assert_accurate(result, expected, dtype, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "last", "shift", "group", "features"),
    [
        ((8, 8, 4, 4), False, 0, 4, 1),
        ((8, 16, 4, 4), True, 0, 4, 2),
        ((4, 15, 2, 2), True, 0, 4, 1),  # with its map, 16 channels
        ((8, 8, 4, 4), False, 1, 2, 2),
        ((6, 8, 2, 2), True, 1, 3, 1),
        ((6, 6, 3, 1), False, 0, 6, 3),  # more samples than fit in registers
        ((6, 6, 1, 3), True, 0, 6, 3),
        ((1, 1, 1, 1), False, 0, 1, 1),
        ((5, 2, 1, 1), False, 0, 1, 2),
        ((2, 40, 9, 9), False, 0, 2, 1),
    ],
)
def test_minibatch_stddev(
    kernels: Any, dtype: torch.dtype, shape: tuple[int, ...], last: bool, shift: int, group: int, features: int
) -> None:
    f, device = kernels
    u, x = (tensor(shape, dtype, last, device, seed, shift) for seed in range(2))
    dy = tensor((shape[0], shape[1] + features, *shape[2:]), dtype, last, device, 2, shift)
    options = (group, features, 1e-2)
    y = f.minibatch_stddev_forward(x, *options)
    assert_accurate(y, MINIBATCH_STDDEV.minibatch_stddev_forward(*double(x), *options), dtype, dy)
    dx, t = f.minibatch_stddev_backward(dy, x, *options)
    assert_accurate((dx, t), MINIBATCH_STDDEV.minibatch_stddev_backward(*double(dy, x), *options), dtype, x)
    result = f.minibatch_stddev_second_backward(u, x, t, *options)
    assert_accurate(result, MINIBATCH_STDDEV.minibatch_stddev_second_backward(*double(u, x, t), *options), dtype, x)


def test_equal_samples_have_no_deviation(kernels: Any) -> None:
    """The deviation of equal, large numbers is exactly sqrt(eps), and the derivatives are finite."""
    f, device = kernels
    x = torch.full((4, 8, 2, 2), 12345.6789, device=device)
    maps = f.minibatch_stddev_forward(x, 4, 1, 1e-8)[:, 8]
    torch.testing.assert_close(maps, torch.full_like(maps, 1e-4), rtol=1e-6, atol=0)
    dx, t = f.minibatch_stddev_backward(torch.ones(4, 9, 2, 2, device=device), x, 4, 1, 1e-8)
    assert torch.equal(dx, torch.ones_like(x))
    assert all(torch.isfinite(g).all() for g in f.minibatch_stddev_second_backward(x, x, t, 4, 1, 1e-8))


@pytest.mark.parametrize("last", [False, True])
def test_results_are_bit_identical_between_runs(kernels: Any, last: bool) -> None:
    f, device = kernels
    u, dy, x = (tensor((4, 16, 5, 8), torch.float32, last, device, seed) for seed in range(3))
    more = tensor((4, 17, 5, 8), torch.float32, last, device, 4)
    y, r = f.bias_act_pixel_norm_forward(x, None, LRELU, 0.2, 1.0, 1e-8)
    for run in (
        lambda: f.bias_act_backward(dy, y, None, LRELU, 0.2, 1.0, True),
        lambda: f.bias_act_pixel_norm_backward(dy, y, r, LRELU, 0.2, 1.0, True),
        lambda: f.bias_act_pixel_norm_second_backward(u, dy, y, r, LRELU, 0.2, 1.0, True),
        lambda: (f.minibatch_stddev_forward(x, 4, 1, 1e-8),),
        lambda: f.minibatch_stddev_backward(more, x, 4, 1, 1e-8),
    ):
        first = run()
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_relu_preserves_nan_and_infinity(kernels: Any) -> None:
    f, device = kernels
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0]], device=device)
    expected = BIAS_ACT.bias_act_forward(x, None, RELU, 0.2, 2.0)
    torch.testing.assert_close(f.bias_act_forward(x, None, RELU, 0.2, 2.0), expected, equal_nan=True)
    ref = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device)
    result = f.bias_act_backward(x, ref, None, RELU, 0.2, 2.0, False)[0]
    torch.testing.assert_close(result, torch.tensor([[0.0, 0.0, -torch.inf, 2.0]], device=device))
    # The gradient passes through a NaN, as in PyTorch.
    result = f.bias_act_backward(torch.ones_like(x), torch.full_like(x, torch.nan), None, RELU, 0.2, 2.0, False)[0]
    torch.testing.assert_close(result, torch.full_like(x, 2.0))


def needs_nvcc() -> None:
    try:
        extension._compiler("cuda")
    except extension.BuildError as reason:
        pytest.skip(str(reason))


@pytest.mark.timeout(900)
def test_library_compiles_and_reports_a_missing_gpu(tmp_path: Path) -> None:
    needs_nvcc()
    reason = extension.cpu()
    if reason is not None:
        pytest.skip(reason)
    library = extension.cached_library("cuda", "90", folder=extension.cache_folder() / "tests")
    code = f"""
import torch
from fastgan.ops.dispatch import extension
assert extension.cpu() is None
torch.ops.load_library({str(library)!r})
print(torch.ops.fastgan.cuda_refusal())
print(extension.cuda())
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    refusal, reason = done.stdout.splitlines()
    assert refusal.startswith("CUDA error: ")
    assert "there is no GPU" in reason


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("file", sorted(it.name for it in (CSRC / "cuda").glob("*.cu")))
@pytest.mark.parametrize("architecture", extension.CUDA_ARCHITECTURES)
def test_no_kernel_spills(tmp_path: Path, file: str, architecture: int) -> None:
    needs_nvcc()
    nvcc = extension._compiler("cuda")
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    headers = [f"-I{folder}" for folder in (CSRC, extension._torch_folder() / "include")]
    flags = [*extension._flags("cuda", str(architecture)), "-cubin", "-Xptxas=-v", target, *headers]
    report = extension._run([*nvcc, *flags, str(CSRC / "cuda" / file), "-o", str(tmp_path / "cubin")])
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", report)]
    assert len(spills) >= len(registers) > 0
    assert set(spills) == {("0", "0")}, report
    assert max(registers) <= 128


def test_wrong_arguments_raise(kernels: Any) -> None:
    f, device = kernels
    x = torch.zeros(2, 4, 3, 3, device=device)
    for call, words in (
        (lambda: f.bias_act_forward(x[:, :, ::2], None, 1, 0.2, 1.0), "x must be dense"),
        (lambda: f.bias_act_forward(x, None, 6, 0.2, 1.0), "act must be 0 to 5, got 6"),
        (lambda: f.bias_act_forward(x, torch.zeros(3, device=device), 1, 0.2, 1.0), r"bias must be \[4\]"),
        (lambda: f.bias_act_forward(x.double(), None, 1, 0.2, 1.0), "x must be Float, BFloat16 or Half, got Double"),
        (lambda: f.bias_act_backward(x, x[:1], None, 1, 0.2, 1.0, False), "ref must have the shape"),
        (lambda: f.bias_act_backward(x, None, None, 1, 0.2, 1.0, False), "ref must be a tensor"),
        (lambda: f.pixel_norm_backward(x, x.contiguous(memory_format=torch.channels_last), x[:, :1]), "dy must have"),
        (lambda: f.pixel_norm_backward(x, x, x[:, 0, 0]), "r must be Float"),
        (lambda: f.minibatch_stddev_forward(x, 3, 1, 1.0), "group must be a divisor of 2, got 3"),
        (lambda: f.minibatch_stddev_forward(x, 2, 3, 1.0), "num_features must be a divisor of 4, got 3"),
        (lambda: f.minibatch_stddev_backward(x, x, 2, 1, 1.0), r"dy must be \[N, C \+ num_features, H, W\]"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()
