"""What owns a network's optimizer: DeepSpeed, or plain torch in one process.

Both keep parameters and optimizer state in float32 and give their state in one form, a tensor for each parameter's
name and quantity, so that a checkpoint does not depend on the engine, the ZeRO stage or the number of ranks.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgan.errors import ArgumentError
from fastgan.training.distributed.gradient_reducer import GradientReducer, reduce_to
from fastgan.training.distributed.process_group import bound
from fastgan.utils.buckets import BUCKET_BYTES
from fastgan.utils.timers import Stopwatch

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Fragment(NamedTuple):
    """Part of a parameter for which this rank holds optimizer state: `holder[start:start + numel]` of the flattened
    tensor that the optimizer knows is `parameter[at:at + numel]` of the flattened parameter `name`."""

    name: str
    parameter: nn.Parameter
    holder: Tensor
    start: int
    at: int
    numel: int


class Engine(Protocol):
    """One network and its optimizer.

    `backward` takes the mean loss of a micro-batch; `step` is called after every micro-batch and moves the weights
    after the last of an accumulation. It may do so later, when `module` is next called or at `wait`: then ranks do
    not wait for each other's gradients before they must. memory_format: of the weights, where it applies to them.
    """

    module: nn.Module
    memory_format: torch.memory_format

    def backward(self, loss: Tensor) -> None: ...

    def step(self) -> None: ...

    def wait(self) -> None:
        """Move the weights now if that is still to be done; before they are read by anything but `module` itself."""
        ...

    def set_rate(self, rate: float) -> None:
        """Learning rate of the steps to come."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Optimizer state, "parameter/quantity" -> CPU tensor; a collective: every rank calls it."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave, on this engine or another."""
        ...

    def close(self) -> None: ...


def _collect(
    module: nn.Module, fragments: list[Fragment], optimizer: torch.optim.Optimizer, shared: bool
) -> dict[str, Tensor]:
    """Optimizer state by parameter name; `shared` when each rank holds only some fragments.

    Every rank runs the same collectives in the same order, so the quantities are agreed on first.
    """
    quantities: dict[str, bool] = {}
    for fragment in fragments:
        for key in optimizer.state.get(fragment.holder, {}):
            quantities[key] = key != "step"  # the one quantity that is a number and not one for each weight
    if shared:
        gathered: list[dict[str, bool] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, quantities)
        quantities = {key: value for part in gathered if part for key, value in part.items()}
    by_name: dict[str, list[Fragment]] = {}
    for fragment in fragments:
        by_name.setdefault(fragment.name, []).append(fragment)
    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        for key in sorted(quantities):
            flat = torch.zeros(parameter.numel() if quantities[key] else 1, device=parameter.device)
            found = torch.zeros(1, device=parameter.device)
            for fragment in by_name.get(name, []):
                value = optimizer.state.get(fragment.holder, {}).get(key)
                if value is None:
                    continue
                found += 1
                if quantities[key]:
                    piece = value.flatten()[fragment.start : fragment.start + fragment.numel]
                    flat[fragment.at : fragment.at + fragment.numel] = piece
                else:
                    flat[0] = value
            if shared:
                dist.all_reduce(flat)
                dist.all_reduce(found)
            if found.item() == 0:
                continue
            if not quantities[key]:
                flat = flat / found  # a step count: every holder has the same
            state[f"{name}/{key}"] = (flat.view_as(parameter) if quantities[key] else flat[0]).clone().cpu()
    return state


def _restore(fragments: list[Fragment], optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, quantity = key.rsplit("/", 1)
        by_name.setdefault(name, {})[quantity] = value
    for fragment in fragments:
        held = optimizer.state[fragment.holder]
        for quantity, value in by_name.get(fragment.name, {}).items():
            if quantity == "step":
                # Fused optimizers keep the count beside the parameter, the others on the host.
                fused = optimizer.param_groups[0].get("fused")
                held[quantity] = value.clone().to(fragment.holder.device if fused else "cpu")
                continue
            if quantity not in held:
                held[quantity] = torch.zeros_like(fragment.holder)
            # Written in the holder's own memory format, not through a flattened copy.
            if fragment.numel == fragment.holder.numel() and fragment.holder.shape == value.shape:
                held[quantity].copy_(value)
            else:
                piece = value.to(fragment.holder.device).flatten()[fragment.at : fragment.at + fragment.numel]
                held[quantity].view(-1)[fragment.start : fragment.start + fragment.numel] = piece


def _trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


class TorchEngine:
    """Plain torch, for one process: what macOS and Windows use, and a laptop that wants no launcher.

    moved: called whenever the weights have moved.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerFactory,
        accumulation: int,
        memory_format: torch.memory_format = torch.contiguous_format,
        moved: Callable[[], None] | None = None,
    ) -> None:
        self.module = module.to(memory_format=memory_format)
        self.memory_format = memory_format
        self._named = _trainable(module)
        self._optimizer = optimizer([p for _, p in self._named])
        self._accumulation = accumulation
        self._moved = moved
        self._micro = 0

    def backward(self, loss: Tensor) -> None:
        (loss / self._accumulation if self._accumulation > 1 else loss).backward()

    def step(self) -> None:
        self._micro += 1
        if self._micro % self._accumulation == 0:
            for _, p in self._named:
                if p.grad is None:
                    # As DeepSpeed does, so that a layer no longer in use ages alike in both engines.
                    p.grad = torch.zeros_like(p)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            if self._moved is not None:
                self._moved()

    def wait(self) -> None: ...

    def set_rate(self, rate: float) -> None:
        _set_rate(self._optimizer, rate)

    def _fragments(self) -> list[Fragment]:
        return [Fragment(name, p, p, 0, 0, p.numel()) for name, p in self._named]

    def state(self) -> dict[str, Tensor]:
        return _collect(self.module, self._fragments(), self._optimizer, shared=False)

    def load_state(self, state: dict[str, Tensor]) -> None:
        _restore(self._fragments(), self._optimizer, state)

    def close(self) -> None:
        pass


