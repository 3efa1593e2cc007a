"""Whole training steps beside plain PyTorch: time, peak memory, the step's arithmetic and the share of peak reached.

    python -m benchmarks.training.whole_steps [CASE ...] [--threads 2] [--precision fp32 bf16] [--kept on off]

A step is one of the discriminator and one of the generator, with everything that training has around them. Arms:
`plain` (benchmarks/training/plain.py, written from the papers, at torch's defaults) in float32, and through the
trainer's own stage, in each --precision, `ours` in eager mode and `compiled` (--compile on; compiling is not counted,
and takes up to a minute a case once). Both sides start from the same weights, and their losses are compared before
anything is timed. The arms of a case run in turns in one process; peak memory is that of a process per arm. --kept
repeats everything with memory that malloc keeps, on both sides (docs/precision.md). Results go to --out as JSON.

The arithmetic is that of matrix products and convolutions, counted by torch over both backwards. The machine's peak is
measured: the largest rate of a matrix product of 2048 and of a convolution of 64 channels in channels_last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastgan

if __name__ == "__main__":
    fastgan.configure_process()  # before torch is loaded, as the commands do

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.studies.result_cache import ROOT, markdown_table
from benchmarks.training import plain
from fastgan.config import Config, Precision, replace
from fastgan.config.variants import VARIANTS
from fastgan.data import Batch
from fastgan.training.compiling.build import build
from fastgan.training.compiling.programs import ProgramSpec, StagePrograms, load
from fastgan.training.distributed.process_group import ProcessGroup
from fastgan.training.loss_scale import LossScales
from fastgan.training.observability.meters import Meters
from fastgan.training.observability.stragglers import StragglerDetector
from fastgan.training.stage import ActiveStage
from fastgan.utils import counter_rng
from fastgan.utils.files import write_atomic
from fastgan.utils.process import KEEP_VARIABLE
from fastgan.utils.system import device_name

CPU = torch.device("cpu")
# Where rounding moves a pre-activation across zero, the slope flips and the gradient jumps.
TOLERANCE = {"fp32": 5e-3, "bf16": 0.15, "fp16": 0.15}
Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """A row of the table: fastgan's configuration, and the plain networks with the same parameters."""

    variant: str
    resolution: int
    channels: int
    batch: int
    changes: dict[str, dict[str, Any]]
    plain: Callable[[Config, int], tuple[nn.Module, nn.Module]]

    def config(self, precision: Precision) -> Config:
        schedule = {"resolution": self.resolution, "batch": self.batch, "batch_at": {}}
        config = replace(VARIANTS[self.variant].config("paper"), **self.changes)
        return replace(config, schedule=schedule, system={"precision": precision})


def _progressive(config: Config, channels: int) -> tuple[nn.Module, nn.Module]:
    n, r = config.networks, config.schedule.resolution
    return plain.ProgressiveGenerator(r, channels, n.latent, 64), plain.ProgressiveDiscriminator(r, channels, 64)


def _dcgan(config: Config, channels: int) -> tuple[nn.Module, nn.Module]:
    n, levels = config.networks, config.schedule.resolution.bit_length() - 3
    widths = [n.width * 2**i for i in range(levels)]
    discriminator = plain.DcganDiscriminator(widths, channels, n.norm_d == "batch")
    return plain.DcganGenerator(widths[::-1], channels, n.latent), discriminator


def _sagan(config: Config, channels: int) -> tuple[nn.Module, nn.Module]:
    from fastgan.models.sagan import _widths

    n = config.networks
    widths = _widths(config.schedule.resolution, n.width, n.max_width)
    return plain.SaganGenerator(widths, channels, n.latent, 32), plain.SaganDiscriminator(widths, channels, 32)


_WIDTH_64 = {"networks": {"latent": 64, "fmap_base": 8192, "fmap_max": 64}}
_SAGAN: dict[str, dict[str, Any]] = {
    "networks": {"width": 16, "max_width": 256},
    "objective": {"regularizer": "gradient-penalty"},
}
CASES = {
    "pggan-32": Case("pggan", 32, 1, 16, _WIDTH_64, _progressive),
    "pggan-64": Case("pggan", 64, 1, 16, _WIDTH_64, _progressive),
    "wgan-gp-64": Case("wgan-gp", 64, 3, 64, {"networks": {"width": 64}, "optimizer": {"n_critic": 1}}, _dcgan),
    "dcgan-64": Case("dcgan", 64, 3, 64, {"networks": {"width": 64}}, _dcgan),
    "sagan-64": Case("sagan", 64, 3, 8, _SAGAN, _sagan),
}


# --- arms ------------------------------------------------------------------------------------------------------------


