"""Every rank of a finished run exits with success, whichever exits first, and without threads of its process group."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import ranks

from fastgan.cli import train
from fastgan.training.trainer import Trainer

FLAGS = "--variant pggan --fmap-base 32 --fmap-max 8 --latent 8 --resolution 8 --batch 16 --batch-at 8 1".split()
FLAGS += "--fade-kimg 0.016 --stable-kimg 0.016 --kimg 0.064".split()


@pytest.mark.slow
@pytest.mark.parametrize(("late", "engine"), [(0, "deepspeed"), (0, "torch"), (1, "deepspeed")])
def test_every_rank_of_a_finished_run_exits_with_success(tmp_path: Path, late: int, engine: str) -> None:
    """Also if one rank still works when the other has left: rank 0 saves and evaluates alone."""
    ranks.launch(Path(__file__), {"late": late}, tmp_path, 2, engine)
    threads = [json.loads((tmp_path / f"threads-{rank}.json").read_text()) for rank in range(2)]
    # A thread of torch's process group that outlives it may abort the process while the interpreter ends.
    assert threads == [{"before": True, "after": False}] * 2


def _connected() -> bool:
    """Whether this process has threads of gloo, by the names that torch gives them."""
    return any("gloo" in name.read_text() for name in Path("/proc/self/task").glob("*/comm"))


def main() -> None:
    late, out = json.loads(Path(sys.argv[-2]).read_text())["late"], Path(sys.argv[-1])
    threads, trained = {}, Trainer.run

    def run(self: Trainer) -> int | None:
        stopped = trained(self)
        rank = self.world.rank
        threads.update(rank=rank, before=_connected())
        time.sleep(2 if rank == late else 0)
        return stopped

    Trainer.run = run  # type: ignore[method-assign]
    code = train.main([*FLAGS, sys.argv[1], "--out", str(out / "run")])
    (out / f"threads-{threads.pop('rank')}.json").write_text(json.dumps({**threads, "after": _connected()}))
    sys.exit(code)


if __name__ == "__main__":
    main()
