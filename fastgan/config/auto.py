"""The preset `auto`: from facts about pictures, machine and time to settings, each with its reason.

Pure functions. `fastgan.data.survey` looks at the pictures, `fastgan.training.auto` measures steps and calls `choose`.

The order of decisions is fixed: variant, then resolution, then width. More time never gives a lower resolution: that is
decided at the narrowest width, and only what time is left then widens the networks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastgan.config.augmentation import FEW_PICTURES, augmentation_for
from fastgan.config.batches import batch_at
from fastgan.config.growth import stages_of
from fastgan.config.sections import Config, Schedule, replace
from fastgan.config.variants import VARIANTS
from fastgan.utils.text import readable_duration

Width = Literal["narrow", "medium", "wide", "published"]
WIDTHS: tuple[Width, ...] = ("narrow", "medium", "wide", "published")

DEFAULT_HOURS = 8.0
"""Time of a run whose user names neither hours nor kimg: a night."""
NEEDED_KIMG = {4: 5, 8: 10, 16: 25, 32: 60, 64: 150, 128: 400, 256: 1000, 512: 2500, 1024: 5000}
"""Thousands of images from which on a run of a resolution is worth its start. From runs at 32 px, where 60 to 80 kimg
give clean digits, and about 2.5 times as many for twice the resolution. The published recipes have up to ten times as
many."""
_WIDER = 4.0
"""Networks are widened where the time is enough for this many times the images of `NEEDED_KIMG`. With 3.6 times as many
dcgan's medium ones were behind narrow ones on Fashion-MNIST, which were shown 8 times as many in the same time."""
LONGEST_KIMG = 25_000.0
"""No run is longer than that of Karras et al. 2020."""
_ENLARGED = 1.25  # pictures are enlarged by at most so much
_HANDED = 2.0  # see Pictures.asymmetry
_STARTING = 30.0  # seconds for loading, the first steps and the last files
# Learning rates as shares of the digits preset's, whose networks are narrower still.
_LR_OF_WIDTH: dict[Width, float] = {"narrow": 0.5, "medium": 0.25, "wide": 0.125, "published": 0.0625}


@dataclass(frozen=True)
class Pictures:
    """What is known of a set of pictures.

    Attributes:
        count: number of pictures.
        side: median length of the shorter side, px; None: they can be had at any size.
        channels: channels of the source, 1, 3 or 4.
        gray: whether all pictures looked at have equal colors, though they are stored in color.
        alpha: share of the pictures with transparent parts.
        aspect: median of the longer side over the shorter one.
        asymmetry: mean square of (mean difference of pictures and their mirror images / its standard error): about 1
            for a set that looks the same in a mirror, more for text.
        num_classes: 0 without labels.
    """

    count: int
    side: int | None
    channels: int = 3
    gray: bool = False
    alpha: float = 0.0
    aspect: float = 1.0
    asymmetry: float = 1.0
    num_classes: int = 0


@dataclass(frozen=True)
class Machine:
    """What is known of the machine: `kind` is cpu or cuda, `memory` the free bytes of one rank's device."""

    kind: str
    memory: float = math.inf
    ranks: int = 1


@dataclass(frozen=True)
class StageCost:
    """A step of a stage, for each image that the discriminator is shown.

    Attributes:
        seconds: of all ranks together.
        bytes: of memory on one rank.
        measured: whether `seconds` was measured, and not estimated.
        scatter: of the measured steps, relative: the distance of their quartiles over the median.
    """

    seconds: float
    bytes: float = 0.0
    measured: bool = True
    scatter: float = 0.0


Costs = Mapping[Width, Mapping[int, StageCost]]
"""By width and resolution. A width that is missing is estimated from the next narrower one."""


@dataclass(frozen=True)
class Wish:
    """What the user asks for; None: left to `choose`. `fixed` has every value that is given, by its field's name."""

    variant: str | None = None
    hours: float | None = None
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def kimg(self) -> float | None:
        return self.fixed.get("kimg")

    @property
    def seconds(self) -> float | None:
        """Time for the run; None where its length is given in kimg alone."""
        if self.hours is None:
            return None if self.kimg is not None else DEFAULT_HOURS * 3600
        return self.hours * 3600


@dataclass(frozen=True)
class Decision:
    """What was decided.

    Attributes:
        variant, width: of the networks.
        config: complete, the values of the user among them.
        reasons: one line each.
        seconds: expected time of the run; None without costs.
    """

    variant: str
    width: Width
    config: Config
    reasons: list[str]
    seconds: float | None


