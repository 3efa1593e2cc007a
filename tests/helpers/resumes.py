"""One rank of the tests that move a run to another number of ranks: resumes checkpoints and writes new ones.

    python resumes.py CASES.json OUT

as ranks.py. Each case is {"from": run or null, "to": run, "variant", "flags", "steps"}: the run `from` is resumed, as
by `fastgan train --resume`, for so many steps, and its checkpoint is written to the run `to`; paths are in OUT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ranks
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastgan import checkpoint, data
from fastgan.cli.train import parse
from fastgan.training.distributed import rendezvous
from fastgan.training.distributed.process_group import ProcessGroup
from fastgan.training.run_setup import keep_batch_cut
from fastgan.training.trainer import Trainer


def case(before: str | None, to: str, variant: str, zero: int, steps: int) -> dict[str, Any]:
    flags = ranks.case(to, variant, zero, 1)["flags"]
    flags = flags[: flags.index("--accumulation")]  # chosen at the resume, to keep the cut of the batches
    return {"from": before, "to": to, "variant": variant, "flags": flags, "steps": steps}


def resume(case: dict[str, Any], world: ProcessGroup, out: Path) -> None:
    request = parse(["--variant", case["variant"], *case["flags"]])
    config, stored = request.config, None
    if case["from"] is not None:
        stored = checkpoint.read(out / case["from"], "--resume")
        if not request.sets_accumulation:
            config = keep_batch_cut(config, stored, world)
    source = data.open_source("digits", config.schedule.resolution)
    trainer = Trainer(config, request.variant, world, source, out / case["to"], stored)
    for _ in range(case["steps"]):
        trainer.train_step()
    trainer.save()
    trainer.stage.close()
    trainer.feed.pipeline.close()


def stored(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and values of a run's checkpoint, without the random states and meters of single ranks."""
    saved = checkpoint.read(run, "--resume")
    tensors = {f"ema:{name}": tensor for name, tensor in saved.generator().items()}
    everything = load_file(saved.path / "training.safetensors")
    tensors |= {name: tensor for name, tensor in everything.items() if not name.startswith(("random:", "meters:"))}
    values = {key: saved.meta[key] for key in ("images", "steps", "ema_steps", "resolution", "data", "seed")}
    return tensors, values


def assert_moved(before: Path, after: Path) -> None:
    """Weights, moving average, optimizer state and position in the data are bit-identical."""
    (one, where), (other, there) = stored(before), stored(after)
    assert where == there
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    assert {name.split(":")[0] for name in one} == {"ema", "generator", "discriminator", "optimizer_g", "optimizer_d"}


def main() -> None:
    cases, out = json.loads(Path(sys.argv[-2]).read_text()), Path(sys.argv[-1])
    torch.set_num_threads(1)
    world = rendezvous.start("auto", "cpu")
    for one in cases:
        resume(one, world, out)
    world.done()
    rendezvous.stop()


if __name__ == "__main__":
    main()
