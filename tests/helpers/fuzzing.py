"""One reader of this project against mutated and forged files, in a process that is watched.

    python fuzzing.py READER COUNT SEED FOLDER

prints one line of JSON: cases, how many were refused, what went wrong, and the memory above that of the idle process.
What goes wrong is an error that is not one line for the user, a file opened outside of FOLDER, a module imported, code
executed or a socket opened after the first good file was read.
"""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import signal
import socket
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import readers

from fastgan.errors import ArgumentError

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_REFUSED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
_EVALUATES = ("/typing.py", "/typing_extensions.py", "/dataclasses.py", "/collections/__init__.py")
_SECONDS = 20  # that one case may take


class Watch:
    """An audit hook: what the process does besides reading files of its folder."""

    def __init__(self, folder: Path) -> None:
        self.active, self.seen, self.folder = False, [], str(folder.resolve()) + os.sep
        libraries = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *map(os.path.abspath, sys.path)}
        folders = [os.path.realpath(path) + os.sep for path in libraries if path]
        self.readable = (*folders, "/proc/", "/dev/", "/sys/")
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes):
                self._opened(os.path.realpath(os.fsdecode(path)), flags)
        elif event == "import":
            name = str(arguments[0])
            if name.partition(".")[0] not in ("PIL", "encodings"):
                self.seen.append(f"imports {name}")
        elif event == "exec":
            self._executed(getattr(arguments[0], "co_filename", ""), sys._getframe(1).f_code.co_filename)
        elif event == "ctypes.dlopen" and arguments[0] not in (None, "libnvidia-ml.so.1"):  # torch looks for GPUs
            self.seen.append(f"loads {arguments[0]}")
        elif event.startswith(("socket.connect", "socket.bind", "socket.getaddrinfo")) or event in _REFUSED:
            self.seen.append(f"{event} {arguments}"[:200])

    def _executed(self, file: str, caller: str) -> None:
        """Modules of Pillow and codecs are imported when they are needed; type hints and dataclasses are evaluated."""
        if not any(part in file for part in ("/PIL/", "/encodings/")) and not caller.endswith(_EVALUATES):
            self.seen.append(f"{caller} executes {file}")

    def _opened(self, path: str, flags: int) -> None:
        if path.startswith(self.folder) or path == os.devnull:
            return
        if flags & _WRITES or not path.startswith(self.readable):
            self.seen.append(f"opens {path} ({flags:o})")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"a case took more than {_SECONDS} s")


def run(read: Callable[[random.Random], None], count: int, seed: int, watch: Watch) -> dict[str, Any]:
    """Read `count` files, each made from its own seed."""
    refused, wrong, idle = 0, [], _peak()
    for number in range(count):
        signal.alarm(_SECONDS)
        watch.active = True
        try:
            read(random.Random(f"{seed} {number}"))
        except ArgumentError as error:
            refused += 1
            if "\n" in str(error) or not str(error).isprintable():
                wrong.append(f"case {number}: more than a line: {str(error)!r:.300}")
        except Exception:
            wrong.append(f"case {number}: {traceback.format_exc()[-1500:]}")
        finally:
            watch.active = False
            signal.alarm(0)
        wrong += [f"case {number}: {what}" for what in watch.seen]
        watch.seen.clear()
    return {"cases": count, "refused": refused, "wrong": wrong[:20], "count": len(wrong), "memory": _peak() - idle}


def fuzz(name: str, count: int, seed: int, folder: Path) -> dict[str, Any]:
    """`run` of a reader, after its first use, which imports what it needs. The audit hook stays, and is idle then."""
    before = signal.signal(signal.SIGALRM, _too_long)
    try:
        read = readers.READERS[name](folder)
        for number in range(-20, 0):
            try:
                read(random.Random(number))
            except Exception:  # the watched cases report it
                continue
        return run(read, count, seed, Watch(folder))
    finally:
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    name, count, seed, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.chdir(folder)
    socket.setdefaulttimeout(5)
    print(json.dumps(fuzz(name, count, seed, folder)))


if __name__ == "__main__":
    main()
