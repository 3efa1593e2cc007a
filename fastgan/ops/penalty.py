"""Penalties on the gradient of a critic with respect to its input.

The gradient of a penalty mean_n f(|g_n|), g_n = dD/dx_n, with respect to the weights can be computed in two ways.
`reverse` differentiates the graph of the gradient. `tangent` holds the cotangent v_n = d penalty / d g_n constant and
differentiates the sum over n of D'(x_n; v_n), the directional derivative of the critic in forward mode, which has the
same gradient: everything in it is first order, at the price of one more forward pass. docs/penalties.md has the costs
and measurements of both.

A `critic` is any callable of x that returns one score for each sample, [N] or [N, 1]; of several scores, [N, ...], the
sum is penalized. A conditional critic is a lambda that closes over its labels. The papers define the penalties for
critics whose score of one sample does not depend on other samples. Batch norm breaks that, and so does minibatch
standard deviation, which the progressive-growing paper accepts.

The gradient, its norm and the penalty are in float32 at least, whatever the precision of the critic: squares of
half-precision gradients overflow and underflow, a source of NaN in mixed-precision training with a penalty. The
gradient itself passes through the critic in the critic's precision: under float16 a `scale`, the power of two that also
multiplies the loss, keeps it in range, and is divided out in float32 before the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from fastgan.ops.arguments import require_floating, require_number
from fastgan.ops.autograd import with_zeros, without_autocast
from fastgan.ops.dispatch.backend import Op

for _name in ("gradient_penalty", "wasserstein_divergence", "zero_centered_penalty"):
    Op(_name)

Critic = Callable[[Tensor], Tensor]
METHODS = ("reverse", "tangent")


def _at_least_float32(gradient: Tensor) -> Tensor:
    return gradient.float() if gradient.dtype in (torch.float16, torch.bfloat16) else gradient


def _flat(gradient: Tensor) -> Tensor:
    return _at_least_float32(gradient.flatten(1))


def _penalty(
    critic: Critic,
    x: Tensor,
    of_gradient: Callable[[Tensor], Tensor],
    method: str,
    zeros: Iterable[Tensor],
    scale: Tensor | float | None,
) -> Tensor:
    """`of_gradient` applied to d(sum of scores)/dx as [N, features], float32 at least."""
    if method not in METHODS:
        raise ValueError(f"method must be {' or '.join(METHODS)}, got {method!r}")
    if not torch.is_grad_enabled():
        raise RuntimeError("a penalty needs gradients: call it outside torch.no_grad")
    x = x.detach().requires_grad_(True)
    reverse = method == "reverse"
    scores = _sum_of_scores(critic(x), x)
    (gradient,) = torch.autograd.grad(scores if scale is None else scores * scale, x, create_graph=reverse)
    if scale is not None:
        gradient = _at_least_float32(gradient) / scale
    if reverse:
        return with_zeros(of_gradient(_flat(gradient)), zeros)
    gradient = gradient.detach().requires_grad_(True)
    value = of_gradient(_flat(gradient))
    (direction,) = torch.autograd.grad(value, gradient)
    if scale is not None:
        direction = (direction * scale).to(x.dtype)
    with forward_ad.dual_level():
        scores = critic(forward_ad.make_dual(x.detach(), direction))
        tangent = forward_ad.unpack_dual(scores).tangent
    value = value.detach()
    if tangent is None:
        raise RuntimeError("critic: a layer lost the forward-mode derivative; method='reverse' needs none")
    _reject_norms(scores)
    slope = tangent.sum(dtype=value.dtype)
    if scale is not None:
        slope = slope / scale
    return with_zeros(value + (slope - slope.detach()), zeros)


def _sum_of_scores(scores: Any, x: Tensor) -> Tensor:
    """Sum of the scores: one for each sample, or several, as from a critic of patches."""
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"critic must return a floating-point tensor, [N] or [N, 1], got {got}")
    if scores.ndim == 0 or scores.shape[0] != x.shape[0]:
        # A mean over the batch would divide each sample's gradient by N.
        n = x.shape[0]
        raise ValueError(f"critic must return [{n}] or [{n}, 1], one score for each sample, got {tuple(scores.shape)}")
    return scores.float().sum()


# PyTorch's forward-mode rules of these take the mean and the deviation, which depend on the weights, for constants: the
# gradient of the weights through them is wrong.
_CONSTANT_STATISTICS = {
    "NativeLayerNormBackward0": "layer norm",
    "NativeBatchNormBackward0": "batch norm or instance norm",
    "CudnnBatchNormBackward0": "batch norm or instance norm",
    "MiopenBatchNormBackward0": "batch norm or instance norm",
}


def _reject_norms(scores: Tensor) -> None:
    """Raise if layer norm, or batch norm in training, is in the graph of these scores."""
    seen, stack = set(), [scores.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        norm = _CONSTANT_STATISTICS.get(type(node).__name__)
        if norm is not None and getattr(node, "_saved_training", True):
            raise RuntimeError(
                f"critic: the forward-mode derivative of {norm} in PyTorch has a wrong gradient; use method='reverse'"
            )
        stack.extend(function for function, _ in node.next_functions)


class _Norm(Function):
    """Euclidean norm over features, [N, features] -> [N]. Where the norm is 0, its derivative is 0."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(gradient, dim=1)
        ctx.save_for_backward(gradient, norm)
        return norm

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        gradient, norm = ctx.saved_tensors
        # Both branches stay finite: 0 / 0 at norm 0 would be NaN in this derivative or in the next.
        zero = norm == 0
        return gradient * torch.where(zero, 0.0, cotangent / torch.where(zero, 1.0, norm))[:, None]


