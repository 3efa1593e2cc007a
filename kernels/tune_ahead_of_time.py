"""python -m fastgan.kernels.tune --ahead-of-time: tiles of the attention kernels that fit a GPU, found without one.

Every entry of tiles.json is compiled in all forms in which it is used. If it spills, or needs more memory than a
program has, it is replaced by the nearest tile that fits in all forms. Which of the tiles that fit is fastest must be
measured on a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from . import attention, tiles
from .ahead_of_time import SHARED_MEMORY, TENSOR_MEMORY, Launch, Resources, compile_launch, record_launches
from .tile_candidates import PASSES, candidates, write_tiles
from .tiles import Tile

OPS = tuple(op for name in ("forward", "backward", "second backward") for op in PASSES[name])
# Some tiles take the compiler many minutes; those that fit take 1 to 10 seconds.
SECONDS = 60


def forms(size: int, odd: bool) -> tuple[str, ...]:
    """The forms in which tiles of a size are used.

    Returns:
        even: lengths divisible by every tile. uneven: lengths divisible by none, with a causal mask. odd: the same with
        odd strides. convolution: features before pixels in memory, as a convolution returns them. narrow: the same with
        a quarter of the features in queries and keys, and fewer keys than queries (SAGAN).
    """
    if odd:
        return ("odd",)
    return ("even", "uneven", "convolution", "narrow") if size <= 128 else ("even", "uneven")


@contextlib.contextmanager
def _float32_precision(precision: str) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def run_all_passes(q: Tensor, k: Tensor, v: Tensor, do: Tensor, causal: bool) -> None:
    """Forward, backward and second backward."""
    o, lse = attention.attention_forward(q, k, v, 0.3, causal)
    attention.attention_backward(do, q, k, v, o, lse, 0.3, causal)
    attention.attention_second_backward(q, k, v, do, q, k, v, o, lse, 0.3, causal)


def launches_of_form(architecture: str, kind: str, size: int, form: str) -> list[Launch]:
    """The launches of `run_all_passes` with `size` features, or 5 fewer for odd strides."""
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    transposed = form in ("convolution", "narrow")

    def array(length: int, features: int) -> Tensor:
        shape = (2, 2, features, length) if transposed else (2, 2, length, features)
        x = torch.empty(*shape, dtype=dtype, device="meta")
        return x.transpose(2, 3) if transposed else x

    causal = form in ("uneven", "odd")
    n, m = (1025, 1023) if causal else (4096, 1024) if form == "narrow" else (4096, 4096)
    dv = size - 5 if form == "odd" else size
    d = max(8, size // 4) if form == "narrow" else dv
    q, k, v, do = array(n, d), array(m, d), array(m, dv), array(n, dv)

    with _float32_precision("tf32" if kind == "tf32" else "ieee"):
        return record_launches(architecture, lambda: run_all_passes(q, k, v, do, causal))


@dataclasses.dataclass(frozen=True)
class Entry:
    """The key of an entry in tiles.json."""

    architecture: str
    op: str
    kind: str
    size: int
    odd: bool

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.size}" + "/odd" * self.odd

    def __str__(self) -> str:
        return f"{self.architecture} {self.op} {self.key}"

    def tile(self) -> Tile:
        """The tile in the table, or the largest candidate if there is none."""
        with contextlib.suppress(KeyError):
            return tiles.lookup_for(self.architecture, self.op, self.kind, self.size, self.odd)
        return max(candidates(self.op, self.kind, self.size), key=lambda it: (it.rows * it.cols, it.warps, it[3:]))


def compile_entry(entry: Entry, form: str, tile: Tile) -> Resources:
    """The resources of the kernel of `entry` with `tile`, in `form`."""
    with tiles.override({entry.op: tile}):
        launches = launches_of_form(entry.architecture, entry.kind, entry.size, form)
    (launch,) = (it for it in launches if f"attention_{it.name}" == f"{entry.op}_kernel")
    return compile_launch(launch, entry.architecture)


def _compile_and_send(connection: Connection, seconds: int, entry: Entry, form: str, tile: Tile) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # only the parent process reports an interrupt
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    try:
        connection.send(compile_entry(entry, form, tile))
    except Exception as error:  # a tile that does not compile does not fit
        connection.send(f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"[:200])


def compile_isolated(entry: Entry, form: str, tile: Tile, seconds: int = SECONDS) -> Resources | str:
    """`compile_entry` in another process, as the compiler can crash or hang; a line of text if it fails."""
    fork = multiprocessing.get_context("fork")  # this process has no threads and no CUDA context
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_compile_and_send, args=(sender, seconds, entry, form, tile))
    process.start()
    sender.close()
    with receiver:
        try:
            result: Resources | str = receiver.recv()
        except EOFError:
            result = f"the compiler crashed, or took more than {seconds} s of CPU time"
    process.join()
    return result


def nearest_tiles(start: Tile, op: str, kind: str, size: int) -> list[Tile]:
    """The tiles to try if `start` does not fit, nearest first.

    A larger tile reads less memory, so the area is reduced last: after chunk, warps and stages.
    """
    many = size >= (256 if kind == "half" else 128)  # features for which chunks are worth the extra loads
    keyed = []
    for it in {start, *candidates(op, kind, size)}:
        same = it[:2] == start[:2]
        fewer = it.rows * it.cols <= start.rows * start.cols and it.stages <= start.stages
        if it != start and fewer and (many or kind == "float32" or it.chunk == start.chunk):
            owned = it.cols if op.endswith("columns") else it.rows
            other = (it.chunk != start.chunk, it.warps != start.warps, -it.stages)
            keyed.append((-it.rows * it.cols, not same, -owned, *other, it))
    return [it for *_, it in sorted(keyed)]


def _cannot_fit(tile: Tile, architecture: str, tried: dict[Tile, Resources | str]) -> bool:
    """Whether results of tiles with the same rows, columns and chunk show that this one does not fit either."""
    for other, needed in tried.items():
        if isinstance(needed, str) or (other.rows, other.cols, other.chunk) != (tile.rows, tile.cols, tile.chunk):
            continue
        fewer_stages = tile.warps == other.warps and needed.spilled > 64  # bytes, which hardly depend on stages
        fewer_warps = tile.warps <= other.warps and needed.spilled > 300
        as_many_stages = tile.stages == other.stages and needed.shared > 1.5 * SHARED_MEMORY[architecture]
        if needed.tensor_columns > TENSOR_MEMORY or fewer_stages or fewer_warps or as_many_stages:
            return True
    return False


@dataclasses.dataclass
class Fitted:
    """The result of `fit`.

    Attributes:
        entry: the entry.
        before: its tile before.
        tile: the nearest tile that fits, or None.
        why: the reason why `before` does not fit, or "".
        tried: number of tiles compiled.
    """

    entry: Entry
    before: Tile
    tile: Tile | None
    why: str
    tried: int = 1


Compile = Callable[[Entry, str, Tile], Resources | str]


def _first_misfit(entry: Entry, tile: Tile, compile_one: Compile) -> tuple[Resources | str, str] | None:
    """The resources (or error) of the first form that does not fit, with a description; None if all fit."""
    for form in forms(entry.size, entry.odd):
        result = compile_one(entry, form, tile)
        if isinstance(result, str) or not result.fits(entry.architecture):
            return result, f"{form}: {result}"
    return None


def fit(entry: Entry, compile_one: Compile) -> Fitted:
    """Find the nearest tile that fits in all forms, starting with the tile in the table."""
    before = entry.tile()
    bad = _first_misfit(entry, before, compile_one)
    if bad is None:
        return Fitted(entry, before, before, "")
    tried = {before: bad[0]}
    for tile in nearest_tiles(before, entry.op, entry.kind, entry.size):
        if not _cannot_fit(tile, entry.architecture, tried):
            worse = _first_misfit(entry, tile, compile_one)
            if worse is None:
                return Fitted(entry, before, tile, bad[1], len(tried))
            tried[tile] = worse[0]
    return Fitted(entry, before, None, bad[1], len(tried))


def entries(architectures: Iterable[str], kinds: Iterable[str], sizes: Iterable[int]) -> list[Entry]:
    """All entries. "default" and even strides come first, as the fallback of the others."""
    product = itertools.product(sorted(architectures), (False, True), kinds, sizes, OPS)
    return [Entry(architecture, op, kind, size, odd) for architecture, odd, kind, size, op in product]


def fit_entries(wanted: list[Entry], check_only: bool) -> int:
    """Fit `wanted`, and write each change immediately. Returns the number of entries that do not fit."""
    wrong = 0
    for i, entry in enumerate(wanted):
        if sys.stderr.isatty():
            print(f"\r{i} of {len(wanted)}, {entry}\033[K", end="\r", file=sys.stderr, flush=True)
        if check_only:
            bad = _first_misfit(entry, entry.tile(), compile_isolated)
            wrong += bad is not None
            if bad:
                print(f"{entry}: {tuple(entry.tile())} does not fit ({bad[1]})", flush=True)
            continue
        fitted = fit(entry, compile_isolated)
        if not fitted.why:
            continue
        if fitted.tile is None:
            wrong += 1
            what = f"of {fitted.tried} compiled; {tuple(fitted.before)} {fitted.why}"
            print(f"{entry}: no tile fits, {what}", flush=True)
            continue
        write_tiles(entry.architecture, {entry.op: {entry.key: fitted.tile}})
        print(f"{entry}: {tuple(fitted.before)} -> {tuple(fitted.tile)} ({fitted.why})", flush=True)
    return wrong
