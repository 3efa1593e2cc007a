"""What all commands share: how they are found, and how they fail."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from fastgan import __version__
from fastgan.errors import ArgumentError
from fastgan.training.resilience.slurm import set_rank_variables
from fastgan.utils.old_names import current_flags

COMMANDS = {
    "train": "train one of eight GAN variants",
    "plan": "say how long a run would take on a cluster, stage by stage",
    "sample": "draw images from a trained generator",
    "evaluate": "say how good a trained generator's images are",
    "prepare": "bring images into the form that training reads fastest",
    "data": "say, check or show what a prepared set holds",
    "export": "write a trained generator for other tools: safetensors, torch.export, ONNX, TorchScript",
    "explore": "look at a trained generator on a local page",
    "import": "read a progressive GAN that pytorch_GAN_zoo published",
    "doctor": "print versions, devices, backends, and what is missing",
}
# Command -> module of fastgan.cli, where the command's own name is a keyword.
MODULES = {"import": "import_"}

# Package -> the extra that brings it; every other one is in `train`.
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
}


def module_of(name: str) -> str:
    """Name, inside fastgan.cli, of the module whose `main` is the command `name`."""
    return MODULES.get(name, name)


def command(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Turn an `ArgumentError` into one line on stderr and exit code 2, said by the first rank of each host.

    A missing package is said with the command that installs it; an interrupt ends quietly.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str]) -> int:
        set_rank_variables()
        with contextlib.suppress(AttributeError):  # a caller's own
            sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names of files may be no text
        try:
            status = main(current_flags(argv))
            sys.stdout.flush()
            return status
        except ArgumentError as error:
            rank = os.environ.get("RANK", "0")
            if rank == "0":
                print(f"fastgan: {error}", file=sys.stderr, flush=True)
            elif os.environ.get("LOCAL_RANK") == "0":  # what only this host lacks, the first rank does not know
                print(f"fastgan: rank {rank} on {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
            return 2
        except ModuleNotFoundError as error:
            extra = EXTRAS.get((error.name or "").split(".")[0], "train")
            print(
                f"fastgan: {error.name} is not installed; pip install 'fastgan[{extra}]'", file=sys.stderr, flush=True
            )
            return 2
        except KeyboardInterrupt:
            print("fastgan: interrupted", file=sys.stderr, flush=True)
            return 130
        except BrokenPipeError:  # who read this has seen enough, as `| head` has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141

    return wrapped


def check_device(device: str, *may_be: str) -> None:
    """Raises ArgumentError unless `device` is one of `may_be` (cpu or cuda) and this machine has it."""
    may_be = may_be or ("cpu", "cuda")
    if device not in may_be:
        raise ArgumentError("--device", device, f"must be {', '.join(may_be[:-1])} or {may_be[-1]}")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ArgumentError("--device", device, "must be cpu; torch sees no GPU here")


def check_picture(out: Path) -> None:
    """Raises ArgumentError unless `out` is named as a PNG."""
    if out.suffix.lower() != ".png":
        raise ArgumentError("--out", str(out), "must be a file that ends in .png")


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Around the writing of the file that `--out` names, or its default: what the system refuses is that argument's."""
    try:
        yield
    except OSError as error:
        raise ArgumentError("--out", str(out), f"must be a file that can be written ({error.strerror})") from None


def main(argv: list[str] | None = None) -> int:
    """`fastgan CMD ...`, also `python -m fastgan CMD ...`."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return command(lambda rest: importlib.import_module(f"fastgan.cli.{module_of(argv[0])}").main(rest))(argv[1:])
    if argv and argv[0] in ("--version", "-V"):
        print(f"fastgan {__version__}")
        return 0
    usage = "usage: fastgan COMMAND ...\n\n" + "\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items())
    usage += "\n\nfastgan COMMAND --help shows the options of a command."
    if not argv or argv[0] in ("--help", "-h"):
        print(usage)
        return 0
    print(f"fastgan: command must be {', '.join(COMMANDS)}, got {argv[0]!r}", file=sys.stderr)
    return 2
