"""Convolution-sized products of a penalty with its weight gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from kernelcases import random
from torch import Tensor

from fastgan import models, ops
from fastgan.nn import EqualizedConv2d
from fastgan.ops import gradient_penalty, use_backend

Products = Callable[[Callable[[], object]], int]


def count_of_penalty(
    products: Products,
    critic: Callable[[Tensor], Tensor],
    weights: list[Tensor],
    x: Tensor,
) -> dict[str, int]:
    """Convolution-sized products of one penalty with its weight gradients, by how it is computed."""

    def run(method: str) -> None:
        value = gradient_penalty(critic, x, x, weight=torch.zeros(len(x)), method=method)
        torch.autograd.grad(value, weights, allow_unused=True)

    found = {method: products(lambda method=method: run(method)) for method in ("reverse", "tangent")}
    with use_backend("torch"):
        found["plain"] = products(lambda: run("reverse"))
    return found


def test_products_of_a_piecewise_linear_critic(products: Products) -> None:
    """Eight layers: four products each, where plain PyTorch takes six but for the first input."""
    widths = [3, *[4] * 8]
    weights = [random(o, i, 3, 3).float().requires_grad_() for i, o in itertools.pairwise(widths)]
    last = random(1, 4).float().requires_grad_()
    biases = [torch.zeros(4).requires_grad_() for _ in weights]

    def critic(x: Tensor) -> Tensor:
        for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
            x = ops.bias_act(ops.conv2d(x, w, None, padding=1), b, "lrelu" if i else "relu")
            x = ops.avg_pool2d(x) if i % 2 else x
        return ops.linear(x.mean((2, 3)), last)

    found = count_of_penalty(products, critic, [*weights, *biases, last], torch.randn(2, 3, 16, 16))
    # The tangent pass takes forward, input gradient, forward again, tangent, input gradient and weight gradient,
    # without the last input gradient at the images.
    assert found == {"reverse": 32, "tangent": 47, "plain": 47}


def test_products_with_a_layer_that_curves(products: Products) -> None:
    """Six before minibatch standard deviation, less one at the images; four behind it."""
    before = [random(4, 4, 3, 3, seed=i).float().requires_grad_() for i in range(3)]
    behind = [random(4, 5 if i == 0 else 4, 3, 3, seed=i).float().requires_grad_() for i in range(2)]
    last = random(1, 4).float().requires_grad_()

    def critic(x: Tensor) -> Tensor:
        for w in before:
            x = ops.bias_act(ops.conv2d(x, w, padding=1), None, "lrelu")
        x = ops.minibatch_stddev(x, 2)
        for w in behind:
            x = ops.bias_act(ops.conv2d(x, w, padding=1), None, "lrelu")
        return ops.linear(x.mean((2, 3)), last)

    found = count_of_penalty(products, critic, [*before, *behind, last], torch.randn(4, 4, 8, 8))
    assert found["reverse"] == 6 * 3 - 1 + 4 * 2
    assert found["plain"] == 6 * 5 - 1


@pytest.mark.parametrize("model", ["dcgan", "pggan", "sagan"])
def test_products_of_the_critics_of_this_package(model: str, products: Products) -> None:
    """No layer undoes the saving: dcgan's critic needs the minimum, the others more for their nonlinear layers."""
    torch.manual_seed(0)
    _, critic = models.build(
        model, resolution=16, channels=3, latent=4, width=8, max_width=8, norm_d="none", fmap_base=32, fmap_max=8
    )
    convolutions = sum(isinstance(m, torch.nn.Conv2d | EqualizedConv2d) for m in critic.modules())
    convolutions -= 2 if model == "pggan" else 0  # fromRGB of the levels below
    weights = [p for p in critic.parameters() if p.requires_grad]
    found = count_of_penalty(products, critic, weights, torch.randn(4, 3, 16, 16))
    if model == "dcgan":
        # The last layer's gradient does not depend on what is behind it: there is no cotangent to send on.
        assert found["reverse"] == 4 * convolutions - 1
    elif model == "pggan":
        assert found["reverse"] == 6 * (convolutions - 1) - 1 + 4
    assert found["reverse"] < found["plain"]
