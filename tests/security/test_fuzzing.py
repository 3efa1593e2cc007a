"""Every reader of files and requests of others against thousands of mutated and forged ones; see docs/security.md."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzzing
import pytest
import readers

FULL, QUICK = 2000, 20
LIMIT = 512 * 2**20  # bytes above the idle process


def fuzz_alone(reader: str, count: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    line = [sys.executable, str(Path(fuzzing.__file__)), reader, str(count), str(seed), str(folder)]
    result = subprocess.run(line, capture_output=True, text=True, timeout=1500)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Traceback" not in result.stderr, result.stderr[-3000:]  # of a thread or a server, which go on
    return json.loads(result.stdout.splitlines()[-1])


def check(found: dict[str, Any], count: int) -> None:
    assert found["cases"] == count
    assert found["good"] > fuzzing.GOOD // 4  # a reader that reads nothing finds nothing
    assert not found["wrong"], f"{found['count']}: " + "\n".join(found["wrong"])
    assert found["memory"] < LIMIT
    assert found["refused"] > count // 10  # most of them are damaged


@pytest.mark.parametrize("reader", [name for name in readers.READERS if name != "page"])
def test_a_sample_of_files(tmp_path: Path, reader: str) -> None:
    """In this process, which has imported everything; its memory is not measured."""
    check(fuzzing.fuzz(reader, QUICK, 0, tmp_path) | {"memory": 0}, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("reader", list(readers.READERS))
def test_thousands_of_cases(tmp_path: Path, reader: str) -> None:
    check(fuzz_alone(reader, FULL, tmp_path, seed=1), FULL)


def misbehave(what: str, folder: Path, victim: Path) -> None:
    """What no reader may do, each of which must be reported."""
    if what == "hang":
        with contextlib.suppress(Exception):  # as readers do with errors of libraries
            while True:
                pass
    elif what == "import":
        importlib.import_module("antigravity" if "this" in sys.modules else "this")
    elif what == "unpickle":
        pickle.loads(b"cos\ngetpid\n.")
    else:
        changes: dict[str, Callable[[], object]] = {
            "open": lambda: (victim / "file").write_text("x"),
            "read": lambda: (victim / "file").read_bytes(),
            "rename": lambda: os.rename(folder / "own", victim / "new"),
            "rename from": lambda: os.rename(victim / "file", folder / "new"),
            "mkdir": lambda: os.mkdir(victim / "new"),
            "unlink": lambda: os.unlink(victim / "file"),
            "rmdir": lambda: os.rmdir(victim / "folder"),
            "symlink": lambda: os.symlink("x", victim / "new"),
            "link": lambda: os.link(folder / "own", victim / "new"),
            "chmod": lambda: os.chmod(victim / "file", 0o600),
            "truncate": lambda: os.truncate(victim / "file", 0),
            "utime": lambda: os.utime(victim / "file"),
            "rmtree": lambda: shutil.rmtree(victim / "folder"),
            "listdir": lambda: os.listdir(victim),
            "exec": lambda: exec("1"),
            "process": lambda: os.system("true"),
            "socket": lambda: socket.create_connection(("127.0.0.1", 9), 0.1).close(),
        }
        changes[what]()


WAYS = ("hang", "import", "unpickle", "open", "read", "rename", "rename from", "mkdir", "unlink", "rmdir", "symlink")
WAYS += ("link", "chmod", "truncate", "utime", "rmtree", "listdir", "exec", "process", "socket")


@pytest.mark.skipif(sys.platform != "linux", reason="paths relative to an open folder are read from /proc")
@pytest.mark.parametrize("what", WAYS)
def test_the_watch_reports(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, victim = tmp_path / "own", tmp_path / "victim"
    (victim / "folder").mkdir(parents=True)
    folder.mkdir()
    (folder / "own").touch()
    (victim / "file").touch()
    monkeypatch.setattr(fuzzing, "_SECONDS", 1)
    before = signal.signal(signal.SIGALRM, fuzzing._too_long)

    def read(_: random.Random) -> None:
        with contextlib.suppress(Exception):
            misbehave(what, folder, victim)

    try:
        found = fuzzing.run(read, 1, 0, fuzzing.Watch(folder))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert found["wrong"], what
    assert not fuzzing.run(lambda _: (folder / "own").write_text("x"), 1, 0, fuzzing.Watch(folder))["wrong"]
