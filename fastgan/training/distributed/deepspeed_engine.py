"""The engine of DeepSpeed with ZeRO 0, 1 or 2, and its configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgan.errors import ArgumentError
from fastgan.training.distributed import private_api
from fastgan.training.distributed.engine import (
    BaseEngine,
    Fragment,
    OptimizerFactory,
    collect_optimizer_state,
    trainable_parameters,
)
from fastgan.utils.buckets import BUCKET_BYTES
from fastgan.utils.stored_values import MALFORMED
from fastgan.utils.timers import Stopwatch

# Keys of a DeepSpeed file that change how gradients are reduced. With one of them DeepSpeed reduces, under ZeRO 0 too.
_REDUCTION_KEYS = ("communication_data_type", "prescale_gradients", "gradient_predivide_factor", "sparse_gradients")


def uses_own_reducer(config: dict[str, Any]) -> bool:
    """Whether `GradientReducer`, and not DeepSpeed, averages gradients under this DeepSpeed configuration."""
    stage = (config.get("zero_optimization") or {}).get("stage", 0)
    return not stage and not any(key in config for key in _REDUCTION_KEYS)


def without_grad_norm(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with which ZeRO 1 and 2 do not compute a norm of the gradients in each step, where they need none.

    The norm is read by the host, which would wait for the device, and a step in which it is not finite is skipped
    without a word; the trainer's own check stops there. A file that sets it, clips or offloads keeps what it says.
    """
    zero = config.get("zero_optimization") or {}
    needed = config.get("gradient_clipping") or any(zero.get(key) for key in ("offload_optimizer", "zenflow"))
    if zero.get("stage") not in (1, 2) or needed or "compute_grad_norm" in zero:
        return config
    if not private_api.knows_compute_grad_norm():
        return config
    return {**config, "zero_optimization": {**zero, "compute_grad_norm": False}}


