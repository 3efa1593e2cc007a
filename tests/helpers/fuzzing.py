"""One reader of this project against mutated and forged files, in a process that is watched.

    python fuzzing.py READER COUNT SEED FOLDER

prints one line of JSON: cases, how many were refused, how many good files were accepted before, what went wrong, and
the peak of memory above that after the good files. What goes wrong: an error that is not one line for the user, a
case that takes too long, and what `Watch` reports.
"""

from __future__ import annotations

import dis
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
from types import FrameType
from typing import Any

import readers
from mutations import Unchanged

from fastgan.errors import ArgumentError

BY_DESIGN = ("holds a program", "no image in a format that is read")  # why good files of some kinds are refused
GOOD = 20  # good files that are read first: they import what the reader needs
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_REFUSED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty")
_REFUSED += ("os.startfile", "os.kill", "os.killpg", "os.chdir", "pickle.find_class", "sys.addaudithook")
_REFUSED += (
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "socket.gethostby",
    "socket.sendto",
    "urllib.Request",
)
# Events that change or list paths -> how many of their arguments are paths.
_CHANGES = {"os.rename": 2, "os.link": 2, "os.symlink": 2}
_CHANGES |= dict.fromkeys(("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.utime"), 1)
_CHANGES |= dict.fromkeys(("os.setxattr", "os.removexattr", "os.chflags"), 1)
_LISTS = ("os.listdir", "os.scandir")
_EVALUATES = ("/typing.py", "/typing_extensions.py", "/dataclasses.py", "/collections/__init__.py", "/pydantic/")
_BY_NAME = ("PIL", "encodings")  # Pillow imports its formats and Python its codecs by name
_SECONDS = 20  # that one case may take
PRIVATE = ("GRADIO_TEMP_DIR",)  # variables that name folders which the process made for itself


class Hang(BaseException):
    """A case takes too long. No reader takes it for a damaged file, as it is no Exception."""


def _imports_a_name(frame: FrameType | None) -> bool:
    """Whether the outermost import in progress takes its module from data, not from an import statement."""
    importer = frame
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            importer = frame.f_back
        frame = frame.f_back
    if importer is not None and importer.f_code.co_filename.endswith("/PIL/Image.py"):
        return False  # one of Pillow's own modules, which it imports by name
    return importer is None or dis.opname[importer.f_code.co_code[importer.f_lasti]] != "IMPORT_NAME"


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


class Watch:
    """An audit hook: what the process does besides reading files of its folder.

    It reports: files opened outside of the folder for writing, or for reading unless they belong to Python, a library
    or the system's /proc, /sys and /dev; paths there that are renamed, linked, made, removed or changed, and folders
    that are listed; modules that are imported by a name that no import statement has; code that is executed or
    unpickled; libraries that are loaded; processes, signals and connections.
    """

    def __init__(self, folder: Path) -> None:
        self.active, self.seen, self.folder = False, [], str(folder.resolve()) + os.sep
        libraries = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *map(os.path.abspath, sys.path)}
        folders = [os.path.realpath(path) + os.sep for path in libraries if path]
        self.readable = (*folders, "/proc/", "/dev/", "/sys/")
        self.writable = [self.folder]
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            self._opened(arguments[0], arguments[2])
        elif event in _CHANGES:
            for number, path in enumerate(arguments[: _CHANGES[event]]):
                at = arguments[2 + number] if event in ("os.rename", "os.link") else arguments[-1]
                self._changed(event, path, at)
        elif event in _LISTS:
            self._opened(arguments[0] or ".", os.O_RDONLY)
        elif event in ("import", "exec", "ctypes.dlopen"):
            self._loaded(event, arguments, sys._getframe(1))
        elif event.startswith(_REFUSED):
            self.seen.append(f"{event} {arguments}"[:200])

    def _loaded(self, event: str, arguments: tuple[Any, ...], frame: FrameType) -> None:
        if event == "import":
            if str(arguments[0]).partition(".")[0] not in _BY_NAME and _imports_a_name(frame):
                self.seen.append(f"imports {arguments[0]}")
        elif event == "exec":
            self._executed(getattr(arguments[0], "co_filename", ""), frame)
        else:
            gpu = arguments[0] in (None, "libnvidia-ml.so.1")  # torch looks for GPUs
            if not gpu and not (_importing(frame) and not _imports_a_name(frame)):
                self.seen.append(f"loads {arguments[0]}")

    def _executed(self, file: str, frame: FrameType) -> None:
        """Import statements execute modules; type hints and dataclasses are evaluated."""
        caller = frame.f_code.co_filename
        expected = any(f"/{name}/" in file for name in _BY_NAME) or any(part in caller for part in _EVALUATES)
        if not expected and not (_importing(frame) and not _imports_a_name(frame)):
            self.seen.append(f"{caller} executes {file}")

    def _inside(self, path: str, folders: tuple[str, ...]) -> bool:
        return (path + os.sep).startswith((*self.writable, *folders))

    def _opened(self, path: object, flags: int) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a file that is open
        path = os.path.realpath(os.fsdecode(path))
        if not self._inside(path, (os.devnull,) if flags & _WRITES else self.readable):
            self.seen.append(f"opens {path} ({flags:o})")

    def _changed(self, event: str, path: object, folder: object) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        path = os.fsdecode(path)
        relative = isinstance(folder, int) and folder >= 0 and not os.path.isabs(path)
        if relative and event not in ("os.truncate", "os.setxattr", "os.removexattr", "os.chflags"):
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)  # relative to an open folder
        path = os.path.join(os.path.realpath(os.path.dirname(path) or "."), os.path.basename(path))
        if not self._inside(path, ()):
            self.seen.append(f"{event} {path}")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _too_long(*_: object) -> None:
    raise Hang(f"more than {_SECONDS} s")


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
        except (Exception, Hang):
            wrong.append(f"case {number}: {traceback.format_exc()[-1500:]}")
        finally:
            watch.active = False
            signal.alarm(0)
        wrong += [f"case {number}: {what}" for what in watch.seen]
        watch.seen.clear()
    return {"cases": count, "refused": refused, "wrong": wrong[:20], "count": len(wrong), "memory": _peak() - idle}


def fuzz(name: str, count: int, seed: int, folder: Path) -> dict[str, Any]:
    """`run` of a reader, after good files, which must be read without an error. The audit hook stays, and is idle then.

    Those that are refused by design are not counted as accepted.
    """
    before = signal.signal(signal.SIGALRM, _too_long)
    try:
        read = readers.READERS[name](folder)
        accepted = 0
        for number in range(GOOD):
            try:
                read(Unchanged(number))
                accepted += 1
            except ArgumentError as error:
                if not any(words in str(error) for words in BY_DESIGN):
                    raise
        watch = Watch(folder)
        watch.writable += [str(Path(os.environ[key]).resolve()) + os.sep for key in PRIVATE if key in os.environ]
        return run(read, count, seed, watch) | {"good": accepted}
    finally:
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    name, count, seed, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    sys.dont_write_bytecode = True
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.chdir(folder)
    socket.setdefaulttimeout(5)
    print(json.dumps(fuzz(name, count, seed, folder)))


if __name__ == "__main__":
    main()
