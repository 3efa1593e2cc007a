"""Penalties on the gradient of a critic with respect to its input.

The weights' gradient of a penalty mean_n f(|g_n|), g_n = dD/dx_n, can be had in two ways. `reverse` differentiates the
gradient's own graph. `tangent` holds the cotangent v_n = d penalty / d g_n constant and differentiates the sum over n
of D'(x_n; v_n), the critic's directional derivative in forward mode, of which that gradient is the same: everything in
it is first order, at the price of one more forward pass. docs/penalties.md has both, counted and measured.

`critic` is any callable of x that gives one score for each sample, [N] or [N, 1] (of several, [N, ...], the sum is
penalised); a conditional critic is a lambda that closes over its labels. Scores of one sample must not depend on
another for the penalties to be what the papers define (batch norm breaks that; minibatch standard deviation does too,
and the progressive-growing paper accepts it).

The gradient, its norm and the penalty are float32 at least, whatever precision the critic computes in: squares of
half-precision gradients overflow and vanish, which is where NaNs in penalised mixed-precision training come from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from fastgan.ops.backend import Op

for _name in ("gradient_penalty", "wasserstein_divergence", "zero_centered_penalty"):
    Op(_name)

Critic = Callable[[Tensor], Tensor]
METHODS = ("reverse", "tangent")


def _flat(gradient: Tensor) -> Tensor:
    gradient = gradient.flatten(1)
    return gradient.float() if gradient.dtype in (torch.float16, torch.bfloat16) else gradient


def _penalty(critic: Critic, x: Tensor, of_gradient: Callable[[Tensor], Tensor], method: str) -> Tensor:
    """`of_gradient` of d(sum of scores)/dx, which it gets as [N, features], float32 at least."""
    if method not in METHODS:
        raise ValueError(f"method must be {' or '.join(METHODS)}, got {method!r}")
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "a penalty is made of derivatives: it may be taken where gradients are on, not under no_grad"
        )
    x = x.detach().requires_grad_(True)
    reverse = method == "reverse"
    (gradient,) = torch.autograd.grad(_sum_of_scores(critic(x), x), x, create_graph=reverse)
    if reverse:
        return of_gradient(_flat(gradient))
    gradient = gradient.detach().requires_grad_(True)
    value = of_gradient(_flat(gradient))
    (direction,) = torch.autograd.grad(value, gradient)
    with forward_ad.dual_level():
        scores = critic(forward_ad.make_dual(x.detach(), direction))
        tangent = forward_ad.unpack_dual(scores).tangent
    value = value.detach()
    if tangent is None:
        raise RuntimeError("critic: has a layer that lost the forward-mode derivative; method='reverse' needs none")
    _refuse_norms(scores)
    slope = tangent.sum(dtype=value.dtype)
    return value + (slope - slope.detach())


def _sum_of_scores(scores: Any, x: Tensor) -> Tensor:
    """One score for each sample, or several that are added up, as a critic of patches gives."""
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        was = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"critic must give a floating tensor, [N] or [N, 1], got {was}")
    if scores.ndim == 0 or scores.shape[0] != x.shape[0]:
        # A mean over the batch would divide each sample's gradient by N.
        raise ValueError(
            f"critic must give [{x.shape[0]}] or [{x.shape[0]}, 1], , got scores of shape {tuple(scores.shape)}"
            "one for each sample"
        )
    return scores.float().sum()


# PyTorch's forward-mode rules of these hold the mean and the deviation, which depend on the weights, for constants, so
# that the weights' gradient through them is another.
_HOLD_STATISTICS = {
    "NativeLayerNormBackward0": "layer norm",
    "NativeBatchNormBackward0": "batch norm or instance norm",
    "CudnnBatchNormBackward0": "batch norm or instance norm",
    "MiopenBatchNormBackward0": "batch norm or instance norm",
}


def _refuse_norms(scores: Tensor) -> None:
    """Raise if a norm of the batch, in training, or of a layer is in the graph of these scores."""
    seen, stack = set(), [scores.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        what = _HOLD_STATISTICS.get(type(node).__name__)
        if what is not None and getattr(node, "_saved_training", True):
            raise RuntimeError(
                f"critic: has {what}, whose forward-mode derivative in PyTorch is not to be differentiated; "
                "method may be 'reverse'"
            )
        stack.extend(function for function, _ in node.next_functions)


class _Norm(Function):
    """Euclidean norm over features: [N, features] -> [N], read once. Its derivative where the norm is 0 is 0."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(gradient, dim=1)
        ctx.save_for_backward(gradient, norm)
        return norm

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        gradient, norm = ctx.saved_tensors
        # 0 / 0 at norm 0 would be NaN in this derivative or in the next, so both branches stay finite.
        zero = norm == 0
        return gradient * torch.where(zero, 0.0, cotangent / torch.where(zero, 1.0, norm))[:, None]