# Settings of a user's file that say how gradients are to be reduced: then DeepSpeed does it, under ZeRO 0 too.
_REDUCTION = ("communication_data_type", "prescale_gradients", "gradient_predivide_factor", "sparse_gradients")


def uses_own_reducer(config: dict[str, Any]) -> bool:
    """Whether under this DeepSpeed configuration gradients are averaged by `GradientReducer`, and not by DeepSpeed."""
    stage = (config.get("zero_optimization") or {}).get("stage", 0)
    return not stage and not any(key in config for key in _REDUCTION)


def _reduce(tensor: Tensor, dst: int, op: Any, group: Any, async_op: bool) -> None:
    """`deepspeed.comm`'s `reduce` where that is gloo's, which sends more than it must."""
    assert op.name == "SUM" and not async_op, (op, async_op)  # all that ZeRO asks for
    reduce_to(tensor, dst, group)


def _count_waiting(engine: Any, waiting: Stopwatch) -> None:
    """Let `waiting` run during DeepSpeed's collectives that hold the step up."""
    from deepspeed.comm import comm

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            # With `overlap_comm` a stream of their own has them, and the step does not wait for it.
            if torch.cuda.is_initialized() and torch.cuda.current_stream() != torch.cuda.default_stream():
                return function(*args, **kwargs)
            with comm.cdb.fastgan_waiting():
                return function(*args, **kwargs)

        return call

    if not hasattr(comm.cdb, "fastgan_waiting"):
        if dist.get_backend() == "gloo":
            comm.cdb.reduce = _reduce
        for name in ("all_reduce", "reduce", "all_gather", "all_gather_into_tensor"):
            setattr(comm.cdb, name, counted(getattr(comm.cdb, name)))
    comm.cdb.fastgan_waiting = waiting
    engine.allreduce_gradients = counted(engine.allreduce_gradients)


