"""One rank of the multi-process tests: trains a list of cases and writes each one's weights.

    python ranks.py [--engine=torch] CASES.json OUT

The launcher's environment variables make it a rank; without them it is one process. Each case is {"name", "variant",
"flags", "steps"}. Rank 0 writes the weights and optimizer state after these steps to OUT/NAME.safetensors. A case with
"stop" runs the training loop in OUT/NAME until the last rank has seen so many images and gets SIGTERM; then each rank R
writes its weights and moving average to OUT/NAME-R.safetensors. "strength" is that of the augmentation at the start.

The tests that compare several ranks with one process share `launch`, `case` and `assert_same_weights`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastgan import data
from fastgan.cli.train import parse
from fastgan.training.distributed import rendezvous
from fastgan.training.distributed.process_group import ProcessGroup
from fastgan.training.trainer import Trainer

STEPS = {"wgan-gp": 10, "dcgan": 10, "pggan": 16, "r3gan": 6}
FLAGS = {
    # The paper's optimizer: rounding that differs in the last bit grows with the learning rate and the steps. The rates
    # fall over all of the ten steps.
    "wgan-gp": "--width 8 --max-width 16 --latent 8 --batch 8 --resolution 16 --n-critic 2 --lr-g 1e-4 --lr-d 1e-4 "
    "--beta2 0.9 --kimg 0.16 --lr-decay 1",
    "dcgan": "--width 8 --max-width 16 --latent 8 --batch 8 --resolution 16 --lr-g 1e-4 --lr-d 1e-4 "
    "--regularizer zero-centered --penalty-weight 1",
    # Grows from 4 to 8 px after 10 of its 16 steps. The bias of a Wasserstein critic's output has no gradient but the
    # drift's; at the preset's 0.001 that is the rounding error of a sum of +-1, which Adam then normalizes, so the
    # comparison is made where the gradient is one.
    "pggan": "--fmap-base 32 --fmap-max 8 --latent 8 --batch 16 --resolution 8 --kimg 0.32 --drift 1 "
    "--fade-kimg 0.08 --stable-kimg 0.16 --lr-g 1e-3 --lr-d 1e-3",
    "r3gan": "--width 8 --max-width 16 --latent 8 --batch 8 --resolution 8 --lr-g 1e-4 --lr-d 1e-4",
}


def case(name: str, variant: str, zero: int, accumulation: int) -> dict[str, Any]:
    # One memory format for all: convolutions round differently in another, and Adam with beta1 = 0 amplifies that.
    flags = [*FLAGS[variant].split(), "--memory-format", "contiguous", "--zero", str(zero)]
    return {
        "name": name,
        "variant": variant,
        "flags": [*flags, "--accumulation", str(accumulation)],
        "steps": STEPS[variant],
    }


def one_process(variant: str, world: int, accumulation: int) -> int:
    """Micro-batches with which one process does what `world` ranks do.

    Batch norm (wgan-gp's generator, both networks of dcgan) is per rank, so one process takes the ranks' shares as
    micro-batches. r3gan has none and takes the batch whole. pggan has none, and its minibatch-stddev groups of four
    fall within the ranks' strided slices: it takes the batch of 16 whole, unless a slice is smaller than a group.
    """
    whole = variant == "r3gan" or (variant == "pggan" and world * accumulation <= 4)
    return accumulation if whole else accumulation * world


def assert_same_weights(one: dict[str, Tensor], many: dict[str, Tensor]) -> None:
    """Each tensor differs by less than 1e-5 of its norm."""
    assert one.keys() == many.keys()
    compared = 0
    for name, expected in one.items():
        if "running_" in name or "num_batches" in name:
            continue  # batch-norm statistics are a rank's own
        difference = (expected - many[name]).norm() / expected.norm().clamp_min(1e-30)
        assert difference < 1e-5, f"{name}: {difference:.1e}"
        compared += 1
    assert compared > 20


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(script: Path, cases: Any, out: Path, world: int, engine: str = "auto") -> None:
    """Run `script --engine=ENGINE CASES.json OUT` in `world` processes, as a launcher would."""
    file = out / f"cases{world}.json"
    file.write_text(json.dumps(cases))
    # Test files that are scripts import the helpers.
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    if world > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world)}
    line = [sys.executable, str(script), f"--engine={engine}", str(file), str(out)]
    processes = []
    for rank in range(world):
        own = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {})
        processes.append(subprocess.Popen(line, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, file)


def stop(case: dict[str, Any], trainer: Trainer, out: Path) -> None:
    world, step = trainer.world, trainer.train_step

    def signalled() -> None:
        step()
        if world.rank == world.size - 1 and trainer.images >= case["stop"]:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.train_step = signalled  # type: ignore[method-assign]
    assert trainer.run() == signal.SIGTERM
    tensors = {f"{i}.{k}": v for i, m in enumerate(trainer.stage.modules) for k, v in m.state_dict().items()}
    _write({**tensors, "ema.steps": trainer.stage.ema.steps}, out / f"{case['name']}-{world.rank}.safetensors")


def make_trainer(case: dict[str, Any], world: ProcessGroup, out: Path) -> Trainer:
    request = parse(["--variant", case["variant"], *case["flags"]])
    source = data.open_source("digits", request.config.schedule.resolution)
    (out / case["name"]).mkdir(exist_ok=True)  # as `fastgan train` does
    return Trainer(request.config, request.variant, world, source, out / case["name"])


def train(case: dict[str, Any], world: ProcessGroup, out: Path) -> None:
    trainer = make_trainer(case, world, out)
    if "stop" in case:
        stop(case, trainer, out)
        return
    if "strength" in case:
        trainer.stage.step.augmentation.strength.fill_(case["strength"])  # type: ignore[union-attr,operator]
    for _ in range(case["steps"]):
        trainer.train_step()
    trainer.stage.wait()
    tensors = {f"g.{k}": v for k, v in trainer.stage.step.generator.state_dict().items()}
    tensors |= {f"d.{k}": v for k, v in trainer.stage.step.discriminator.state_dict().items()}
    tensors |= {f"og.{k}": v for k, v in trainer.stage.engines[0].state().items()}
    tensors |= {f"od.{k}": v for k, v in trainer.stage.engines[1].state().items()}
    if trainer.stage.step.augmentation is not None:
        tensors |= {f"augmentation.{k}": v for k, v in trainer.stage.step.augmentation.state_dict().items()}
    if world.main:
        _write(tensors, out / f"{case['name']}.safetensors")
    trainer.stage.close()
    trainer.feed.pipeline.close()


def main() -> None:
    cases, out = json.loads(Path(sys.argv[-2]).read_text()), Path(sys.argv[-1])
    torch.set_num_threads(1)
    engine = next((flag.partition("=")[2] for flag in sys.argv if flag.startswith("--engine=")), "auto")
    world = rendezvous.start(engine, "cpu")
    for case in cases:
        train(case, world, out)
    world.done()
    rendezvous.stop()


if __name__ == "__main__":
    main()