def training_seconds(seconds: float) -> float:
    """What is left of a run's time for its steps: it starts, draws samples and saves too."""
    return max(0.95 * seconds - _STARTING, seconds / 2)


def run_seconds(config: Config, costs: Mapping[int, StageCost]) -> float:
    """Seconds of a run's steps, over its stages."""
    return sum((stage.end - stage.start) * costs[stage.resolution].seconds for stage in stages_of(config))


def kimg_within(config: Config, costs: Mapping[int, StageCost], seconds: float) -> float:
    """The longest run, in kimg with three digits, whose steps take at most so many seconds; at most `LONGEST_KIMG`."""

    def fits(kimg: float) -> bool:
        return run_seconds(replace(config, schedule={"kimg": kimg}), costs) <= seconds

    low, high = 0.001, LONGEST_KIMG
    if fits(high):
        return high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    digits = max(0, 2 - math.floor(math.log10(low)))
    return max(0.001, math.floor(low * 10**digits) / 10**digits)


def choose_variant(pictures: Pictures, wish: Wish) -> tuple[str, str]:
    """The variant, and why."""
    if wish.variant is not None:
        return wish.variant, "as requested"
    if largest_resolution(pictures) <= 32:
        return "dcgan", "at 32 px and below it is ahead of the others after the same time"
    return "pggan", "it grows with the pictures, and most of its images are small and quick"


def largest_resolution(pictures: Pictures) -> int:
    """The highest power of two for which the median picture is enlarged by at most a quarter; 8 to 1024 px."""
    if pictures.side is None:
        return 1024
    return max(8, min(1024, 2 ** math.floor(math.log2(pictures.side * _ENLARGED))))


def resolutions(pictures: Pictures, model: str, wish: Wish) -> list[int]:
    """The resolutions that steps are needed of, ascending."""
    largest = wish.fixed.get("resolution") or largest_resolution(pictures)
    smallest = (wish.fixed.get("first_resolution") or 4) if model == "pggan" else min(16, largest)
    if "resolution" in wish.fixed and model != "pggan":
        smallest = largest
    return [2**i for i in range(2, 11) if smallest <= 2**i <= largest]


def recipe(variant: str, width: Width, pictures: Pictures, machine: Machine, wish: Wish) -> Config:
    """The settings that do not depend on time, with those of the user; the resolution is the largest one."""
    entry = VARIANTS[variant]
    base, paper = entry.digits, entry.paper
    optimizer: dict[str, Any] = {"ema_warmup": True}
    for name in ("lr_g", "lr_d"):
        rate = _LR_OF_WIDTH[width] * getattr(base.optimizer, name)
        same = base.optimizer.optimizer == paper.optimizer.optimizer and width == "published"
        optimizer[name] = float(f"{min(rate, getattr(paper.optimizer, name)) if same else rate:.3g}")
    by_length = any(wish.fixed.get(name) is not None for name in ("fade_kimg", "stable_kimg"))
    config = Config(base.networks, base.objective, base.optimizer, base.schedule)
    config = replace(
        config,
        networks=_networks(variant, width),
        optimizer=optimizer,
        schedule={
            "resolution": largest_resolution(pictures),
            **_batches(base.networks.model, width, machine),
            "grown_at": 0.3 if base.networks.model == "pggan" and not by_length else None,
        },
        data={"augment": augmentation_for(pictures.count), "mirror": mirrored(pictures)},
    )
    if pictures.gray:
        config = replace(config, data={"channels": 1})
    if variant == "sagan" and 2 <= pictures.num_classes <= pictures.count / 50:
        config = replace(config, networks={"conditional": True})
    return with_values(config, wish.fixed)


def _networks(variant: str, width: Width) -> dict[str, Any]:
    """Sizes of networks."""
    paper = VARIANTS[variant].paper.networks
    if width == "published":
        return {key: getattr(paper, key) for key in ("latent", "width", "max_width", "fmap_base", "fmap_max")}
    factor = {"narrow": 1, "medium": 2, "wide": 4}[width]
    sizes: dict[str, int] = {"latent": min(64 * factor, 128)}
    if paper.model == "mlp":
        return {**sizes, "width": 256 * factor}
    if paper.model == "pggan":
        return {**sizes, "fmap_base": 512 * factor, "fmap_max": 64 * factor}
    # r3gan has several times the operations of other networks of its width: at 32 channels of 32 px a core trains on 35
    # images a second, and at 16 on 118.
    channels = (16 if paper.model == "r3gan" else 32) * factor
    return {**sizes, "width": min(channels, 64), "max_width": 64 * factor}


