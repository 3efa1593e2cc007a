"""`make gpu`: run the GPU tests and benchmarks in pieces; results go to benchmarks/results/NAME-OF-THE-GPU.json.

    python benchmarks/gpu.py                 # all pieces that are not done at this revision
    python benchmarks/gpu.py --minutes 9     # stop within 9 minutes; the same command resumes
    python benchmarks/gpu.py --list          # list the pieces and whether they are done
    python benchmarks/gpu.py --only attention -k second

Runs from a checkout without installation. Tests come first. Each piece is a pytest process of its own, so that a
failure, crash or timeout does not affect the others. The results, with versions and git revision, are written after
each piece. A piece whose tests failed is done; one that crashed or timed out is repeated by the next call. The exit
code is 1 if a test failed or a piece crashed, 2 if pieces are left for lack of time.
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

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # fastgan need not be installed

from fastgan.utils.files import write_atomic

RESULTS = ROOT / "benchmarks" / "results"
_OPS = "benchmarks/ops/bench_{}.py"

# Name of a piece -> arguments of pytest. Each takes a few minutes at most; the first compiles the kernels.
PIECES: dict[str, list[str]] = {
    "tests, attention": ["-m", "gpu", "tests/kernels/test_attention_kernels.py"],
    "tests, scaled convolutions": ["-m", "gpu", "tests/kernels/test_scaled_conv_kernels.py"],
    "tests, other Triton kernels": [
        *("-m", "gpu", "tests/kernels", "--ignore=tests/kernels/test_attention_kernels.py"),
        *("--ignore=tests/kernels/test_scaled_conv_kernels.py", "--ignore=tests/kernels/test_ops_on_gpu.py"),
    ],
    "tests, ops": ["-m", "gpu", "tests/kernels/test_ops_on_gpu.py"],
    "tests, CUDA kernels": ["-m", "gpu", "tests/ops"],
    "attention, second order": [_OPS.format("attention"), "-k", "second"],
    "attention, first order": [_OPS.format("attention"), "-k", "first or forward"],
    **{
        f"{name}, {layout}": [_OPS.format("conv"), "-k", f"{name} and {layout}"]
        for layout in ("channels_last", "contiguous")
        for name in ("upsample_conv2d", "conv2d_downsample")
    },
    "pixel_norm": [_OPS.format("pixel_norm")],
    "bias_act": [_OPS.format("bias_act")],
    "bias_act_pixel_norm": [_OPS.format("bias_act_pixel_norm")],
    "minibatch_stddev": [_OPS.format("minibatch_stddev")],
    "penalty": [_OPS.format("penalty")],
    "SAGAN's step": ["benchmarks/training/bench_sagan_step.py"],
}


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def package_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """GPU, versions and git state: results are resumed only if all of it is the same."""
    gpu = torch.cuda.get_device_properties(0)
    return {
        "gpu": gpu.name,
        "compute_capability": f"{gpu.major}.{gpu.minor}",
        "gpu_memory_bytes": gpu.total_memory,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in ("torch", "triton", "numpy", "fastgan")},
        "revision": git("rev-parse", "HEAD"),
        # Results do not count as changes.
        "changed_files": [
            line[3:] for line in git("status", "--porcelain").splitlines() if "benchmarks/results" not in line
        ],
    }


def read_test_report(report: Path) -> dict[str, Any]:
    """Counts of a junit report, and the names and messages of failed tests."""
    if not report.exists():
        return {"error": "pytest wrote no report"}
    suite = next(ElementTree.parse(report).iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = {}
    for case in suite.iter("testcase"):
        for fault in (*case.findall("failure"), *case.findall("error")):
            failed[f"{case.get('classname')}::{case.get('name')}"] = (fault.get("message") or "").strip()[:400]
    return {**counts, "seconds": float(suite.get("time", 0)), "failed": failed}


def read_benchmark_report(report: Path) -> list[dict[str, Any]]:
    """Name, times in seconds and extra info (errors, memory, times of the other sides) of each benchmark."""
    if not report.exists() or not report.stat().st_size:
        return []
    statistics = ("min", "median", "mean", "stddev", "rounds")
    return [
        {
            "name": it["name"],
            "group": it["group"],
            "seconds": {name: it["stats"][name] for name in statistics},
            **it["extra_info"],
        }
        for it in json.loads(report.read_text())["benchmarks"]
    ]


def pytest_arguments(name: str, keywords: str | None, more: list[str]) -> list[str]:
    """The arguments of a piece, with the user's -k combined with its own, as pytest uses only the last -k."""
    arguments = list(PIECES[name])
    if keywords and "-k" in arguments:
        at = arguments.index("-k") + 1
        arguments[at] = f"({arguments[at]}) and ({keywords})"
    elif keywords:
        arguments += ["-k", keywords]
    return [*arguments, *more]


