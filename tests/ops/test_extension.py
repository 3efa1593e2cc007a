"""Builds of the compiled libraries: cache, failures, concurrency; and the worked example of csrc/README.md."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastgan
from fastgan.ops.dispatch import extension
from fastgan.ops.dispatch.kernel_registry import kernel_implementations

REPOSITORY = Path(fastgan.__file__).parents[1]
CSRC = REPOSITORY / "csrc"
posix = pytest.mark.skipif(os.name == "nt", reason="the compiled libraries are not built on Windows")
pytestmark = posix


def _compiler_path() -> str | None:
    try:
        return extension._compiler("cpu")[0]
    except extension.BuildError:
        return None


COMPILER = _compiler_path()
compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")

LEVELS = list(extension.INSTRUCTIONS)
# The lowest and the highest instruction set that run here.
RUNNABLE = sorted({"baseline", extension.level()}, key=LEVELS.index)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for this test, with no library loaded. Loading does nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("FASTGAN_BUILD", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(extension, "_reasons", {})
    monkeypatch.setattr(extension, "_files", {})
    monkeypatch.setattr(extension, "_open", lambda file: None)
    return tmp_path / "cache" / "fastgan" / "extension"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A csrc/ of two small files, in place of the package's."""
    folder = tmp_path / "csrc"
    (folder / "cpu").mkdir(parents=True)
    exported = 'extern "C" __attribute__((visibility("default")))'
    (folder / "cpu" / "library.cpp").write_text(f'#include "answer.h"\n{exported} int ask() {{ return answer(); }}\n')
    (folder / "cpu" / "answer.h").write_text("int answer();\n")
    (folder / "cpu" / "answer.cpp").write_text('#include "answer.h"\nint answer() { return 42; }\n')
    monkeypatch.setattr(extension, "source_folder", lambda: folder)
    return folder


