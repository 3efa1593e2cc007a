"""`srun` as a launcher: sets the environment variables of torch and DeepSpeed from Slurm's."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping


def first_host(nodes: str) -> str:
    """The first host of a node list in Slurm's short form: node[07-09,12],gpu3 -> node07."""
    match = re.match(r"([^\[,]*)(?:\[([^\]]*)\])?([^,\[]*)", nodes)
    assert match is not None
    prefix, numbers, suffix = match.groups()
    return prefix + re.split("[,-]", numbers)[0] + suffix if numbers else prefix


def set_rank_variables(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT if `srun` started this process as one of several.

    Variables that another launcher or the user has set are kept. In a batch script, outside `srun`, nothing is set.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in environment or "SLURM_PROCID" not in environment or tasks < 2:
        return
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    step = int(environment.get("SLURM_JOB_ID", "0")) * 8 + int(environment.get("SLURM_STEP_ID", "0"))
    variables = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": re.split(r"\D", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0],
        # Task 0 runs on the first node, which may not be the one where `srun` was started.
        "MASTER_ADDR": first_host(nodes) or environment.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"),
        "MASTER_PORT": str(20000 + step % 20000),
    }
    for name, value in variables.items():
        environment.setdefault(name, value)