class DeepSpeedEngine:
    """DeepSpeed with ZeRO 0, 1 or 2.

    The step calls `module` and never the engine's own forward: under a gradient penalty the engine's forward hooks
    would see the inner gradient as a backward of their own and fail.

    Under ZeRO 0 gradients are reduced by `GradientReducer`: DeepSpeed would do so in one piece when the backward is
    over. The weights are then in `memory_format`, and move only when `module` is next called, or at `wait`; ZeRO 1 and
    2 move them at once, flatten them and know no layout but the contiguous one.

    Args:
        waiting: runs while this rank waits for others.
        timeout: seconds that DeepSpeed's collectives may take.
        group: the ranks whose gradients are averaged; None: all. With a group, which only ZeRO 0 can have, a rank that
            is not in it keeps the engine and calls neither `backward` nor `step`.
        moved: called whenever the weights have moved.
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
        moved: Callable[[], None] | None = None,
    ) -> None:
        import deepspeed

        named = _trainable(module)
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer([p for _, p in named]), config=config, dist_init_required=False
        )
        if dist.get_world_size() > 1:
            bound(self._engine.data_parallel_group, timeout)  # made with torch's default, half an hour
        self.module = self._engine.module
        self._stage = self._engine.zero_optimization_stage()
        self._reducer: GradientReducer | None = None
        self._pending = False
        self._moved = moved
        self.memory_format = torch.contiguous_format
        if uses_own_reducer(config):
            # Not before: when it starts, DeepSpeed views the weights as bytes, which only contiguous ones can be.
            self.module.to(memory_format=memory_format)
            self.memory_format = memory_format
        if dist.get_world_size() > 1 and uses_own_reducer(config):
            self._engine.enable_backward_allreduce = False
            if dist.get_rank(group) >= 0:
                self._reducer = GradientReducer(self.module, waiting, group)
                self.module.register_forward_pre_hook(lambda *_: self.wait())
        elif dist.get_world_size() > 1:
            _count_waiting(self._engine, waiting)

    def backward(self, loss: Tensor) -> None:
        last = self._reducer is not None and self._engine.is_gradient_accumulation_boundary()
        if self._reducer is not None and last:
            self._reducer.expect()
        self._engine.backward(loss)
        if self._reducer is not None and last:
            self._reducer.flush()

    def step(self) -> None:
        last = self._engine.is_gradient_accumulation_boundary()
        if self._reducer is not None and last:
            self._pending = True
            return
        self._engine.step()
        if self._moved is not None and last:
            self._moved()

    def wait(self) -> None:
        if not self._pending:
            return
        assert self._reducer is not None
        self._pending = False
        self._reducer.finish()
        self._engine.step()
        if self._moved is not None:
            self._moved()

    def set_rate(self, rate: float) -> None:
        self.wait()  # a step that is still to be done has the rate before
        _set_rate(self._base(), rate)

    def _base(self) -> torch.optim.Optimizer:
        optimizer = self._engine.optimizer
        return optimizer.optimizer if self._stage else optimizer

    def _fragments(self) -> list[Fragment]:
        named = _trainable(self.module)
        if not self._stage:
            return [Fragment(name, p, p, 0, 0, p.numel()) for name, p in named]
        partitions = self._engine.optimizer.single_partition_of_fp32_groups
        fragments = []
        for name, p in named:
            mapping = getattr(p, "_hp_mapping", None)
            if mapping is None:
                continue
            ours, theirs = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            holder = partitions[mapping.param_group_index]
            fragments.append(Fragment(name, p, holder, theirs.start, ours.start, ours.numel))
        return fragments

    def state(self) -> dict[str, Tensor]:
        return _collect(self.module, self._fragments(), self._base(), shared=self._stage > 0)

    def load_state(self, state: dict[str, Tensor]) -> None:
        _restore(self._fragments(), self._base(), state)

    def close(self) -> None:
        self._pending = False
        if self._reducer is not None:
            self._reducer.close()
        self._engine.destroy()


_OURS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
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
    """DeepSpeed's configuration: the user's file, or a sane one, with the sizes of this run.

    overlap: whether ZeRO 1 and 2 reduce gradients during the backward, on a stream of their own.

    Raises:
        ArgumentError: the file cannot be read, or sets what is this package's to set.
    """
    sizes = dict(zip(_OURS, (micro_batch * accumulation * world, micro_batch, accumulation), strict=True))
    config: dict[str, Any] = {
        # By default DeepSpeed sends whole buckets to all ranks, each of which keeps its part: half as much again.
        # Its buckets are buffers of 2 GB each on a GPU, allocated in every backward, which no GAN fills before the end.
        "zero_optimization": {
            "stage": zero,
            "use_multi_rank_bucket_allreduce": False,
            "overlap_comm": overlap,
            "reduce_bucket_size": BUCKET_BYTES // 4,  # in elements
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        # DeepSpeed clips the norm to 1 unless told not to, which would make its result another than plain torch's.
        "gradient_clipping": 0.0,
    }
    if path is not None:
        try:
            given = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ArgumentError("--deepspeed-config", path, f"must be a readable JSON file ({error})") from None
        if not isinstance(given, dict):
            raise ArgumentError("--deepspeed-config", path, "must be a JSON object")
        for key, why in _REFUSED.items():
            section = given.get(key)
            if section and not (isinstance(section, dict) and section.get("enabled") is False):
                raise ArgumentError("--deepspeed-config", path, f"its {key!r} may be left out: {why}")
        for key, ours in sizes.items():
            if given.get(key, "auto") not in ("auto", ours):
                raise ArgumentError(
                    f"--deepspeed-config: {key}",
                    given[key],
                    f"it may be left out, or {ours} as --batch and --accumulation say",
                )
        stage = (given.get("zero_optimization") or {}).get("stage", zero)
        if zero not in (0, stage):
            raise ArgumentError("--zero", zero, f"it may be left out, or {stage} as {path} says")
        if stage == 3:
            raise ArgumentError("--deepspeed-config", path, "its ZeRO stage may be 0, 1 or 2 (see --zero)")
        config.update(given)
    config.update(sizes)
    return config
