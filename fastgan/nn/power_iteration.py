"""Spectral norm (Miyato et al. 2018, section 2.1), with the power iterations of all layers of a model in one call.

A layer divides its weight by sigma = u^T W v, where u and v are steps of the power iteration, constants to autograd.
With g the gradient of W / sigma,

    dW = (g - <g, W> / sigma u v^T) / sigma

torch computes some fifteen small operations for each layer and call. `fastgan.nn.convert` gives the parametrization and
the hook of torch's two styles the classes of this file, and the model a hook that runs before its forward, where the
steps of all layers take one call. A layer takes what was computed ahead for it if nothing has changed since, and else
makes its own step: the numbers and buffers are torch's, up to rounding, however often a layer is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm as _Hook

from fastgan.ops.autograd import autocast_enabled, form_tag, non_leaf
from fastgan.ops.dispatch import torch_private
from fastgan.ops.dispatch.backend import in_transform, is_recorded
from fastgan.ops.dispatch.torch_private import SpectralNorm as _Parametrization
from fastgan.ops.dispatch.torch_private import copy_all_, dispatch_modes, dispatcher_has_kernel, in_forward_mode
from fastgan.ops.fallthrough import foreign


class Call(NamedTuple):
    """What sigma of a layer is computed from.

    Attributes:
        weight: any shape with at least two dimensions.
        u, v: the layer's buffers.
        dim: of the weight; the rows of the matrix.
        iterations: of the power iteration; none in evaluation.
        u_first: whether a step computes u and then v, as the parametrization does; the hook computes v first.
        eps: least length of a vector that is normalized.
    """

    weight: Tensor
    u: Tensor
    v: Tensor
    dim: int
    iterations: int
    u_first: bool
    eps: float

    def versions(self) -> tuple[int, ...]:
        return self.weight._version, self.u._version, self.v._version

    def kind(self) -> tuple[Any, ...]:
        return self.weight.dtype, self.weight.device, *self[4:]


class Vectors(NamedTuple):
    """New u and v of a layer, and sigma, which belong to no other call."""

    u: Tensor
    v: Tensor
    sigma: Tensor


class _Result(NamedTuple):
    """What was computed ahead for a call."""

    call: Call
    versions: tuple[int, ...]
    vectors: Vectors

    def is_of(self, weight: Tensor, iterations: int) -> bool:
        """Whether a call with this weight has this result: no tensor was changed in place since."""
        same = self.call.weight is weight and self.call.iterations == iterations
        return same and self.versions == self.call.versions() and not in_transform()


def _matrix(weight: Tensor, dim: int) -> Tensor:
    """[size of `dim`, rest]; a view where the memory format allows."""
    return (weight if dim == 0 else weight.movedim(dim, 0)).flatten(1)


@torch.no_grad()
def iterate(calls: Sequence[Call]) -> list[Vectors]:
    """The steps of the power iteration of calls of one kind, and sigma behind them."""
    first = calls[0]
    matrices = [_matrix(it.weight.detach(), it.dim) for it in calls]
    us, vs = [it.u for it in calls], [it.v for it in calls]
    if _has_kernel(first.weight):
        return _by_cpp(matrices, us, vs, first.iterations, first.u_first, first.eps)
    return by_torch(matrices, us, vs, first.iterations, first.u_first, first.eps)


def by_torch(
    matrices: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], iterations: int, u_first: bool, eps: float
) -> list[Vectors]:
    """`iterate` in plain PyTorch: three products for each layer, and one call for the rest."""
    us, vs = list(us), list(vs)
    for step in range(2 * iterations):
        if (step % 2 == 0) == u_first:
            us = torch_private.unit_vectors([w.mv(v) for w, v in zip(matrices, vs, strict=True)], eps)
        else:
            vs = torch_private.unit_vectors([w.t().mv(u) for w, u in zip(matrices, us, strict=True)], eps)
    if not iterations:
        us, vs = [u.clone() for u in us], [v.clone() for v in vs]
    return [Vectors(u, v, u.dot(w.mv(v))) for w, u, v in zip(matrices, us, vs, strict=True)]


def _by_cpp(
    matrices: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], iterations: int, u_first: bool, eps: float
) -> list[Vectors]:
    matrices = [w.contiguous() for w in matrices]
    vectors, sigmas = torch.ops.fastgan.spectral_norm_forward(matrices, us, vs, iterations, u_first, eps)
    parts = vectors.split([size for w in matrices for size in w.shape])
    return [Vectors(*it) for it in zip(parts[::2], parts[1::2], sigmas.unbind(), strict=True)]


@cache
def _no_cpp() -> str | None:
    from fastgan.ops.dispatch import extension

    reason = extension.cpu()
    if reason is None and not dispatcher_has_kernel("fastgan::spectral_norm_forward", "CPU"):
        reason = "the compiled library has no spectral_norm_forward"
    return reason


def _has_kernel(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.is_cpu and _no_cpp() is None


class _Divided(Function):
    """weight / sigma, differentiable to any order in the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(form_tag(), weight, u, v, sigma)
        ctx.dim = dim
        return weight / sigma

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        _, weight, u, v, sigma = ctx.saved_tensors
        none = (None,) * 4
        if torch.is_grad_enabled():
            sigma = u.dot(_matrix(weight, ctx.dim).mv(v))
        elif ctx.dim == 0 and weight.is_contiguous() and _has_kernel(weight):
            return torch.ops.fastgan.spectral_norm_backward(g.contiguous(), weight, u, v, sigma), *none
        rank_one = torch.outer(u, v)
        if ctx.dim:
            sizes = [weight.shape[ctx.dim], *weight.shape[: ctx.dim], *weight.shape[ctx.dim + 1 :]]
            rank_one = rank_one.view(sizes).movedim(0, ctx.dim)
        of_sigma = (g * weight).sum() / sigma
        return (g - of_sigma * rank_one.view_as(weight)) / sigma, *none


