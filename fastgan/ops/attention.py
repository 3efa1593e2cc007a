"""Scaled dot-product attention that can be differentiated twice (Vaswani et al. 2017, equation 1).

`torch.nn.functional.scaled_dot_product_attention` raises under a gradient penalty on every fused backend, and its math
backend stores several N x M arrays. Here the backward pass is an autograd Function with a backward of its own, and none
of the three passes stores an N x M array.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastgan.ops import attention_chunked
from fastgan.ops.arguments import require_number
from fastgan.ops.autograd import SecondBackward, autocast, autocast_enabled, form_tag, kept, tracked, without_autocast
from fastgan.ops.dispatch import torch_functions as F
from fastgan.ops.dispatch.backend import Implementation, Op, size_class
from fastgan.ops.dispatch.kernel_registry import kernel_functions, kernel_implementations, no_products_reason
from fastgan.ops.dispatch.torch_private import in_forward_mode
from fastgan.ops.fallthrough import fall_through, foreign


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`: softmax(scale * query key^T + mask) value.

    First and second derivatives in query, key and value use no N x M arrays but the mask; a third derivative raises
    (`backend="torch"` has every order). A call with dropout, or with a mask that requires a gradient, runs in plain
    PyTorch, differentiable to any order, in the mask too.

    Args:
        query: [..., H, N, d], at least two dimensions. The three tensors have one floating-point dtype (or get it from
            autocast), and their leading dimensions broadcast. float16 and bfloat16 accumulate in float32.
        key: [..., H, M, d].
        value: [..., H, M, dv].
        attn_mask: broadcasts to [..., N, M]; bool, True where a query may attend to a key, or floating-point, added to
            the logits. A query without keys has output 0 and gradients 0.
        dropout_p: probability of dropping an attention weight, in every call: there is no training flag here.
        is_causal: query i attends to the keys 0 .. i, also where N != M; not together with `attn_mask`.
        scale: factor of the logits; 1 / sqrt(d) when None.
        enable_gqa: key and value have fewer heads (dimension -3) than query, by a whole factor; each serves as many
            consecutive heads of the query.
        backend: None, "torch", "chunked", "cpp" or "triton"; see `fastgan.ops.backends`.

    Returns:
        [..., H, N, dv], in the dtype of `query`, or autocast's.

    Raises:
        TypeError: dtypes that differ, or a flag that is not True or False.
        ValueError: shapes or devices that do not fit, a `dropout_p` outside [0, 1], a mask together with `is_causal`,
            or a `backend` that cannot run the call.
        NotImplementedError: from autograd, for a third derivative through an implementation other than "torch".
    """
    _require_flags(is_causal, enable_gqa)
    if _foreign(query, key, value, attn_mask):
        how = {"scale": scale, "enable_gqa": enable_gqa}
        return _fall_through(query, key, value, attn_mask, dropout_p, is_causal, **how, backend=backend)
    if casting := autocast_enabled(query):
        query, key, value, attn_mask = autocast(query, key, value, attn_mask)
    leading = _require_fit(query, key, value, dropout_p, enable_gqa)
    if attn_mask is not None:
        _require_mask(attn_mask, query, (*leading, query.shape[-2], key.shape[-2]), is_causal)
    scale = _scale(query, scale)
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    if (name := _implementation(backend, query, key, value, attn_mask, dropout_p > 0)) != "torch":
        return _run_kernels(_kernels(name, attn_mask, leading), query, key, value, leading, scale, is_causal)
    if backend is None and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        # Compiled code is differentiated once at most: torch's fused kernels are the fastest for it.
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    with without_autocast(query) if casting else nullcontext():
        return _reference(query, key, value, attn_mask, dropout_p, is_causal, scale)


def _implementation(
    backend: str | None, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: bool
) -> str:
    if 0 in (*query.shape, *key.shape, *value.shape):
        return "torch"
    plain_only = dropout or (mask is not None and (tracked(mask) or torch.compiler.is_compiling()))
    return OP.choose(backend, query, key, value, plain_only=plain_only, masked=mask is not None)


def _require_flags(is_causal: bool, enable_gqa: bool) -> None:
    for name, value in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if value is not True and value is not False:
            raise TypeError(f"{name} must be True or False, got {value!r}")


