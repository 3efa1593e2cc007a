"""python -m fastgan.kernels.tune: measure tiles on the present GPU and write the fastest to tiles.json.

Run it once for a new architecture, and again when a kernel changes. Entries for odd strides (see tiles.py) are not
measured.

With `--ahead-of-time ARCHITECTURE` (repeatable, or `all`) nothing is measured and no GPU is needed: the entries of
attention are compiled, and an entry that spills or needs too much memory is replaced by the nearest tile that fits.
`--check` only lists such entries. `pytest -m "slow or not slow" tests/kernels -k compiles` checks all kernels.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator

import torch
import triton

from . import attention, scaled_conv, tiles, tune_ahead_of_time
from .ahead_of_time import WITH_PRODUCTS
from .tile_candidates import PASSES, SIZES, candidates, write_tiles
from .tiles import KINDS, Tile


def make_passes(kind: str, size: int) -> dict[str, Callable[[], object]]:
    """Each launcher of `PASSES`, with inputs that fill a GPU: for attention about 2^32 products of 64 features."""
    n = 4096 if size <= 64 else 2048
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    side = 128 if size <= 64 else 32
    w = torch.randn(size, size, 4, 4, device="cuda", dtype=dtype)
    small, large = (
        torch.randn(16, size, s, s, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
        for s in (side, 2 * side)
    )
    q, k, v, do = (torch.randn(8, 2, n, size, device="cuda", dtype=dtype) for _ in range(4))
    o, lse = attention.attention_forward(q, k, v, 0.1, False)
    arguments = (do, q, k, v, o, lse, 0.1, False)
    return {
        "forward": lambda: attention.attention_forward(q, k, v, 0.1, False),
        "backward": lambda: attention.attention_backward(*arguments),
        "second backward": lambda: attention.attention_second_backward(k, v, q, *arguments),
        "scaled convolution, down": lambda: scaled_conv.down(large, w),
        "scaled convolution, up": lambda: scaled_conv.up(small, w),
        "scaled convolution, weight": lambda: scaled_conv.weight(small, large),
    }


def measure(run: Callable[[], object], overrides: dict[str, Tile]) -> float | None:
    """Median milliseconds of `run` with these tiles, or None if they do not fit."""
    with tiles.override(overrides):
        try:
            run()
        except (triton.TritonError, RuntimeError):  # out of resources, or an error of the compiler or ptxas
            return None
        return float(triton.testing.do_bench(run, return_mode="median"))


def tune(kinds: tuple[str, ...], sizes: tuple[int, ...]) -> Iterator[dict[str, dict[str, Tile]]]:
    """Yield, for each kind and size, the fastest tiles: kernel -> key -> tile.

    The kernels of one launcher are tuned one after the other.
    """
    for kind, size in itertools.product(kinds, sizes):
        fastest: dict[str, dict[str, Tile]] = {}
        torch.backends.cuda.matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"
        torch.backends.cudnn.conv.fp32_precision = "tf32" if kind == "tf32" else "ieee"  # type: ignore[attr-defined]
        for name, run in make_passes(kind, size).items():
            best: dict[str, Tile] = {}
            for op in PASSES[name]:
                times = {tile: measure(run, {**best, op: tile}) for tile in candidates(op, kind, size)}
                known = {tile: time for tile, time in times.items() if time is not None}
                if known:
                    best[op] = min(known, key=known.__getitem__)
                    fastest.setdefault(op, {})[f"{kind}/{size}"] = best[op]
                    print(f"{op} {kind}/{size}: {tuple(best[op])}, {name} {known[best[op]]:.3f} ms", flush=True)
        yield fastest


def fit_ahead_of_time(architectures: list[str], kinds: tuple[str, ...], sizes: tuple[int, ...], check: bool) -> int:
    """Fit or check the tiles of attention by compiling. Returns the exit code."""
    wanted = tune_ahead_of_time.entries(architectures, kinds, sizes)
    try:
        wrong = tune_ahead_of_time.fit_entries(wanted, check)
    except KeyboardInterrupt:
        print("tune: interrupted" + "; results so far are in tiles.json" * (not check), file=sys.stderr)
        return 130
    print(f"{len(wanted) - wrong} of {len(wanted)} entries fit, compiled with triton {triton.__version__}")
    return 1 if wrong else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastgan.kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=KINDS, action="append", help="kind of numbers (repeatable; default: all)")
    parser.add_argument("--size", type=int, choices=SIZES, action="append", help="padded feature size (the same)")
    parser.add_argument(
        "--ahead-of-time", choices=(*WITH_PRODUCTS, "all"), action="append", metavar="ARCHITECTURE",
        help=f"fit the tiles of attention by compiling, without a GPU: {', '.join(WITH_PRODUCTS)} or all",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="with --ahead-of-time: only list entries that do not fit")
    args = parser.parse_args(arguments)
    kinds, sizes = tuple(args.kind or KINDS), tuple(args.size or SIZES)
    if args.ahead_of_time:
        names = set(WITH_PRODUCTS) if "all" in args.ahead_of_time else set(args.ahead_of_time)
        return fit_ahead_of_time(list(names), kinds, sizes, args.check)
    if args.check:
        parser.error("--check needs --ahead-of-time")
    if not torch.cuda.is_available():
        print(
            "tune: torch sees no GPU to measure on, tiles.json is unchanged; --ahead-of-time needs no GPU",
            file=sys.stderr,
        )
        return 1
    architecture = tiles.architecture(torch.device("cuda", torch.cuda.current_device()))
    for fastest in tune(kinds, sizes):
        write_tiles(architecture, fastest)  # immediately, in case a later one is interrupted or crashes
    print(f"wrote the tiles of {architecture} to {tiles.TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
