"""python -m fastgan.kernels.tune: measure tiles on the GPU at hand and write the fastest into tiles.json.

Run once for a new architecture, and again when a kernel changes; programs only look the table up. Entries for odd
strides (see tiles.py) are not measured.

With `--ahead-of-time ARCHITECTURE` (more than once, or `all`) nothing is measured and no GPU is needed: attention's
entries are compiled, and one that spills or asks for too much memory gives way to the nearest that does not; `--check`
only names them. `pytest -m "slow or not slow" tests/kernels -k compiles` asks the same of every kernel.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

from fastgan.kernels import attention, scaled_conv, tiles, tune_ahead_of_time
from fastgan.kernels.ahead_of_time import SHARED
from fastgan.kernels.tile_candidates import PASSES, SIZES, candidates, write
from fastgan.kernels.tiles import KINDS, Tile


def passes(kind: str, size: int) -> dict[str, Callable[[], object]]:
    """Each pass at a size that fills a GPU: of attention about 2^32 products of one inner dimension of 64."""
    n = 4096 if size <= 64 else 2048
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    side = 128 if size <= 64 else 32
    w = torch.randn(size, size, 4, 4, device="cuda", dtype=dtype)
    small, large = (
        torch.randn(16, size, s, s, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
        for s in (side, 2 * side)
    )
    q, k, v, do = (torch.randn(8, 2, n, size, device="cuda", dtype=dtype) for _ in range(4))
    u: tuple[Tensor, ...] = (k, v, q)
    o, lse = attention.attention_forward(q, k, v, 0.1, False)
    rest = (do, q, k, v, o, lse, 0.1, False)
    return {
        "forward": lambda: attention.attention_forward(q, k, v, 0.1, False),
        "backward": lambda: attention.attention_backward(*rest),
        "second backward": lambda: attention.attention_second_backward(*u, *rest),
        "scaled convolution, down": lambda: scaled_conv.down(large, w),
        "scaled convolution, up": lambda: scaled_conv.up(small, w),
        "scaled convolution, weight": lambda: scaled_conv.weight(small, large),
    }


def time_of(run: Callable[[], object], given: dict[str, Tile]) -> float | None:
    """Milliseconds of a pass with these tiles, or None where they do not fit."""
    with tiles.using(given):
        try:
            run()
        except (triton.TritonError, RuntimeError):  # of resources, of the compiler, of ptxas
            return None
        return float(triton.testing.do_bench(run, return_mode="median"))


def tune(kinds: tuple[str, ...], sizes: tuple[int, ...]) -> Iterator[dict[str, dict[str, Tile]]]:
    """For each kind and size: operation -> kind and size -> fastest tile.

    The kernels of a pass are tuned one after the other.
    """
    for kind, size in itertools.product(kinds, sizes):
        found: dict[str, dict[str, Tile]] = {}
        torch.backends.cuda.matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"
        torch.backends.cudnn.conv.fp32_precision = "tf32" if kind == "tf32" else "ieee"  # type: ignore[attr-defined]
        for name, run in passes(kind, size).items():
            best: dict[str, Tile] = {}
            for op in PASSES[name]:
                times = {tile: time_of(run, {**best, op: tile}) for tile in candidates(op, kind, size)}
                known = {tile: time for tile, time in times.items() if time is not None}
                if known:
                    best[op] = min(known, key=known.__getitem__)
                    found.setdefault(op, {})[f"{kind}/{size}"] = best[op]
                    print(f"{op} {kind}/{size}: {tuple(best[op])}, the pass {known[best[op]]:.3f} ms", flush=True)
        yield found


def ahead_of_time(architectures: list[str], kinds: tuple[str, ...], sizes: tuple[int, ...], check: bool) -> int:
    wanted = tune_ahead_of_time.entries(architectures, kinds, sizes)
    try:
        wrong = tune_ahead_of_time.run(wanted, check)
    except KeyboardInterrupt:
        print("tune: stopped" + "; what was found until now is in tiles.json" * (not check), file=sys.stderr)
        return 130
    print(f"{len(wanted) - wrong} of {len(wanted)} entries fit, compiled by triton {triton.__version__}")
    return 1 if wrong else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastgan.kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=KINDS, action="append", help="numbers to tune for; all by default")
    parser.add_argument("--size", type=int, choices=SIZES, action="append", help="padded feature sizes; all by default")
    parser.add_argument(
        "--ahead-of-time", choices=(*SHARED, "all"), action="append", metavar="ARCHITECTURE",
        help=f"fit attention's tiles by compiling alone, for {', '.join(SHARED)} or all; default: see tiles.py",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="with --ahead-of-time: write nothing")
    given = parser.parse_args(arguments)
    kinds, sizes = tuple(given.kind or KINDS), tuple(given.size or SIZES)
    if given.ahead_of_time:
        named = set(SHARED) if "all" in given.ahead_of_time else set(given.ahead_of_time)
        return ahead_of_time(list(named), kinds, sizes, given.check)
    if given.check:
        parser.error("--check: is for --ahead-of-time; what a GPU is tuned to is always written")
    if not torch.cuda.is_available():
        print(
            "tune: there is no GPU here to measure on; tiles.json is as it was. --ahead-of-time fits without one",
            file=sys.stderr,
        )
        return 1
    architecture = tiles.architecture(torch.device("cuda", torch.cuda.current_device()))
    for found in tune(kinds, sizes):
        write(architecture, found)  # at once: a later one may be stopped, or crash
    print(f"wrote the tiles of {architecture} to {tiles.TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
