"""Forecast of a run on a cluster, stage by stage: `fastgan plan --nodes 16 --gpus-per-node 8`."""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastgan.cli.main import command
from fastgan.cli.output import say
from fastgan.cli.run_request import RunFlags, parse
from fastgan.config import Config, batches_for_all
from fastgan.config.growth import stages_of
from fastgan.config.images import source_arguments
from fastgan.errors import ArgumentError
from fastgan.planning import step_times
from fastgan.planning.cost_model import Cluster, Cost, Link, total_cost
from fastgan.planning.forecast import Forecaster, StageForecast
from fastgan.utils.text import readable_duration

if TYPE_CHECKING:
    from fastgan.data import Source
    from fastgan.training.distributed.process_group import ProcessGroup

# Flags that say which run is meant. Without any of them the published recipe is planned, on images of its size.
_RUN_FLAGS = ("--data", "--preset", "--config", "--resume")


@dataclass(frozen=True)
class ClusterFlags:
    """Cluster."""

    nodes: int = 1
    """Number of hosts."""
    gpus_per_node: int = 8
    """Ranks on each host."""
    bandwidth: float = 50.0
    """Bandwidth of a host's network, in GB/s in each direction; 50 is one 400 Gb/s adapter."""
    latency: float = 5.0
    """Latency between hosts, in microseconds."""
    bandwidth_inside: float = 300.0
    """Bandwidth between the ranks of a host, in GB/s in each direction; 300 is about that of NVLink."""
    latency_inside: float = 3.0
    """Latency inside a host, in microseconds."""
    overlap: bool = True
    """Send gradients during the backward pass, as the trainer does."""

    def validate(self) -> None:
        """Raises ArgumentError if a flag is out of bounds."""
        for flag, count in (("--nodes", self.nodes), ("--gpus-per-node", self.gpus_per_node)):
            if count < 1:
                raise ArgumentError(flag, count, "must be at least 1")
        for flag, value in (("--bandwidth", self.bandwidth), ("--bandwidth-inside", self.bandwidth_inside)):
            if not (math.isfinite(value) and value > 0):
                raise ArgumentError(flag, value, "must be above 0, in GB/s")
        for flag, value in (("--latency", self.latency), ("--latency-inside", self.latency_inside)):
            if not (math.isfinite(value) and value >= 0):
                raise ArgumentError(flag, value, "must be at least 0, in microseconds")

    def cluster(self) -> Cluster:
        return Cluster(
            self.nodes,
            self.gpus_per_node,
            between=Link(self.bandwidth * 1e9, self.latency * 1e-6),
            inside=Link(self.bandwidth_inside * 1e9, self.latency_inside * 1e-6),
            overlap=self.overlap,
        )


@dataclass(frozen=True)
class StepTimeFlags:
    """Step times."""

    measure_seconds: float = 5.0
    """Approximate duration of each measurement; a step that would take over six times as long is estimated."""
    step_times: str | None = None
    """Read step times from this file instead of measuring them here."""
    write_step_times: str | None = None
    """Write the measured step times to this file, and measure smaller micro-batches too, to plan other clusters."""

    def validate(self) -> None:
        """Raises ArgumentError if a flag is out of bounds or cannot be combined with another."""
        if not (math.isfinite(self.measure_seconds) and self.measure_seconds > 0):
            raise ArgumentError("--measure-seconds", self.measure_seconds, "must be above 0")
        if self.step_times and self.write_step_times:
            raise ArgumentError("--write-step-times", self.write_step_times, "cannot be combined with --step-times")
        if self.write_step_times:
            step_times.require_writable(self.write_step_times)


@dataclass(frozen=True)
class PlanOptions(RunFlags):
    """Forecast how long a run takes on a cluster, stage by stage, and how much of it is communication.

    Takes all flags of fastgan train. Without --data, --preset, --config or --resume it plans the published recipe.
    """

    machines: ClusterFlags = field(default_factory=ClusterFlags)
    times: StepTimeFlags = field(default_factory=StepTimeFlags)


def make_forecaster(config: Config, source: Source, cluster: Cluster) -> Forecaster:
    """A forecaster with the trainer's stages, footprints and way of reducing gradients."""
    from fastgan.training.distributed.deepspeed_engine import uses_own_reducer
    from fastgan.training.footprint import footprint
    from fastgan.training.from_config import engine_settings

    stages = stages_of(config)
    return Forecaster(
        config,
        stages,
        cluster,
        functools.cache(
            lambda stage, micro, fading: footprint(config, source, stage, micro, cluster.size, fading=fading)
        ),
        own_reducer=uses_own_reducer(engine_settings(config, stages[0].resolution, cluster.size)),
    )


def _this_process(config: Config) -> ProcessGroup:
    from fastgan.training.distributed.process_group import ProcessGroup
    from fastgan.training.distributed.rendezvous import pick_device

    return ProcessGroup(0, 1, pick_device(config.system.device), "torch", "measuring")


def _measure(forecaster: Forecaster, config: Config, channels: int, flags: StepTimeFlags) -> step_times.StepTimes:
    """Measure the steps of a run. The file of --write-step-times is rewritten after each step, so nothing is lost."""
    import torch
    from tqdm import tqdm

    from fastgan.training.step_measurement import Bench, busy, free_bytes
    from fastgan.utils.system import device_name

    device = _this_process(config).device
    bench = Bench(config, device, channels, flags.measure_seconds)
    recipe = step_times.recipe_of(config, channels)
    times = step_times.StepTimes(step_times.SCHEMA, device_name(device), torch.__version__, recipe, [])
    smaller = flags.write_step_times is not None
    measured = forecaster.measure(bench.time, lambda: free_bytes(device), flags.measure_seconds, smaller=smaller)
    steps = len(forecaster.steps_to_measure(smaller))
    with tqdm(total=steps, unit="step", desc="measuring", leave=False, disable=None) as bar:
        for timing in measured:
            if isinstance(timing, str):
                bar.write(timing, file=sys.stderr)
            else:
                times.timings.append(timing)
                if flags.write_step_times:
                    step_times.write(times, flags.write_step_times)
                bar.set_postfix_str(f"{timing.resolution} px, {timing.micro} per rank")
            bar.update()
    line = busy(bench.scatters, device)
    if line is not None:
        say(line, error=True)
    return times


