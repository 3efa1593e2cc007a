"""attn_implementation="fastgan" against torch's math form, to second order, on tiny models made from a config."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from second_order import by_math, penalty_gradients
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs the extra: pip install fastgan[integrations]")

import fastgan.integrations.transformers as integration

SIZES = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LENGTH = 7
LEFT = torch.ones(3, LENGTH, dtype=torch.long)
LEFT[0, :3] = LEFT[1, :1] = 0
RIGHT = LEFT.flip(1)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)
    return transformers.LlamaModel(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        **SIZES, num_attention_heads=2, hidden_dropout_prob=0, attention_probs_dropout_prob=0
    )
    return transformers.BertModel(config, add_pooling_layer=False)


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["full", "left", "right"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_equals_the_math_form(make: Callable[[], Any], mask: Tensor | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = make().to(dtype).train()
    embeds = torch.randn(3, LENGTH, 16, dtype=dtype)
    shown = torch.ones(3, LENGTH, 1, dtype=dtype) if mask is None else mask[..., None].to(dtype)

    def run(x: Tensor) -> Tensor:
        return model(inputs_embeds=x, attention_mask=mask).last_hidden_state * shown

    model.set_attn_implementation("fastgan")
    ours = penalty_gradients(model, run, embeds)
    model.set_attn_implementation("sdpa")
    plain = by_math(model, run, embeds)
    if dtype == torch.float64:
        torch.testing.assert_close(ours, plain, rtol=1e-8, atol=1e-9)
        return
    exact_model = make().double()
    exact_model.load_state_dict(model.double().state_dict())
    model = exact_model.train()
    exact = by_math(model, lambda x: run(x), embeds.double())
    for found, other, right in zip(ours, plain, exact, strict=True):
        error, limit = ((t.double() - right).norm() / right.norm().clamp_min(1e-3) for t in (found, other))
        assert error <= 2 * limit + 2e-2


def test_padding_has_no_part_in_the_result() -> None:
    model = llama().double()
    model.set_attn_implementation("fastgan")
    tokens = torch.randint(31, (3, LENGTH))
    first = model(tokens, attention_mask=LEFT).last_hidden_state
    second = model(tokens.where(LEFT.bool(), 5), attention_mask=LEFT).last_hidden_state
    torch.testing.assert_close(first[LEFT.bool()], second[LEFT.bool()], rtol=0, atol=0)
    alone = model(tokens[:1, 3:], position_ids=torch.arange(3, LENGTH)[None]).last_hidden_state
    torch.testing.assert_close(first[:1, 3:], alone, rtol=1e-6, atol=1e-6)


def test_generation_with_a_cache_gives_the_tokens_of_torchs_attention() -> None:
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(3, 31, (3, LENGTH))
    found = []
    for name in ("fastgan", "sdpa"):
        model.set_attn_implementation(name)
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        found.append(model.generate(tokens, attention_mask=LEFT, **options))
    assert torch.equal(*found)


def test_a_model_saved_and_loaded(tmp_path: Any) -> None:
    model = llama()
    model.set_attn_implementation("fastgan")
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaModel.from_pretrained(tmp_path, attn_implementation="fastgan")
    tokens = torch.randint(31, (2, LENGTH))
    torch.testing.assert_close(loaded(tokens).last_hidden_state, model(tokens).last_hidden_state)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [None, torch.bool, torch.float64])
def test_position_bias(causal: bool, kind: torch.dtype | None) -> None:
    q, k, v = (torch.randn(2, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    hidden = torch.zeros(5, 5, dtype=torch.bool)
    mask = None
    if kind is not None:
        hidden[:, 3] = True
        mask = ~hidden if kind == torch.bool else torch.zeros(5, 5, dtype=kind).masked_fill(hidden, -torch.inf)
    elif causal:
        hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    found, _ = integration.attention(SimpleNamespace(is_causal=causal), q, k, v, mask, position_bias=bias, scaling=0.3)
    logits = (0.3 * q @ k.mT + bias).masked_fill(hidden, -torch.inf)
    torch.testing.assert_close(found, (logits.softmax(-1) @ v).transpose(1, 2))


@pytest.mark.parametrize("option", [{"softcap": 3.0}, {"s_aux": torch.zeros(2)}, {"output_attentions": True}])
def test_what_it_does_not_have_is_refused(option: dict[str, Any]) -> None:
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="use 'eager'"):
        integration.attention(nn.Identity(), x, x, x, None, **option)
