"""Import a progressive GAN that pytorch_GAN_zoo published: `fastgan import FILE --out FOLDER`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastgan.cli.export import write_and_report
from fastgan.cli.main import command
from fastgan.cli.output import say


@dataclass(frozen=True)
class Import:
    """Convert the generator of a progressive GAN that pytorch_GAN_zoo published.

    The result can be sampled, explored and exported. The discriminator is not converted.
    """

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Checkpoint, as torch.hub downloads it (celebaHQ, DTD, celebaCropped ... .pth)."""
    out: str
    """Folder or .safetensors file to write, as fastgan export does."""
    license: str | None = None
    """License of the weights for the model card, as named on the Hugging Face hub."""


@command
def main(argv: list[str]) -> int:
    args = tyro.cli(Import, args=argv, prog="fastgan import")
    from fastgan.export import pytorch_gan_zoo
    from fastgan.export.write import describe, output_path
    from fastgan.generator import TrainedGenerator

    file = Path(args.file)
    out = output_path(args.out, file.parent, ".safetensors")
    trained = TrainedGenerator(*pytorch_gan_zoo.read(file))
    meta = describe(trained, out.parent, None, args.license)
    if "weights" in meta:
        say("the checkpoint has no moving average: its last weights are used", error=True)
    return write_and_report(trained, meta, "safetensors", out, out.parent)
