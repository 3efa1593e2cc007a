"""Captured steps beside ordinary ones, in an engine that the tests' own process cannot have.

    python captured_steps.py --engine=ENGINE CASES.json OUT

trains each case {"name", "variant", "flags"} twice on the CPU, where recorded operations stand in for a GPU's graph,
and writes OUT/NAME.json: the engine, the form of the last step, and the names of tensors that differ.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ranks import make_trainer
from torch import Tensor

from fastgan.training.compiling import captured_step, capturing
from fastgan.training.distributed import rendezvous
from fastgan.training.distributed.process_group import ProcessGroup

STEPS = 9


@contextlib.contextmanager
def on_the_cpu(warm_up: int) -> Iterator[None]:
    with (
        mock.patch.object(capturing, "_DEVICES", ("cuda", "cpu")),
        mock.patch.object(captured_step, "WARM_UP_STEPS", warm_up),
    ):
        yield


def trained(case: dict[str, Any], world: ProcessGroup, out: Path) -> tuple[str, dict[str, Tensor]]:
    """The form of the last step, and all that the run has afterwards."""
    trainer = make_trainer(case, world, out)
    for _ in range(STEPS):
        trainer.train_step()
    stage = trainer.stage
    found = {f"{i}.{k}": v.clone() for i, m in enumerate(stage.modules) for k, v in m.state_dict().items()}
    for name, engine in zip("gd", stage.engines, strict=True):
        found |= {f"{name}.{key}": value for key, value in engine.state().items()}
    found["ema"], found["checks"] = stage.ema.steps.clone(), stage.nonfinite.pending().clone()
    form = trainer.capturing.form(stage)
    stage.close()
    trainer.feed.pipeline.close()
    return form, found


def main() -> None:
    cases, out = json.loads(Path(sys.argv[-2]).read_text()), Path(sys.argv[-1])
    engine = next(word.partition("=")[2] for word in sys.argv if word.startswith("--engine="))
    torch.set_num_threads(1)
    world = rendezvous.start(engine, "cpu")
    for case in cases:
        with on_the_cpu(warm_up=3):
            form, ours = trained(case, world, out)
        with on_the_cpu(warm_up=10**9):
            _, theirs = trained(case, world, out)
        differing = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
        result = {"engine": world.engine, "form": form, "differences": differing}
        (out / f"{case['name']}.json").write_text(json.dumps(result))
    world.done()
    rendezvous.stop()


if __name__ == "__main__":
    main()
