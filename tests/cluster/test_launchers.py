"""The launchers of docs/cluster.md besides DeepSpeed's: the files parse, and the commands train on two hosts."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults import FLAGS, finish
from hosts import ROOT, Hosts

from fastgan.cli import train

SCRIPT = str(ROOT / "fastgan" / "train.py")


def _block(language: str) -> str:
    match = re.search(rf"```{language}\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
    assert match is not None
    return match[1]


def _flags(line: str) -> list[str]:
    return shlex.split(line.partition("fastgan/train.py ")[2])


def test_batch_script_of_slurm() -> None:
    script = _block("bash")
    subprocess.run(["bash", "-n", "-c", script], check=True)
    assert script.startswith("#!") and "\n#SBATCH --nodes" in script
    line = next(line for line in script.splitlines() if line.startswith("srun "))
    config = train.parse(_flags(line)).config
    assert config.run.out is not None  # without --out every requeue would start a new run


def test_manifest_of_kubernetes() -> None:
    service, job = yaml.safe_load_all(_block("yaml"))
    name, spec = job["metadata"]["name"], job["spec"]
    pod: dict[str, Any] = spec["template"]["spec"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"] and spec["completionMode"] == "Indexed"
    (container,) = pod["containers"]
    (line,) = container["args"]
    assert f"--nnodes {spec['completions']} " in line and spec["parallelism"] == spec["completions"]
    assert f"--master_addr {name}-0.{pod['subdomain']} " in line and "--node_rank $JOB_COMPLETION_INDEX " in line
    assert f"--nproc_per_node {container['resources']['limits']['nvidia.com/gpu']} " in line
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert 30 < int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    config = train.parse(_flags(line)).config
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert str(Path(str(config.run.out)).parent) in mounted and str(Path(config.data.data).parent) in mounted
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_two_hosts(hosts: Hosts, reference: Path, run: Path, launcher: str) -> None:
    jobs = []
    for host in (0, 1):
        flags = [SCRIPT, *FLAGS, "--resume", "auto", "--out", str(run)]
        if launcher == "torchrun":
            line = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
            line += ["--node_rank", str(host), "--master_addr", "h1"]
            jobs.append(hosts.run(host, [*line, *flags]))
        else:  # the variables that srun sets for a task
            task = {"PROCID": str(host), "STEP_NUM_TASKS": "2", "LOCALID": "0", "JOB_ID": "7", "STEP_ID": "0",
                    "STEP_NODELIST": "h[1-2]", "STEP_TASKS_PER_NODE": "1(x2)"}  # fmt: skip
            jobs.append(
                hosts.run(host, [sys.executable, *flags], **{f"SLURM_{key}": value for key, value in task.items()})
            )
    output = finish(hosts, jobs[0], run, reference)
    assert jobs[1].wait(timeout=60) == 0, output
    assert "2 x cpu" in output, output
