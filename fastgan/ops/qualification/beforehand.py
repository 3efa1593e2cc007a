"""The calls that `fastgan doctor --qualify` measures before a run meets them: each op at sizes that networks have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastgan.ops import qualification
from fastgan.ops.bias_act import ACTS
from fastgan.ops.conv_products import Geometry
from fastgan.ops.dispatch.backend import OPS
from fastgan.ops.qualification.cases import MEASURED_OPS

# [N, C, H, W] of layers with 16 to 512 channels at 4 to 256 px: every class of sizes, and of pairs of channels.
SHAPES = [
    *((4, 16, 4, 4), (4, 16, 8, 8), (16, 16, 8, 8), (16, 64, 8, 8), (16, 512, 4, 4), (16, 32, 16, 16)),
    *((16, 64, 16, 16), (16, 512, 8, 8), (16, 32, 32, 32), (16, 64, 32, 32), (16, 256, 16, 16), (16, 512, 16, 16)),
    *((16, 256, 32, 32), (16, 128, 64, 64), (16, 64, 128, 128), (16, 16, 256, 256)),
]
# [B, H, N, d]: self-attention over 8, 16, 32 and 64 px.
QUERIES = [(16, 1, 64, 32), (16, 1, 256, 32), (16, 1, 1024, 32), (16, 1, 4096, 32)]

Call = tuple[str, tuple[Tensor | None, ...], dict[str, Any]]


def devices() -> list[torch.device]:
    """What is measured: the CPU, and the first GPU of each kind."""
    found = [torch.device("cpu")]
    kinds = set()
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        kind = torch.cuda.get_device_name(i)
        if kind not in kinds:
            found.append(torch.device("cuda", i))
        kinds.add(kind)
    return found


def dtypes(device: torch.device) -> list[torch.dtype]:
    """Those that training computes in."""
    if device.type == "cpu":
        return [torch.float32, torch.bfloat16]
    return [torch.float32, torch.bfloat16, torch.float16]


def calls(device: torch.device, dtype: torch.dtype) -> Iterator[Call]:
    """Op, tensors and options of each call, as `Op.choose` gets them; one of each class."""
    seen = set()
    for name, inputs, options in _all_calls(device, dtype):
        op = OPS[name]
        key = op.class_of(*inputs, **options)
        assert key is not None
        label = qualification.label_of(op, key)
        if label not in seen:
            seen.add(label)
            yield name, inputs, options


def _all_calls(device: torch.device, dtype: torch.dtype) -> Iterator[Call]:
    def empty(*shape: int, last: bool = False) -> Tensor:
        layout = torch.channels_last if last else torch.contiguous_format
        return torch.empty(shape, dtype=dtype, device=device, memory_format=layout)

    acts = [{"act": ACTS.index(act), "negative_slope": 0.2, "gain": 1.0} for act in ("lrelu", "relu")]
    same = Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    for name in MEASURED_OPS:
        if name == "scaled_dot_product_attention":
            for shape in QUERIES:
                yield name, (empty(*shape),) * 3, {"plain_only": False}
            continue
        for shape in SHAPES:
            channels = shape[1]
            for last in (True, False):
                x = empty(*shape, last=last)
                if name in ("pixel_norm", "affine_grid_sample"):
                    yield name, (x,), {}
                elif name == "layer_norm":
                    yield name, (x,), {"shape": shape[1:]}
                elif name == "minibatch_stddev":
                    yield name, (x,), {"eps": 1e-8}
                elif name in ("group_norm", "instance_norm"):
                    yield name, (x, empty(channels)), {"groups": min(channels, 8)} if name == "group_norm" else {}
                elif name == "avg_pool2d":
                    yield name, (x,), {"kernel_size": 2}
                elif name in ("bias_act", "bias_act_pixel_norm"):
                    for options in acts[: 2 if name == "bias_act" else 1]:
                        yield name, (x, empty(channels)), options
                elif name == "conv2d":
                    yield name, (x, empty(channels, channels, 3, 3)), {"geometry": same}
                elif name == "conv_transpose2d":
                    strided = Geometry((2, 2), (1, 1), (1, 1), True, (0, 0), 1)
                    yield name, (x, empty(channels, channels, 4, 4)), {"geometry": strided}
                else:
                    options = {"act": ACTS.index("linear"), "negative_slope": 0.2, "gain": 1.0}
                    yield name, (x, empty(channels, channels, 3, 3), empty(channels)), options
