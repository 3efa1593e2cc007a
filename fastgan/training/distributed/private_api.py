"""All private or undocumented names of torch and DeepSpeed that this package's distributed training uses."""

from __future__ import annotations

import contextlib
import datetime
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgan.utils.timers import Stopwatch


def set_group_timeout(group: Any, seconds: float) -> None:
    """Limit every later collective of `group` (None: of all ranks) to `seconds`."""
    limit = datetime.timedelta(seconds=seconds)
    if hasattr(dist, "set_timeout"):
        dist.set_timeout(limit, group)
    else:
        # `_set_pg_timeout`: torch before 2.15 has no public function for it.
        dist.distributed_c10d._set_pg_timeout(limit, group)


def disable_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory collective, which it does on a CPU when the ranks meet."""
    # `__compatible_ops__`: the only switch. Compiling takes 10 to 40 s and needs ninja and a compiler.
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False


@contextlib.contextmanager
def scalars_are_broadcast() -> Iterator[None]:
    """Let engines be built of networks that have parameters without dimensions, as SAGAN's gamma."""
    # `_broadcast_model`: it views every parameter as bytes, which torch refuses for one without dimensions.
    from deepspeed.runtime.engine import DeepSpeedEngine

    original = DeepSpeedEngine._broadcast_model

    def broadcast(engine: Any) -> None:
        scalars = [p for p in engine.module.parameters() if p.dim() == 0]
        for p in scalars:
            p.data = p.data.view(1)
        try:
            original(engine)
        finally:
            for p in scalars:
                p.data = p.data.view(())

    DeepSpeedEngine._broadcast_model = broadcast
    try:
        yield
    finally:
        DeepSpeedEngine._broadcast_model = original


def knows_compute_grad_norm() -> bool:
    """Whether this DeepSpeed can be told not to compute the norm of all gradients in each ZeRO step."""
    # `DeepSpeedZeroConfig`: an older one refuses a key that it does not know.
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return "compute_grad_norm" in DeepSpeedZeroConfig.model_fields


def zero_partition(optimizer: Any, parameter: nn.Parameter) -> tuple[Tensor, int, int, int] | None:
    """Where this rank's ZeRO 1 or 2 partition holds a parameter.

    Args:
        optimizer: DeepSpeed's ZeRO optimizer.
        parameter: one of its parameters.

    Returns:
        (flat float32 tensor, start in it, offset in the flattened parameter, number of elements), or None if another
        rank holds the parameter.
    """
    # `_hp_mapping`: DeepSpeed's public utilities give whole tensors by collectives, not what a rank holds.
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None
    inside, held = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
    holder = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    return holder, held.start, inside.start, inside.numel


def time_collectives(engine: Any, waiting: Stopwatch) -> None:
    """Run `waiting` during the collectives of DeepSpeed that the step waits for.

    Args:
        engine: a DeepSpeed engine that reduces gradients itself.
        waiting: takes the place of the stopwatch of an earlier engine, if there was one.
    """
    # `comm.cdb`: DeepSpeed's one communication backend; it has no hook around its collectives.
    from deepspeed.comm import comm

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            # With `overlap_comm` collectives run on a stream of their own, and the step does not wait for them.
            if torch.cuda.is_initialized() and torch.cuda.current_stream() != torch.cuda.default_stream():
                return function(*args, **kwargs)
            with comm.cdb.fastgan_waiting():
                return function(*args, **kwargs)

        return call

    if not hasattr(comm.cdb, "fastgan_waiting"):
        for name in ("all_reduce", "reduce", "all_gather", "all_gather_into_tensor"):
            setattr(comm.cdb, name, timed(getattr(comm.cdb, name)))
    comm.cdb.fastgan_waiting = waiting
    # `allreduce_gradients`: the reduction at the end of a backward, copies into its buckets included.
    engine.allreduce_gradients = timed(engine.allreduce_gradients)
