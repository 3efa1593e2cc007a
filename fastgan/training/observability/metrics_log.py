"""Progress bar or lines, metrics.jsonl, TensorBoard events and sample grids of a run."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgan.data.sheets import save_sheet
from fastgan.utils.files import append_regular, read_regular, write_atomic
from fastgan.utils.stored_values import MALFORMED
from fastgan.utils.text import readable_duration


def save_grid(
    images: Tensor,
    path: Path,
    *,
    size: int | None = None,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
) -> None:
    """Write images as one PNG, row by row; `path` is replaced atomically.

    Args:
        images: [N, C, R, R] in [-1, 1].
        path: of the PNG.
        size: an image is at least so large, px, so that grids of a growing network are comparable; see `save_sheet`.
        columns: of the grid; None: near-square.
        labels: a text below each image.
    """
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    save_sheet(pixels.numpy(), path, size=size, columns=columns, labels=labels)


def _without_events(error: threading.ExceptHookArgs, default: Callable[..., object] = threading.excepthook) -> None:
    """Hook of threads that hides an OSError of TensorBoard's writer: its next call raises the same error."""
    ours = isinstance(error.exc_value, OSError) and type(error.thread).__module__.startswith("tensorboard.")
    if not ours:
        default(error)


class MetricsLog:
    """Progress and metrics of a run; does nothing on ranks other than 0.

    Args:
        run: the run directory.
        active: whether this rank logs.
        total: images of the whole run.
        seen: images seen before this process started.
    """

    def __init__(self, run: Path, *, active: bool, total: int, seen: int) -> None:
        self._active = active
        self._total = total
        self._bar: Any = None
        self._events: Any = None
        if not active:
            return
        self._path = run / "metrics.jsonl"
        append_regular(self._path, "")  # refuses what cannot be written now, and not after the first interval
        self._resumed_at: int | None = seen  # until the first new row
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total / 1000,
                initial=seen / 1000,
                unit="kimg",
                dynamic_ncols=True,
                smoothing=0.1,
                bar_format="{l_bar}{bar}| {n:.4g}/{total:g} kimg [{elapsed}{postfix}]",
            )
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.line("TensorBoard events are off: tensorboard is not installed (pip install 'fastgan[train]')")
        else:
            threading.excepthook = _without_events
            self._events = SummaryWriter(str(run / "tensorboard"), purge_step=seen)

    def _write_row(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl. The first one of a resumed run takes the place of those after its checkpoint.

        Until then they stay: a run that stops before it has trained again loses nothing of its record.
        """
        line = json.dumps(row) + "\n"
        if self._resumed_at is None:
            append_regular(self._path, line)
            return
        kept = []
        for old in read_regular(self._path).splitlines(keepends=True):
            try:
                if old.endswith(b"\n") and json.loads(old)["images"] <= self._resumed_at:
                    kept.append(old)
            except MALFORMED:
                continue  # cut short when the process was killed, or edited by hand
        write_atomic(self._path, b"".join([*kept, line.encode()]))
        self._resumed_at = None

    def _progress(self, seen: int) -> str:
        """As in `     12.8/600 kimg`; runs of less than 10 kimg have three digits."""
        return f"{seen / 1000:9.{1 if self._total >= 10_000 else 3}f}/{self._total / 1000:g} kimg"

    def line(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def advance(self, images: int) -> None:
        """Move the progress bar to `images` seen; cheap enough for every step."""
        if self._bar is not None:
            self._bar.total = max(self._total, images) / 1000  # the last batch may go beyond the end
            self._bar.update(images / 1000 - self._bar.n)

    def metrics(self, row: dict[str, Any], seconds_left: float) -> None:
        """Log one interval.

        Args:
            row: a line of metrics.jsonl, with images, resolution, alpha, images_per_second and the losses.
            seconds_left: to the end of the run.
        """
        if not self._active:
            return
        self._write_row(row)
        if self._events is not None:
            for name, value in row.items():
                if name != "images" and isinstance(value, int | float):
                    self._events.add_scalar(name, value, row["images"])
        shown = f"G {row.get('loss_g', math.nan):.3f} D {row['loss_d']:.3f}"
        stage = f"{row['resolution']} px" + (f" alpha {row['alpha']:.2f}" if row["alpha"] < 1 else "")
        if "slowest_rank" in row:
            times = row["slowest_step_seconds"] / max(row["step_seconds"], 1e-9)
            stage += f", slowest rank {row['slowest_rank']} ({times:.1f}x)"
        speed, left = row["images_per_second"], readable_duration(seconds_left)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{left} left, {speed:.0f} img/s, {shown}, {stage}")
        else:
            self.line(f"{self._progress(row['images'])}  {speed:7.1f} img/s  {shown}  {stage}  {left} left")

    def evaluation(self, seen: int, record: dict[str, Any]) -> None:
        """Log the result of an evaluation.

        Args:
            seen: images seen.
            record: a line of evaluation.jsonl.
        """
        if not self._active:
            return
        names = {f"evaluation/{name}": value for name, value in record["metrics"].items()}
        self._write_row({"images": seen, "features": record["features"], **names})
        if self._events is not None:
            for name, value in names.items():
                self._events.add_scalar(name, value, seen)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in record["metrics"].items())
        self.line(f"{self._progress(seen)}  {record['features']} features: {shown}")

    def images(self, images: Tensor, path: Path, seen: int, size: int) -> None:
        """Write a sample grid; see `save_grid`."""
        if not self._active:
            return
        path.parent.mkdir(exist_ok=True)
        save_grid(images, path, size=size)

    def close(self) -> None:
        """Close the progress bar and the event file."""
        if self._bar is not None:
            self._bar.close()
        if self._events is not None:
            self._events.close()
