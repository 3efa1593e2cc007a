"""`convert` of timm's vision transformers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from second_order import by_math, penalty_gradients

timm = pytest.importorskip("timm", reason="needs the extra: pip install fastgan[integrations]")

from timm.layers.attention import Attention
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

import fastgan.nn


def vit(**options: Any) -> VisionTransformer:
    return VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=1, **options)


def swin() -> SwinTransformer:
    """Its attention calls torch.nn.functional by its whole name, with a mask that has a gradient."""
    sizes = {"img_size": 16, "patch_size": 2, "embed_dim": 8, "depths": (2,), "num_heads": (2,), "window_size": 4}
    return SwinTransformer(**sizes, num_classes=1)


X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LARGER = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [vit, lambda: vit(qk_norm=True), swin], ids=["vit", "normalized", "swin"])
def test_equals_the_math_form(make: Any) -> None:
    model = make().double().eval()  # without random depth
    x = LARGER if isinstance(model, SwinTransformer) else X
    plain, shown = by_math(model, model, x), repr(model)
    done = fastgan.nn.convert(model)
    assert done.replaced["Attention"] + done.replaced["WindowAttention"] == 2 and repr(model) == shown
    torch.testing.assert_close(penalty_gradients(model, model, x), plain, rtol=1e-8, atol=1e-9)
    assert "Attention" not in fastgan.nn.convert(model).replaced
    fastgan.nn.revert(model)
    assert not any(hasattr(type(module), "_fastgan_original") for module in model.modules())
    torch.testing.assert_close(by_math(model, model, x), plain, rtol=0, atol=0)


def test_pickle_deepcopy_and_state_dict() -> None:
    model = vit().double()
    names = list(model.state_dict())
    fastgan.nn.convert(model)
    assert list(model.state_dict()) == names
    expected = penalty_gradients(model, model, X)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied.blocks[0].attn) is type(model.blocks[0].attn) is not Attention
        torch.testing.assert_close(penalty_gradients(copied, copied, X), expected, rtol=0, atol=0)


class Own(Attention):
    """Of a user, whose forward may do anything."""


def test_a_subclass_of_timms_attention_is_left() -> None:
    model = torch.nn.Sequential(Own(16, 2))
    fastgan.nn.convert(model)
    assert type(model[0]) is Own
