"""Peak extra memory of attention with its second backward against N = M: `python -m benchmarks.ops.attention_memory`.

One head, d = dv = 32, float32, on the CPU, results included. Prints a table and draws docs/attention_memory.svg.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path

import torch

from benchmarks import side_by_side
from benchmarks.ops.bench_attention import Attend, math_form, ours, run
from fastgan.utils.files import write_atomic

SIZES = (1024, 2048, 4096, 8192, 16384)
COLORS = ("#1f77b4", "#2ca02c", "#d62728")
FILE = Path(__file__).resolve().parents[2] / "docs" / "attention_memory.svg"


def peak(attend: Attend, n: int) -> float:
    """Peak extra MB of forward, backward and second backward together."""
    tensors = tuple(torch.randn(1, 1, n, 32).requires_grad_() for _ in range(3))
    do, us = torch.randn(1, 1, n, 32).requires_grad_(), tuple(torch.randn(1, 1, n, 32) for _ in range(3))
    return side_by_side.peak_memory(partial(run, attend, tensors, do, us, "second"), "cpu") / side_by_side.MB


def draw(peaks: dict[str, dict[int, float]]) -> str:
    """An SVG of MB against N for each side, both axes logarithmic."""
    width, height, left, bottom = 560, 360, 60, 40

    def x(n: int) -> float:
        return left + (width - left - 90) * math.log2(n / SIZES[0]) / math.log2(SIZES[-1] / SIZES[0])

    def y(mb: float) -> float:
        return height - bottom - (height - bottom - 20) * math.log10(mb) / 4

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"']
    parts.append(f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>')
    for power in range(5):
        at = y(10**power)
        parts.append(f'<path d="M{left} {at:.1f}H{width - 90}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{10**power:,} MB</text>')
    for n in SIZES:
        parts.append(f'<text x="{x(n):.1f}" y="{height - bottom + 18}" text-anchor="middle">{n}</text>')
    parts.append(f'<text x="{(left + width - 90) / 2}" y="{height - 6}" text-anchor="middle">N = M</text>')
    for color, (name, sizes) in zip(COLORS, peaks.items(), strict=False):
        points = " ".join(f"{x(n):.1f},{y(mb):.1f}" for n, mb in sizes.items())
        last, mb = list(sizes.items())[-1]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<text x="{x(last) + 6:.1f}" y="{y(mb) + 4:.1f}" fill="{color}">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest-math", type=int, default=8192, help="math needs 2.9 GB at 8192, 12 GB at 16384")
    largest = parser.parse_args().largest_math
    for attend in (ours("cpp"), ours("chunked"), math_form):
        peak(attend, 256)  # the first call loads libraries
    peaks: dict[str, dict[int, float]] = {"cpp": {}, "chunked": {}, "math": {}}
    print(f"{'N = M':>8}" + "".join(f"{name + ', MB':>14}" for name in peaks))
    for n in SIZES:
        line = f"{n:8}"
        for name, sizes in peaks.items():
            if name != "math" or n <= largest:
                sizes[n] = peak(math_form if name == "math" else ours(name), n)
            line += f"{sizes[n]:14.1f}" if n in sizes else f"{'-':>14}"
        print(line, flush=True)
    write_atomic(FILE, draw(peaks).encode())
    print(f"wrote {FILE.relative_to(FILE.parents[1])}")


if __name__ == "__main__":
    main()
