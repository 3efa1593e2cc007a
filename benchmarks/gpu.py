"""`make gpu`: run the GPU tests and the benchmarks that use a GPU, piece by piece, into results/GPU.json.

    python benchmarks/gpu.py                 # all pieces; those that are done at this revision are left out
    python benchmarks/gpu.py --minutes 9     # stop in time; the same command goes on where it stopped
    python benchmarks/gpu.py --list          # the pieces, and which are done
    python benchmarks/gpu.py --only attention -k second

Correctness comes first. A piece is one pytest in a process of its own: one that fails, crashes or is cut off costs
only itself, and the file, with versions and git revision, is replaced whole after each. A piece whose tests failed is
done; one that crashed or was cut off is run again by the next call. Ends with 1 when a test failed or a piece crashed,
with 2 when pieces are left for want of time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_BENCH = "benchmarks/bench_{}.py"

# Name of a piece -> what pytest gets. Each is meant to take a few minutes at most; the first compiles the kernels.
PIECES: dict[str, list[str]] = {
    "tests, attention": ["-m", "gpu", "tests/kernels/test_attention_kernels.py"],
    "tests, scaled convolutions": ["-m", "gpu", "tests/kernels/test_scaled_conv_kernels.py"],
    "tests, other Triton kernels": [
        *("-m", "gpu", "tests/kernels", "--ignore=tests/kernels/test_attention_kernels.py"),
        *("--ignore=tests/kernels/test_scaled_conv_kernels.py", "--ignore=tests/kernels/test_ops_on_gpu.py"),
    ],
    "tests, ops": ["-m", "gpu", "tests/kernels/test_ops_on_gpu.py"],
    "tests, CUDA kernels": ["-m", "gpu", "tests/ops"],
    "attention, second order": [_BENCH.format("attention"), "-k", "second"],
    "attention, first order": [_BENCH.format("attention"), "-k", "first or forward"],
    **{
        f"{name}, {layout}": [_BENCH.format("conv"), "-k", f"{name} and {layout}"]
        for layout in ("channels_last", "contiguous")
        for name in ("upsample_conv2d", "conv2d_downsample")
    },
    "pixel_norm": [_BENCH.format("pixel_norm")],
    "bias_act": [_BENCH.format("bias_act")],
    "bias_act_pixel_norm": [_BENCH.format("bias_act_pixel_norm")],
    "minibatch_stddev": [_BENCH.format("minibatch_stddev")],
    "penalty": [_BENCH.format("penalty")],
    "SAGAN's step": [_BENCH.format("sagan_step")],
}


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(0)
    return {
        "gpu": gpu.name,
        "compute_capability": f"{gpu.major}.{gpu.minor}",
        "gpu_memory_bytes": gpu.total_memory,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "triton", "numpy", "fastgan")},
        "revision": git("rev-parse", "HEAD"),
        # The results themselves are no change.
        "changed_files": [
            line[3:] for line in git("status", "--porcelain").splitlines() if "benchmarks/results" not in line
        ],
    }


def tests(report: Path) -> dict[str, Any]:
    """Counts of a junit report, and the names of the tests that failed with the last line of what they said."""
    if not report.exists():
        return {"error": "pytest wrote no report"}
    suite = next(ElementTree.parse(report).iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    wrong = {}
    for case in suite.iter("testcase"):
        for fault in (*case.findall("failure"), *case.findall("error")):
            wrong[f"{case.get('classname')}::{case.get('name')}"] = (fault.get("message") or "").strip()[:400]
    return {**counts, "seconds": float(suite.get("time", 0)), "failed": wrong}


def benchmarks(report: Path) -> list[dict[str, Any]]:
    """Of each benchmark its name, times in seconds, and what it noted: errors, memory, the other sides' times."""
    if not report.exists() or not report.stat().st_size:
        return []
    kept = ("min", "median", "mean", "stddev", "rounds")
    return [
        {
            "name": it["name"],
            "group": it["group"],
            "seconds": {name: it["stats"][name] for name in kept},
            **it["extra_info"],
        }
        for it in json.loads(report.read_text())["benchmarks"]
    ]


def pytest_arguments(name: str, words: str | None, more: list[str]) -> list[str]:
    """Of a piece, with the user's -k beside its own, of which pytest would take the last alone."""
    found = list(PIECES[name])
    if words and "-k" in found:
        at = found.index("-k") + 1
        found[at] = f"({found[at]}) and ({words})"
    elif words:
        found += ["-k", words]
    return [*found, *more]


