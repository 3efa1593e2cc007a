"""Downtime of a run after a fault, under `fastgan train --hostfile --max-restarts` on two hosts.

    python -m benchmarks.training.bench_restart [--rounds 3] [--fault rank|host] [--lines]

The hosts are network namespaces, which needs root, Linux and the programs that tests/helpers/hosts.py names. Prints the
seconds from the fault, and from the end of the failed job on all hosts, to each stage of the restart; the last stage is
its first step. Python packages are in the page cache, as the first start has read them.
"""

from __future__ import annotations

import argparse
import runpy
import statistics
import sys
import tempfile
import time
from pathlib import Path

from fastgan import checkpoint

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ROOT / "tests" / "helpers" / "hosts.py"
FLAGS = (
    "--variant pggan --fmap-base 32 --fmap-max 8 --latent 8 --batch 8 --resolution 8 --kimg 2.4 --fade-kimg 0.6 "
    "--stable-kimg 1.2 --log-kimg 0.008 --checkpoint-kimg 0.1 --keep 50 --samples 4 --deterministic --threads 1 "
    "--timeout 20"
).split()
# Text in a line of the output -> the stage that has ended with it, in order.
STAGES = {
    "fastgan: rank 1 on h2": "the other rank has reported the fault",
    "the ranks failed (exit code": "the failed job has ended on both hosts",
    "start 2": "both hosts have answered",
    "Running on the following workers": "DeepSpeed's launcher has been loaded",
    "nnodes=2": "the launcher runs on both hosts",
    "2 x cpu, run ": "the ranks have started, met and read the checkpoint",
    "img/s": "the first step",
}


def measure(folder: Path, fault: str, show: bool) -> dict[str, float]:
    """Seconds from the fault to each of `STAGES`."""
    with runpy.run_path(str(HOSTS))["Hosts"](2, folder) as hosts:
        run = folder / "run"
        line = [sys.executable, str(ROOT / "fastgan" / "train.py"), "--hostfile", str(hosts.hostfile)]
        job = hosts.run(0, [*line, "--max-restarts", "1", *FLAGS, "--out", str(run)])
        assert job.stdout is not None
        fault_at, seconds, remaining = 0.0, dict[str, float](), iter(STAGES)
        words = next(remaining, None)
        for text in job.stdout:
            if show:
                print(f"{time.monotonic() - fault_at if fault_at else 0:7.2f} {text}", end="")
            if not fault_at and "img/s" in text and len(checkpoint.existing(run)) >= 3:
                fault_at = time.monotonic()
                if fault == "rank":
                    hosts.kill(next(pid for pid, command in hosts.processes(1).items() if "--local_rank=" in command))
                else:
                    hosts.crash(1)
                    hosts.boot(1)
            if fault_at and words is not None and words in text:
                seconds[STAGES[words]] = time.monotonic() - fault_at
                words = next(remaining, None)
        assert job.wait() == 0 and words is None, seconds
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="number of faults; medians are printed")
    parser.add_argument("--fault", choices=("rank", "host"), default="rank", help="what fails")
    parser.add_argument("--lines", action="store_true", help="show the output of the run")
    args = parser.parse_args()
    rounds = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(measure(Path(folder), args.fault, args.lines))
    names = list(STAGES.values())
    for name in names:
        after, since = (
            statistics.median(seconds[name] - seconds.get(origin, 0.0) for seconds in rounds)
            for origin in ("", names[1])
        )
        print(f"{after:6.1f} s after the fault, {since:6.1f} s after the failed job's end: {name}")


if __name__ == "__main__":
    main()
