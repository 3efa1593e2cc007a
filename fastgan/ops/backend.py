"""Which implementation of an op runs, and why.

Every op has a plain PyTorch form, its reference and its fallback. Kernels register here beside it.
"""

from __future__ import annotations

OPS = (
    "scaled_dot_product_attention",
    "pixel_norm",
    "minibatch_stddev",
    "upsample_conv2d",
    "conv2d_downsample",
    "avg_pool2d",
    "interpolate_nearest",
    "gradient_penalty",
    "wasserstein_divergence",
    "zero_centered_penalty",
)


def backends(op: str) -> dict[str, str]:
    """What can run `op`: backend name -> reason, the one that would run first.

    Raises:
        ValueError: `op` is no op of this package.
    """
    if op not in OPS:
        raise ValueError(f"op: was {op!r}; it may be one of {', '.join(OPS)}")
    return {"torch": "the reference in PyTorch; no kernel exists for this op yet"}