def our_stage(case: Case, precision: Precision) -> ActiveStage:
    """The trainer's stage of a case, the same weights at every call."""
    world = ProcessGroup(0, 1, CPU, "torch", "measuring")
    scales = LossScales(CPU) if precision == "fp16" else None
    return ActiveStage(
        case.config(precision), world, case.resolution, channels=case.channels, num_classes=0,
        stragglers=StragglerDetector(world), meters=Meters(), scales=scales, groups={},
    )  # fmt: skip


class NotCompiled(RuntimeError):
    """There are no programs for a case, or they are not right; the message says why."""


def compiled_programs(case: Case, stage: ActiveStage) -> StagePrograms:
    """The programs of a stage, compiled now if they are not in the user's cache."""
    spec = ProgramSpec(stage.config, case.resolution, False, case.channels, 0, case.batch)
    if not spec.compiled(CPU):
        build(spec, CPU)
    found = load(spec, stage.step)
    if not isinstance(found, StagePrograms):
        raise NotCompiled(f"{case.variant} at {case.resolution} px cannot be compiled: {found}")
    return found


def plain_trainer(case: Case, precision: Precision = "fp32") -> plain.PlainTrainer:
    """The plain side of a case, with the weights of `our_stage`."""
    config = case.config("fp32")
    networks, stage = case.plain(config, case.channels), our_stage(case, "fp32")
    for network, module in zip(networks, stage.modules, strict=False):
        state = module.state_dict()
        network.load_state_dict({name: state[name] for name in network.state_dict()})
    o, dtype = config.objective, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    penalty = o.penalty_weight if o.regularizer == "gradient-penalty" else 0.0
    betas = (config.optimizer.beta1, config.optimizer.beta2)
    return plain.PlainTrainer(*networks, o.loss, penalty, o.drift, betas, dtype)


def images_of(case: Case) -> Tensor:
    shape = (case.batch, case.channels, case.resolution, case.resolution)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def arm(case: Case, name: str) -> Step:
    """One whole step of an arm, "plain", or "plain", "ours" or "compiled" with "-PRECISION"."""
    images = images_of(case)
    side, _, precision = name.partition("-")
    if side == "plain":
        trainer = plain_trainer(case, precision or "fp32")  # type: ignore[arg-type]
        return lambda: trainer.step(images)
    stage = our_stage(case, precision)  # type: ignore[arg-type]
    if side == "compiled":
        stage.use(compiled_programs(case, stage))
    positions = torch.arange(case.batch)

    def step() -> None:
        stage.generator_step(stage.discriminator_step([Batch(images, None, positions)]))

    return step


def difference(case: Case, precision: Precision) -> float:
    """Relative difference of the discriminator's losses of both sides, and of the gradients of the weights."""
    stage, trainer, images = our_stage(case, precision), plain_trainer(case), images_of(case)
    positions = torch.arange(case.batch)
    z = counter_rng.normal(stage.step.seed, "latent of D's step", positions, stage.step.latent)
    weight = counter_rng.uniform(stage.step.seed, "interpolation", positions, 1)[:, 0]
    ours, _ = stage.step.discriminator_loss(images, positions)
    theirs = trainer.discriminator_loss(images, z, weight)
    ours.backward()
    theirs.backward()
    mine = dict(stage.step.discriminator.named_parameters())
    pairs = [(mine[n].grad, p.grad) for n, p in trainer.discriminator.named_parameters() if p.grad is not None]
    off = sum((a - b).square().sum().item() for a, b in pairs if a is not None) ** 0.5
    size = sum(b.square().sum().item() for _, b in pairs) ** 0.5
    return max(abs(ours.item() - theirs.item()) / max(abs(theirs.item()), 1.0), off / size)


# --- measures --------------------------------------------------------------------------------------------------------


