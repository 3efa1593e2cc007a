"""python -m fastgan.kernels.tune --ahead-of-time: tiles of attention's kernels that fit a GPU which is not at hand.

Every entry of tiles.json is compiled in every form its numbers and sizes are called in. Where one spills, or asks for
more memory than a program has, the nearest tile that does in no form takes its place. Which of two tiles that fit is
the faster only a GPU can say.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from fastgan.kernels import attention, tiles
from fastgan.kernels.ahead_of_time import SHARED, TENSOR, Launch, Resources, compiled, launches
from fastgan.kernels.tile_candidates import PASSES, candidates, write
from fastgan.kernels.tiles import Tile

OPS = tuple(op for name in ("forward", "backward", "second backward") for op in PASSES[name])
# Some tiles keep the compiler busy for many minutes; those that fit take it 1 to 10 seconds.
SECONDS = 60


def forms(size: int, odd: bool) -> tuple[str, ...]:
    """even: lengths that every tile divides; uneven: lengths that none does, under a causal mask; odd: strides besides.

    convolution: features first in memory, as a convolution leaves them; narrow: so, and with a quarter of the features
    in queries and keys, and fewer keys than queries (SAGAN).
    """
    if odd:
        return ("odd",)
    return ("even", "uneven", "convolution", "narrow") if size <= 128 else ("even", "uneven")


@contextlib.contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def every_pass(q: Tensor, k: Tensor, v: Tensor, do: Tensor, causal: bool) -> None:
    o, lse = attention.attention_forward(q, k, v, 0.3, causal)
    attention.attention_backward(do, q, k, v, o, lse, 0.3, causal)
    attention.attention_second_backward(q, k, v, do, q, k, v, o, lse, 0.3, causal)


def launched(architecture: str, kind: str, size: int, form: str) -> list[Launch]:
    """What forward, backward and second backward launch: `size` features, or 5 fewer where strides are odd."""
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    transposed = form in ("convolution", "narrow")

    def array(length: int, features: int) -> Tensor:
        shape = (2, 2, features, length) if transposed else (2, 2, length, features)
        made = torch.empty(*shape, dtype=dtype, device="meta")
        return made.transpose(2, 3) if transposed else made

    causal = form in ("uneven", "odd")
    n, m = (1025, 1023) if causal else (4096, 1024) if form == "narrow" else (4096, 4096)
    dv = size - 5 if form == "odd" else size
    d = max(8, size // 4) if form == "narrow" else dv
    q, k, v, do = array(n, d), array(m, d), array(m, dv), array(n, dv)

    with _float32_products("tf32" if kind == "tf32" else "ieee"):
        return launches(architecture, lambda: every_pass(q, k, v, do, causal))


@dataclasses.dataclass(frozen=True)
class Entry:
    """A place in tiles.json."""

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
        """The table's, or where it has none the largest of those there are to try."""
        with contextlib.suppress(KeyError):
            return tiles.find_for(self.architecture, self.op, self.kind, self.size, self.odd)
        return max(candidates(self.op, self.kind, self.size), key=lambda it: (it.rows * it.cols, it.warps, it[3:]))


def resources(entry: Entry, form: str, tile: Tile) -> Resources:
    """What the kernel of `entry` needs with `tile` in `form`."""
    with tiles.using({entry.op: tile}):
        found = launched(entry.architecture, entry.kind, entry.size, form)
    (launch,) = (it for it in found if f"attention_{it.name}" == f"{entry.op}_kernel")
    return compiled(launch, entry.architecture)