def _foreign(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether torch's own function must run; an exported program has the decomposed form, its tensors being fake."""
    exporting = torch.compiler.is_exporting()
    if foreign(query, key, value) and not exporting:
        return True
    if mask is None or type(mask) is Tensor or (exporting and type(mask) is type(query)):
        return False
    return foreign(mask)


def _fall_through(*tensors_and_options: Any, backend: str | None, **keywords: Any) -> Tensor:
    tensors, options = tensors_and_options[:4], tensors_and_options[4:]
    plain = F.scaled_dot_product_attention
    return fall_through(OP, scaled_dot_product_attention, plain, tensors, *options, backend=backend, **keywords)


def _run_kernels(
    kernels: Any, query: Tensor, key: Tensor, value: Tensor, leading: tuple[int, ...], scale: float, is_causal: bool
) -> Tensor:
    query, key, value = (_four_dimensional(x, leading) for x in (query, key, value))
    if tracked(query, key, value):
        output: Tensor = _Forward.apply(query, key, value, scale, is_causal, kernels)
    else:
        output, _ = kernels.attention_forward(query, key, value, scale, is_causal)
    # A view is a node of the graph, which costs time that shows with small inputs.
    return output if len(leading) == 2 else output.reshape(*leading, *output.shape[2:])


def _scale(query: Tensor, scale: float | None) -> float:
    if scale is not None:
        return float(require_number("scale", scale))
    return 1.0 / math.sqrt(query.shape[-1]) if query.shape[-1] else 1.0


def _require_fit(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, enable_gqa: bool) -> tuple[int, ...]:
    """Raise unless the arguments fit; returns the leading dimensions of the result."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not x.is_floating_point():
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must be {query.dtype}, as query, got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name} must be on {query.device}, as query, got {x.device}")
        if x.ndim < 2 + enable_gqa:
            raise ValueError(f"{name} must be [..., {'H, ' * enable_gqa}length, features], got {x.ndim} dimensions")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"key must have {query.shape[-1]} features, as query, got {key.shape[-1]}")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"value must have length {key.shape[-2]}, as key, got {value.shape[-2]}")
    if not 0 <= require_number("dropout_p", dropout_p) <= 1:
        raise ValueError(f"dropout_p must be 0 to 1, got {dropout_p}")
    leading: tuple[int, ...] = query.shape[:-2]
    for name, x in (("key", key), ("value", value)):
        own = x.shape[:-2]
        if enable_gqa:
            heads = own[-1]
            if heads < 1 or query.shape[-3] % heads:
                raise ValueError(f"{name} must have heads that divide the {query.shape[-3]} of query, got {heads}")
            own = torch.Size((*own[:-1], query.shape[-3]))
        if own != leading:
            try:
                leading = torch.broadcast_shapes(leading, own)
            except RuntimeError:
                needed = f"must have leading dimensions that broadcast to {tuple(leading)}"
                raise ValueError(f"{name} {needed}, got {tuple(own)}") from None
    return leading


def _require_mask(mask: Tensor, query: Tensor, logits: tuple[int, ...], is_causal: bool) -> None:
    """Raise unless the mask fits a query and logits of this shape."""
    if is_causal:
        raise ValueError("is_causal must be False with attn_mask, got True")
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(f"attn_mask must be bool, float32 or {query.dtype}, got {mask.dtype}")
    if mask.device != query.device:
        raise ValueError(f"attn_mask must be on {query.device}, as query, got {mask.device}")
    fits = len(mask.shape) <= len(logits) and all(
        size in (1, full) for size, full in zip(reversed(mask.shape), reversed(logits), strict=False)
    )
    if not fits:
        raise ValueError(f"attn_mask must broadcast to {logits}, got shape {tuple(mask.shape)}")


def _four_dimensional(x: Tensor, leading: tuple[int, ...]) -> Tensor:
    """[..., length, features], its leading dimensions broadcast, as [B, H, length, features]."""
    if x.shape[:-2] != leading:
        x = x.expand(*leading, *x.shape[-2:])
    if len(leading) == 2:
        return x
    if len(leading) < 2:
        return x[(None,) * (2 - len(leading))]
    return x.flatten(0, len(leading) - 2)


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """Plain matrix products; float16 and bfloat16 are computed in float32, as torch's own math form does."""
    dtype = query.dtype
    if dtype in attention_chunked.HALF:
        query, key, value = query.float(), key.float(), value.float()
    logits = (query * scale) @ key.transpose(-2, -1)
    if is_causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if mask is None:
        weights = _softmax(logits)
    else:
        logits = logits.masked_fill(mask.logical_not(), -torch.inf) if mask.dtype == torch.bool else logits + mask
        # Zero logits in a row without keys, then zero weights: 0 / 0 is neither computed nor differentiated.
        no_keys = (logits == -torch.inf).all(dim=-1, keepdim=True)
        weights = _softmax(logits.masked_fill(no_keys, 0.0)).masked_fill(no_keys, 0.0)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return (weights @ value).to(dtype)


def _softmax(logits: Tensor) -> Tensor:
    if not in_forward_mode():
        return torch.softmax(logits, dim=-1)
    # The forward-mode rule of torch.softmax changes in place what its backward needs.
    exponentials = (logits - logits.detach().amax(dim=-1, keepdim=True)).exp()
    return exponentials / exponentials.sum(dim=-1, keepdim=True)


def _kernels(name: str, mask: Tensor | None = None, leading: tuple[int, ...] = ()) -> Any:
    """The three functions of an implementation, which autograd does not see; with a mask, under it.

    - attention_forward(q, k, v, scale, causal) -> o, lse
    - attention_backward(do, q, k, v, o, lse, scale, causal) -> dq, dk, dv
    - attention_second_backward(uq, uk, uv, do, q, k, v, o, lse, scale, causal) -> gq, gk, gv, gdo; each u may be None

    q: [B, H, N, d]; k: [B, H, M, d]; v: [B, H, M, dv]; one dtype, any strides, no dimension of size 0. `lse` [B, H, N],
    float32 (float64 for float64), is the log-sum-exp of a row of scale q k^T. All compute in the dtype of their inputs,
    under autocast too.
    """
    if mask is not None:
        under_mask = attention_chunked.Masked if name == "chunked" else _MaskedKernels
        return under_mask(mask.detach(), leading)
    if name == "chunked":
        return attention_chunked
    if name == "cpp":
        _register_fakes()
    return kernel_functions("attention", name)


class _MaskedKernels(attention_chunked.Masked):
    """The three passes in C++ under a mask without a gradient."""

    def _with_mask(self, name: str, shapes: tuple[Tensor, Tensor], arguments: tuple[Any, ...]) -> Any:
        q, k = shapes
        mask = self._checked()._mask
        if mask.dtype not in (torch.bool, torch.float32):
            mask = mask.float()
        mask = mask.expand(*q.shape[:3], k.shape[2])
        return getattr(torch.ops.fastgan, f"attention_{name}")(*arguments, mask)

    def attention_forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        o, lse = self._with_mask("forward", (arguments[0], arguments[1]), arguments)
        return o.masked_fill_(self._no_keys, 0.0), lse

    def attention_backward(self, do: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self._with_mask("backward", (arguments[0], arguments[1]), (self._without_keys(do), *arguments))

    def attention_second_backward(
        self, uq: Tensor | None, uk: Tensor | None, uv: Tensor | None, do: Tensor, *arguments: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        given = (uq, uk, uv, self._without_keys(do), *arguments)
        gq, gk, gv, gdo = self._with_mask("second_backward", (arguments[0], arguments[1]), given)
        return gq, gk, gv, self._without_keys(gdo)


@cache
def _register_fakes() -> None:
    """Shapes and dtypes of the compiled ops' results, for torch.compile and torch.export."""

    @torch.library.register_fake("fastgan::attention_forward")
    def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)

    @torch.library.register_fake("fastgan::attention_backward")
    def _(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    @torch.library.register_fake("fastgan::attention_second_backward")
    def _(uq: Any, uk: Any, uv: Any, do: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), do.new_empty(do.shape)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, kernels: Any) -> Tensor:
        o, lse = kernels.attention_forward(q, k, v, scale, causal)
        ctx.set_materialize_grads(False)
        # Only `chunked` needs neither the output nor lse: what it keeps is not what the kernels keep.
        chunked = kernels is attention_chunked or type(kernels) is attention_chunked.Masked
        needed = (None, None) if chunked else (kept(o), lse)
        ctx.save_for_backward(form_tag("chunked" if chunked else "kernels"), q, k, v, *needed)
        ctx.rest = scale, causal, kernels
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor | None) -> tuple[Any, ...]:
        if do is None:
            return (None,) * 6
        if in_forward_mode() and forward_ad.unpack_dual(do).tangent is not None:
            raise NotImplementedError(f"{OP.name}: its gradient has no forward-mode derivative; backend='torch' has it")
        _, q, k, v, o, lse = ctx.saved_tensors
        scale, causal, kernels = ctx.rest
        if torch.is_grad_enabled():
            # o and lse depend on q, k and v; attention_second_backward includes their part of the second derivative.
            gradients = _Backward.apply(do, q, k, v, None if o is None else o.detach(), lse, scale, causal, kernels)
        else:
            gradients = kernels.attention_backward(do, q, k, v, o, lse, scale, causal)
        return *_needed(ctx, gradients), None, None, None


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor | None,
        lse: Tensor | None,
        scale: float,
        causal: bool,
        kernels: Any,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(do, q, k, v, o, lse)
        ctx.rest = scale, causal, kernels
        return kernels.attention_backward(do, q, k, v, o, lse, scale, causal)

    @staticmethod
    def backward(ctx: Any, uq: Tensor | None, uk: Tensor | None, uv: Tensor | None) -> tuple[Any, ...]:
        if uq is None and uk is None and uv is None:
            return (None,) * 9
        *options, kernels = ctx.rest
        arguments = (uq, uk, uv, *ctx.saved_tensors, *options)
        gq, gk, gv, gdo = SecondBackward.apply(OP.name, kernels.attention_second_backward, *arguments)
        return *_needed(ctx, (gdo, gq, gk, gv)), None, None, None, None, None


def _needed(ctx: Any, gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    return tuple(x if need else None for x, need in zip(gradients, ctx.needs_input_grad, strict=False))


def _unsupported_options(plain_only: bool = False, masked: bool = False) -> str | None:
    return "attn_mask and dropout run in other forms" if plain_only or masked else None


def _unsupported_with_mask(*inputs: Tensor, plain_only: bool = False, masked: bool = False) -> str | None:
    return "attn_mask with a gradient, and dropout, run in plain PyTorch" if plain_only else None


def _chunked_not_preferred(*inputs: Tensor, **options: object) -> str | None:
    if inputs and inputs[0].shape[-2] * inputs[1].shape[-2] < 2**16:
        return "plain matrix products are faster below 256 x 256 logits"
    return None


def _kernel_implementations() -> dict[str, Implementation]:
    """The kernels; Triton's keep whole feature vectors on the chip, which limits their size, and take no mask."""
    entries = kernel_implementations("attention", _unsupported_options)
    triton, cpp = entries["triton"], kernel_implementations("attention", _unsupported_with_mask)["cpp"]

    def unsupported_reason(*inputs: Tensor, **options: object) -> str | None:
        largest = max((x.shape[-1] for x in inputs), default=0)
        if largest > 256:
            return f"it supports 256 features, not {largest}"
        reason = triton.unsupported_reason(*inputs, **options)
        return reason or (no_products_reason(inputs[0].device.index) if inputs else None)

    return {**entries, "triton": replace(triton, unsupported_reason=unsupported_reason), "cpp": cpp}


def _classify(
    query: Tensor, key: Tensor, value: Tensor, plain_only: bool = False, masked: bool = False
) -> tuple[object, ...] | None:
    """The class of a call, by the number of logits and the power of 2 of the features; none where not all forms run."""
    if plain_only or masked:
        return None
    features = query.shape[-1]
    logits = query.numel() // max(features, 1) * key.shape[-2]
    return query.device, query.dtype, True, size_class(logits), ((features - 1).bit_length(),)


OP = Op(
    "scaled_dot_product_attention",
    {
        **_kernel_implementations(),
        "chunked": Implementation(
            unsupported_reason=_unsupported_with_mask,
            not_preferred_reason=_chunked_not_preferred,
            note="plain PyTorch in blocks of rows, with O(N) memory",
        ),
    },
    classify=_classify,
    variant=("features",),
)
