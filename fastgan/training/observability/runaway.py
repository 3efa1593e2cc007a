"""Tells of a run that goes wrong with finite numbers: the loss or score of the discriminator leaps and stays there."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgan import checkpoint
from fastgan.training.observability.rank_log import LOGGER

WATCHED = ("loss_d", "score_real", "score_fake")
_FACTOR = 100.0  # times the median magnitude of the rows before; the runs of docs/results.md stay below 10
_LEAST = 1.0  # smaller magnitudes count as this: losses near zero grow by orders of magnitude in good runs too
_ROWS = 20  # that are looked back at
_FIRST = 3  # rows before anything is compared
_PATIENCE = 5  # rows in a row beyond the limit, after which it stays


class RunawayError(RuntimeError):
    """A loss or score has leaped by orders of magnitude and stayed there; the message names the way back."""


@dataclass(frozen=True)
class Leap:
    """What a row of metrics says about a leap.

    Attributes:
        name: of the value.
        value: in this row.
        usual: the median magnitude of the rows before the leap: few rows on the way up do not move it.
        images: seen at the last row before the leap.
        rows: rows since then, this one among them.
        over: the values are back.
    """

    name: str
    value: float
    usual: float
    images: int
    rows: int
    over: bool = False

    @property
    def stays(self) -> bool:
        return not self.over and self.rows >= _PATIENCE

    def __str__(self) -> str:
        if self.over:
            return f"{self.name} is back at {self.value:.4g}"
        since = f"{self.images / 1000:g} kimg"
        return f"{self.name} leaped to {self.value:.4g} after {since}; before, it was about {self.usual:.3g}"


class RunawayDetector:
    """Compares each row of metrics with the rows before it. The same on every rank, as the rows are."""

    def __init__(self) -> None:
        self._recent: list[dict[str, float]] = []
        self._images = 0
        self._leap: dict[str, Any] | None = None

    def update(self, images: int, row: dict[str, float]) -> Leap | None:
        """Take a row of finite values.

        Args:
            images: seen at the row.
            row: values by name; those of `WATCHED` are compared.

        Returns:
            A leap that begins, lasts or is over with this row, or None.
        """
        values = {name: abs(row[name]) for name in WATCHED if name in row}
        usual = {name: self._usual(name) for name in values}
        beyond = [name for name in values if values[name] > _FACTOR * usual[name]]
        if self._leap is not None:
            started = self._leap
            if beyond:
                started["rows"] += 1
                name = beyond[0]
                return Leap(name, row[name], usual[name], started["images"], started["rows"])
            self._leap = None
            self._take(images, values)
            return Leap(started["name"], row[started["name"]], 0.0, started["images"], 0, over=True)
        if beyond and len(self._recent) >= _FIRST:
            name = beyond[0]
            self._leap = {"name": name, "images": self._images, "rows": 1}
            return Leap(name, row[name], usual[name], self._images, 1)
        self._take(images, values)
        return None

    def _usual(self, name: str) -> float:
        return max(_LEAST, statistics.median([0.0, *(row.get(name, 0.0) for row in self._recent)]))

    def _take(self, images: int, values: dict[str, float]) -> None:
        self._recent = [*self._recent[1 - _ROWS :], values]
        self._images = images

    def state(self) -> dict[str, Any]:
        """Plain values, from which `load` continues."""
        return {"recent": self._recent, "images": self._images, "leap": self._leap}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state`.

        Raises:
            ValueError: the values are not of a state.
        """
        try:
            recent = [{name: float(row[name]) for name in WATCHED if name in row} for row in state["recent"][-_ROWS:]]
            images, leap = int(state["images"]), state["leap"]
            if leap is not None:
                leap = {"name": str(leap["name"]), "images": int(leap["images"]), "rows": int(leap["rows"])}
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        if not all(math.isfinite(value) for row in recent for value in row.values()):
            raise ValueError("a value is not finite")
        if leap is not None and leap["name"] not in WATCHED:
            raise ValueError(f"{leap['name'][:60]!r} is not watched")
        self._recent, self._images, self._leap = recent, images, leap


def respond(leap: Leap, step: int, run: Path | None, say: Callable[[str], object]) -> None:
    """Warn of a leap, keep the last checkpoint before it, and end a run in which it stays.

    Args:
        leap: of the present row.
        step: generator steps so far.
        run: the run directory, on the rank that writes; None on others.
        say: prints a line.

    Raises:
        RunawayError: the leap stays; on every rank.
    """
    way_back = "there is no checkpoint yet"
    if run is not None and not leap.over:
        kept = checkpoint.mark(run, leap.images, str(leap))
        way_back = way_back if kept is None else f"{kept} is kept; --init-from it with a lower --lr-d"
    if leap.stays:
        raise RunawayError(f"step {step}: {leap}, and stays for {leap.rows} rows; {way_back}")
    if leap.over or leap.rows == 1:
        LOGGER.warning(str(leap))
        say(str(leap) if leap.over else f"warning: {leap}; {way_back}")