def _norm(gradient: Tensor) -> Tensor:
    return _Norm.apply(gradient)


def _interpolates(real: Tensor, fake: Tensor, weight: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if real.shape != fake.shape:
        raise ValueError(f"fake must be {tuple(real.shape)}, as real, got shape {tuple(fake.shape)}")
    require_floating("real", real)
    if real.ndim < 2:
        raise ValueError(f"real must be [N, ...] with at least two dimensions, got shape {tuple(real.shape)}")
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
        raise ValueError(f"weight must have {real.shape[0]} elements, one for each sample, got {weight.numel()}")
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
    zeros: Iterable[Tensor] = (),
    scale: Tensor | float | None = None,
) -> Tensor:
    """Mean over samples of (|grad critic(x)| - target)^2 at random interpolates x (Gulrajani et al. 2017, eq. 3).

    Args:
        critic: returns scores [N] or [N, 1] of x; called once by `reverse`, twice by `tangent`.
        real: [N, ...]; no gradient flows into it.
        fake: as `real`.
        target: the norm that is not penalized.
        generator: draws the interpolation weights, one uniform number for each sample.
        weight: [N], the interpolation weights (0 is real, 1 is fake); None draws them.
        method: "reverse", differentiable to any order that the critic is, or "tangent", differentiable once.
        zeros: parameters, such as `critic.parameters()`, that get zeros and not None where the penalty does not depend
            on them. A penalty with a backward pass of its own needs it under DistributedDataParallel, and wherever the
            optimizer is to treat those parameters as it does in plain PyTorch.
        scale: of the inner gradient on its way through a critic in float16, a scalar; None: 1. The penalty does not
            depend on it, but for overflow and underflow.

    Returns:
        Scalar, float32 at least, without a coefficient. Where the gradient is exactly 0, its norm has derivative 0. The
        critic's last bias, and every bias that only piecewise linear layers follow, gets None from it and not zeros:
        `autograd.grad` needs `allow_unused=True`, and `backward` the argument `zeros` where zeros are expected.

    Raises:
        TypeError: a dtype that is not floating-point, or dtypes that differ.
        ValueError: `fake`, `weight` or the scores do not fit `real`, or an unknown method.
        RuntimeError: under no_grad; or with `tangent`, for a layer of the critic without a forward-mode derivative or,
            as layer norm and batch norm in training, with one whose gradient is wrong.
    """

    def of_gradient(gradient: Tensor) -> Tensor:
        return (_norm(gradient) - target).square().mean()

    return _penalty(critic, _interpolates(real, fake, weight, generator), of_gradient, method, zeros, scale)


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
    zeros: Iterable[Tensor] = (),
    scale: Tensor | float | None = None,
) -> Tensor:
    """k times the mean over samples of |grad critic(x)|^p (Wu et al. 2018, "Wasserstein divergence for GANs", eq. 6).

    x is sampled uniformly on the straight lines between paired real and fake samples, as in the paper's experiments.
    The other arguments, the reduction and the derivative at gradient 0 are as in `gradient_penalty`. Biases get None
    from it, not zeros, unless they are in `zeros`.
    """

    def of_gradient(gradient: Tensor) -> Tensor:
        if p == 2:
            return k * gradient.square().sum(dim=1).mean()
        return k * _norm(gradient).pow(p).mean()

    return _penalty(critic, _interpolates(real, fake, weight, generator), of_gradient, method, zeros, scale)


