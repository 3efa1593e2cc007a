"""`fastgan.functional` has every name of `torch.nn.functional`, the lean ones with torch's arguments."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import fx

import fastgan.functional as L
from fastgan import ops


def test_every_name_of_torch_is_there() -> None:
    names = {name for name in dir(F) if not name.startswith("_")}
    assert names <= set(dir(L)) and names == set(L.__all__)
    for name in names - set(L.LEAN):
        assert getattr(L, name) is getattr(F, name), name
    for name in L.LEAN:
        assert getattr(L, name) is not getattr(F, name), name
    with pytest.raises(AttributeError, match=r"module 'fastgan\.functional' has no attribute 'nothing'"):
        _ = L.nothing


# Built-in functions of torch, without a signature that Python can read.
SIGNATURES = {
    "conv2d": "input, weight, bias, stride, padding, dilation, groups",
    "conv_transpose2d": "input, weight, bias, stride, padding, output_padding, groups, dilation",
    "avg_pool2d": "input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override",
    "linear": "input, weight, bias",
    "prelu": "input, weight",
    "scaled_dot_product_attention": "query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa",
    "max_pool2d": "input, kernel_size, stride, padding, dilation, ceil_mode, return_indices",
    "adaptive_max_pool2d": "input, output_size, return_indices",
    "relu_": "input",
    "leaky_relu_": "input, negative_slope",
    "hardtanh_": "input, min_val, max_val",
    "threshold_": "input, threshold, value",
}


@pytest.mark.parametrize("name", L.LEAN)
def test_lean_functions_take_torchs_arguments(name: str) -> None:
    ours = [p for p in inspect.signature(getattr(L, name)).parameters.values() if p.name != "backend"]
    if name in SIGNATURES:
        assert [p.name for p in ours] == SIGNATURES[name].split(", ")
        return
    theirs = list(inspect.signature(getattr(F, name)).parameters.values())
    assert [p.name for p in ours] == [p.name for p in theirs]
    assert [p.default for p in ours] == [p.default for p in theirs]


@pytest.mark.parametrize("name", ["relu_", "leaky_relu_", "hardtanh_"])
def test_in_place_functions(name: str) -> None:
    x = torch.randn(3, 4)
    leaf = torch.ones((), requires_grad=True)
    found, expected = x * leaf, x * leaf
    assert getattr(L, name)(found) is found
    getattr(F, name)(expected)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), leaf), torch.autograd.grad(expected.sum(), leaf))
    assert torch.equal(L.threshold_(x.clone(), 0.5, 2.0), F.threshold(x, 0.5, 2.0))


def test_upsample_and_attention() -> None:
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(L.upsample(x, scale_factor=2), F.interpolate(x, scale_factor=2))
    assert (
        L.multi_head_attention_forward.__globals__["scaled_dot_product_attention"] is ops.scaled_dot_product_attention
    )


def test_a_symbolic_trace_has_one_node_for_each_call() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return L.relu_(L.avg_pool2d(L.gelu(L.leaky_relu(x, 0.1)), 2))

    traced = fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called == [ops.leaky_relu, F.gelu, ops.avg_pool2d, ops.relu]
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(traced(x), model(x))