def _supports(weight: Any) -> bool:
    """Whether a weight is one of these forms'; else torch's own forward runs."""
    if in_transform() or in_forward_mode() or dispatch_modes() or is_recorded() or foreign(weight):
        return False
    wide = weight.dtype in (torch.float32, torch.float64) and weight.ndim > 1 and weight.numel() > 0
    return wide and not weight.is_inference() and not autocast_enabled(weight)


def _divide(call: Call, vectors: Vectors) -> Tensor:
    """The weight of a layer."""
    if call.iterations:
        with torch.no_grad():
            copy_all_((call.u, call.v), vectors[:2])
    if not torch.is_grad_enabled() or not call.weight.requires_grad:
        return call.weight / vectors.sigma
    return _Divided.apply(non_leaf(call.weight), *vectors, call.dim)


class _SpectralNorm(_Parametrization or nn.Module):  # type: ignore[misc]
    """The parametrization of `torch.nn.utils.parametrizations.spectral_norm`."""

    def call_of(self, weight: Tensor) -> Call | None:
        if not _supports(weight):
            return None
        iterations = self.n_power_iterations if self.training else 0
        return Call(weight, self._u, self._v, self.dim, iterations, True, self.eps)

    def forward(self, weight: Tensor) -> Tensor:
        ahead: _Result | None = self.__dict__.pop("_ahead", None)
        if ahead is not None and ahead.is_of(weight, self.n_power_iterations if self.training else 0):
            return _divide(ahead.call, ahead.vectors)
        call = self.call_of(weight)
        return super().forward(weight) if call is None else _divide(call, iterate([call])[0])


class SpectralNorm(_Hook):
    """The hook of `torch.nn.utils.spectral_norm`."""

    def call_of(self, module: nn.Module, training: bool) -> Call | None:
        weight = getattr(module, f"{self.name}_orig")
        if not _supports(weight):
            return None
        u, v = getattr(module, f"{self.name}_u"), getattr(module, f"{self.name}_v")
        return Call(weight, u, v, self.dim, self.n_power_iterations if training else 0, False, self.eps)

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        ahead: _Result | None = self.__dict__.pop("_ahead", None)
        weight = getattr(module, f"{self.name}_orig")
        if ahead is not None and ahead.is_of(weight, self.n_power_iterations if do_power_iteration else 0):
            return _divide(ahead.call, ahead.vectors)
        call = self.call_of(module, do_power_iteration)
        if call is None:
            return super().compute_weight(module, do_power_iteration)
        return _divide(call, iterate([call])[0])


# torch's class -> the one of this file.
LEAN = {_Hook: SpectralNorm} | ({_Parametrization: _SpectralNorm} if _Parametrization else {})


class Ahead:
    """The forward pre-hook of a model: computes u, v and sigma of all its layers ahead of their calls.

    Args:
        norms: each with what has its weight: the list of parametrizations, or the module with the hook.
    """

    def __init__(self, norms: Sequence[tuple[Any, Any]]) -> None:
        self._norms = norms

    def __call__(self, model: nn.Module, inputs: Any) -> None:
        if in_transform():
            return
        groups: dict[tuple[Any, ...], list[tuple[Any, Call]]] = {}
        for norm, owner in self._norms:
            if isinstance(owner, ParametrizationList):
                call = norm.call_of(owner.original)
            else:
                call = norm.call_of(owner, owner.training)
            if call is not None:
                groups.setdefault(call.kind(), []).append((norm, call))
        for group in groups.values():
            for (norm, call), vectors in zip(group, iterate([call for _, call in group]), strict=True):
                norm.__dict__["_ahead"] = _Result(call, call.versions(), vectors)


def forget(model: nn.Module, inputs: Any, output: Any) -> None:
    """The forward hook of a model: what no layer has taken is gone."""
    if in_transform():
        return
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, Ahead):
            for norm, _ in hook._norms:
                norm.__dict__.pop("_ahead", None)


def norms_of(model: nn.Module) -> list[tuple[Any, Any]]:
    """The norms of this file in a model whose weights they compute from a parameter alone, as `Ahead` takes them."""
    found: list[tuple[Any, Any]] = []
    for module in model.modules():
        if isinstance(module, ParametrizationList) and len(module) == 1 and isinstance(module[0], _SpectralNorm):
            found.append((module[0], module))
        found += [(hook, module) for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
    return found


def hooks_of(module: nn.Module, classes: dict[Any, Any]) -> list[Any]:
    """Spectral norm's hooks of a module that are of one of these classes."""
    hooks: Iterable[Any] = module._forward_pre_hooks.values()
    return [hook for hook in hooks if type(hook) in classes]


def compute_ahead(model: nn.Module) -> None:
    """Let the hooks of a model run, where it has several layers with a norm of this file; they replace earlier ones."""
    leave(model)
    norms = norms_of(model)
    if len(norms) > 1:
        model.register_forward_pre_hook(Ahead(norms))
        model.register_forward_hook(forget)


def leave(model: nn.Module) -> None:
    """Remove the hooks of `compute_ahead` from a model and its submodules."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Ahead) or hook is forget]:
                del hooks[key]
