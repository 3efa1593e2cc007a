"""The op tests, rerun in another process with C++ kernels built under AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastgan
from fastgan.ops.dispatch import extension

REPOSITORY = Path(fastgan.__file__).parents[1]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"


def _runtime() -> tuple[str, str]:
    """The compiler, and the libraries to preload into Python; skips the test if there are none."""
    try:
        compiler = extension._compiler("cpu")[0]
    except extension.BuildError as reason:
        pytest.skip(str(reason))
    # AddressSanitizer intercepts exceptions only if the C++ library is preloaded too.
    libraries = []
    for library in ("libasan.so", "libubsan.so", "libstdc++.so.6"):
        path = extension._run([compiler, f"-print-file-name={library}"]).strip()
        if not os.path.isabs(path):
            pytest.skip(f"{compiler} has no {library}")
        libraries.append(os.path.realpath(path))
    return compiler, " ".join(libraries)


def _run(cache: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python with an instrumented C++ library, built in `cache`."""
    compiler, preload = _runtime()
    environment = {
        **os.environ,
        "CXX": f"{shlex.quote(compiler)} {FLAGS}",
        "XDG_CACHE_HOME": str(cache),
        "FASTGAN_BUILD": "force",
        "LD_PRELOAD": preload,
        # Python and torch are not instrumented, so their leaks and mismatches are not reported.
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
        # Busy-waiting threads would take the cores from working ones.
        "OMP_WAIT_POLICY": "passive",
    }
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=1500
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the tests below: the first one builds the library."""
    return tmp_path_factory.mktemp("cache")


# Without the tests that build and import the library, which start compilers and interpreters.
FILES = sorted(
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if path.name not in ("test_extension.py", "test_ops_import.py", "test_sanitizers.py", "test_cuda_kernels.py")
)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("file", FILES)
def test_op_tests_pass_under_sanitizers(file: str, cache: Path) -> None:
    done = _run(
        cache,
        *("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", f"tests/ops/{file}"),
        # torch.compile starts compilers, and calls the kernels just as eager mode does.
        *("--timeout", "1400", "-k", "not compile"),
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert list(cache.rglob("cpu-*.so")), "the tests did not load the sanitized library"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"),
    [("scale_rows(x, torch.ones(16))", "heap-buffer-overflow"), ("shift(40)", "runtime error: shift exponent 40")],
)
def test_sanitizers_report_a_fault(tmp_path: Path, fault: str, words: str) -> None:
    """The worked example does not check the length of `scale`, and here reads beyond its end."""
    sources = tmp_path / "csrc" / "cpu"
    sources.mkdir(parents=True)
    shutil.copy(REPOSITORY / "csrc" / "cpu" / "op.h", sources)
    text = (Path(__file__).parent / "csrc" / "scale_rows.cpp").read_text()
    text = text.replace("int64_t vector_width() { return kVector; }", "int64_t shift(int64_t n) { return 1 << n; }")
    text = text.replace("vector_width() -> int", "shift(int n) -> int").replace("vector_width", "shift")
    (sources / "scale_rows.cpp").write_text(text)
    code = f"""
import torch
from pathlib import Path
from fastgan.ops.dispatch import extension
extension.compile_library("cpu", Path({str(tmp_path)!r}) / "library.so", "baseline", Path({str(sources.parent)!r}))
torch.ops.load_library({str(tmp_path / "library.so")!r})
fastgan_example = torch.ops.fastgan_example
scale_rows, shift = fastgan_example.scale_rows_forward, fastgan_example.shift
x, scale = torch.ones(64, 8), torch.ones(64)
assert torch.equal(scale_rows(x, scale), x) and shift(4) == 16
print("correct calls passed", flush=True)
{fault}
"""
    done = _run(tmp_path, "-c", code)
    assert "correct calls passed" in done.stdout, done.stderr
    assert done.returncode != 0 and words in done.stderr, done.stderr
