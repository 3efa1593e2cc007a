"""`make gpu`: run the GPU tests and all benchmarks, and write results/MACHINE.json with versions and git revision.

    python benchmarks/gpu.py            # on a machine with a GPU
    python benchmarks/gpu.py -k attention

Further arguments go to pytest, both times. Ends with 1 when a test failed; the file is written all the same.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def pytest(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT).returncode


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(0)
    return {
        "gpu": gpu.name,
        "compute_capability": f"{gpu.major}.{gpu.minor}",
        "gpu_memory_bytes": gpu.total_memory,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "triton", "numpy", "fastgan")},
        "revision": git("rev-parse", "HEAD"),
        "changed_files": [line[3:] for line in git("status", "--porcelain").splitlines()],
    }


def tests(report: Path) -> dict[str, Any]:
    """Counts of a junit report, and the names of the tests that failed."""
    if not report.exists():
        return {"error": "pytest wrote no report"}
    suite = next(ElementTree.parse(report).iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    wrong = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {**counts, "seconds": float(suite.get("time", 0)), "failed": wrong}


def benchmarks(report: Path) -> list[dict[str, Any]]:
    """Of each benchmark its name, times in seconds, and what it noted: errors, memory, the other sides' times."""
    if not report.exists() or not report.stat().st_size:
        return []
    kept = ("min", "median", "mean", "stddev", "rounds")
    return [
        {
            "name": it["name"],
            "group": it["group"],
            "seconds": {name: it["stats"][name] for name in kept},
            **it["extra_info"],
        }
        for it in json.loads(report.read_text())["benchmarks"]
    ]


def main(arguments: list[str]) -> int:
    if not torch.cuda.is_available():
        print("make gpu: there is no GPU here, or this torch cannot use it", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        junit, times = Path(folder, "tests.xml"), Path(folder, "benchmarks.json")
        failed = pytest("-m", "gpu", f"--junitxml={junit}", *arguments)
        failed |= pytest("benchmarks", "--benchmark-only", f"--benchmark-json={times}", "--timeout=0", *arguments)
        where = machine()
        result = {"machine": where, "tests": tests(junit), "benchmarks": benchmarks(times)}
    name = re.sub(r"[^a-z0-9]+", "-", where["gpu"].lower()).strip("-")
    file = RESULTS / f"{name}.json"
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {file}")
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