def zero_centered_penalty(
    critic: Critic,
    x: Tensor,
    *,
    method: str = "reverse",
    zeros: Iterable[Tensor] = (),
    scale: Tensor | float | None = None,
    sigma: float = 0.01,
    direction: Tensor | None = None,
    scores: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean over samples of |grad critic(x)|^2: R1 on real samples, R2 on fake ones (Mescheder et al. 2018, eq. 9).

    The paper multiplies it by gamma / 2. Differentiable where the gradient is 0. `method`, `zeros` and `scale`: as in
    `gradient_penalty`; biases get None from it, not zeros, unless they are in `zeros`.

    There is one more method, "finite-difference", which is of first order: the mean of ((critic(x + sigma u) -
    critic(x)) / sigma)^2 over one random direction u for each sample (Lin et al. 2025, "Diffusion adversarial
    post-training for one-step video generation", section 3, divided by sigma^2). Over directions of covariance 1 its
    mean is the penalty, up to terms of order sigma; over normal ones the standard deviation of one sample's term is
    1.4 times its mean. The critic must compute the same in two calls: spectral norm, batch norm and dropout in training
    do not. docs/penalties.md compares costs and results.

    Args:
        critic, method, zeros, scale: see above; "finite-difference" takes no `scale`.
        x: [N, ...]; no gradient flows into it.
        sigma: length of the step, in units of x. A critic is evaluated in float32 for it, without autocast: rounding of
            the scores is divided by sigma.
        direction: u, as x; None: drawn from a standard normal distribution.
        scores: critic(x), if it has been computed already; with its graph. None: the critic is called for it.
        generator: draws the directions.

    Raises:
        ValueError: `direction` or `scores` do not fit x; an unknown method; a `sigma` that is not above 0.
        TypeError: scores in half precision, with "finite-difference".
    """
    require_floating("x", x)
    if method == "finite-difference":
        penalty = _finite_difference(critic, x.detach(), sigma, direction, scores, generator)
        return with_zeros(penalty, zeros)
    if method not in METHODS:
        raise ValueError(f"method must be {', '.join(METHODS)} or finite-difference, got {method!r}")
    return _penalty(critic, x, lambda gradient: gradient.square().sum(dim=1).mean(), method, zeros, scale)


def _finite_difference(
    critic: Critic,
    x: Tensor,
    sigma: float,
    direction: Tensor | None,
    scores: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    if not require_number("sigma", sigma) > 0:
        raise ValueError(f"sigma must be above 0, got {sigma}")
    if direction is None:
        direction = torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=generator)
    elif direction.shape != x.shape:
        raise ValueError(f"direction must be {tuple(x.shape)}, as x, got shape {tuple(direction.shape)}")
    with without_autocast(x):
        before = _score_of_each(critic(x) if scores is None else scores, x)
        after = _score_of_each(critic(x + sigma * direction.to(x.dtype)), x)
    return ((after - before) / sigma).square().mean()


def _score_of_each(scores: Any, x: Tensor) -> Tensor:
    """[N], the sum of a sample's scores."""
    _sum_of_scores(scores, x)  # raises
    if scores.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(f"critic must return float32 or float64 scores for finite differences, got {scores.dtype}")
    return scores.flatten(1).sum(dim=1) if scores.ndim > 1 else scores
