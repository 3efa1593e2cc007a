"""Attention processors of diffusers against torch's math form, to second order, on tiny models made from a config."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from second_order import by_math, penalty_gradients
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers", reason="needs the extra: pip install fastgan[integrations]")

from diffusers.models.attention_processor import Attention, AttnProcessor

from fastgan.integrations import diffusers as integration

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}


def dit() -> tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]:
    """Of Peebles and Xie 2023: processors that call torch's function."""
    sizes = {"in_channels": 3, "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 10, "norm_num_groups": 4}
    model = diffusers.DiTTransformer2DModel(**HEADS, **sizes, patch_size=2).double().eval()
    time, labels = torch.zeros(2, dtype=torch.long), torch.tensor([1, 2])
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    return model, lambda x: model(x, timestep=time, class_labels=labels).sample, x


def flux() -> tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]:
    """Joint attention to images and text: processors that call diffusers' dispatcher."""
    sizes = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 12}
    rest = {"pooled_projection_dim": 10, "guidance_embeds": False, "axes_dims_rope": (2, 2, 4)}
    model = diffusers.FluxTransformer2DModel(**HEADS, **sizes, **rest).double().eval()
    text, pooled = torch.randn(2, 3, 12, dtype=torch.float64), torch.randn(2, 10, dtype=torch.float64)
    places = {"img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(3, 3)}
    time = torch.ones(2, dtype=torch.float64)

    def run(x: Tensor) -> Tensor:
        return model(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=time, **places).sample

    return model, run, torch.randn(2, 6, 4, dtype=torch.float64)


@pytest.mark.parametrize("make", [dit, flux])
def test_equals_the_math_form(make: Callable[[], tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]]) -> None:
    model, run, x = make()
    plain = by_math(model, run, x)
    done = integration.convert(model)
    assert done.replaced.total() >= 2 and not done.left
    torch.testing.assert_close(penalty_gradients(model, run, x), plain, rtol=1e-8, atol=1e-9)
    reverted = integration.revert(model)
    assert reverted.replaced == done.replaced
    torch.testing.assert_close(by_math(model, run, x), plain, rtol=0, atol=0)


def test_processors_can_be_copied_and_pickled() -> None:
    model, run, x = dit()
    integration.convert(model)
    expected = penalty_gradients(model, run, x)[:2]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        processor = copied.transformer_blocks[0].attn1.processor
        assert type(processor) is integration.AttnProcessor
        assert torch.equal(copied(x, timestep=torch.zeros(2), class_labels=torch.tensor([1, 2])).sample, expected[0])


@pytest.mark.parametrize("kind", ["none", "keys", "queries"])
def test_cross_attention_with_a_mask(kind: str) -> None:
    layer = Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4).double()
    text = torch.randn(2, 5, 6, dtype=torch.float64)
    mask = {
        "none": None,
        "keys": torch.tensor([[0, 0, 0, -1e4, -1e4], [0] * 5], dtype=torch.float64)[:, None],
        "queries": torch.randn(2, 7, 5, dtype=torch.float64),
    }[kind]

    def run(x: Tensor) -> Tensor:
        return layer(x, encoder_hidden_states=text, attention_mask=mask)

    x = torch.randn(2, 7, 8, dtype=torch.float64)
    plain = by_math(layer, run, x)
    layer.set_processor(integration.AttnProcessor())
    torch.testing.assert_close(penalty_gradients(layer, run, x), plain, rtol=1e-8, atol=1e-9)


def test_a_processor_with_attention_of_its_own_is_left_and_counted() -> None:
    layer = Attention(query_dim=8, heads=2, dim_head=4)
    layer.set_processor(AttnProcessor())
    done = integration.convert(layer)
    assert not done.replaced and done.left == {"AttnProcessor": 1}


def test_a_backend_of_the_model_is_diffusers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, run, x = flux()
    integration.convert(model)
    for processor in model.attn_processors.values():
        processor._attention_backend = "_native_math"  # set_attention_backend would set it for the process too
    called: list[Any] = []
    monkeypatch.setattr(integration.ops, "scaled_dot_product_attention", lambda *a, **k: called.append(1))
    run(x)
    assert not called


def test_the_dispatcher_has_diffusers_layout_and_a_mask_of_keys() -> None:
    q, k, v = (torch.randn(2, 5, 3, 4, dtype=torch.float64) for _ in range(3))
    mask = torch.tensor([[True] * 5, [True, True, False, False, True]])
    found = integration._attention(q, k, v, mask)
    expected = integration._dispatch(q, k, v, mask)
    torch.testing.assert_close(found, expected)
