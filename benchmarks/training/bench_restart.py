"""How long a run stands still after a fault, under `fastgan train --hostfile --max-restarts` on two hosts.

    python -m benchmarks.training.bench_restart [--rounds 3] [--fault rank|host] [--lines]

Network namespaces stand for the hosts (root, Linux, and what tests/helpers/hosts.py names). Seconds from the fault, and
from the moment the failed job had ended on all hosts, to what each stage of the restarted one has written; the last is
its first step. Packages are warm: the start before the fault has read them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

FLAGS = (
    "--variant pggan --fmap-base 32 --fmap-max 8 --latent 8 --batch 8 --resolution 8 --kimg 2.4 --fade-kimg 0.6 "
    "--stable-kimg 1.2 --log-kimg 0.008 --checkpoint-kimg 0.1 --keep 50 --samples 4 --deterministic --threads 1 "
    "--timeout 20"
).split()
# What a line of the output holds, in the order of their coming, and what has come to its end with it.
STAGES = {
    "fastgan: rank 1 on h2": "the other rank has named it",
    "a fault (exit code": "the failed job has ended on both hosts",
    "start 2": "both hosts have answered",
    "Running on the following workers": "DeepSpeed's launcher has been loaded",
    "nnodes=2": "it runs on the hosts",
    "going on at": "ranks have loaded, met and read the checkpoint",
    "img/s": "the first step",
}


def measure(folder: Path, fault: str, show: bool) -> dict[str, float]:
    """Seconds from the fault to each of `STAGES`."""
    from hosts import Hosts

    from fastgan import checkpoint

    with Hosts(2, folder) as hosts:
        run = folder / "run"
        line = [sys.executable, str(ROOT / "fastgan" / "train.py"), "--hostfile", str(hosts.hostfile)]
        job = hosts.run(0, [*line, "--max-restarts", "1", *FLAGS, "--out", str(run)])
        assert job.stdout is not None
        began, found, waited = 0.0, dict[str, float](), iter(STAGES)
        words = next(waited, None)
        for text in job.stdout:
            if show:
                print(f"{time.monotonic() - began if began else 0:7.2f} {text}", end="")
            if not began and "img/s" in text and len(checkpoint.existing(run)) >= 3:
                began = time.monotonic()
                if fault == "rank":
                    hosts.kill(next(pid for pid, said in hosts.processes(1).items() if "--local_rank=" in said))
                else:
                    hosts.crash(1)
                    hosts.boot(1)
            if began and words is not None and words in text:
                found[STAGES[words]] = time.monotonic() - began
                words = next(waited, None)
        assert job.wait() == 0 and words is None, found
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fault", choices=("rank", "host"), default="rank", help="what is killed")
    parser.add_argument("--lines", action="store_true", help="show what the run prints")
    given = parser.parse_args()
    rounds = []
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(measure(Path(folder), given.fault, given.lines))
    names = list(STAGES.values())
    for name in names:
        after, since = (
            statistics.median(found[name] - found.get(past, 0.0) for found in rounds) for past in ("", names[1])
        )
        print(f"{after:6.1f} s after the fault, {since:6.1f} s after the failed job's end: {name}")


if __name__ == "__main__":
    main()
