"""Whole steps under settings of the process: memory that malloc keeps, how OpenMP threads wait, pages of 2 MiB.

    python -m benchmarks.studies.process_settings [--cases pggan-32 ...] [--rounds 5] [--threads 2]

Each measurement is a process of its own that trains some steps of `benchmarks.training.whole_steps`, plain PyTorch and
ours, under one setting; settings run in turns, --rounds times. All of it twice: on a quiet machine, and beside a busy
program (--load). The table has the median seconds of a step with their range over rounds, beside those of the first
setting, and the largest resident size.

Finished measurements are stored in --results; an interrupted command resumes. --table prints the table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastgan.utils import process

ROOT = Path(__file__).resolve().parents[2]
# Name -> environment. The first is what a program has that sets nothing.
SETTINGS: dict[str, dict[str, str]] = {
    "as it is": {process.KEEP_VARIABLE: "0"},
    "memory kept": {},
    "memory kept, GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "memory kept, OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=1000": {process.KEEP_VARIABLE: "0", "GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=passive": {process.KEEP_VARIABLE: "0", "OMP_WAIT_POLICY": "passive"},
    "THP_MEM_ALLOC_ENABLE=1": {process.KEEP_VARIABLE: "0", "THP_MEM_ALLOC_ENABLE": "1"},
    "memory kept, THP_MEM_ALLOC_ENABLE=1": {"THP_MEM_ALLOC_ENABLE": "1"},
}
LOADS = ("quiet", "busy")


@contextlib.contextmanager
def load(name: str) -> Iterator[None]:
    """Beside a program that keeps one core busy, if `name` is "busy"."""
    if name != "busy":
        yield
        return
    program = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        program.kill()
        program.wait()


def environment(setting: str, threads: int) -> dict[str, str]:
    """The environment of a measurement: this one's, with no other setting than the named one."""
    decided = {name for values in SETTINGS.values() for name in values}
    decided |= {
        "KMP_BLOCKTIME",
        "MALLOC_MMAP_THRESHOLD_",
        "MALLOC_TRIM_THRESHOLD_",
        "MALLOC_TOP_PAD_",
        "GLIBC_TUNABLES",
    }
    rest = {name: value for name, value in os.environ.items() if name not in decided}
    return {**rest, "OMP_NUM_THREADS": str(threads), **SETTINGS[setting]}


def measure(case: str, arm: str, setting: str, args: Any) -> dict[str, Any]:
    words = ["--child", case, arm, str(args.steps)]
    command = [sys.executable, "-m", "benchmarks.studies.process_settings", *words]
    own = environment(setting, args.threads)
    done = subprocess.run(command, env=own, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(case: str, arm: str, steps: int) -> dict[str, Any]:
    """In a process of its own: seconds of steps after two that are not counted, and the largest resident size."""
    process.keep_memory()  # before torch is loaded; threads wait as the environment says
    from benchmarks.training import whole_steps

    whole_steps.torch.set_flush_denormal(True)
    step, seconds = whole_steps.arm(whole_steps.CASES[case], arm), []
    for _ in range(steps + 2):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[2:], "peak": whole_steps.peak_resident()}


def report(results: dict[str, dict[str, Any]]) -> str:
    """The table of finished measurements."""
    from benchmarks.studies.result_cache import markdown_table

    groups: dict[tuple[str, str, str], dict[str, list[dict[str, Any]]]] = {}
    for name, values in results.items():
        case, arm, load_, setting, _ = name.split("/")
        groups.setdefault((case, arm, load_), {}).setdefault(setting, []).append(values)
    rows = []
    for (case, arm, load_), settings in sorted(groups.items()):
        first = None
        for setting in [name for name in SETTINGS if name in settings]:
            medians = [1e3 * statistics.median(found["seconds"]) for found in settings[setting]]
            middle = statistics.median(medians)
            first = middle if first is None else first
            peak = max(found["peak"] for found in settings[setting]) / 1e6
            times = f"{middle:.0f} ({min(medians):.0f} to {max(medians):.0f})"
            rows.append([case, arm, load_, setting, times, f"{first / middle:.2f}x", f"{peak:.0f}"])
    head = "step|arm|machine|setting|ms (range over processes)|beside the first|peak resident MB"
    return markdown_table(head.split("|"), rows) if rows else "no finished measurements"


def main(argv: list[str]) -> int:
    if argv[:1] == ["--child"]:
        print(json.dumps(child(argv[1], argv[2], int(argv[3]))))
        return 0
    from benchmarks.studies.result_cache import ResultCache
    from benchmarks.training.whole_steps import CASES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["pggan-32", "pggan-64", "dcgan-64"], choices=list(CASES))
    parser.add_argument("--arms", nargs="+", default=["plain", "ours-fp32", "ours-bf16"])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--load", nargs="+", default=list(LOADS), choices=LOADS)
    parser.add_argument("--rounds", type=int, default=5, help="processes of each setting")
    parser.add_argument("--steps", type=int, default=7, help="steps of each process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "process_settings.json")
    parser.add_argument("--table", action="store_true", help="only print the table of finished measurements")
    args = parser.parse_args(argv)
    cache = ResultCache(args.results)
    groups = [(c, a, where) for c in args.cases for where in args.load for a in args.arms]
    for case, arm, where in [] if args.table else groups:
        with load(where):
            for number in range(args.rounds):
                for setting in args.settings:
                    name = f"{case}/{arm}/{where}/{setting}/{number}"
                    if name not in cache.results:
                        cache.store(name, measure(case, arm, setting, args))
                        print(f"{name}: done", file=sys.stderr, flush=True)
    print(report(cache.results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