class DeepSpeedEngine(BaseEngine):
    """DeepSpeed with ZeRO 0, 1 or 2.

    Call `module`, never DeepSpeed's own forward: its hooks would take the inner gradient of a gradient penalty for a
    backward of the step, and fail.

    Under ZeRO 0 `GradientReducer` averages gradients during the backward; DeepSpeed would send all of them after it.
    Weights then have `memory_format`, and their update is deferred. ZeRO 1 and 2 flatten the weights, which therefore
    stay contiguous, and update them at once.

    Args:
        module: the network.
        optimizer: makes the optimizer of its trainable parameters.
        config: DeepSpeed's configuration (see `deepspeed_config`).
        waiting: runs while this rank waits for others.
        timeout: seconds that DeepSpeed's collectives may take.
        memory_format: memory format of convolution weights under ZeRO 0.
        group: ranks whose gradients are averaged; None: all. Only under ZeRO 0. A rank outside the group keeps the
            engine and calls neither `backward` nor `step`.
        on_update: called after every update of the weights.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerFactory,
        config: dict[str, Any],
        waiting: Stopwatch,
        timeout: float = 600.0,
        memory_format: torch.memory_format = torch.contiguous_format,
        group: Any = None,
        on_update: Callable[[], None] | None = None,
    ) -> None:
        import deepspeed

        with private_api.scalars_are_broadcast():
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer([p for _, p in trainable_parameters(module)]),
                config=without_grad_norm(config),
                dist_init_required=False,
            )
        several, own_reducer = dist.get_world_size() > 1, uses_own_reducer(config)
        if several:
            private_api.set_group_timeout(self._engine.data_parallel_group, timeout)  # torch's default: 30 minutes
        module = self._engine.module
        if own_reducer:
            # After initialize(), which views the weights as bytes and so needs contiguous ones.
            module = module.to(memory_format=memory_format)
        self._partitioned = self._engine.zero_optimization_stage() > 0
        super().__init__(
            module,
            self._engine.optimizer.optimizer if self._partitioned else self._engine.optimizer,
            config["gradient_accumulation_steps"],
            memory_format if own_reducer else torch.contiguous_format,
            on_update,
        )
        if several and own_reducer:
            self._engine.enable_backward_allreduce = False
            self._reduce_gradients(waiting, group)
        elif several:
            private_api.time_collectives(self._engine, waiting)

    def _backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def _update(self, last: bool) -> None:
        self._engine.step()

    def discard_step(self) -> None:
        super().discard_step()
        self._engine.micro_steps -= self._engine.micro_steps % self._accumulation

    def _fragments(self) -> list[Fragment]:
        if not self._partitioned:
            return super()._fragments()
        return [
            Fragment(name, p, *part)
            for name, p in trainable_parameters(self.module)
            if (part := private_api.zero_partition(self._engine.optimizer, p)) is not None
        ]

    def state(self) -> dict[str, Tensor]:
        return collect_optimizer_state(self.module, self._fragments(), self._optimizer, self._partitioned)

    def close(self) -> None:
        super().close()
        self._engine.destroy()


_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# Sections that fastgan's own flags replace.
_REFUSED = {
    "optimizer": "the optimizer is set by --optimizer, --lr-g and --lr-d",
    "scheduler": "learning rates are set by --lr-g, --lr-d and --lr-decay",
    "fp16": "half precision is set by --precision",
    "bf16": "half precision is set by --precision",
    "torch_autocast": "half precision is set by --precision",
}


def deepspeed_config(
    path: str | None, *, zero: int, micro_batch: int, accumulation: int, world: int, overlap: bool = False
) -> dict[str, Any]:
    """DeepSpeed's configuration: defaults, overlaid with the user's file, with the batch sizes of this run.

    Args:
        path: the user's JSON file, if any.
        zero: ZeRO stage of --zero.
        micro_batch: images of a micro-batch on one rank.
        accumulation: micro-batches of an update.
        world: number of ranks.
        overlap: whether ZeRO 1 and 2 reduce gradients during the backward, on a CUDA stream of their own.

    Raises:
        ArgumentError: the file cannot be read, or contradicts fastgan's flags.
    """
    sizes = dict(zip(_SIZES, (micro_batch * accumulation * world, micro_batch, accumulation), strict=True))
    config: dict[str, Any] = {
        # DeepSpeed's defaults send whole buckets to all ranks, 1.5 times the bytes, and allocate two 2 GB buckets in
        # every backward on a GPU. No GAN fills those before the backward ends.
        "zero_optimization": {
            "stage": zero,
            "use_multi_rank_bucket_allreduce": False,
            "overlap_comm": overlap,
            "reduce_bucket_size": BUCKET_BYTES // 4,  # in elements
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        # DeepSpeed's default clips the gradient norm to 1; plain torch does not clip.
        "gradient_clipping": 0.0,
    }
    if path is not None:
        try:
            given = json.loads(Path(path).read_text())
        except (OSError, *MALFORMED) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ArgumentError("--deepspeed-config", path, f"must be a readable JSON file ({reason})") from None
        if not isinstance(given, dict):
            raise ArgumentError("--deepspeed-config", path, "must be a JSON object")
        for key, why in _REFUSED.items():
            section = given.get(key)
            if section and not (isinstance(section, dict) and section.get("enabled") is False):
                raise ArgumentError("--deepspeed-config", path, f"remove its {key!r}: {why}")
        for key, ours in sizes.items():
            if given.get(key, "auto") not in ("auto", ours):
                raise ArgumentError(
                    f"--deepspeed-config: {key}",
                    given[key],
                    f'must be {ours} or "auto"; --batch and --accumulation set it',
                )
        stage = (given.get("zero_optimization") or {}).get("stage", zero)
        if zero not in (0, stage):
            raise ArgumentError("--zero", zero, f"must be {stage}; {path} sets this ZeRO stage")
        if stage == 3:
            raise ArgumentError("--deepspeed-config", path, "its ZeRO stage must be 0, 1 or 2")
        config.update(given)
        config["zero_optimization"] = {**(config["zero_optimization"] or {}), "stage": stage}
    config.update(sizes)
    return config
