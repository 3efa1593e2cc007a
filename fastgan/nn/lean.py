"""`torch.nn`'s layers over `fastgan.ops`: the same parameters, arguments, state and results, lean second derivatives.

`fastgan.nn.convert` gives the layers of an existing model these classes. Each has the name and adds no attribute.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastgan import functional as F
from fastgan.nn.other_packages import over_lean_functions


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` over `ops.conv2d`, for critics with a gradient penalty; padding in every mode is lean too."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class ConvTranspose2d(nn.ConvTranspose2d):
    forward = over_lean_functions(nn.ConvTranspose2d.forward)


class Linear(nn.Linear):
    """In reverse mode PyTorch's own; in forward mode, as of a penalty by `tangent`, it sends no zeros backward."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class ReLU(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(input, self.inplace)


class LeakyReLU(nn.LeakyReLU):
    def forward(self, input: Tensor) -> Tensor:
        return F.leaky_relu(input, self.negative_slope, self.inplace)


class Hardtanh(nn.Hardtanh):
    def forward(self, input: Tensor) -> Tensor:
        return F.hardtanh(input, self.min_val, self.max_val, self.inplace)


class ReLU6(nn.ReLU6):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu6(input, self.inplace)


class Threshold(nn.Threshold):
    def forward(self, input: Tensor) -> Tensor:
        return F.threshold(input, self.threshold, self.value, self.inplace)


class PReLU(nn.PReLU):
    def forward(self, input: Tensor) -> Tensor:
        return F.prelu(input, self.weight)


class AvgPool2d(nn.AvgPool2d):
    def forward(self, input: Tensor) -> Tensor:
        options = (self.stride, self.padding, self.ceil_mode, self.count_include_pad, self.divisor_override)
        return F.avg_pool2d(input, self.kernel_size, *options)


class MaxPool2d(nn.MaxPool2d):
    def forward(self, input: Tensor) -> Any:
        options = (self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices)
        return F.max_pool2d(input, self.kernel_size, *options)


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveMaxPool2d(nn.AdaptiveMaxPool2d):
    def forward(self, input: Tensor) -> Any:
        return F.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class _Reflection(nn.Module):
    padding: Any

    def forward(self, input: Tensor) -> Tensor:
        return F.pad(input, self.padding, "reflect")


class _Replication(nn.Module):
    padding: Any

    def forward(self, input: Tensor) -> Tensor:
        return F.pad(input, self.padding, "replicate")


class ReflectionPad1d(_Reflection, nn.ReflectionPad1d):
    pass


class ReflectionPad2d(_Reflection, nn.ReflectionPad2d):
    pass


class ReflectionPad3d(_Reflection, nn.ReflectionPad3d):
    pass


class ReplicationPad1d(_Replication, nn.ReplicationPad1d):
    pass


class ReplicationPad2d(_Replication, nn.ReplicationPad2d):
    pass


class ReplicationPad3d(_Replication, nn.ReplicationPad3d):
    pass


class Upsample(nn.Upsample):
    def forward(self, input: Tensor) -> Tensor:
        recompute = self.recompute_scale_factor
        return F.interpolate(input, self.size, self.scale_factor, self.mode, self.align_corners, recompute)


class LayerNorm(nn.LayerNorm):
    forward = over_lean_functions(nn.LayerNorm.forward)


class GroupNorm(nn.GroupNorm):
    forward = over_lean_functions(nn.GroupNorm.forward)


class InstanceNorm1d(nn.InstanceNorm1d):
    _apply_instance_norm = over_lean_functions(nn.InstanceNorm1d._apply_instance_norm)


class InstanceNorm2d(nn.InstanceNorm2d):
    _apply_instance_norm = over_lean_functions(nn.InstanceNorm2d._apply_instance_norm)


class InstanceNorm3d(nn.InstanceNorm3d):
    _apply_instance_norm = over_lean_functions(nn.InstanceNorm3d._apply_instance_norm)


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` over `ops.scaled_dot_product_attention`: `need_weights=False` has a fused form."""

    forward = over_lean_functions(nn.MultiheadAttention.forward)


# torch's class -> the one of this file.
LEAN: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, kind.__name__): kind
    for kind in (
        Conv2d,
        ConvTranspose2d,
        Linear,
        ReLU,
        LeakyReLU,
        Hardtanh,
        ReLU6,
        Threshold,
        PReLU,
        AvgPool2d,
        MaxPool2d,
        AdaptiveAvgPool2d,
        AdaptiveMaxPool2d,
        ReflectionPad1d,
        ReflectionPad2d,
        ReflectionPad3d,
        ReplicationPad1d,
        ReplicationPad2d,
        ReplicationPad3d,
        Upsample,
        LayerNorm,
        GroupNorm,
        InstanceNorm1d,
        InstanceNorm2d,
        InstanceNorm3d,
        MultiheadAttention,
    )
}