def run_piece(arguments: list[str], limit: float) -> dict[str, Any]:
    """Run one piece for at most `limit` seconds.

    pytest ends by itself, with a report, after the test in which the time runs out; if it hangs it is killed.

    Returns:
        The entry for the results file; `done` is false if the piece must be repeated.
    """
    is_benchmark = arguments[0].startswith("benchmarks/")
    with tempfile.TemporaryDirectory() as folder:
        junit, times = Path(folder, "tests.xml"), Path(folder, "benchmarks.json")
        command = [sys.executable, "-m", "pytest", *arguments, f"--junitxml={junit}"]
        if importlib.util.find_spec("pytest_timeout") is not None:
            command += [f"--session-timeout={max(1, limit - 60):.0f}"] * (limit < 86400) + [
                "--timeout=0"
            ] * is_benchmark
        start = time.monotonic()
        if is_benchmark:
            command += ["--benchmark-only", f"--benchmark-json={times}"]
        try:
            code: int | None = subprocess.run(command, cwd=ROOT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = None
        result: dict[str, Any] = {"exit_code": code, "arguments": arguments, "tests": read_test_report(junit)}
        if is_benchmark:
            result["benchmarks"] = read_benchmark_report(times)
        cut_off = code is None or time.monotonic() - start > limit - 60
    # 0: all passed; 1: some failed; 5: nothing was selected. Other codes, and signals, are crashes.
    return {**result, "cut_off": cut_off, "done": code in (0, 1, 5) and not (cut_off and code == 1)}


def save(file: Path, results: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    write_atomic(file, (json.dumps(results, indent=1) + "\n").encode())


def load_results(file: Path, current: dict[str, Any]) -> dict[str, Any]:
    """The results so far, if they are of the current machine and revision. Otherwise the file is renamed."""
    if file.is_file():
        before: dict[str, Any] = json.loads(file.read_text())
        if before.get("machine") == current:
            return before
        os.replace(file, file.with_name(f"{file.stem}.before.json"))
        print(f"gpu: {file.name} is of another revision or version: renamed to {file.stem}.before.json", flush=True)
    return {"machine": current, "pieces": {}}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop within this time")
    parser.add_argument("--only", metavar="TEXT", help="only pieces whose name contains TEXT")
    parser.add_argument("-k", metavar="WORDS", help="only tests and benchmarks selected by -k of pytest")
    parser.add_argument("--again", action="store_true", help="repeat pieces that are done")
    parser.add_argument("--list", action="store_true", help="list the pieces and exit")
    args, more = parser.parse_known_args(arguments)
    if not torch.cuda.is_available():
        print("gpu: torch sees no GPU", file=sys.stderr)
        return 1
    end = time.monotonic() + 60 * args.minutes
    current = machine()
    file = RESULTS / (re.sub(r"[^a-z0-9]+", "-", current["gpu"].lower()).strip("-") + ".json")
    names = [name for name in PIECES if (args.only or "") in name]
    if not names:
        print(f"--only must be part of one of: {', '.join(PIECES)}, got {args.only!r}", file=sys.stderr)
        return 1
    results = load_results(file, current)
    pieces = results["pieces"]
    failed = left = 0
    # A selection of a piece gets its own name, as it does not complete the piece.
    titles = {" ".join([name, *(["-k", args.k] if args.k else []), *more]): name for name in names}
    for title, name in titles.items():
        done = pieces.get(title, {}).get("done", False)
        if args.list:
            print(f"{'done' if done else 'open':6}{title}")
            continue
        if not done or args.again:
            if end - time.monotonic() < 90:
                left += 1
                continue
            print(f"gpu: {title}", flush=True)
            # 10 seconds are for writing the file.
            limit = min(end - time.monotonic() - 10, 86400.0)
            pieces[title] = run_piece(pytest_arguments(name, args.k, more), limit)
            save(file, results)
        failed += pieces[title]["exit_code"] not in (0, 5)
        left += pieces[title]["cut_off"] and not pieces[title]["done"]
    if args.list:
        return 0
    summary = ", ".join(f"{name}: exit code {pieces[name]['exit_code']}" for name in titles if name in pieces)
    print(f"gpu: {summary}\ngpu: wrote {file}" + (f"; {left} pieces are left: run it again" if left else ""))
    return 2 if left else int(failed != 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
