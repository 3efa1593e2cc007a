"""How long a run would take on a cluster, stage by stage: `fastgan plan --nodes 16 --gpus-per-node 8`."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastgan.cli.main import command
from fastgan.cli.train import Asked, Request, parse
from fastgan.config import Config, batches_for_all
from fastgan.errors import ArgumentError
from fastgan.utils.text import readable_duration

if TYPE_CHECKING:
    from fastgan.planning.communication import Cluster
    from fastgan.training.forecast import Planner, Row
    from fastgan.training.step_measurement import StepTimes


@dataclass(frozen=True)
class Machines:
    """Cluster."""

    nodes: int = 1
    """Hosts."""
    gpus_per_node: int = 8
    """Ranks on each host."""
    bandwidth: float = 50.0
    """Of a host's network, in GB/s each way; 50 is one adapter of 400 Gb/s."""
    latency: float = 5.0
    """Of a message between hosts, in microseconds."""
    bandwidth_inside: float = 300.0
    """Between the ranks of a host, in GB/s each way; 300 is about NVLink's."""
    latency_inside: float = 3.0
    """Of a message inside a host, in microseconds."""
    overlap: bool = True
    """Send gradients while the backward goes on, as the trainer does."""


@dataclass(frozen=True)
class Times:
    """Step times."""

    measure_seconds: float = 5.0
    """About how long each kind of step is measured; what takes over six times that is worked out, and said so."""
    step_times: str | None = None
    """Take step times from this file instead of measuring them here."""
    write_step_times: str | None = None
    """Write what was measured to this file, with smaller micro-batches too, for plans of other clusters."""


@dataclass(frozen=True)
class Plan(Asked):
    """Say how long a run would take on a cluster, stage by stage, and how much of it is communication.

    Takes all flags of fastgan train. Without --data, --preset, --config or --resume it plans the published recipe.
    """

    machines: Machines = field(default_factory=Machines)
    times: Times = field(default_factory=Times)


def _check(machines: Machines, times: Times) -> None:
    for flag, count in (("--nodes", machines.nodes), ("--gpus-per-node", machines.gpus_per_node)):
        if count < 1:
            raise ArgumentError(flag, count, "must be at least 1")
    for flag, value in (("--bandwidth", machines.bandwidth), ("--bandwidth-inside", machines.bandwidth_inside)):
        if not (math.isfinite(value) and value > 0):
            raise ArgumentError(flag, value, "must be above 0, in GB/s")
    for flag, value in (("--latency", machines.latency), ("--latency-inside", machines.latency_inside)):
        if not (math.isfinite(value) and value >= 0):
            raise ArgumentError(flag, value, "must be at least 0, in microseconds")
    if not (math.isfinite(times.measure_seconds) and times.measure_seconds > 0):
        raise ArgumentError("--measure-seconds", times.measure_seconds, "must be above 0")
    if times.step_times and times.write_step_times:
        raise ArgumentError("--write-step-times", times.write_step_times, "it may be left out with --step-times")


def cluster_of(machines: Machines) -> Cluster:
    from fastgan.planning.communication import Cluster, Link

    return Cluster(
        machines.nodes,
        machines.gpus_per_node,
        between=Link(machines.bandwidth * 1e9, machines.latency * 1e-6),
        inside=Link(machines.bandwidth_inside * 1e9, machines.latency_inside * 1e-6),
        overlap=machines.overlap,
    )


def _measure(planner: Planner, request: Request, times: Times) -> StepTimes:
    """Measure what the plan needs; with a file to write, it is replaced after each step, so that nothing is lost."""
    import torch
    from tqdm import tqdm

    from fastgan.training import step_measurement
    from fastgan.training.distributed.rendezvous import pick_device
    from fastgan.utils.system import device_name

    device = pick_device(request.config.system.device)
    more = times.write_step_times is not None
    recipe = step_measurement.recipe(request.config, planner.source.channels)
    measured = step_measurement.StepTimes(step_measurement.SCHEMA, device_name(device), torch.__version__, recipe, [])
    with tqdm(total=len(planner.wanted(more)), unit="step", desc="measuring", leave=False, disable=None) as bar:
        for timing in planner.measure(request.variant, device, times.measure_seconds, more=more):
            if isinstance(timing, str):
                bar.write(timing, file=sys.stderr)
            else:
                measured.timings.append(timing)
                if times.write_step_times:
                    step_measurement.write(measured, times.write_step_times)
                bar.set_postfix_str(f"{timing.resolution} px, {timing.micro} per rank")
            bar.update()
    return measured


