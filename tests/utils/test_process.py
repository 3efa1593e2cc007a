"""Memory that malloc keeps and threads that do not spin: set by every door, unless the user decides."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastgan
from fastgan.utils import process

ROOT = Path(fastgan.__file__).resolve().parents[1]
GLIBC = process._glibc() is not None
CLEAN = {k: v for k, v in os.environ.items() if k not in (*process._THEIR_MALLOC, *process._THEIR_WAITING)}


def python(code: str, **variables: str) -> list[str]:
    environment = {**CLEAN, "PYTHONPATH": os.pathsep.join([str(ROOT), CLEAN.get("PYTHONPATH", "")]), **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    return done.stdout.split("\n")


FREED = """
import ctypes, fastgan
fastgan.configure_process()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def faults():
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
blocks = []
for _ in range(3):
    before = faults()
    blocks = [libc.malloc(2**24) for _ in range(8)]
    for block in blocks:
        ctypes.memset(block, 1, 2**24)
    for block in blocks:
        libc.free(block)
    print(faults() - before)
"""


@pytest.mark.skipif(not GLIBC, reason="only glibc has mallopt")
def test_freed_memory_is_used_again() -> None:
    """Blocks of 16 MiB: without the setting each is mapped and cleared anew, page by page."""
    kept = [int(line) for line in python(FREED)[:3]]
    anew = [int(line) for line in python(FREED, FASTGAN_KEEP_MEMORY="0")[:3]]
    pages = 8 * 2**24 // os.sysconf("SC_PAGE_SIZE")
    assert max(kept[1:]) < pages / 20
    if min(anew) > pages / 2:  # unless the system gives out huge pages by itself
        assert max(kept[1:]) < min(anew) / 20


def test_threads_are_set_before_torch_and_not_after() -> None:
    code = "import os, fastgan; print(fastgan.configure_process()['idle threads'], os.environ.get('GOMP_SPINCOUNT'))"
    assert python(code)[0] == "GOMP_SPINCOUNT=1000 1000"
    late = python(f"import torch; {code}")[0]
    assert "torch was loaded before" in late and late.endswith("None")


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_what_the_user_set_for_threads_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in process._THEIR_WAITING:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "7")
    assert process.configure_process()["idle threads"] == f"{name}=7"
    assert [v for v in process._THEIR_WAITING if v in os.environ] == [name]


@pytest.mark.parametrize(
    ("variables", "state"),
    [
        ({"FASTGAN_KEEP_MEMORY": "0"}, "not kept: FASTGAN_KEEP_MEMORY=0"),
        ({"MALLOC_TOP_PAD_": "1"}, "as the environment says: MALLOC_TOP_PAD_"),
        ({"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"}, "kept by jemalloc, which LD_PRELOAD names"),
    ],
)
def test_what_the_user_set_for_memory_stays(
    variables: dict[str, str], state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_glibc", lambda: pytest.fail("malloc was changed"))
    for variable in (*process._THEIR_MALLOC, process.KEEP_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert process.configure_process()["freed memory"] == state


def test_another_malloc_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (*process._THEIR_MALLOC, process.KEEP_VARIABLE, "LD_PRELOAD"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(process, "_glibc", lambda: None)
    assert "jemalloc" in process.configure_process()["freed memory"]


@pytest.mark.parametrize(
    "door", ["fastgan/train.py", "fastgan/evaluate.py tests", "-m fastgan train", "-m fastgan doctor"]
)
def test_every_door_sets_them_before_torch(door: str) -> None:
    """Seen by a hook on imports: what the variable is when torch is first looked for."""
    words = door.split()
    run = f"runpy.run_path({words[0]!r}, run_name='__main__')"
    if words[0] == "-m":
        words.pop(0)
        run = f"runpy.run_module({words[0]!r}, run_name='__main__', alter_sys=True)"
    code = f"""
import os, runpy, sys
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder())
sys.argv[1:] = {words[1:]!r}
os.chdir({str(ROOT)!r})
{run}
"""
    assert [line for line in python(code) if line][-1] == "1000"
