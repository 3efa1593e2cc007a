"""One rank of the multi-process tests: trains a list of cases and writes each one's weights.

    python ranks.py CASES.json OUT

started by torchrun's variables (or without them, as one process). Each case is {"name", "variant", "flags", "steps"};
the weights and optimiser state after its steps go to OUT/NAME.safetensors, written by the first rank.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastgan import data
from fastgan.train import parse
from fastgan.training import world as processes
from fastgan.training.trainer import Trainer


def train(case: dict[str, Any], world: processes.World, out: Path) -> None:
    request = parse(["--variant", case["variant"], *case["flags"]])
    source = data.open_source("digits", request.config.schedule.resolution)
    trainer = Trainer(request.config, request.variant, world, source, out)
    for _ in range(case["steps"]):
        trainer.train_step()
    assert trainer._engines is not None
    tensors = {f"g.{k}": v for k, v in trainer.step.generator.state_dict().items()}
    tensors |= {f"d.{k}": v for k, v in trainer.step.discriminator.state_dict().items()}
    tensors |= {f"og.{k}": v for k, v in trainer._engines[0].state().items()}
    tensors |= {f"od.{k}": v for k, v in trainer._engines[1].state().items()}
    if world.main:
        save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, out / f"{case['name']}.safetensors")
    trainer._close_engines()


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    world = processes.start("auto", "cpu")
    for case in cases:
        train(case, world, out)
    processes.stop()


if __name__ == "__main__":
    main()