def table(rows: list[Row]) -> list[str]:
    """The stages and their sum. sending: all seconds of all-reduces; waiting: those that computing does not hide."""
    lines = [
        f"{'px':>5} {'kimg':>7} {'batch':>6} {'ranks':>6} {'per rank':>9} {'step':>10} {'sending':>8} {'waiting':>8} "
        f"{'images/s':>9} {'time':>9} {'memory/rank':>12}"
    ]
    for row in rows:
        share, time = row.share, row.time
        lines.append(
            f"{share.stage.resolution:5d} {row.images / 1000:7g} {share.batch:6d} {share.active:6d} {share.micro:9d} "
            f"{1000 * time.step:7.1f} ms {time.communication / time.seconds:8.1%} {time.exposed / time.seconds:8.1%} "
            f"{row.images / time.seconds:9.1f} {readable_duration(time.seconds):>9} {row.of.bytes / 2**30:8.2f} GiB"
            + (" *" if row.note else "")
        )
    seconds = sum(row.time.seconds for row in rows)
    images = sum(row.images for row in rows)
    lines.append(
        f"{'all':>5} {images / 1000:7g} {'':6} {'':6} {'':9} {'':10} "
        f"{sum(row.time.communication for row in rows) / seconds:8.1%} "
        f"{sum(row.time.exposed for row in rows) / seconds:8.1%} "
        f"{images / seconds:9.1f} {readable_duration(seconds):>9} {max(row.of.bytes for row in rows) / 2**30:8.2f} GiB"
    )
    return lines


def remarks(rows: list[Row], ranks: int, config: Config) -> list[str]:
    """What a reader of the table should know: what was not measured, and which ranks have nothing to do."""
    lines = []
    for note in dict.fromkeys(row.note for row in rows if row.note):
        at = ", ".join(str(row.share.stage.resolution) for row in rows if row.note == note)
        lines.append(f"* {at} px: {note}")
    idle = [row.share for row in rows if row.share.active < ranks]
    if idle:
        at = ", ".join(str(share.stage.resolution) for share in idle)
        working = ", ".join(str(share.active) for share in idle)
        lines.append(
            f"{at} px: the batch keeps {working} of {ranks} ranks at work; the others have no part in it; all have one "
            f"with {batches_for_all(config.schedule, ranks)}"
        )
    small = [str(row.share.stage.resolution) for row in rows if row.share.micro < 4]
    if config.networks.model == "pggan" and small:
        lines.append(
            f"{', '.join(small)} px: fewer than 4 images per rank, so that minibatch standard deviation sees smaller "
            "groups than on one rank"
        )
    return lines


@command
def main(argv: list[str]) -> int:
    named = ("--data", "--preset", "--config", "--resume")
    if not any(flag.split("=")[0] in named for flag in argv):
        argv = [*argv, "--data", "synthetic"]
    request = parse(argv, Plan, "fastgan plan")
    assert isinstance(request.asked, Plan)
    machines, times, config = request.asked.machines, request.asked.times, request.config
    _check(machines, times)
    from fastgan.cli.train import prepare_torch
    from fastgan.data import open_source
    from fastgan.training import step_measurement
    from fastgan.training.factory import check_stages
    from fastgan.training.forecast import Planner

    prepare_torch(config)
    cluster = cluster_of(machines)
    check_stages(config, cluster.size)
    source = open_source(config.data.data, config.schedule.resolution, config.data.channels, config.run.seed)
    planner = Planner(config, source, cluster)
    if times.write_step_times:
        step_measurement.writable(times.write_step_times)
    if times.step_times:
        measured = step_measurement.read(times.step_times, step_measurement.recipe(config, source.channels))
    else:
        measured = _measure(planner, request, times)
    try:
        rows = planner.rows(measured)
    except LookupError as error:
        raise ArgumentError(
            "--step-times" if times.step_times else "--measure-seconds",
            times.step_times or times.measure_seconds,
            f"no step of {error} px, nor of another stage, was measured",
        ) from None
    s = config.schedule
    print(
        f"{request.variant}, {request.preset} preset: {s.kimg:g} kimg to {s.resolution} px on {machines.nodes} x "
        f"{machines.gpus_per_node} = {cluster.size} ranks, ZeRO {config.system.zero}, {config.system.precision}"
    )
    print(
        f"step times: {measured.device}, torch {measured.torch}" + (f", {times.step_times}" if times.step_times else "")
    )
    print(
        f"network: {machines.bandwidth:g} GB/s and {machines.latency:g} us between hosts, "
        f"{machines.bandwidth_inside:g} GB/s and {machines.latency_inside:g} us inside one; ring all-reduce inside "
        f"and between, {'during' if machines.overlap else 'after'} the backward"
    )
    print()
    print("\n".join(table(rows)))
    for line in remarks(rows, cluster.size, config):
        print(line)
    return 0
