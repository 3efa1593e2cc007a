"""Attention and its first and second derivatives in plain PyTorch, a block of rows at a time, with O(N) memory.

With S = scale Q K^T, P = softmax(S), O = P V and a cotangent dO of O,

    dP = dO V^T    D_i = sum_j P_ij dP_ij    dS = P * (dP - D)
    dQ = scale dS K    dK = scale dS^T Q    dV = P^T dO

and with cotangents uQ, uK, uV of dQ, dK, dV,

    E = scale (uQ K^T + Q uK^T)    F = dO uV^T    G = P * F + E * dS
    e_i = sum_j P_ij E_ij    c_i = sum_j G_ij    A = P * (E - e)    gS = G - e dS - c P
    gdO = A V + P uV    gV = A^T dO    gQ = scale (gS K + dS uK)    gK = scale (gS^T Q + dS^T uQ)

A block has all columns of its rows, so one sweep over the blocks gives P, the row sums D, e and c, and all results.
torch's fused attention for CPUs takes less time in first order, but its gradients in float16 and bfloat16 are up to ten
times less exact than those of plain products, for a peaked softmax above all, and it overflows at large logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastgan.ops.autograd import without_autocast

_Pass = TypeVar("_Pass", bound=Callable[..., Any])

HALF = (torch.float16, torch.bfloat16)

# Elements of one block of logits. On a CPU four such blocks and their operands fit into the caches of the cores; a GPU
# needs blocks that occupy all of it.
_BLOCK = {"cpu": 2**18}
_BLOCK_ELSEWHERE = 2**24


def _disable_autocast(function: _Pass) -> _Pass:
    """Autocast would compute matrix products of a backward pass in another dtype than that of the forward pass."""

    @wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        with without_autocast(next(x for x in arguments if x is not None)):
            return function(*arguments, **options)

    return run  # type: ignore[return-value]


def _wide(x: Tensor) -> Tensor:
    """[B, H, N, d] -> [B H, N, d], float32 at least."""
    x = x.flatten(0, 1)
    return x.float() if x.dtype in HALF else x


class Masked:
    """The three passes under a mask without a gradient, with the rows of it that a block needs at a time.

    Args:
        mask: broadcasts to [*leading, N, M]; bool, True where a query may attend to a key, or added to the logits.
        leading: dimensions of the result before N.
    """

    def __init__(self, mask: Tensor, leading: tuple[int, ...]) -> None:
        self._version = None if mask.is_inference() else mask._version
        self._given = mask
        self._heads = leading[-1] if leading else 1
        mask = mask[(None,) * (2 + max(len(leading), 2) - mask.ndim)]
        if mask.ndim > 4:
            mask = mask.expand(*leading[:-1], *mask.shape[-3:]).flatten(0, -4)
        self._mask = mask
        hidden = mask.logical_not() if mask.dtype == torch.bool else mask == -torch.inf
        self._no_keys = hidden.all(dim=-1, keepdim=True)

    def of(self, h: slice, i: slice, j: slice) -> Tensor:
        """What is added to a block's logits, or bool, True where it is hidden: [heads or 1, rows or 1, columns or 1].

        The logits of a query without keys stay as they are: its softmax is finite, and its row is zeroed.
        """
        block, no_keys = self._part(self._mask, h, i, j), self._part(self._no_keys, h, i, j)
        if block.dtype == torch.bool:
            return block.logical_or(no_keys).logical_not_()
        return block.masked_fill(no_keys, 0.0)

    def _part(self, mask: Tensor, h: slice, i: slice, j: slice) -> Tensor:
        rows, columns = mask.shape[2:]
        block = mask[:, :, i if rows > 1 else slice(None), j if columns > 1 else slice(None)]
        if block.shape[:2] == (1, 1):
            return block[0]
        index = torch.arange(h.start, h.stop, device=block.device)
        return block[index // self._heads % block.shape[0], index % self._heads % block.shape[1]]

    def _without_keys(self, x: Tensor) -> Tensor:
        """[B, H, N, features] with zeros for queries without keys, whose output and gradients are 0."""
        return x.masked_fill(self._no_keys, 0.0)

    def _checked(self) -> Masked:
        if self._version is not None and self._given._version != self._version:
            raise RuntimeError("attn_mask was changed in place after the forward pass, and its gradients need it")
        return self

    def attention_forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        o, lse = attention_forward(*arguments, mask=self)
        return o.masked_fill_(self._no_keys, 0.0), lse

    def attention_backward(self, do: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return attention_backward(self._without_keys(do), *arguments, mask=self._checked())

    def attention_second_backward(
        self, uq: Tensor | None, uk: Tensor | None, uv: Tensor | None, do: Tensor, *arguments: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        do = self._without_keys(do)
        gq, gk, gv, gdo = attention_second_backward(uq, uk, uv, do, *arguments, mask=self._checked())
        return gq, gk, gv, self._without_keys(gdo)


def _blocks(
    q: Tensor, k: Tensor, causal: bool, mask: Masked | None
) -> Iterator[tuple[slice, slice, slice, Tensor | None]]:
    """(heads, rows, columns, mask as of `Masked.of`) of each block of the logits of [B H, N, d] and [B H, M, d]."""
    heads, n, m = q.shape[0], q.shape[1], k.shape[1]
    block = _BLOCK.get(q.device.type, _BLOCK_ELSEWHERE)
    rows = min(n, max(16, block // m))
    group = max(1, block // (rows * m))
    for head in range(0, heads, group):
        for row in range(0, n, rows):
            end = min(row + rows, n)
            columns, masked = m, None
            if causal:
                columns = min(m, end)
                masked = torch.ones(end - row, columns, dtype=torch.bool, device=q.device).triu_(row + 1)
            h, i, j = slice(head, min(head + group, heads)), slice(row, end), slice(0, columns)
            yield h, i, j, masked if mask is None else mask.of(h, i, j)


def _logits(q: Tensor, k: Tensor, scale: float, masked: Tensor | None) -> Tensor:
    logits = torch.bmm(q, k.mT).mul_(scale)
    if masked is None:
        return logits
    return logits.masked_fill_(masked, -torch.inf) if masked.dtype == torch.bool else logits.add_(masked)


def _probabilities(q: Tensor, k: Tensor, scale: float, masked: Tensor | None) -> Tensor:
    # Not exp(logits - lse): the rounding of lse is the same for a whole row and would add up in every sum over it.
    return torch.softmax(_logits(q, k, scale, masked), dim=2)


def _logit_gradient(p: Tensor, do: Tensor, v: Tensor) -> Tensor:
    """dS; D is taken from dP itself, whose rounding then cancels, and not from dO and O."""
    dp = torch.bmm(do, v.mT)
    ds = dp.mul_(p)
    return ds.addcmul_(p, ds.sum(dim=2, keepdim=True), value=-1)


@_disable_autocast
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, *, mask: Masked | None = None
) -> tuple[Tensor, Tensor]:
    """O [B, H, N, dv] in the dtype of q, and lse [B, H, N], float32 at least."""
    # The results are no views, as a view made inside an autograd Function may not be changed in place.
    o = q.new_empty(*q.shape[:3], v.shape[3])
    q, k, v = _wide(q), _wide(k), _wide(v)
    lse = q.new_empty(o.shape[:3])
    flat_o, flat_lse = o.view(*q.shape[:2], -1), lse.view(q.shape[:2])
    for h, i, j, masked in _blocks(q, k, causal, mask):
        logits = _logits(q[h, i], k[h, j], scale, masked)
        flat_lse[h, i] = torch.logsumexp(logits, dim=2)
        flat_o[h, i] = torch.bmm(torch.softmax(logits, dim=2), v[h, j])
    return o, lse


@_disable_autocast
def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor | None,
    lse: Tensor | None,
    scale: float,
    causal: bool,
    *,
    mask: Masked | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV in the shapes and the dtype of q, k, v; `o` and `lse` are not needed."""
    leading, dtype = q.shape[:2], q.dtype
    do, q, k, v = _wide(do), _wide(q), _wide(k), _wide(v)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for h, i, j, masked in _blocks(q, k, causal, mask):
        p = _probabilities(q[h, i], k[h, j], scale, masked)
        dv[h, j].baddbmm_(p.mT, do[h, i])
        ds = _logit_gradient(p, do[h, i], v[h, j])
        dq[h, i].baddbmm_(ds, k[h, j], beta=0, alpha=scale)
        dk[h, j].baddbmm_(ds.mT, q[h, i], alpha=scale)
    return tuple(x.to(dtype).unflatten(0, leading) for x in (dq, dk, dv))


