"""Text of `fastgan train --dry-run`: what a run would do."""

from __future__ import annotations

from collections.abc import Mapping

from fastgan.config import Config
from fastgan.config.growth import short_run_warning, stages_of
from fastgan.config.images import source_arguments
from fastgan.data import Source, open_source
from fastgan.planning.forecast import StageBatch, stage_batches
from fastgan.planning.memory import Footprint
from fastgan.training.footprint import footprint
from fastgan.training.from_config import validate_stages
from fastgan.utils.text import readable_duration

_COMPILER_BYTES = 2 * 2**30
"""Python with torch and Inductor, and the C++ compiler: 1.2 and 1.1 GB at most for pggan at 32 px and width 64."""


def describe(variant: str, preset: str, config: Config, ranks: int, costs: Mapping[int, float] | None = None) -> str:
    """Networks, objective, optimizer, and the batch, memory and time of each stage.

    Memory is that of one rank in float32: parameters, gradients, optimizer state, moving average, and the peak of a
    step's activations. Workspaces of convolution libraries are not included. Times are those of `costs`, seconds for
    each image at each resolution.

    Raises:
        ArgumentError: a stage's batch cannot be divided over the ranks.
    """
    validate_stages(config, ranks)
    source = open_source(**source_arguments(config))
    lines = [
        *_settings(variant, preset, config, source, ranks),
        "",
        f"{'px':>5} {'from kimg':>10} {'fade until':>10} {'to kimg':>8} {'batch':>6} {'ranks':>6} {'per rank':>9} "
        f"{'G params':>11} {'D params':>11} {'memory/rank':>12}" + (f" {'time':>9}" if costs else ""),
    ]
    largest = 0.0
    for batch in stage_batches(config, stages_of(config), ranks):
        fading = batch.stage.fade_end > batch.stage.start
        of = footprint(config, source, batch.stage, batch.micro, ranks, fading=fading)
        largest = max(largest, of.bytes)
        row = _row(batch, of)
        if costs:
            row += f" {readable_duration(batch.images * costs[batch.stage.resolution]):>9}"
        lines.append(row)
    if config.system.compile != "off":
        more = (_COMPILER_BYTES + largest) / 2**30
        when = "where the run is long enough" if config.system.compile == "auto" else "at the start"
        lines.append(f"compiling, {when}: a process beside training, up to {more:.1f} GiB more on each host")
    warning = short_run_warning(config)
    return "\n".join(lines if warning is None else [*lines, warning])


def _settings(variant: str, preset: str, config: Config, source: Source, ranks: int) -> list[str]:
    o, objective, s, m = config.optimizer, config.objective, config.schedule, config.system
    decay = f", decaying to 0 over the last {o.lr_decay * s.kimg:g} kimg" if o.lr_decay else ""
    decay += "".join(f", times {factor:g} from {at} px on" for at, factor in sorted(o.lr_factor_at.items()))
    drift = f", drift {objective.drift:g}" if objective.drift else ""
    return [
        *source.remarks(),
        f"{variant}, {preset} preset: {s.kimg:g} kimg of {source.name} ({len(source):,} images) to {s.resolution} px",
        f"objective: {objective.loss}, regularizer {objective.regularizer}{drift}",
        f"optimizer: {o.optimizer}, lr {o.lr_g:g} (G) {o.lr_d:g} (D){decay}, {o.n_critic} D steps for each G step, "
        f"EMA {o.ema_decay:g}",
        f"machine: {ranks} rank{'s' if ranks > 1 else ''}, ZeRO {m.zero}, precision {m.precision}",
    ]


def _row(batch: StageBatch, of: Footprint) -> str:
    stage = batch.stage
    return (
        f"{stage.resolution:5d} {stage.start / 1000:10g} {stage.fade_end / 1000:10g} {stage.end / 1000:8g} "
        f"{batch.size:6d} {batch.active:6d} {batch.micro:9d} {of.g:11,d} {of.d:11,d} {of.bytes / 2**30:8.2f} GiB"
    )
