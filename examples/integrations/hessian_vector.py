"""The largest eigenvalue of a language model's Hessian, by power iteration of Hessian-vector products.

The batch has sentences of different lengths, padded on the left. Llama's attention is causal, and its keys are shared
by groups of queries.

pip install transformers
python examples/integrations/hessian_vector.py
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LENGTH = 32


def product(model: LlamaForCausalLM, batch: dict[str, Tensor], vector: list[Tensor]) -> list[Tensor]:
    """The Hessian of the loss times `vector`."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(model(**batch).loss, parameters, create_graph=True)
    slope = torch.stack([(g * v).sum() for g, v in zip(gradients, vector, strict=True)]).sum()
    return list(torch.autograd.grad(slope, parameters))


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, attn_implementation="fastgan"))
    tokens = torch.randint(64, (4, LENGTH))
    shown = (torch.arange(LENGTH) >= torch.tensor([0, 5, 12, 20])[:, None]).long()
    batch = {"input_ids": tokens, "attention_mask": shown, "labels": tokens.where(shown.bool(), -100)}
    vector = [torch.randn_like(p) for p in model.parameters()]
    for step in range(5):
        norm = torch.stack([v.square().sum() for v in vector]).sum().sqrt()
        vector = product(model, batch, [v / norm for v in vector])
        print(f"step {step}: |H v| = {torch.stack([v.square().sum() for v in vector]).sum().sqrt().item():.3f}")


if __name__ == "__main__":
    main()
