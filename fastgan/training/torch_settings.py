"""Process-wide settings of torch."""

from __future__ import annotations

import os

import torch

from fastgan.config import Config
from fastgan.ops import qualification


def apply(config: Config) -> None:
    """Threads, denormal numbers, deterministic kernels and the choice of implementations, in the whole process."""
    if config.system.threads is not None:
        torch.set_num_threads(config.system.threads)
    # Squares of vanishing gradients in the optimizers are denormal, and a CPU computes with those 50 times slower. The
    # setting is one of the thread and inherited by the threads it starts, so it must come before any tensor work.
    torch.set_flush_denormal(True)
    if config.system.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    else:
        torch.backends.cudnn.benchmark = True
    qualification.configure(enabled=config.system.qualify)


def allow_tf32(allowed: bool) -> None:
    """Whether float32 products and convolutions on a GPU may use TF32, in torch and in our kernels alike."""
    # The older pair of switches: it moves the newer `fp32_precision` with it, and torch.compile reads the older ones.
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
