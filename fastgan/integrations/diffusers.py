"""Attention processors of Hugging Face's diffusers whose attention can be differentiated twice.

from fastgan.integrations import diffusers as integration
print(integration.convert(model))                       # every processor of a model, of whatever class
attention.set_processor(integration.AttnProcessor())    # or: the default one, by hand
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from fastgan import ops
from fastgan.nn import Conversion
from fastgan.nn.other_packages import ATTENTION, has_a_name, lean_subclass, original_class, over_lean_functions

_dispatch: Any = None
with contextlib.suppress(ImportError):  # before diffusers 0.35 processors call torch's function alone
    from diffusers.models.attention_dispatch import dispatch_attention_fn as _dispatch


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> Tensor:
    """`dispatch_attention_fn` of diffusers; a backend requested for this model, and a parallel one, are diffusers' own.

    query: [N, L, H, d], key and value: [N, M, H, d]; a mask [N, M] is one of keys. Returns [N, L, H, d].
    """
    if backend is not None or parallel_config is not None or attention_kwargs:
        return _dispatch(
            *(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs),
            backend=backend,
            parallel_config=parallel_config,
        )
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    output = ops.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa=enable_gqa
    )
    return output.transpose(1, 2)


_NAMES: dict[str, Callable[..., Any]] = {} if _dispatch is None else {"dispatch_attention_fn": _attention}


@functools.cache
def _lean_processor(kind: type) -> type | None:
    """The class of a processor, with lean attention; None where none of its methods calls one."""
    if original_class(kind) is not None:
        return None
    call = kind.__call__
    if not isinstance(call, FunctionType) or not has_a_name(call, (*ATTENTION, *_NAMES)):
        return None
    return lean_subclass(kind, _lean_processor, {"__call__": over_lean_functions(call, _NAMES)})


AttnProcessor: Any = _lean_processor(AttnProcessor2_0)
"""`AttnProcessor2_0`, the default of `diffusers.models.attention_processor.Attention`, over fastgan's attention."""


def convert(model: nn.Module) -> Conversion:
    """Give every attention processor of a model a class whose attention can be differentiated twice, in place.

    Everything else about the processors stays. `revert` gives their own classes back. Layers are converted by
    `fastgan.nn.convert`.

    Args:
        model: of diffusers; any module whose submodules have a `processor`.

    Returns:
        What was replaced, and processors that were left as they are: those that compute attention in a way of their
        own. Print it.
    """
    return _change(model, _lean_processor)


def revert(model: nn.Module) -> Conversion:
    """Give the processors of a model their own classes back; the inverse of `convert`."""
    return _change(model, original_class)


def _change(model: nn.Module, class_of: Callable[[type], type | None]) -> Conversion:
    done, seen = Conversion(), set[int]()
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if processor is None or id(processor) in seen:
            continue
        seen.add(id(processor))
        kind = class_of(type(processor))
        if kind is not None:
            processor.__class__ = kind
        (done.left if kind is None else done.replaced)[type(processor).__name__] += 1
    return done
