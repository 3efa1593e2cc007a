"""The `fastgan` command: finds its subcommands, and reports their errors."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from fastgan import __version__, configure_process
from fastgan.errors import ArgumentError
from fastgan.training.resilience.slurm import set_rank_variables
from fastgan.utils.old_names import current_flags

COMMANDS = {
    "train": "train one of nine GAN variants",
    "plan": "predict how long a run takes on a cluster, stage by stage",
    "sample": "draw images from a trained generator",
    "evaluate": "measure how good the images of a trained generator are",
    "prepare": "convert images to the format that training reads fastest",
    "data": "describe or verify a prepared set, or show images as training sees them",
    "export": "write a trained generator for other tools: safetensors, torch.export, ONNX, TorchScript",
    "explore": "explore a trained generator on a local web page",
    "project": "find the latent whose image is nearest to a picture",
    "import": "read a progressive GAN that pytorch_GAN_zoo published",
    "doctor": "print versions, devices, backends, and what is missing",
}
# Command -> module of fastgan.cli, where the command's own name is a keyword.
MODULES = {"import": "import_"}

# Package -> the extra that installs it; every other one is in `train`.
EXTRAS = {
    "nvidia": "dali",
    "timm": "eval",
    "torch_fidelity": "eval",
    "torchmetrics": "eval",
    "huggingface_hub": "export",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "gradio": "explore",
    "imageio_ffmpeg": "video",
}


def module_of(name: str) -> str:
    """Name, inside fastgan.cli, of the module whose `main` is the command `name`."""
    return MODULES.get(name, name)


def _interrupt(number: int, frame: object) -> None:
    """Ctrl-C: KeyboardInterrupt, but the end of the process while torch is imported, whose C++ parts it would abort."""
    for name in ("torch", "torch._dynamo"):
        spec = getattr(sys.modules.get(name), "__spec__", None)
        if getattr(spec, "_initializing", False):
            os.write(2, b"fastgan: interrupted\n")
            os._exit(130)
    raise KeyboardInterrupt


@contextlib.contextmanager
def _handled_interrupts() -> Iterator[None]:
    """`_interrupt` in place of Python's own handler, where that one is in place."""
    mine = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    mine = mine and threading.current_thread() is threading.main_thread()
    if mine:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        if mine and signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C fell into code that raises something else then, as an import may."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def command(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Turn an `ArgumentError` into one line on stderr, by the first rank of each host, and exit code 2.

    A missing package is reported with the command that installs it; an interrupt ends without a traceback.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str]) -> int:
        set_rank_variables()
        with contextlib.suppress(AttributeError):  # a stream that a caller has replaced
            sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # file names may not be text
        try:
            with _handled_interrupts():
                status = main(current_flags(argv))
                sys.stdout.flush()
            return status
        except ArgumentError as error:
            rank = os.environ.get("RANK", "0")
            if rank == "0":
                print(f"fastgan: {error}", file=sys.stderr, flush=True)
            elif os.environ.get("LOCAL_RANK") == "0":  # the first rank does not know what only this host lacks
                print(f"fastgan: rank {rank} on {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
            return 2
        except ModuleNotFoundError as error:
            if (error.name or "fastgan").startswith("fastgan"):
                raise  # no package that pip could add
            extra = EXTRAS.get((error.name or "").split(".")[0], "train")
            print(
                f"fastgan: {error.name} is not installed; pip install 'fastgan[{extra}]'", file=sys.stderr, flush=True
            )
            return 2
        except KeyboardInterrupt:
            print("fastgan: interrupted", file=sys.stderr, flush=True)
            return 130
        except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except Exception as error:
            if not _was_interrupted(error):
                raise
            print("fastgan: interrupted", file=sys.stderr, flush=True)
            return 130

    return wrapped


def check_device(device: str, *allowed: str) -> None:
    """Raise ArgumentError unless `device` is one of `allowed` (default: cpu, cuda, mps) and this machine has it."""
    allowed = allowed or ("cpu", "cuda", "mps")
    if device not in allowed:
        raise ArgumentError("--device", device, f"must be {', '.join(allowed[:-1])} or {allowed[-1]}")
    if device in ("cuda", "mps"):
        from fastgan.utils.system import missing_device

        problem = missing_device(device)
        if problem:
            raise ArgumentError("--device", device, problem)


def check_picture(out: Path) -> None:
    """Raise ArgumentError unless `out` has the suffix of a PNG file."""
    if out.suffix.lower() != ".png":
        raise ArgumentError("--out", str(out), "must be a file that ends in .png")


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Report errors of the system while the file of `--out` is written as an error of that argument."""
    try:
        yield
    except OSError as error:
        raise ArgumentError("--out", str(out), f"must be a file that can be written; {error.strerror}") from None


def main(argv: list[str] | None = None) -> int:
    """Run `fastgan COMMAND ...` or `python -m fastgan COMMAND ...`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        configure_process()  # before the command imports torch
        return command(lambda rest: importlib.import_module(f"fastgan.cli.{module_of(argv[0])}").main(rest))(argv[1:])
    if argv and argv[0] in ("--version", "-V"):
        print(f"fastgan {__version__}")
        return 0
    usage = "usage: fastgan COMMAND ...\n\n" + "\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items())
    usage += "\n\nfastgan COMMAND --help shows the options of a command."
    if not argv or argv[0] in ("--help", "-h"):
        print(usage)
        return 0
    near = "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(argv[0], COMMANDS, 1))
    print(f"fastgan: COMMAND must be {', '.join(COMMANDS)}, got {argv[0]!r}{near}", file=sys.stderr)
    return 2