def run_piece(arguments: list[str], limit: float) -> dict[str, Any]:
    """Run one piece for `limit` seconds at most; what it found, `done` or not.

    pytest itself ends after the test in which its time is over, and then reports what it has; one that hangs is killed.
    """
    measures = arguments[0].startswith("benchmarks/")
    with tempfile.TemporaryDirectory() as folder:
        junit, times = Path(folder, "tests.xml"), Path(folder, "benchmarks.json")
        command = [sys.executable, "-m", "pytest", *arguments, f"--junitxml={junit}"]
        if importlib.util.find_spec("pytest_timeout") is not None:
            command += [f"--session-timeout={max(1, limit - 60):.0f}"] * (limit < 86400) + ["--timeout=0"] * measures
        start = time.monotonic()
        if measures:
            command += ["--benchmark-only", f"--benchmark-json={times}"]
        try:
            code: int | None = subprocess.run(command, cwd=ROOT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = None
        found: dict[str, Any] = {"exit_code": code, "arguments": arguments, "tests": tests(junit)}
        if measures:
            found["benchmarks"] = benchmarks(times)
        cut = code is None or time.monotonic() - start > limit - 60
    # 0: all passed; 1: some failed; 5: nothing was selected. Others, and signals, are crashes.
    return {**found, "cut_off": cut, "done": code in (0, 1, 5) and not (cut and code == 1)}


def keep(file: Path, result: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    partial = file.with_name(f".{file.name}.part")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, file)


def so_far(file: Path, where: dict[str, Any]) -> dict[str, Any]:
    """What is in the file, if it is of this machine as it is now; else a fresh start, and the old file kept beside."""
    if file.is_file():
        before: dict[str, Any] = json.loads(file.read_text())
        if before.get("machine") == where:
            return before
        os.replace(file, file.with_name(f"{file.stem}.before.json"))
        print(f"gpu: {file.name} was of another revision or version; it is {file.stem}.before.json now", flush=True)
    return {"machine": where, "pieces": {}}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end within so many minutes")
    parser.add_argument("--only", metavar="TEXT", help="pieces whose name has TEXT in it")
    parser.add_argument("-k", metavar="WORDS", help="tests and benchmarks of these pieces that pytest's -k selects")
    parser.add_argument("--again", action="store_true", help="run pieces that are done, too")
    parser.add_argument("--list", action="store_true", help="list the pieces and run nothing")
    asked, more = parser.parse_known_args(arguments)
    if not torch.cuda.is_available():
        print("make gpu: there is no GPU here, or this torch cannot use it", file=sys.stderr)
        return 1
    end = time.monotonic() + 60 * asked.minutes
    where = machine()
    file = RESULTS / (re.sub(r"[^a-z0-9]+", "-", where["gpu"].lower()).strip("-") + ".json")
    names = [name for name in PIECES if (asked.only or "") in name]
    if not names:
        print(f"--only must be part of one of: {', '.join(PIECES)}, got {asked.only!r}", file=sys.stderr)
        return 1
    result = so_far(file, where)
    pieces = result["pieces"]
    wrong = left = 0
    # Pieces of which a part was asked for have names of their own: they are not done for the next call.
    asked_for = {" ".join([name, *(["-k", asked.k] if asked.k else []), *more]): name for name in names}
    for title, name in asked_for.items():
        done = pieces.get(title, {}).get("done", False)
        if asked.list:
            print(f"{'done' if done else 'open':6}{title}")
            continue
        if not done or asked.again:
            if end - time.monotonic() < 90:
                left += 1
                continue
            print(f"gpu: {title}", flush=True)
            # The last seconds are for writing the file.
            limit = min(end - time.monotonic() - 10, 86400.0)
            pieces[title] = run_piece(pytest_arguments(name, asked.k, more), limit)
            keep(file, result)
        wrong += pieces[title]["exit_code"] not in (0, 5)
        left += pieces[title]["cut_off"] and not pieces[title]["done"]
    if asked.list:
        return 0
    summary = ", ".join(f"{name}: exit code {pieces[name]['exit_code']}" for name in asked_for if name in pieces)
    print(f"gpu: {summary}\ngpu: wrote {file}" + (f"; {left} pieces are left, run it again" if left else ""))
    return 2 if left else int(wrong != 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