def _batches(model: str, width: Width, machine: Machine) -> dict[str, Any]:
    if model == "pggan":
        schedule = VARIANTS["pggan"].paper.schedule
        batch, at = (16, {256: 8, 1024: 4}) if machine.kind == "cpu" else (64, {128: 32, 256: 16, 512: 8, 1024: 4})
        if width == "published" and machine.kind != "cpu":
            batch, at = schedule.batch, schedule.batch_at
    else:
        batch = 32 if model == "r3gan" and machine.kind == "cpu" else 64
        at = {128: 32, 256: 16, 512: 8, 1024: 4}
    return {
        "batch": _multiple(batch, machine.ranks),
        "batch_at": {r: _multiple(size, machine.ranks) for r, size in at.items()},
    }


def _multiple(batch: int, ranks: int) -> int:
    return -(-batch // ranks) * ranks


def mirrored(pictures: Pictures) -> bool:
    """Few pictures are doubled by their mirror images, where the set looks the same in a mirror."""
    return pictures.count < FEW_PICTURES and pictures.asymmetry < _HANDED


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with some values, by the names of their fields, which are unique over the sections."""
    sections: dict[str, dict[str, Any]] = {}
    for section in dataclasses.fields(Config):
        names = {field.name for field in dataclasses.fields(getattr(config, section.name))}
        chosen = {name: value for name, value in values.items() if name in names}
        if chosen:
            sections[section.name] = chosen
    return replace(config, **sections)


def choose(pictures: Pictures, machine: Machine, wish: Wish, costs: Costs) -> Decision:
    """Decide everything.

    Args:
        pictures, machine, wish: the facts.
        costs: of the resolutions of `resolutions`, at least for the narrowest width; empty: nothing was measured, and
            the length of the run must be given in kimg.
    """
    variant, why_variant = choose_variant(pictures, wish)
    configs = {width: recipe(variant, width, pictures, machine, wish) for width in WIDTHS}
    sizes = resolutions(pictures, configs["narrow"].networks.model, wish)
    table = _all_widths(costs)

    def run(width: Width, resolution: int) -> tuple[Config, float]:
        """The run at a resolution, and the share of the images it needs that it is shown."""
        config = replace(configs[width], schedule={"resolution": resolution})
        if wish.kimg is None:
            assert wish.seconds is not None
            kimg = kimg_within(config, table[width], training_seconds(wish.seconds))
            config = replace(config, schedule={"kimg": kimg})
        return config, config.schedule.kimg / NEEDED_KIMG[resolution]

    resolution = _choose_resolution(sizes, lambda r: run("narrow", r)[1], wish)
    width: Width = "narrow"
    if wish.kimg is None:
        width = next((w for w in WIDTHS[::-1] if run(w, resolution)[1] >= _WIDER), "narrow")
    elif machine.kind == "cuda":
        width = "medium"
    config = replace(run(width, resolution)[0], schedule={"resolution": resolution})
    config = _finished(config, resolution, table.get(width, {}), machine, wish)
    seconds = run_seconds(config, table[width]) if table else None
    reasons = [
        *_describe(pictures, config),
        f"{variant}: {why_variant}",
        *_reasons_of_size(config, width, sizes, table, wish),
        *_reasons_of_pictures(pictures, config, wish),
    ]
    return Decision(variant, width, config, reasons, seconds)


def _all_widths(costs: Costs) -> dict[Width, dict[int, StageCost]]:
    """`costs` with estimates of missing widths: twice as wide takes at most four times as long and twice the bytes."""
    table: dict[Width, dict[int, StageCost]] = {}
    for i, width in enumerate(WIDTHS if costs else ()):
        if width in costs:
            table[width] = dict(costs[width])
        else:
            below = table[WIDTHS[i - 1]]
            factor = 4 if width == "published" else 2
            table[width] = {r: StageCost(c.seconds * factor**2, c.bytes * factor, False) for r, c in below.items()}
    return table


def _choose_resolution(sizes: list[int], share: Callable[[int], float], wish: Wish) -> int:
    if "resolution" in wish.fixed:
        return sizes[-1]
    candidates = [r for r in sizes if r >= min(16, sizes[-1])]
    return next((r for r in reversed(candidates) if share(r) >= 1), candidates[0])


def _finished(config: Config, resolution: int, costs: Mapping[int, StageCost], machine: Machine, wish: Wish) -> Config:
    """Batches that fit into memory, alone those that the run has, and the length of the moving average."""
    s = config.schedule
    used = [stage.resolution for stage in stages_of(config)]
    batches = {}
    for r in used:
        size = batch_at(s, r)
        while costs and size > 4 * machine.ranks and size / machine.ranks * costs[r].bytes > machine.memory:
            size = _multiple(size // 2, machine.ranks)
        batches[r] = size
    at = {r: size for r, size in batches.items() if size < batches[used[0]]}
    least: dict[int, int] = {}
    for r, size in sorted(at.items()):
        if size < min([batches[used[0]], *least.values()]):
            least[r] = size
    half_life = min(10.0, s.kimg / 20)  # kimg
    images = config.optimizer.n_critic * batches[resolution] / 1000
    decay = round(0.5 ** (images / half_life), 5)
    chosen = {"batch": batches[used[0]], "batch_at": least, "ema_decay": min(max(decay, 0.5), 0.9999)}
    return with_values(config, {key: value for key, value in chosen.items() if key not in wish.fixed})


def _describe(pictures: Pictures, config: Config) -> list[str]:
    colors = {1: "gray", 3: "color", 4: "color with alpha"}[config.data.channels or pictures.channels]
    side = "any size" if pictures.side is None else f"{pictures.side} px"
    labels = f", {pictures.num_classes:,} classes" if pictures.num_classes else ""
    lines = [f"pictures: {pictures.count:,}, {side} (the shorter side, median), {colors}{labels}"]
    if pictures.gray and config.data.channels == 1:
        lines.append("gray: all pictures looked at are, though stored in color (--channels 3 keeps three channels)")
    if pictures.aspect > 1.2:
        lines.append(
            f"shape: the longer side is {pictures.aspect:.2g} times the shorter one; the center square is used"
        )
    if pictures.alpha >= 0.005 and (config.data.channels or pictures.channels) != 4:
        lines.append(
            f"alpha: {pictures.alpha:.0%} of the pictures are transparent in part; they are put on a background"
        )
    return lines


def _reasons_of_size(
    config: Config, width: Width, sizes: list[int], table: Mapping[Width, Mapping[int, StageCost]], wish: Wish
) -> list[str]:
    s, needed = config.schedule, NEEDED_KIMG[config.schedule.resolution]
    time = f" in {readable_duration(run_seconds(config, table[width]))}" if table else ""
    lines = [f"{s.resolution} px, {s.kimg:g} kimg{time}: {_why_resolution(config, sizes, table, wish)}"]
    if s.kimg < needed:
        lines.append(f"warning: {s.resolution} px needs about {needed} kimg, and {s.kimg:g} are few: images stay rough")
    if s.kimg >= LONGEST_KIMG and wish.kimg is None:
        lines.append(f"kimg: longer runs are not known to gain; --kimg goes beyond {LONGEST_KIMG:g}")
    why = {"narrow": "wider ones would be too slow", "published": "the published ones, as there is time for them"}
    lines.append(
        f"{width} networks, batch {s.batch}, rates {config.optimizer.lr_g:g} (G) {config.optimizer.lr_d:g} (D)"
        f": {why.get(width, 'there is time for them') if wish.kimg is None else 'a default of this device'}"
    )
    return lines


def _why_resolution(
    config: Config, sizes: list[int], table: Mapping[Width, Mapping[int, StageCost]], wish: Wish
) -> str:
    resolution = config.schedule.resolution
    if "resolution" in wish.fixed:
        return "as requested"
    if resolution == sizes[-1]:
        return "that of the pictures"
    above, needed = 2 * resolution, NEEDED_KIMG[2 * resolution]
    if wish.kimg is not None or not table:
        return f"{above} px needs about {needed} kimg"
    larger = replace(config, schedule={"resolution": above, "kimg": float(needed)})
    seconds = run_seconds(larger, table["narrow"])
    return f"{above} px would take {readable_duration(seconds)} for the {needed} kimg it needs"


def _reasons_of_pictures(pictures: Pictures, config: Config, wish: Wish) -> list[str]:
    few = f"fewer than {FEW_PICTURES:,} pictures"
    augment, mirror = config.data.augment, config.data.mirror
    if "augment" in wish.fixed:
        why = "as requested"
    else:
        why = few if augment != "none" else f"{pictures.count:,} pictures are enough without"
    lines = [f"augment {augment}: {why}"]
    if "mirror" not in wish.fixed:
        if mirror:
            lines.append(f"mirror: {few}, and the set looks the same in a mirror (--no-mirror for text)")
        elif pictures.count < FEW_PICTURES:
            lines.append("no mirror: the set does not look the same in a mirror")
    return lines


def placeholder(variant: str) -> Config:
    """What flags are read over before anything is known: the digits preset with no length of its own."""
    base = VARIANTS[variant].digits
    return Config(base.networks, base.objective, base.optimizer, dataclasses.replace(base.schedule, kimg=Schedule.kimg))
