"""Second derivatives of other packages' transformers: fastgan's attention beside torch's math form, time and memory.

    pip install -e ".[integrations]"
    pytest benchmarks/training/bench_integrations.py --benchmark-only

The math form is the only one of torch with a second derivative, and what users are told to take. Models have two layers
of two heads of 64 features, and are made from a config; nothing is downloaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgan.nn
from benchmarks.side_by_side import compare
from fastgan import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, HEADS, DEPTH = 128, 2, 2
Case = tuple[nn.Module, nn.Module, Callable[[nn.Module], Tensor]]


def vit_critic(tokens: int, dtype: torch.dtype) -> Case:
    """A gradient penalty on timm's vision transformer, converted; 4 pixels a token."""
    timm = pytest.importorskip("timm.models.vision_transformer", reason="pip install timm")
    side = 2 * round(tokens**0.5)
    sizes = {"img_size": side, "patch_size": 2, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    plain = timm.VisionTransformer(**sizes, num_classes=1, class_token=False, global_pool="avg").to(DEVICE, dtype)
    lean = copy.deepcopy(plain)
    fastgan.nn.convert(lean)
    real = torch.randn(2, 3, side, side).to(DEVICE, dtype)
    weight = torch.tensor([0.3, 0.6], device=DEVICE, dtype=dtype)
    return plain, lean, lambda critic: ops.gradient_penalty(critic, real, real.flip(0), weight=weight)


def language_model(tokens: int, dtype: torch.dtype) -> Case:
    """The squared gradient of a loss in the embeddings of a Llama model, with padded sentences and grouped queries."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    import fastgan.integrations.transformers as integration

    sizes = {"vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": DEPTH}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=HEADS, num_key_value_heads=1)
    plain = transformers.LlamaModel(config).to(DEVICE, dtype)
    lean = copy.deepcopy(plain)
    plain.set_attn_implementation("sdpa")
    lean.set_attn_implementation(integration.NAME)
    embeds = torch.randn(2, tokens, WIDTH).to(DEVICE, dtype)
    direction = torch.randn(WIDTH).to(DEVICE, dtype)
    shown = (torch.arange(tokens) >= torch.tensor([0, tokens // 4])[:, None]).long().to(DEVICE)

    def penalty(model: nn.Module) -> Tensor:
        x = embeds.clone().requires_grad_()
        scores = model(inputs_embeds=x, attention_mask=shown).last_hidden_state @ direction
        (slope,) = torch.autograd.grad((scores * shown).sum(), x, create_graph=True)
        return slope.square().mean()

    return plain, lean, penalty


def diffusion_transformer(tokens: int, dtype: torch.dtype) -> Case:
    """R1 through diffusers' diffusion transformer."""
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers")
    from fastgan.integrations import diffusers as integration

    side = 2 * round(tokens**0.5)
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS, "in_channels": 4, "num_layers": DEPTH}
    rest = {"sample_size": side, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_num_groups": 4}
    plain = diffusers.DiTTransformer2DModel(**sizes, **rest).eval().to(DEVICE, dtype)
    lean = copy.deepcopy(plain)
    integration.convert(lean)
    fastgan.nn.convert(lean)
    x = torch.randn(2, 4, side, side).to(DEVICE, dtype)
    time, labels = torch.zeros(2, dtype=torch.long, device=DEVICE), torch.tensor([1, 2], device=DEVICE)

    def penalty(model: nn.Module) -> Tensor:
        def critic(x: Tensor) -> Tensor:
            return model(x, timestep=time, class_labels=labels).sample.flatten(1).square().mean(1)

        return ops.zero_centered_penalty(critic, x)

    return plain, lean, penalty


CASES = {"ViT critic": vit_critic, "language model": language_model, "diffusion transformer": diffusion_transformer}
TOKENS = (1024, 4096)


def second_order(model: nn.Module, penalty: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    """The penalty, and its gradient for all weights in one vector."""
    value = penalty(model)
    weights = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, weights, allow_unused=True)
    return [value.detach(), torch.cat([g.flatten() for g in found if g is not None and g.ndim > 1])]


def by_math(model: nn.Module, penalty: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    with sdpa_kernel(SDPBackend.MATH):
        return second_order(model, penalty)


def sides(name: str, tokens: int) -> tuple[dict[str, Callable[[], Any]], list[Tensor]]:
    """Both sides in float32, and the result in float64."""
    torch.manual_seed(0)
    plain, lean, penalty = CASES[name](tokens, torch.float32)
    torch.manual_seed(0)
    _, exact, wide = CASES[name](tokens, torch.float64)
    return {
        "fastgan": lambda: second_order(lean, penalty),
        "math": lambda: by_math(plain, penalty),
    }, second_order(exact, wide)


@pytest.mark.benchmark(group="a penalty and its weight gradients")
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", CASES)
def test_second_order(benchmark: Any, name: str, tokens: int) -> None:
    by_name, exact = sides(name, tokens)
    compare(benchmark, f"{name}, {tokens} tokens", by_name, expected=exact, baseline="math", floor=1e-3, rounds=5)
