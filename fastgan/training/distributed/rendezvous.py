"""How the ranks of a run meet and leave: device, engine, process group and heartbeat of this process."""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib
import importlib.util
import json
import os
import re
import socket
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from fastgan.errors import ArgumentError
from fastgan.training.distributed.private_api import disable_shared_memory_op, set_group_timeout
from fastgan.training.distributed.process_group import ProcessGroup
from fastgan.training.resilience.heartbeat import EXIT_RANK_FAULT, Heartbeat, join_timeout
from fastgan.utils.system import missing_device

_STORES: list[Any] = []
"""Keeps the stores of `_start_heartbeat` alive: rank 0's also serves torch's process group, at the same port."""


def launched() -> bool:
    """Whether a launcher that sets RANK and WORLD_SIZE (deepspeed, torchrun, srun) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def deepspeed_missing() -> str | None:
    """Why DeepSpeed cannot be used here, or None."""
    if importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed (pip install 'fastgan[train]')"
    return None


def _quiet_deepspeed(device: str) -> None:
    """Import DeepSpeed for `device` (cpu or cuda), without its log lines and without compiling anything."""
    os.environ["DS_ACCELERATOR"] = device
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    import logging

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    disable_shared_memory_op()


def _choose_engine(preference: str, needs_deepspeed: str | None) -> tuple[str, str]:
    """(engine, reason) for --engine `preference`; `needs_deepspeed` is the flag that only DeepSpeed can honor."""
    missing = deepspeed_missing()
    if preference == "torch" or (preference == "auto" and not needs_deepspeed and not launched()):
        return "torch", "--engine" if preference == "torch" else "one process without a launcher"
    if missing is None:
        return "deepspeed", "--engine" if preference == "deepspeed" else needs_deepspeed or "started by a launcher"
    if preference == "deepspeed":
        raise ArgumentError("--engine", preference, f"must be torch; {missing}")
    if needs_deepspeed:
        raise ArgumentError("--engine", preference, f"{needs_deepspeed} needs DeepSpeed, and {missing}")
    return "torch", missing


def start(
    engine: str,
    device: str,
    *,
    zero: int = 0,
    deepspeed_config: str | None = None,
    timeout: float = 600.0,
    hosts: Sequence[str] = (),
) -> ProcessGroup:
    """Join the ranks of this run. With other ranks, starts the heartbeat first, then torch's process group.

    If the other ranks cannot be reached, prints one line and ends this process with `EXIT_RANK_FAULT`.

    Args:
        engine: "auto", "deepspeed" or "torch".
        device: "auto", "cpu", "cuda" or "mps".
        zero: ZeRO stage; 1 and 2 need DeepSpeed.
        deepspeed_config: DeepSpeed's configuration file, if any.
        timeout: seconds that ranks wait for one another.
        hosts: the host of each rank, if known; names a rank that never connects.

    Raises:
        ArgumentError: the device or the engine is not available here.
    """
    name, reason = _choose_engine(engine, "--zero" if zero else "--deepspeed-config" if deepspeed_config else None)
    size = int(os.environ["WORLD_SIZE"]) if launched() else 1
    own_device = pick_device(device)
    if name == "deepspeed":
        _quiet_deepspeed(own_device.type)
        if not launched():
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    if size == 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        # Nobody has to find a single rank: any free port. A launcher's default belongs to its first run on this host.
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    heartbeat = _start_heartbeat(size, timeout, hosts) if size > 1 else None
    if not dist.is_initialized() and (name == "deepspeed" or size > 1):
        try:
            with contextlib.redirect_stdout(None), heartbeat.guard() if heartbeat else contextlib.nullcontext():
                _init_process_group(name, own_device, timeout)
        except (RuntimeError, OSError) as error:
            _exit_unreachable(error)
    if size > 1:
        set_group_timeout(None, timeout)
    rank = dist.get_rank() if dist.is_initialized() else 0
    return ProcessGroup(rank, size, own_device, name, reason, heartbeat)


def _init_process_group(engine: str, device: torch.device, timeout: float) -> None:
    # DeepSpeed's engine imports this. Imported after the ranks have met, its functions' defaults would keep the process
    # group alive until the interpreter exits (see `stop`).
    importlib.import_module("torch.distributed.nn")
    backend = "nccl" if device.type == "cuda" else "gloo"
    # Longer than the heartbeat waits, which can name the rank that is missing.
    limit = datetime.timedelta(seconds=2 * join_timeout(timeout))
    if engine == "deepspeed":
        import deepspeed

        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=limit, verbose=False)
    else:
        dist.init_process_group(backend, timeout=limit, device_id=device if backend == "nccl" else None)


def _start_heartbeat(size: int, timeout: float, hosts: Sequence[str]) -> Heartbeat:
    """Watch the other ranks before the backend connects to them, so that one that is missing or dies is named.

    The store is at MASTER_ADDR:MASTER_PORT, as for torch's `env://`: rank 0 serves it, unless torchrun does.
    """
    rank, limit = int(os.environ["RANK"]), datetime.timedelta(seconds=join_timeout(timeout))
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        tcp = dist.TCPStore(address, port, size, serves, limit, wait_for_workers=False, multi_tenant=True)
        # torchrun keeps its store when it restarts the ranks.
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"fastgan-{restart}", tcp)

        def broadcast(value: Any) -> Any:
            if rank == 0:
                store.set("heartbeat", json.dumps(value))
            return json.loads(store.get("heartbeat"))

        heartbeat = Heartbeat(rank, size, int(os.environ.get("LOCAL_RANK", "0")), address, timeout, broadcast, hosts)
    except (RuntimeError, OSError) as error:
        _exit_unreachable(error)
    _STORES.append(tcp)
    return heartbeat


def _exit_unreachable(error: Exception) -> NoReturn:
    """The other ranks have not started, or cannot be reached."""
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    taken = re.search("EADDRINUSE|address already in use", str(error), re.IGNORECASE)
    advice = "another run on this host uses the port: give the launcher its own --master_port" if taken else ""
    print(
        f"fastgan: rank {os.environ.get('RANK')} on {socket.gethostname()}: cannot reach the other ranks through "
        f"{address} ({str(error).splitlines()[0]}); {advice or 'see docs/cluster.md'}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_RANK_FAULT)


def join(device: str) -> ProcessGroup:
    """Join the ranks of a launcher, if one started this process, for work without an engine, such as an evaluation.

    Raises:
        ArgumentError: the device is not available here.
    """
    own_device = pick_device(device)
    if launched() and not dist.is_initialized():
        # gloo on GPUs too: the ranks exchange plain objects on the host, once.
        dist.init_process_group("gloo", timeout=datetime.timedelta(hours=2))
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return ProcessGroup(rank, size, own_device, "torch", "nothing is trained")


def pick_device(device: str) -> torch.device:
    """The device of this process; each rank of a host has its own GPU.

    Args:
        device: "auto" (cuda where there is one, else cpu: mps is taken only by name), "cpu", "cuda" or "mps".

    Raises:
        ArgumentError: there is no such device, or this host has fewer GPUs than ranks.
    """
    problem = missing_device(device) if device in ("cuda", "mps") else ""
    if problem:
        raise ArgumentError("--device", device, problem)
    if device == "mps":
        if launched() and int(os.environ["WORLD_SIZE"]) > 1:
            raise ArgumentError("--device", device, "must be cpu or cuda with several ranks; a Mac has one GPU")
        return torch.device("mps")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= gpus:
        raise ArgumentError("--device", "cuda", f"local rank {local_rank} has no GPU: this host has {gpus}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def stop() -> None:
    """Leave the process group, if one was joined, and end its threads.

    Torch shuts a group down, but its threads live as long as a reference to it. Such a thread aborts the process if it
    releases the tensor of a finished collective while the interpreter exits.
    """
    if not dist.is_initialized():
        return
    comm = sys.modules.get("deepspeed.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()  # also the groups that DeepSpeed keeps
    else:
        dist.destroy_process_group()
    gc.collect()  # engines, which hold the last references in cycles
