"""The private names of torch that this package uses: why, and what happens where torch no longer has them.

`fastgan.ops`, `nn`, `objectives` and `models` use no other private name of torch (tests/ops/test_torch_private.py), but
for those of `fastgan.utils.torch_modes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastgan.ops.dispatch import torch_functions as F
from fastgan.utils.torch_modes import dispatch_modes as dispatch_modes
from fastgan.utils.torch_modes import private as _private

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _interpolate(mode: str, **options: bool) -> Callable[..., Tensor]:
    """`F.interpolate` with the arguments of the function that it calls; the scales are the last."""
    return lambda x, *rest: F.interpolate(x, scale_factor=rest[-1], mode=mode, **options)


# What F.interpolate calls, without its Python checks, which take most of the time of a small call.
# Missing: F.interpolate itself.
upsample_nearest2d: Callable[..., Tensor] = _private("_C._nn.upsample_nearest2d") or _interpolate("nearest")
upsample_bilinear2d: Callable[..., Tensor] = _private("_C._nn.upsample_bilinear2d") or _interpolate(
    "bilinear", align_corners=False
)

# Whether the running backward pass computes the gradient of a node (see `autograd.needs_gradient`). torch.autograd has
# no public function for it. Missing: every gradient that could be needed is computed.
will_execute_node: Callable[[Any], bool] | None = _private("_C._will_engine_execute_node")

# Whether the dispatcher has a kernel ("fastgan::NAME", "CPU" or "CUDA"). No public function tells.
# Missing: a library that is loaded counts as complete.
dispatcher_has_kernel: Callable[[str, str], bool] = _private("_C._dispatch_has_kernel_for_dispatch_key") or (
    lambda name, key: True
)

_top_hooks = _private("_C._autograd._top_saved_tensors_default_hooks")


def saved_tensors_are_hooked() -> bool:
    """Whether the call is inside `torch.autograd.graph.saved_tensors_hooks`, as under a checkpoint that recomputes.

    No public function tells. Missing: every call counts as such, which costs small inputs some microseconds.
    """
    return _top_hooks is None or _top_hooks(True) is not None


# Not -1 in a backward pass, on whichever thread it runs. Missing: a backward pass on a thread of autograd's own does
# not see `use_backend`, and nothing is measured but by `fastgan doctor --qualify`.
current_backward: Callable[[], int] | None = _private("_C._current_graph_task_id")

# The gradient of leaky ReLU, without the checks of an OpOverload, an eighth of its time for a small tensor.
# Missing: the OpOverload.
leaky_relu_backward: Callable[..., Tensor] = (
    _private("ops.aten.leaky_relu_backward.default._op") or torch.ops.aten.leaky_relu_backward.default
)

# The gradient of adaptive average pooling, which the public function does not give. Missing: that op is torch's own.
adaptive_avg_pool2d_backward: Any = _private("ops.aten._adaptive_avg_pool2d_backward")

# A tensor with the memory of another until one of the two is changed, which then gets memory of its own.
# Missing: a result that the backward needs cannot be changed in place before it.
lazy_clone: Callable[[Tensor], Tensor] | None = _private("_lazy_clone")

_foreach_clamp_min_ = _private("_foreach_clamp_min_")
_foreach_clamp_max_ = _private("_foreach_clamp_max_")


def clamp_all_(tensors: Sequence[Tensor], low: float, high: float) -> None:
    """Clamp tensors in place, with a few kernels for all of them. Missing: one kernel for each tensor."""
    if _foreach_clamp_min_ is None or _foreach_clamp_max_ is None:
        for tensor in tensors:
            tensor.clamp_(low, high)
    else:
        _foreach_clamp_min_(tensors, low)
        _foreach_clamp_max_(tensors, high)


_foreach_norm = _private("_foreach_norm")
_foreach_div = _private("_foreach_div")
_foreach_copy_ = _private("_foreach_copy_")


def unit_vectors(vectors: Sequence[Tensor], eps: float) -> list[Tensor]:
    """Vectors divided by their length, or by eps where that is larger. Missing: some kernels for each vector."""
    if _foreach_norm is None or _foreach_clamp_min_ is None or _foreach_div is None:
        return [F.normalize(v, dim=0, eps=eps) for v in vectors]
    lengths = _foreach_norm(vectors)
    _foreach_clamp_min_(lengths, eps)
    return list(_foreach_div(vectors, lengths))


def copy_all_(to: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values to tensors, in one call. Missing: a call for each tensor."""
    if _foreach_copy_ is None:
        for tensor, value in zip(to, values, strict=True):
            tensor.copy_(value)
    else:
        _foreach_copy_(to, values)


# The module that `torch.nn.utils.parametrizations.spectral_norm` makes. Missing: `fastgan.nn.convert` leaves it.
SpectralNorm: Any = _private("nn.utils.parametrizations._SpectralNorm")


def in_forward_mode() -> bool:
    """Whether the call is inside `torch.autograd.forward_ad.dual_level`.

    No public function tells. Missing: the answer is False, and autograd Functions without a `jvp` raise there.
    """
    return getattr(forward_ad, "_current_level", -1) >= 0


def constant_when_compiled(function: _Function) -> _Function:
    """Let torch.compile call `function` once and take its result for a constant.

    As `torch.compiler.assume_constant_result`, which would import the compiler. Missing: torch.compile traces it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Whether oneDNN multiplies float16 on this CPU. torch tells nothing public of it. Missing: it does not.
multiplies_float16: Callable[[], bool] = _private("ops.mkldnn._is_mkldnn_fp16_supported") or (lambda: False)