def _norm(gradient: Tensor) -> Tensor:
    return _Norm.apply(gradient)


def _interpolates(real: Tensor, fake: Tensor, weight: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if real.shape != fake.shape:
        raise ValueError(f"fake must be {tuple(real.shape)}, as real, got shape {tuple(fake.shape)}")
    if not real.is_floating_point():
        raise TypeError(f"real must be a floating dtype, got {real.dtype}")
    if real.ndim < 2:
        raise ValueError(f"real must be [N, ...], of two dimensions or more, got shape {tuple(real.shape)}")
    if real.dtype != fake.dtype:
        raise TypeError(f"fake must be {real.dtype}, as real, got {fake.dtype}")
    if real.device != fake.device:
        raise ValueError(f"fake must be on {real.device}, as real, got {fake.device}")
    if weight is None:
        weight = torch.rand(real.shape[0], device=real.device, dtype=real.dtype, generator=generator)
    elif not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor [{real.shape[0]}], got {type(weight).__name__}")
    elif weight.device != real.device:
        raise ValueError(f"weight must be on {real.device}, as real, got {weight.device}")
    elif weight.numel() != real.shape[0]:
        raise ValueError(f"weight must have {real.shape[0]}, one for each sample, got {weight.numel()} elements")
    return torch.lerp(real, fake, weight.to(real.dtype).reshape(-1, *[1] * (real.ndim - 1)))


def gradient_penalty(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    *,
    target: float = 1.0,
    generator: torch.Generator | None = None,
    weight: Tensor | None = None,
    method: str = "reverse",
) -> Tensor:
    """Mean over samples of (|grad critic(x)| - target)^2 at random interpolates x (Gulrajani et al. 2017, eq. 3).

    Args:
        critic: scores [N] or [N, 1] of x; called once by `reverse`, twice by `tangent`.
        real, fake: [N, ...], same shape; no gradient flows into them.
        target: the norm asked for.
        generator: draws the interpolation weights, one uniform number for each sample.
        weight: [N], the interpolation weights themselves (0 is real, 1 is fake) in place of drawing them.
        method: "reverse", differentiable to any order the critic is, or "tangent", once more than the inner gradient.

    Returns:
        Scalar, float32 at least, not multiplied by any coefficient. Where the gradient is exactly 0 its norm has
        derivative 0. The critic's last bias has no gradient from it: `autograd.grad` needs `allow_unused=True`.

    Raises:
        TypeError: `real` is not floating, `fake` has another dtype, or the scores are no floating tensor.
        ValueError: `fake`, `weight` or the scores do not fit `real`, or an unknown method.
        RuntimeError: under no_grad; or with `tangent`, where a layer of the critic has no forward-mode derivative or,
            as layer norm and batch norm in training, one that is not to be differentiated.
    """

    def of_gradient(gradient: Tensor) -> Tensor:
        return (_norm(gradient) - target).square().mean()

    return _penalty(critic, _interpolates(real, fake, weight, generator), of_gradient, method)


def wasserstein_divergence(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    *,
    k: float = 2.0,
    p: float = 6.0,
    generator: torch.Generator | None = None,
    weight: Tensor | None = None,
    method: str = "reverse",
) -> Tensor:
    """k times the mean over samples of |grad critic(x)|^p (Wu et al. 2018, "Wasserstein divergence for GANs", eq. 6).

    x is sampled on the straight lines between paired real and fake samples, uniformly, as in the paper's experiments;
    arguments, reduction and behavior at gradient 0 are those of `gradient_penalty`.
    """

    def of_gradient(gradient: Tensor) -> Tensor:
        if p == 2:
            return k * gradient.square().sum(dim=1).mean()
        return k * _norm(gradient).pow(p).mean()

    return _penalty(critic, _interpolates(real, fake, weight, generator), of_gradient, method)


def zero_centered_penalty(critic: Critic, x: Tensor, *, method: str = "reverse") -> Tensor:
    """Mean over samples of |grad critic(x)|^2: R1 on real samples, R2 on fake ones (Mescheder et al. 2018, eq. 9).

    The paper multiplies by gamma / 2. Differentiable where the gradient is 0. `method` as in `gradient_penalty`.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating dtype, got {x.dtype}")
    return _penalty(critic, x, lambda gradient: gradient.square().sum(dim=1).mean(), method)