class _Flops(TorchDispatchMode):
    """Counts by torch's formulas. torch's own counter tracks modules by hooks, which a penalty's gradient refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        elif func.namespace == "fastgan" and func._opname.startswith(("conv2d_", "winograd_")):
            # As many as the direct sum takes: 2 for each pixel of the output and each weight of the kernel; with a
            # change of scale those of one convolution of stride 2.
            output = result if func._opname.endswith("forward") else args[0]
            weight = result if func._opname.endswith("weight_gradient") else args[1]
            scale = args[-1] if func._opname.startswith("winograd_") else 0
            taps = {-1: 16 / 9, 0: 1.0, 1: 4 / 9}[scale]
            self.total += round(2 * output.numel() * weight[0].numel() * taps)
        return result


def flops(step: Callable[[], object]) -> int:
    """Operations of the matrix products and convolutions of a step; our attention, a small part, is not counted."""
    with _Flops() as counter:
        step()
    return counter.total


def _rate(run: Callable[[], Any], operations: int, repeats: int = 7) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return operations / min(seconds)


@torch.no_grad()
def peaks(dtype: torch.dtype) -> dict[str, float]:
    """Operations a second of this machine's fastest matrix product and convolution."""
    a, b = (torch.randn(2048, 2048, dtype=dtype) for _ in range(2))
    found = {"matrix product": _rate(lambda: a @ b, 2 * 2048**3)}
    w = torch.randn(64, 64, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    for size in (16, 32, 64):
        x = torch.randn(16, 64, size, size, dtype=dtype).to(memory_format=torch.channels_last)
        rate = _rate(lambda x=x: nn.functional.conv2d(x, w, padding=1), 2 * 16 * size**2 * 64 * 64 * 9)  # type: ignore[misc]
        found["convolution"] = max(rate, found.get("convolution", 0.0))
    return found


def interleaved(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median seconds of each step, all run in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_resident() -> int:
    """Largest resident size of this process so far, in bytes; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


# --- processes -------------------------------------------------------------------------------------------------------


def child_times(case: Case, names: list[str], rounds: int) -> dict[str, Any]:
    """In a process of its own: errors, then times of the arms of a case."""
    ours: list[Any] = [name.partition("-")[2] for name in names if name.startswith("ours-")]
    off = {precision: difference(case, precision) for precision in ours}
    wrong = {name: error for name, error in off.items() if error > TOLERANCE[name]}
    if wrong:
        raise SystemExit(f"the sides compute different losses or gradients: {wrong}")
    steps = {}
    for name in names:
        try:
            steps[name] = arm(case, name)
        except NotCompiled as error:
            print(f"{name}: {error}", file=sys.stderr)
    # A program's operations are not seen by torch: those of the eager step stand for it.
    counted = {name: flops(steps[name.replace("compiled", "ours")]) for name in steps}
    return {"difference": off, "seconds": interleaved(steps, rounds), "flops": counted}


def child_memory(case: Case, name: str) -> dict[str, Any]:
    """In a process of its own: the peak of three steps of one arm, and how far it is above the process before them."""
    before, step = peak_resident(), arm(case, name)
    for _ in range(3):
        step()
    return {"peak": peak_resident(), "extra": peak_resident() - before}


def start_child(what: str, case: str, names: list[str], args: Any, kept: bool) -> dict[str, Any]:
    words = [what, case, *names, "--threads", str(args.threads), "--rounds", str(args.rounds)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), KEEP_VARIABLE: "1" if kept else "0"}
    command = [sys.executable, "-m", "benchmarks.training.whole_steps", "--child", *words]
    done = subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: str, args: Any, kept: bool) -> dict[str, Any]:
    names = ["plain", *(f"{side}-{precision}" for precision in args.precision for side in ("ours", "compiled"))]
    found = start_child("times", case, names, args, kept)
    return {**found, "memory": {n: start_child("memory", case, [n], args, kept) for n in found["seconds"]}}


def row(case: str, kept: str, name: str, found: dict[str, Any], peak: dict[str, dict[str, float]]) -> list[str]:
    seconds, memory = found["seconds"][name], found["memory"]
    faster = f"{found['seconds']['plain'] / seconds:.2f}x"
    rate = found["flops"][name] / seconds
    dtype = name.partition("-")[2] or "fp32"
    share = f"{rate / max(peak[dtype].values()):.0%}" if dtype in peak else "-"
    giga = [f"{found['flops'][name] / 1e9:.1f}", f"{rate / 1e9:.0f}"]
    return [case, kept, name, f"{seconds * 1e3:.0f}", faster, *giga, share, f"{memory[name]['extra'] / 1e6:.0f}"]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kept", nargs="+", default=["off", "on"], choices=["off", "on"], help="memory malloc keeps")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--child", choices=["times", "memory"], help=argparse.SUPPRESS)
    args, others = parser.parse_known_args(argv)
    words = [*args.cases, *others]
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    if args.child:
        name, *arms = words
        times = args.child == "times"
        print(json.dumps(child_times(CASES[name], arms, args.rounds) if times else child_memory(CASES[name], arms[0])))
        return 0
    if set(words) - set(CASES):
        parser.error(f"CASE must be of {', '.join(CASES)}, got {' '.join(words)}")
    peak = {name: peaks(dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    machine = f"{device_name(CPU)}, torch {torch.__version__}"
    results: dict[str, Any] = {"machine": machine, "peaks": peak, "cases": {}}
    rows = []
    for case in args.cases or CASES:
        for kept in args.kept:
            found = measure(case, args, kept == "on")
            results["cases"][f"{case}, memory kept {kept}"] = found
            rows += [row(case, kept, name, found, peak) for name in found["seconds"]]
            print(f"{case}, memory kept {kept}: {found['seconds']}", file=sys.stderr, flush=True)
            if args.out:
                write_atomic(args.out, (json.dumps(results, indent=1) + "\n").encode())
    print(machine)
    for name, rates in peak.items():
        print(f"peak {name}: {', '.join(f'{what} {rate / 1e9:.0f} GFLOP/s' for what, rate in rates.items())}")
    print(markdown_table(["step", "kept", "arm", "ms", "faster", "GFLOP", "GFLOP/s", "of peak", "extra MB"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