@pytest.fixture
def as_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Replaces the compiler by a shell script. Returns a file with one line for each of its runs."""

    def make(script: str) -> Path:
        runs, program = tmp_path / "runs", tmp_path / "the compiler"
        runs.write_text("")
        program.write_text(f'#!/bin/sh\necho "$@" >> "{runs}"\n{script}\n')
        program.chmod(0o755)
        monkeypatch.setenv("CXX", f"'{program}'")
        return runs

    return make


def real(script: str = "") -> str:
    return f'{script}\nexec {COMPILER} "$@"'


def ask(file: Path) -> int:
    import ctypes

    return int(ctypes.CDLL(str(file)).ask())


def lines(file: Path) -> int:
    return len(file.read_text().splitlines())


@compiler
def test_loaded_library_uses_the_instruction_set_of_torch() -> None:
    assert extension.cpu() is None
    assert torch.ops.fastgan.cpu_instructions() == extension.level()
    file = extension.file("cpu")
    assert file is not None and file.is_file()


def test_instruction_set_follows_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension.platform, "machine", lambda: "x86_64")
    for flags, avx512 in ({"avx512f"}, "avx512"), ({"avx512f", "avx512_bf16"}, "avx512_bf16"):
        monkeypatch.setattr("fastgan.utils.system.cpu_flags", lambda it=flags: frozenset(it))
        levels = {"AVX512": avx512, "AVX2": "avx2", "DEFAULT": "baseline", "NO AVX": "baseline"}
        for capability, level in levels.items():
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda it=capability: it)
            assert extension.level() == level
    monkeypatch.setattr(extension.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    assert (extension.level(), extension.instructions()) == ("baseline", ["baseline"])


@compiler
def test_cache_key_covers_sources_compiler_flags_and_machine(
    cache: Path, sources: Path, as_compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = as_compiler(real())
    first = extension.cached_library("cpu", "baseline")
    assert first.parent == cache and ask(first) == 42
    assert lines(runs) == 3  # two files and the link
    assert extension.cached_library("cpu", "baseline") == first
    assert lines(runs) == 3
    assert [file.suffix for file in cache.iterdir()].count(".so") == 1
    assert not [file for file in cache.iterdir() if file.suffix not in (".so", ".lock")]

    (sources / "cpu" / "answer.cpp").write_text('#include "answer.h"\nint answer() { return 43; }\n')
    second = extension.cached_library("cpu", "baseline")
    assert second != first and ask(second) == 43

    def key() -> str:
        return extension._key("cpu", "baseline", sources)

    seen = {key()}
    (sources / "cpu" / "answer.h").write_text("int answer(); // the same\n")
    seen.add(key())
    (sources / "shared.h").write_text("")
    seen.add(key())
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    seen.add(key())
    monkeypatch.setattr(extension, "_CPU", [*extension._CPU, "-g"])
    seen.add(key())
    as_compiler(real("true"))
    seen.add(key())
    seen.add(extension._key("cpu", "avx2", sources))
    monkeypatch.setattr(extension.platform, "machine", lambda: "another")
    seen.add(key())
    assert len(seen) == 8


@compiler
@pytest.mark.parametrize("damage", ["truncated", "overwritten", "empty"])
def test_damaged_library_is_recompiled(cache: Path, sources: Path, damage: str) -> None:
    file = extension.cached_library("cpu", "baseline")
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[: len(whole) // 2], "overwritten": b"?" * len(whole), "empty": b""}[damage])
    again = extension.cached_library("cpu", "baseline")
    assert ask(again) == 42
    assert [it for it in cache.iterdir() if it.suffix == ".so"] == [again]


@pytest.mark.parametrize("broken", [False, pytest.param(True, marks=compiler)])
def test_concurrent_processes_compile_once(
    cache: Path, sources: Path, as_compiler: Callable[[str], Path], broken: bool
) -> None:
    runs = as_compiler("sleep 0.5; echo 'error: I am broken' >&2; exit 1" if broken else real("sleep 0.3"))
    for file in (sources / "cpu").glob("answer.cpp"):
        if broken:
            file.unlink()
    context = multiprocessing.get_context("fork")
    queue, together = context.SimpleQueue(), context.Barrier(4)

    def start() -> None:
        together.wait()
        try:
            queue.put(str(extension.cached_library("cpu", "baseline")))
        except extension.BuildError as error:
            queue.put(str(error))

    processes = [context.Process(target=start) for _ in range(4)]
    for process in processes:
        process.start()
    answers = {queue.get() for _ in processes}
    for process in processes:
        process.join()
    assert len(answers) == 1, answers
    assert lines(runs) == (1 if broken else 3)
    assert ("I am broken" in answers.pop()) if broken else answers.pop().endswith(".so")


def test_missing_compiler_warns_once(
    cache: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(RuntimeWarning, match=r"there is no compiler: g\+\+, c\+\+.*FASTGAN_BUILD=0") as seen:
        reason = extension.cpu()
    assert len(seen) == 1
    assert reason is not None and "there is no compiler" in reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert extension.cpu() == reason
    assert extension.file("cpu") is None
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    monkeypatch.setattr(extension, "_reasons", {})
    with pytest.warns(RuntimeWarning, match=r"no compiler 'no-such-compiler', which the variable CXX names"):
        extension.cpu()


def test_compiler_errors_are_quoted_and_logged(
    cache: Path, sources: Path, as_compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = as_compiler("echo 'hm'; echo 'x.cpp:1: error: cannot find the header' >&2; exit 3")
    with pytest.warns(RuntimeWarning, match="x.cpp:1: error: cannot find the header; compiler output: ") as w:
        reason = extension.cpu()
    assert len(w) == 1 and reason is not None
    log = Path(re.search(r"compiler output: (\S+\.log)", str(w[0].message)).group(1))  # type: ignore[union-attr]
    assert log.parent == cache
    assert "hm\n" in log.read_text() and "x.cpp:1: error" in log.read_text() and "-fopenmp-simd" in log.read_text()
    tried = lines(runs)
    assert extension.cpu() == reason
    assert lines(runs) == tried
    monkeypatch.setattr(extension, "_reasons", {})
    monkeypatch.setenv("FASTGAN_BUILD", "force")
    with pytest.raises(
        RuntimeError, match=r"^FASTGAN_BUILD=force, but the cpu library cannot be used: .* error: cannot"
    ):
        extension.cpu()
    if COMPILER is not None:  # a failed build is retried with another compiler
        as_compiler(real())
        assert extension.cpu() is None
        assert ask(extension.file("cpu")) == 42  # type: ignore[arg-type]


def test_build_can_be_disabled(cache: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGAN_BUILD", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert extension.cpu() == "switched off by FASTGAN_BUILD=0"
    assert not cache.exists()
    monkeypatch.setattr(extension, "_reasons", {})
    monkeypatch.setenv("FASTGAN_BUILD", "yes")
    with pytest.raises(ValueError, match=r"^FASTGAN_BUILD must be 0, 1 or force, got 'yes'$"):
        extension.cpu()


@compiler
def test_warning_names_a_cache_that_is_not_writable(cache: Path, sources: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match="the cache folder .* cannot be used .*; set XDG_CACHE_HOME to another"):
        assert extension.cpu() is not None


@compiler
def test_library_that_does_not_load_falls_back(cache: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: Path) -> None:
        raise OSError("undefined symbol: something")

    monkeypatch.setattr(extension, "_open", refuse)
    with pytest.warns(RuntimeWarning, match="does not load: undefined symbol: something"):
        assert extension.cpu() is not None


def test_unexpected_failure_falls_back(cache: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(extension, "cache_folder", no_home)
    with pytest.warns(RuntimeWarning, match="Could not determine home directory"):
        assert extension.cpu() is not None


def test_windows_falls_back_without_a_warning(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "os", SimpleNamespace(name="nt", environ={}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "not built on Windows" in str(extension.cpu())


def test_devices_and_dtypes_are_checked_before_compiling(cache: Path) -> None:
    unsupported_reason = kernel_implementations("pixel_norm")["cpp"].unsupported_reason
    assert unsupported_reason(torch.zeros(1, device="meta")) == "it runs on cpu, not meta"
    wrong = torch.zeros(1, dtype=torch.float64)
    assert unsupported_reason(torch.zeros(1), None, wrong) == "it supports float32, bfloat16, not torch.float64"
    assert not extension._reasons


# The worked example of csrc/README.md, compiled for every instruction set that runs here.


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    def build(level: str) -> None:
        """Under a name of its own for each instruction set, so that all can be loaded."""
        folder = tmp_path_factory.mktemp(level)
        (folder / "cpu").mkdir()
        shutil.copy(CSRC / "cpu" / "op.h", folder / "cpu")
        shutil.copy(CSRC / "common.h", folder)
        text = (Path(__file__).parent / "csrc" / "scale_rows.cpp").read_text()
        (folder / "cpu" / "scale_rows.cpp").write_text(text.replace("fastgan_example", f"fastgan_example_{level}"))
        extension.compile_library("cpu", folder / "library.so", level, folder)
        torch.ops.load_library(str(folder / "library.so"))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build, RUNNABLE))
    yield lambda level: getattr(torch.ops, f"fastgan_example_{level}")


@compiler
@pytest.mark.parametrize("level", RUNNABLE)
def test_worked_example(example: Callable[[str], Any], level: str) -> None:
    op = example(level)
    assert op.vector_width() == {"baseline": 4, "avx2": 8, "avx512": 16, "avx512_bf16": 16}[level]
    generator = torch.Generator().manual_seed(0)
    for (rows, columns), dtype in itertools.product(
        [(1, 1), (3, 63), (64, 1025), (0, 5), (5, 0)], [torch.float32, torch.bfloat16]
    ):
        x = torch.randn(columns, rows, generator=generator).t().to(dtype)  # not contiguous
        grad, scale = torch.randn(rows, columns, generator=generator).to(dtype), torch.randn(rows, generator=generator)
        torch.testing.assert_close(op.scale_rows_forward(x, scale), (x.float() * scale[:, None]).to(dtype))
        assert torch.equal(op.scale_rows_forward(x, None), x)
        grad_x, grad_scale = op.scale_rows_backward(grad, x, scale, True, True)
        torch.testing.assert_close(grad_x, (grad.float() * scale[:, None]).to(dtype))
        expected = (grad.double() * x.double()).sum(1)
        torch.testing.assert_close(grad_scale.double(), expected, atol=1e-4, rtol=1e-5)
        assert op.scale_rows_backward(grad, x, scale, False, False) == (None, None)


@compiler
def test_rounding_to_bfloat16_matches_torch(example: Callable[[str], Any]) -> None:
    """Ties to even, infinities, NaN, overflow: every bfloat16 and the floats next to it."""
    halves = torch.arange(2**16, dtype=torch.int32) << 16
    x = torch.stack([halves + step for step in (0, 0x7FFF, 0x8000, 0x8001)]).view(torch.float32)
    for level in RUNNABLE:
        ones = torch.ones(4, 2**16, dtype=torch.bfloat16)
        factors = x.flatten()[:, None]
        rounded = example(level).scale_rows_forward(ones.flatten()[:, None], factors[:, 0])
        torch.testing.assert_close(rounded, factors.bfloat16(), equal_nan=True, rtol=0, atol=0)


@compiler
def test_worked_example_checks_arguments(example: Callable[[str], Any]) -> None:
    op, x = example(RUNNABLE[0]), torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="x must be Float or BFloat16, got Double"):
        op.scale_rows_forward(x.double(), None)
    with pytest.raises(RuntimeError, match=r"x must be \[R, C\], got 1 dimensions"):
        op.scale_rows_forward(x[0], None)
    with pytest.raises(RuntimeError, match="grad must have the shape of the op's first tensor"):
        op.scale_rows_backward(x[:1], x, None, True, True)


@compiler
def test_worked_example_does_not_depend_on_threads(example: Callable[[str], Any]) -> None:
    x = torch.randn(301, 777, generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(example(RUNNABLE[-1]).scale_rows_backward(x, x, x[:, 0], True, True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def wheel(folder: Path, **environment: str) -> Path:
    """Builds the package's wheel in an environment with torch."""
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("fastgan", "kernels", "csrc"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    done = subprocess.run(command, cwd=source, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_wheel_without_a_compiler_has_the_sources(tmp_path: Path) -> None:
    file = wheel(tmp_path, CXX="no-such-compiler")
    assert file.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(file).namelist())
    assert not [name for name in names if name.endswith(".so")]
    ours = {f"fastgan/{it.relative_to(REPOSITORY)}" for it in CSRC.rglob("*") if it.is_file()}
    assert len(ours) >= 4 and ours <= names


@compiler
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wheel_has_the_library_and_loads_it(tmp_path: Path) -> None:
    file = wheel(tmp_path, FASTGAN_BUILD="force")
    assert re.search(r"-py3-none-(?!any)\w+\.whl$", file.name)
    installed = tmp_path / "installed"
    zipfile.ZipFile(file).extractall(installed)
    code = """
import fastgan.ops.dispatch.extension as e, torch
assert e.cpu() is None, e.cpu()
print(e.file("cpu"), torch.ops.fastgan.cpu_instructions())
"""
    for capability, level in (("", extension.level()), ("default", "baseline")):
        environment = {**os.environ, "PYTHONPATH": str(installed), "CXX": "no-such-compiler"}
        if capability:
            environment["ATEN_CPU_CAPABILITY"] = capability
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        path, level_used = done.stdout.split()
        assert level_used == level and Path(path).is_relative_to(installed.resolve() / "fastgan" / "ops" / "lib")