def _answer(connection: Connection, seconds: int, entry: Entry, form: str, tile: Tile) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent has something to say, this process has not
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    try:
        connection.send(resources(entry, form, tile))
    except Exception as error:  # a tile that the compiler refuses is one that does not fit
        connection.send(f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"[:200])


def isolated(entry: Entry, form: str, tile: Tile, seconds: int = SECONDS) -> Resources | str:
    """`resources` in a process of its own, or in a line why there are none: the compiler can crash and can hang."""
    fork = multiprocessing.get_context("fork")  # nothing here has threads or a GPU that a fork would break
    mine, its = fork.Pipe(duplex=False)
    process = fork.Process(target=_answer, args=(its, seconds, entry, form, tile))
    process.start()
    its.close()
    with mine:
        try:
            found: Resources | str = mine.recv()
        except EOFError:
            found = f"the compiler crashed, or took more than {seconds} s of CPU time"
    process.join()
    return found


def nearest(start: Tile, op: str, kind: str, size: int) -> list[Tile]:
    """What to try when `start` does not fit, the nearest first.

    A large tile reads less, so area is given up last; before it warps, stages and chunks, whose worth depends on more.
    """
    many = size >= (256 if kind == "half" else 128)  # features of which chunks are worth their loads
    sortable = []
    for it in {start, *candidates(op, kind, size)}:
        same = it[:2] == start[:2]
        fewer = it.rows * it.cols <= start.rows * start.cols and it.stages <= start.stages
        if it != start and fewer and (many or kind == "float32" or it.chunk == start.chunk):
            owned = it.cols if op.endswith("columns") else it.rows
            other = (it.chunk != start.chunk, it.warps != start.warps, -it.stages)
            sortable.append((-it.rows * it.cols, not same, -owned, *other, it))
    return [it for *_, it in sorted(sortable)]


def _hopeless(tile: Tile, architecture: str, tried: dict[Tile, Resources | str]) -> bool:
    """Whether what was seen of tiles of these rows, columns and chunk says that this one does not fit either."""
    for other, seen in tried.items():
        if isinstance(seen, str) or (other.rows, other.cols, other.chunk) != (tile.rows, tile.cols, tile.chunk):
            continue
        fewer_stages = tile.warps == other.warps and seen.local > 64  # bytes, which stages hardly change
        fewer_warps = tile.warps <= other.warps and seen.local > 300
        as_many_stages = tile.stages == other.stages and seen.shared > 1.5 * SHARED[architecture]
        if seen.tensor > TENSOR or fewer_stages or fewer_warps or as_many_stages:
            return True
    return False


@dataclasses.dataclass
class Fitted:
    entry: Entry
    before: Tile
    tile: Tile | None  # that fits; None: none of the candidates
    why: str  # `before` does not, or ""
    tried: int = 1


Compile = Callable[[Entry, str, Tile], Resources | str]


def _misfit(entry: Entry, tile: Tile, compile_one: Compile) -> tuple[Resources | str, str] | None:
    """The first form that does not fit, and what it says, or None."""
    for form in forms(entry.size, entry.odd):
        found = compile_one(entry, form, tile)
        if isinstance(found, str) or not found.fits(entry.architecture):
            return found, f"{form}: {found}"
    return None


def fit(entry: Entry, compile_one: Compile) -> Fitted:
    """The tile of the table if it fits in every form, else the nearest that does."""
    before = entry.tile()
    bad = _misfit(entry, before, compile_one)
    if bad is None:
        return Fitted(entry, before, before, "")
    tried = {before: bad[0]}
    for tile in nearest(before, entry.op, entry.kind, entry.size):
        if not _hopeless(tile, entry.architecture, tried):
            worse = _misfit(entry, tile, compile_one)
            if worse is None:
                return Fitted(entry, before, tile, bad[1], len(tried))
            tried[tile] = worse[0]
    return Fitted(entry, before, None, bad[1], len(tried))


def entries(architectures: Iterable[str], kinds: Iterable[str], sizes: Iterable[int]) -> list[Entry]:
    """ "default" and even strides come first: they stand in where the others have no entry."""
    product = itertools.product(sorted(architectures), (False, True), kinds, sizes, OPS)
    return [Entry(architecture, op, kind, size, odd) for architecture, odd, kind, size, op in product]


def run(wanted: list[Entry], check_only: bool) -> int:
    """Fit `wanted` and write what changed, each when it is found. The number of those that do not fit the GPU."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # a thread less in a process that forks
    wrong = 0
    with tqdm(wanted, unit="entry", dynamic_ncols=True, disable=None) as bar:
        for entry in bar:
            bar.set_postfix_str(str(entry))
            if check_only:
                bad = _misfit(entry, entry.tile(), isolated)
                wrong += bad is not None
                if bad:
                    tqdm.write(f"{entry}: {tuple(entry.tile())} does not fit ({bad[1]})")
                continue
            found = fit(entry, isolated)
            if not found.why:
                continue
            if found.tile is None:
                wrong += 1
                tqdm.write(f"{entry}: no tile fits, of {found.tried} compiled; {tuple(found.before)} {found.why}")
                continue
            write(entry.architecture, {entry.op: {entry.key: found.tile}})
            tqdm.write(f"{entry}: {tuple(found.before)} -> {tuple(found.tile)} ({found.why})")
    return wrong
