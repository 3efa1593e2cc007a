"""The processes of a run: who this one is, where it computes, and what it says to the others."""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from fastgan.errors import ArgumentError
from fastgan.training.resilience.heartbeat import FAULT, Heartbeat, host, joining

_STORES: list[Any] = []
"""What `start` has met over; rank 0's is the server of the process group's own store too, at the same port."""


@dataclass(frozen=True)
class ProcessGroup:
    """One process among `size`.

    Attributes:
        rank, size: its number, and how many there are.
        device: where it computes.
        engine, reason: deepspeed or torch, and why.
        heartbeat: watches over the others, if there are any.
    """

    rank: int
    size: int
    device: torch.device
    engine: str
    reason: str
    heartbeat: Heartbeat | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def minimum(self, tensor: Tensor) -> Tensor:
        """Elementwise minimum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return tensor

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, a small plain object, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, small plain objects, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def guard(self) -> contextlib.AbstractContextManager[None]:
        """Around a rank's work; see `Heartbeat.guard`."""
        return self.heartbeat.guard() if self.heartbeat is not None else contextlib.nullcontext()

    def done(self) -> None:
        """Say that this rank's work is done; without it, those that are slower to leave take its end for a death."""
        if self.heartbeat is not None:
            self.heartbeat.close()


def launched() -> bool:
    """Whether a launcher that sets RANK and WORLD_SIZE (deepspeed, torchrun) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def deepspeed_missing() -> str | None:
    """Why DeepSpeed cannot be used here, or None."""
    if importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed (pip install 'fastgan[train]')"
    return None


def quiet_deepspeed(device: str) -> None:
    """Import DeepSpeed for `device` (cpu or cuda), without its chatter and without compiling anything at start.

    On a CPU `init_distributed` would build a shared-memory collective with ninja and a compiler, 10 to 40 seconds of
    silence before the first step, and fail where either is missing; gloo does its work.
    """
    os.environ["DS_ACCELERATOR"] = device
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    import logging

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed imports this when it starts an engine; imported after the processes have met, its functions' defaults
    # would hold the process group until the interpreter ends (see `stop`).
    importlib.import_module("torch.distributed.nn")
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    __compatible_ops__["deepspeed_shm_comm"] = False
    assert deepspeed


def _pick_engine(asked: str, needed: str | None) -> tuple[str, str]:
    missing = deepspeed_missing()
    if asked == "auto":
        if needed:
            asked, reason = "deepspeed", needed
        elif launched():
            asked, reason = "deepspeed", "started by a launcher"
        else:
            return "torch", "one process without a launcher"
    else:
        reason = "--engine"
    if asked == "deepspeed" and missing:
        if reason == "started by a launcher" and int(os.environ["WORLD_SIZE"]) == 1:
            return "torch", missing
        raise ArgumentError("--engine", asked, f"{missing}; one process alone may use torch")
    return asked, reason


def bound(group: Any, timeout: float) -> None:
    """Let no collective of `group` (None: of all ranks) wait longer than `timeout` seconds."""
    limit = datetime.timedelta(seconds=timeout)
    if hasattr(dist, "set_timeout"):  # torch 2.15; before, the same function under another name
        dist.set_timeout(limit, group)
    else:
        dist.distributed_c10d._set_pg_timeout(limit, group)


def start(
    engine: str,
    device: str,
    *,
    zero: int = 0,
    deepspeed_config: str | None = None,
    timeout: float = 600.0,
    hosts: Sequence[str] = (),
) -> ProcessGroup:
    """Join the processes of this run, which from then on wait no longer than `timeout` seconds for one another.

    Args:
        hosts: that of each rank, if it is known; only to name one that does not come.

    Where the others do not come, says so in one line and ends this process with `FAULT`.

    Raises:
        ArgumentError: the device or the engine asked for is not here, or torch's engine is asked of many processes.
    """
    needed = "--zero" if zero else "--deepspeed-config" if deepspeed_config else None
    name, reason = _pick_engine(engine, needed)
    size = int(os.environ["WORLD_SIZE"]) if launched() else 1
    if name == "torch" and size > 1:
        raise ArgumentError("--engine", name, f"must be deepspeed with {size} processes")
    place = pick_device(device)
    use_cuda = place.type == "cuda"
    heartbeat = None
    if name == "deepspeed":
        quiet_deepspeed(place.type)
        import deepspeed

        if not launched():
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        heartbeat = _meet(size, timeout, hosts) if size > 1 else None
        if not dist.is_initialized():
            try:
                with contextlib.redirect_stdout(None), heartbeat.guard() if heartbeat else contextlib.nullcontext():
                    deepspeed.init_distributed(
                        dist_backend="nccl" if use_cuda else "gloo",
                        auto_mpi_discovery=False,
                        # Longer than `heartbeat` waits, which knows whom it waits for.
                        timeout=datetime.timedelta(seconds=2 * joining(timeout)),
                        verbose=False,
                    )
            except (RuntimeError, OSError) as error:
                _alone(error)
    if size > 1:
        bound(None, timeout)
    rank = dist.get_rank() if dist.is_initialized() else 0
    return ProcessGroup(rank, size, place, name, reason, heartbeat)


def _meet(size: int, timeout: float, hosts: Sequence[str]) -> Heartbeat:
    """Watch over the others from before the backend connects to them: who does not come, or dies on the way, is named.

    Over a store at MASTER_ADDR:MASTER_PORT, as torch's `env://` has it: rank 0's, unless torchrun has one there.
    """
    rank, limit = int(os.environ["RANK"]), datetime.timedelta(seconds=joining(timeout))
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        tcp = dist.TCPStore(address, port, size, serves, limit, wait_for_workers=False, multi_tenant=True)
        # torchrun's store lives on when its ranks are started again.
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"fastgan-{again}", tcp)

        def first(value: Any) -> Any:
            if rank == 0:
                store.set("heartbeat", json.dumps(value))
            return json.loads(store.get("heartbeat"))

        heartbeat = Heartbeat(rank, size, int(os.environ.get("LOCAL_RANK", "0")), address, timeout, first, hosts)
    except (RuntimeError, OSError) as error:
        _alone(error)
    _STORES.append(tcp)
    return heartbeat


def _alone(error: Exception) -> NoReturn:
    """The other ranks are not there, or cannot be reached."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    line = f"fastgan: rank {os.environ.get('RANK')} on {host()}: did not find the other ranks, at {where} or from there"
    print(f"{line} ({str(error).splitlines()[0]}); see docs/cluster.md", file=sys.stderr, flush=True)
    os._exit(FAULT)


