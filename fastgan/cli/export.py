"""Export a trained generator for other tools: `fastgan export RUN --format onnx`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastgan.cli.main import command, writing
from fastgan.cli.output import say
from fastgan.errors import ArgumentError

if TYPE_CHECKING:
    from fastgan.generator import TrainedGenerator


@dataclass(frozen=True)
class Export:
    """Write the averaged generator of a run to one file, with a model card beside it.

    The file is opened and its images are compared with the generator's before it is written.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run directory, one checkpoint in it, a .safetensors export, or a name: avatars, fashion-mnist (they come with
    fastgan)."""
    format: Literal["safetensors", "torch-export", "onnx", "torchscript"] = "safetensors"
    """safetensors: weights for fastgan and Generator.from_pretrained; torch-export: torch.export.load, C++ and others;
    onnx: onnxruntime and others; torchscript: torch.jit.load."""
    out: str | None = None
    """File or folder to write; None: RUN/export/model.safetensors, .pt2, .onnx or .torchscript, or for a generator
    that comes with fastgan NAME-export/model.safetensors and so on here."""
    batch: int | None = None
    """Fixed batch size of the file; None: any."""
    license: str | None = None
    """License of the weights for the model card, as named on the Hugging Face hub: apache-2.0, cc-by-nc-4.0 ..."""


def _load(run: str) -> tuple[TrainedGenerator, Path]:
    """The generator, and the folder of its run (or its own)."""
    from fastgan.export import formats
    from fastgan.generator import load
    from fastgan.trained import name_of, resolve

    if name_of(run) is not None:
        return load(run), resolve(run).parent
    path = Path(run)
    file = formats.find_export(path)
    if file is not None and file.suffix != ".safetensors":
        raise ArgumentError("RUN", str(path), "must be a run, a checkpoint or a .safetensors export")
    own = path if path.is_dir() else path.parent
    folder = next((p for p in (own, own.parent, own.parent.parent) if (p / "config.yaml").is_file()), own)
    return load(path), folder


@command
def main(argv: list[str]) -> int:
    args = tyro.cli(Export, args=argv, prog="fastgan export")
    if args.batch is not None and args.batch < 1:
        raise ArgumentError("--batch", args.batch, "must be at least 1")
    if args.license is not None and not args.license.isprintable():
        raise ArgumentError("--license", args.license, "must be a name in one line")
    from fastgan.export import formats
    from fastgan.export.write import describe, output_path
    from fastgan.trained import name_of, resolve

    trained, run = _load(args.run)
    source, name = resolve(args.run), name_of(args.run)
    if args.format == "safetensors" and args.batch is not None:
        raise ArgumentError("--batch", args.batch, "is not needed with --format safetensors: remove it")
    target = f"{name}-export/" if name is not None and args.out is None else args.out
    out = output_path(target, run, formats.FORMATS[args.format].suffix)
    if out.exists() and out.samefile(source):
        raise ArgumentError("--out", str(out), "must be another file than the one that is read")
    meta = describe(trained, run, args.batch, args.license)
    return write_and_report(trained, meta, args.format, out, run)


def write_and_report(trained: TrainedGenerator, meta: dict[str, Any], format: str, path: Path, run: Path) -> int:
    """Write an export, print what was written, and return the exit code.

    Raises:
        ArgumentError: the file cannot be written.
    """
    from fastgan.export.write import ExportMismatch, write_export

    try:
        with writing(path):
            difference = write_export(trained, meta, format, path, run)
    except ExportMismatch as error:
        say(f"fastgan: {error}; nothing was written", error=True)
        return 1
    size = path.stat().st_size / 1e6
    say(f"{trained}, {format}, {size:.1f} MB, largest difference of a pixel {difference:.1g}: {path}")
    if not meta.get("license"):
        say("the model card states no license; --license NAME adds one")
    return 0