def table(stages: list[StageForecast]) -> list[str]:
    """The stages and their total.

    The columns "sending" and "waiting" are all seconds of all-reduce, and those that compute does not hide, as shares
    of the time.
    """
    lines = [
        f"{'px':>5} {'kimg':>7} {'batch':>6} {'ranks':>6} {'per rank':>9} {'step':>10} {'sending':>8} {'waiting':>8} "
        f"{'images/s':>9} {'time':>9} {'memory/rank':>12}"
    ]
    for stage in stages:
        batch, cost = stage.batch, stage.cost
        lines.append(
            f"{batch.stage.resolution:5d} {batch.images / 1000:7g} {batch.size:6d} {batch.active:6d} {batch.micro:9d} "
            f"{1000 * cost.seconds / cost.steps:7.1f} ms {_columns(cost, batch.images, stage.footprint.bytes)}"
            + (" *" if stage.note else "")
        )
    images, nbytes = sum(stage.batch.images for stage in stages), max(stage.footprint.bytes for stage in stages)
    total = _columns(total_cost([(1, stage.cost) for stage in stages]), images, nbytes)
    return [*lines, f"{'all':>5} {images / 1000:7g} {'':6} {'':6} {'':9} {'':10} {total}"]


def _columns(cost: Cost, images: int, nbytes: float) -> str:
    """The columns that a stage and the total have in common."""
    return (
        f"{cost.communication / cost.seconds:8.1%} {cost.exposed / cost.seconds:8.1%} {images / cost.seconds:9.1f} "
        f"{readable_duration(cost.seconds):>9} {nbytes / 2**30:8.2f} GiB"
    )


def remarks(stages: list[StageForecast], ranks: int, config: Config) -> list[str]:
    """Lines under the table: which step times were not measured, and which ranks are idle."""

    def resolutions(chosen: list[StageForecast]) -> str:
        return ", ".join(str(stage.batch.stage.resolution) for stage in chosen) + " px"

    lines = []
    for note in dict.fromkeys(stage.note for stage in stages if stage.note):
        lines.append(f"* {resolutions([stage for stage in stages if stage.note == note])}: {note}")
    idle = [stage for stage in stages if stage.batch.active < ranks]
    if idle:
        active = ", ".join(str(stage.batch.active) for stage in idle)
        lines.append(
            f"{resolutions(idle)}: the batch is too small for {ranks} ranks; active ranks: {active}; the others "
            f"contribute nothing; to use all ranks: {batches_for_all(config.schedule, ranks)}"
        )
    small = [stage for stage in stages if stage.batch.micro < 4]
    if config.networks.model == "pggan" and small:
        lines.append(
            f"{resolutions(small)}: fewer than 4 images per rank, so the groups of minibatch standard deviation are "
            "smaller than on one rank"
        )
    return lines


@command
def main(argv: list[str]) -> int:
    if not any(flag.split("=")[0] in _RUN_FLAGS for flag in argv):
        argv = [*argv, "--data", "synthetic"]
    request = parse(argv, PlanOptions, "fastgan plan")
    assert isinstance(request.flags, PlanOptions)
    machines, flags, config = request.flags.machines, request.flags.times, request.config
    machines.validate()
    flags.validate()
    from fastgan.cli.auto_settings import settle
    from fastgan.data import open_source
    from fastgan.training import precision, torch_settings
    from fastgan.training.from_config import validate_stages

    torch_settings.apply(config)
    cluster = machines.cluster()
    settled = settle(request, _this_process(config), cluster.size)
    request, config = settled.request, settled.request.config
    if not flags.step_times:  # a file says in which precision its steps were measured
        config, _ = precision.resolve(config, request.variant, _this_process(config))
        torch_settings.allow_tf32(config.system.precision == "tf32")
    validate_stages(config, cluster.size)
    source = open_source(**source_arguments(config))
    run = make_forecaster(config, source, cluster)
    if flags.step_times:
        times = step_times.read(flags.step_times, step_times.recipe_of(config, source.channels))
    else:
        times = _measure(run, config, source.channels, flags)
    try:
        stages = run.forecast(times)
    except LookupError:
        if flags.step_times:
            raise ArgumentError("--step-times", flags.step_times, "has no timing of any stage of this run") from None
        raise ArgumentError("--measure-seconds", flags.measure_seconds, "no step could be measured") from None
    s = config.schedule
    print("".join(f"{line}\n" for line in settled.lines), end="")
    print(
        f"{request.variant}, {request.preset} preset: {s.kimg:g} kimg to {s.resolution} px on {machines.nodes} x "
        f"{machines.gpus_per_node} = {cluster.size} ranks, ZeRO {config.system.zero}, {times.recipe['precision']}"
    )
    print(f"step times: {times.device}, torch {times.torch}" + (f", {flags.step_times}" if flags.step_times else ""))
    print(
        f"network: {machines.bandwidth:g} GB/s and {machines.latency:g} us between hosts, "
        f"{machines.bandwidth_inside:g} GB/s and {machines.latency_inside:g} us inside a host; ring all-reduce, "
        f"{'during' if machines.overlap else 'after'} the backward pass"
    )
    print()
    print("\n".join([*table(stages), *remarks(stages, cluster.size, config)]))
    return 0