@_disable_autocast
def attention_second_backward(
    uq: Tensor | None,
    uk: Tensor | None,
    uv: Tensor | None,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor | None,
    lse: Tensor | None,
    scale: float,
    causal: bool,
    *,
    mask: Masked | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gQ, gK, gV, gdO in the shapes and the dtype of q, k, v, o; an absent cotangent is zero."""
    leading, dtype = q.shape[:2], q.dtype
    do, q, k, v = _wide(do), _wide(q), _wide(k), _wide(v)
    uq, uk, uv = (None if u is None else _wide(u) for u in (uq, uk, uv))
    gq, gk, gv, gdo = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(do)
    for h, i, j, masked in _blocks(q, k, causal, mask):
        p = _probabilities(q[h, i], k[h, j], scale, masked)
        ds = _logit_gradient(p, do[h, i], v[h, j])
        g = None
        if uv is not None:
            g = torch.bmm(do[h, i], uv[h, j].mT).mul_(p)
            gdo[h, i].baddbmm_(p, uv[h, j])
        a = None
        if uq is not None:
            a = torch.bmm(uq[h, i], k[h, j].mT).mul_(scale)
        if uk is not None:
            rest = q[h, i], uk[h, j].mT
            a = torch.bmm(*rest).mul_(scale) if a is None else a.baddbmm_(*rest, alpha=scale)
        e = None
        if a is not None:
            g = a * ds if g is None else g.addcmul_(a, ds)
            e = a.mul_(p).sum(dim=2, keepdim=True)
            a.addcmul_(p, e, value=-1)
            gdo[h, i].baddbmm_(a, v[h, j])
            gv[h, j].baddbmm_(a.mT, do[h, i])
        assert g is not None  # autograd does not call this with every cotangent absent
        c = g.sum(dim=2, keepdim=True)
        g.addcmul_(p, c, value=-1)
        if e is not None:
            g.addcmul_(ds, e, value=-1)
        gq[h, i].baddbmm_(g, k[h, j], alpha=scale)
        gk[h, j].baddbmm_(g.mT, q[h, i], alpha=scale)
        if uk is not None:
            gq[h, i].baddbmm_(ds, uk[h, j], alpha=scale)
        if uq is not None:
            gk[h, j].baddbmm_(ds.mT, uq[h, i], alpha=scale)
    return tuple(x.to(dtype).unflatten(0, leading) for x in (gq, gk, gv, gdo))
