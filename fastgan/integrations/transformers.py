"""`attn_implementation="fastgan"` for models of Hugging Face's transformers: import this module once.

    import fastgan.integrations.transformers
    model = AutoModel.from_config(config, attn_implementation="fastgan")
    model.set_attn_implementation("fastgan")        # or: a model that is there

First and second derivatives of attention without a mask then need no N x M arrays. Every model that accepts
`attn_implementation="sdpa"` accepts it. Otherwise it is torch's attention: the same masks, layouts and results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fastgan import ops

NAME = "fastgan"

# What changes the result of attention, and neither this form nor torch's function has.
_UNSUPPORTED = ("softcap", "s_aux", "head_mask")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: the layer; its `is_causal` holds where the argument is None.
        query: [N, H, L, d].
        key, value: [N, G, M, d], where G divides H.
        attention_mask: broadcasts to [N, H, L, M]; bool, True where a query may attend to a key, or added to logits.
        dropout: probability of dropping an attention weight.
        scaling: factor of the logits; None: 1 / sqrt(d).
        is_causal: query i attends to the keys 0 .. i, where there is no mask.
        position_bias: added to the logits besides the mask.
        rest: what other implementations take.

    Returns:
        [N, L, H, d], and None in place of the attention weights.

    Raises:
        ValueError: the model needs what this attention does not have: capped logits, sinks, or its weights.
    """
    for name in _UNSUPPORTED:
        if rest.get(name) is not None:
            raise ValueError(f"attn_implementation={NAME!r} does not support {name}; use 'eager'")
    if rest.get("output_attentions"):
        raise ValueError(f"attn_implementation={NAME!r} does not compute attention weights; use 'eager'")
    length = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # A mask has causality in it; a single query is the last one, and sees all keys.
    causal = bool(causal) and attention_mask is None and length > 1
    if position_bias is not None:
        attention_mask, causal = _with_bias(position_bias, attention_mask, causal, length, key.shape[2]), False
    grouped = query.shape[1] != key.shape[1]
    output = ops.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, causal, scaling, enable_gqa=grouped
    )
    return output.transpose(1, 2).contiguous(), None


def _with_bias(bias: Tensor, mask: Tensor | None, causal: bool, length: int, keys: int) -> Tensor:
    """`bias`, and -inf where `mask` or causality hides a key."""
    if causal:
        mask = torch.ones(length, keys, dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


AttentionInterface.register(NAME, attention)
# Without a mask function transformers passes None for every mask: padding would be attended to, silently.
AttentionMaskInterface.register(NAME, sdpa_mask)
