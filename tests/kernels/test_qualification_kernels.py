"""The Triton kernels are qualified as on a GPU: here by the interpreter, where times say nothing."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_offline import running

from fastgan.kernels import bias_act_pixel_norm as kernels
from fastgan.ops.dispatch.backend import OPS, CallClass, Implementation
from fastgan.ops.qualification import measurement
from fastgan.ops.qualification.measurement import Measurement, measure

LRELU = {"act": 2, "negative_slope": 0.2, "gain": 1.5}
X, BIAS = torch.randn(2, 3, 2, 3), torch.randn(3)
W = torch.randn(3, 3, 3, 3)
CALLS: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
    "pixel_norm": ((X,), {}),
    "bias_act": ((X, BIAS), LRELU),
    "bias_act_pixel_norm": ((X, BIAS), LRELU),
    "minibatch_stddev": ((X,), {"eps": 1e-8}),
    "scaled_dot_product_attention": ((X, X, X), {}),
    "upsample_conv2d": ((X, W, BIAS), LRELU),
    "conv2d_downsample": ((X, W, BIAS), LRELU),
}


def qualify(name: str, monkeypatch: pytest.MonkeyPatch) -> Measurement:
    """What the Triton kernels of an op are found to be, on a CPU."""
    op = OPS[name]
    monkeypatch.setitem(op.implementations, "triton", Implementation(note="interpreted"))
    monkeypatch.setattr(measurement, "_times", lambda op, key, cases, names: {})
    monkeypatch.setattr(kernels, "TILE", 16)
    inputs, options = CALLS[name]
    with running("cpu"):
        found = measure(op, CallClass(*op.classify(*inputs, **options)), inputs, options, ["triton", "torch"])
    assert found["torch"].wrong is None
    return found["triton"]


@pytest.mark.parametrize("name", CALLS)
def test_triton_kernels_qualify(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = qualify(name, monkeypatch)
    assert found.wrong is None, found
    assert 0 < found.error < 1e-5


def test_wrong_triton_kernel_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("fastgan.kernels.pixel_norm")
    right = module.pixel_norm_second_backward

    def wrong(*arguments: Any) -> tuple[Tensor, Tensor]:
        gdy, gx = right(*arguments)
        return gdy, gx.roll(1, 0)  # as an index that is wrong by a sample

    monkeypatch.setattr(module, "pixel_norm_second_backward", wrong)
    found = qualify("pixel_norm", monkeypatch)
    assert found.wrong is not None and "in a second derivative, small shape" in found.wrong
