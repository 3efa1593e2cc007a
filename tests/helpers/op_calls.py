"""One call of every op on images, for tests that do the same with all of them: a new op is a line here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastgan import ops

Call = Callable[[Tensor], Tensor]

generator = torch.Generator().manual_seed(1)
W = torch.randn(3, 3, 3, 3, dtype=torch.float64, generator=generator) * 0.3
BIAS = torch.randn(3, dtype=torch.float64, generator=generator)
ROWS = torch.randn(2, 4, dtype=torch.float64, generator=generator)
ANGLE = torch.tensor([[0.9, -0.3, 0.1], [0.2, 1.1, -0.1]], dtype=torch.float64)


def _turned(x: Tensor) -> Tensor:
    return ops.affine_grid_sample(x, ANGLE.to(torch.promote_types(x.dtype, torch.float32)).expand(x.shape[0], 2, 3))


# Name -> a call on x [N, 3, H, W]; sides of at least 4, divisible by 4, in any floating-point dtype. A name begins with
# that of the function in `fastgan.ops`.
CALLS: dict[str, Call] = {
    "bias_act": lambda x: ops.bias_act(x, BIAS.to(x.dtype)),
    "bias_act relu": lambda x: ops.bias_act(x, BIAS.to(x.dtype), "relu", gain=2.0),
    "bias_act silu": lambda x: ops.bias_act(x, None, "silu"),
    "bias_act tanh": lambda x: ops.bias_act(x, None, "tanh"),
    "pixel_norm": lambda x: ops.pixel_norm(x, 1e-4),
    "bias_act_pixel_norm": lambda x: ops.bias_act_pixel_norm(x, BIAS.to(x.dtype)),
    "minibatch_stddev": lambda x: ops.minibatch_stddev(x, 2),
    "conv2d": lambda x: ops.conv2d(x, W.to(x.dtype), padding=1),
    "conv2d groups": lambda x: ops.conv2d(x, W[:, :1].to(x.dtype), padding=1, groups=3),
    "conv_transpose2d": lambda x: ops.conv_transpose2d(x, W.to(x.dtype), stride=2),
    "linear": lambda x: ops.linear(x[..., :4], ROWS.to(x.dtype)),
    "scaled_dot_product_attention": lambda x: ops.scaled_dot_product_attention(x, x.cos(), x),
    "scaled_dot_product_attention causal": lambda x: ops.scaled_dot_product_attention(x, x, x.sin(), is_causal=True),
    "layer_norm": lambda x: ops.layer_norm(x, (x.shape[-1],)),
    "group_norm": lambda x: ops.group_norm(x, 3, BIAS.to(x.dtype)),
    "instance_norm": lambda x: ops.instance_norm(x),
    "avg_pool2d": lambda x: ops.avg_pool2d(x, 2),
    "avg_pool2d overlapping": lambda x: ops.avg_pool2d(x, 3, 1, 1),
    "upsample_conv2d": lambda x: ops.upsample_conv2d(x, W.to(x.dtype)),
    "conv2d_downsample": lambda x: ops.conv2d_downsample(x, W.to(x.dtype)),
    "affine_grid_sample": _turned,
    "relu": lambda x: ops.relu(x),
    "relu in place": lambda x: ops.relu(x * 1.5, inplace=True),
    "leaky_relu": lambda x: ops.leaky_relu(x, 0.3),
    "leaky_relu in place": lambda x: ops.leaky_relu(x * 1.5, 0.2, inplace=True),
    "relu6": lambda x: ops.relu6(x),
    "hardtanh": lambda x: ops.hardtanh(x, 0.0, 0.5),
    "hardtanh in place": lambda x: ops.hardtanh(x * 1.5, inplace=True),
    "threshold": lambda x: ops.threshold(x, 0.1, 0.3),
    "threshold in place": lambda x: ops.threshold(x * 1.5, 0.1, 0.3, True),
    "abs": lambda x: ops.abs(x),
    "prelu": lambda x: ops.prelu(x, BIAS.to(x.dtype)),
    "pad": lambda x: ops.pad(x, (1, 1, 1, 1), "reflect"),
    "pad replicate": lambda x: ops.pad(x, (1, 1, 1, 1), mode="replicate"),
    "max_pool2d": lambda x: ops.max_pool2d(x, 2, ceil_mode=True),
    "max_pool2d overlapping": lambda x: ops.max_pool2d(x, 3, 1, 1),
    "adaptive_avg_pool2d": lambda x: ops.adaptive_avg_pool2d(x, 3),
    "adaptive_max_pool2d": lambda x: ops.adaptive_max_pool2d(x, 3),
    "interpolate": lambda x: ops.interpolate(x, (3, 3), mode="area"),
    "interpolate_nearest": lambda x: ops.interpolate_nearest(x),
    "upfirdn2d": lambda x: ops.upfirdn2d(x, [1.0, 2.0], up=2, padding=1),
    "blur": lambda x: ops.blur(x),
}