def join(device: str) -> ProcessGroup:
    """Join the processes of a launcher, if one started this, for work that trains nothing and needs no engine.

    Raises:
        ArgumentError: the device asked for is not here.
    """
    place = pick_device(device)
    if launched() and not dist.is_initialized():
        # What is exchanged is gathered as plain objects on the host, once.
        dist.init_process_group("gloo", timeout=datetime.timedelta(hours=2))
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return ProcessGroup(rank, size, place, "torch", "nothing is trained")


def pick_device(device: str) -> torch.device:
    """The device of this process; each of a host's processes has a GPU of its own.

    Raises:
        ArgumentError: there is no GPU, or there are fewer than processes.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("--device", device, "must be cpu; torch sees no GPU here")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ArgumentError(
            "--device",
            "cuda",
            f"this host has {torch.cuda.device_count()} GPUs, and a rank {local_rank} of its own",
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def stop() -> None:
    """Leave the process group, if one was joined, and leave no thread of it behind.

    Torch shuts a group down but leaves its threads to whoever still holds it; one of them that lets go of a finished
    collective's tensor while the interpreter ends aborts the process, whose work is done and saved.
    """
    if not dist.is_initialized():
        return
    comm = sys.modules.get("deepspeed.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()  # and of the groups that DeepSpeed keeps
    else:
        dist.destroy_process_group()
    gc.collect()  # engines, which hold the last of them in reference cycles
