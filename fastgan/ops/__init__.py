"""Operations of generative adversarial networks. They need torch alone, not the rest of the package."""

from fastgan.ops import qualification as _qualification
from fastgan.ops.activation import abs, hardtanh, leaky_relu, prelu, relu, relu6, threshold
from fastgan.ops.affine_grid_sample import affine_grid_sample
from fastgan.ops.attention import scaled_dot_product_attention
from fastgan.ops.avg_pool2d import avg_pool2d, interpolate, interpolate_nearest
from fastgan.ops.bias_act import bias_act
from fastgan.ops.bias_act_pixel_norm import bias_act_pixel_norm
from fastgan.ops.conv import conv2d, conv_transpose2d, linear
from fastgan.ops.dispatch.backend import backends, use_backend
from fastgan.ops.minibatch_stddev import minibatch_stddev
from fastgan.ops.norms import group_norm, instance_norm, layer_norm
from fastgan.ops.padding import pad
from fastgan.ops.penalty import gradient_penalty, wasserstein_divergence, zero_centered_penalty
from fastgan.ops.pixel_norm import pixel_norm
from fastgan.ops.pooling import adaptive_avg_pool2d, adaptive_max_pool2d, max_pool2d
from fastgan.ops.resample import blur, upfirdn2d
from fastgan.ops.scaled_conv import conv2d_downsample, upsample_conv2d

_qualification.configure(enabled=True)

__all__ = [
    "abs",
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "affine_grid_sample",
    "avg_pool2d",
    "backends",
    "bias_act",
    "bias_act_pixel_norm",
    "blur",
    "conv2d",
    "conv2d_downsample",
    "conv_transpose2d",
    "gradient_penalty",
    "group_norm",
    "hardtanh",
    "instance_norm",
    "interpolate",
    "interpolate_nearest",
    "layer_norm",
    "leaky_relu",
    "linear",
    "max_pool2d",
    "minibatch_stddev",
    "pad",
    "pixel_norm",
    "prelu",
    "relu",
    "relu6",
    "scaled_dot_product_attention",
    "threshold",
    "upfirdn2d",
    "upsample_conv2d",
    "use_backend",
    "wasserstein_divergence",
    "zero_centered_penalty",
]
