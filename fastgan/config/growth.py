"""The schedule of progressive growing as a function of the images seen (Karras et al. 2018, section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastgan.config.sections import Config


@dataclass(frozen=True)
class Stage:
    """A resolution and the images that train it: [start, fade_end) is its fade-in, [fade_end, end) comes after it."""

    resolution: int
    start: int
    fade_end: int
    end: int

    def alpha(self, images: int) -> float:
        """The fade-in alpha after `images` images: 0 at `start`, 1 from `fade_end` on."""
        if images >= self.fade_end:
            return 1.0
        return max(0.0, (images - self.start) / (self.fade_end - self.start))


def stages(
    resolution: int,
    kimg: float,
    *,
    progressive: bool,
    first_resolution: int = 4,
    fade_kimg: float | None = None,
    stable_kimg: float | None = None,
    grown_at: float | None = None,
) -> list[Stage]:
    """The stages of a run; one stage without a fade when not `progressive`.

    The first resolution has no fade-in. By default every resolution gets an equal share of `kimg`, half of it for
    its fade-in; the last one trains to the end. With `grown_at`, all fade-ins and the intervals between them have one
    length, and the last fade-in ends after that share of the run. Stages that would start after `kimg` are left out.
    """
    total = round(kimg * 1000)
    if not progressive:
        return [Stage(resolution, 0, 0, total)]
    sizes = [2**i for i in range(int(math.log2(first_resolution)), int(math.log2(resolution)) + 1)]
    share = 1000 * kimg / len(sizes)
    if fade_kimg is None and stable_kimg is None:
        fade = stable = share / 2
        first = share
        if grown_at is not None and len(sizes) > 1:
            fade = stable = first = 1000 * kimg * grown_at / (2 * (len(sizes) - 1))
    else:
        fade = share / 2 if fade_kimg is None else 1000 * fade_kimg
        stable = fade if stable_kimg is None else 1000 * stable_kimg
        first = stable
    planned: list[Stage] = []
    start = 0.0
    for size in sizes:
        fade_end = start + (fade if size > sizes[0] else 0.0)
        end = fade_end + (stable if size > sizes[0] else first)
        if round(start) < total:
            planned.append(Stage(size, round(start), round(fade_end), round(end)))
        start = end
    last = planned[-1]
    planned[-1] = Stage(last.resolution, last.start, last.fade_end, total)
    return planned


def stage_at(planned: list[Stage], images: int) -> Stage:
    """The stage of the step that follows `images` images."""
    return next((stage for stage in planned if images < stage.end), planned[-1])


def stages_of(config: Config) -> list[Stage]:
    """The stages of a run."""
    s = config.schedule
    return stages(
        s.resolution,
        s.kimg,
        progressive=config.networks.model == "pggan",
        first_resolution=s.first_resolution or 4,
        fade_kimg=s.fade_kimg,
        stable_kimg=s.stable_kimg,
        grown_at=s.grown_at,
    )


def short_run_warning(config: Config) -> str | None:
    """A warning for a run that ends before it has grown to the resolution of its configuration; None for others."""
    s, reached = config.schedule, stages_of(config)[-1].resolution
    if reached == s.resolution:
        return None
    return f"warning: {s.kimg:g} kimg end at {reached} px; raise --kimg, or lower --fade-kimg and --stable-kimg"
