"""Put the generator of a run into the package, as fastgan/trained/NAME.safetensors, with its card.

    python -m benchmarks.studies.box_generator RUN NAME --data-license "CC0 1.0" --command "fastgan train ..."

Weights are stored in float16 if no pixel of 256 samples changes by more than 1 of 255 levels, else in float32. Its
discriminator is written beside it, for `--init-from NAME`. The card has the distances in the run's evaluation.jsonl:
run `fastgan evaluate RUN` first. Nothing is written unless the file loads and gives the same images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from benchmarks.studies.result_cache import training_seconds
from fastgan import checkpoint, models, trained
from fastgan.export import formats, model_card
from fastgan.export.write import describe
from fastgan.generator import TrainedGenerator, load
from fastgan.utils.files import write_atomic
from fastgan.utils.system import device_name
from fastgan.utils.text import readable_duration, readable_size

SAMPLES = 256
LEVEL = 2 / 255  # one step of an 8-bit image, for pixels in [-1, 1]


def half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with floating-point values in float16."""
    return {name: x.half() if x.is_floating_point() else x for name, x in tensors.items()}


def stored_weights(generator: TrainedGenerator) -> tuple[dict[str, Tensor], str, float]:
    """The generator's weights as they are stored, their dtype, and the largest change of a pixel by it in levels."""
    weights = {name: x.detach().cpu().contiguous() for name, x in generator.module.state_dict().items()}
    expected = generator.sample(SAMPLES)
    rounded, _ = models.build(**generator.meta["networks"])
    rounded.load_state_dict(half(weights))
    found = TrainedGenerator(rounded.eval().requires_grad_(False), generator.meta).sample(SAMPLES)
    change = (found - expected).abs().max().item() / LEVEL
    return (half(weights), "float16", change) if change <= 1 else (weights, "float32", 0.0)


def card(name: str, meta: dict[str, Any], rows: list[dict[str, Any]], facts: dict[str, str]) -> str:
    """The card in Markdown: facts, distances, how to use it.

    Args:
        meta: metadata of the file.
        rows: as from `model_card.evaluations`.
        facts: further rows of the table.
    """
    networks = meta["networks"]
    kinds = {1: "gray", 4: "RGBA"}
    table = {
        "Images": f"{networks['resolution']} px, {kinds.get(networks['channels'], 'color')}",
        "Latent": f"{networks['latent']} numbers, standard normal",
        "Classes": str(networks["num_classes"] or "none"),
        "Trained for": f"{meta['images'] / 1000:g} kimg (thousands of real images shown), {meta['variant']}",
        **facts,
        "License of the weights": meta["license"],
    }
    lines = [f"# {name}", "", f"A small generator that comes with fastgan: `fastgan.load({name!r}).sample(16)`.", ""]
    lines += ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in table.items()), ""]
    if not rows:
        lines.append("Not measured.")
    for row in rows:
        numbers = ", ".join(f"{metric} {value:.4g}" for metric, value in sorted(row["metrics"].items()))
        lines.append(f"Measured by `fastgan evaluate` on {row['n']:,} samples, {row['features']} features: {numbers}.")
    return "\n".join([*lines, ""])


def box(run: Path, name: str, folder: Path, license: str, facts: dict[str, str]) -> list[Path]:
    """Write the files of one generator; returns them."""
    generator, stored = load(run), checkpoint.read(run, "RUN")
    top = next(path for path in (run, *run.parents) if (path / "config.yaml").is_file())
    meta = describe(generator, top, None, license)
    weights, dtype, change = stored_weights(generator)
    content = save(weights, {"format": "pt", formats.KEY: json.dumps(meta)})
    discriminator = save(half(stored.training()["discriminator"]), {"format": "pt", formats.KEY: json.dumps(meta)})
    folder.mkdir(parents=True, exist_ok=True)
    file, critic = (folder / f"{name}{suffix}" for suffix in (trained.SUFFIX, trained.DISCRIMINATOR_SUFFIX))
    size = f"{readable_size(len(content))} of weights in {dtype}"
    size += f"; the largest change of a pixel is {change:.2f} of 255 levels" if dtype == "float16" else ""
    facts = {"Data": meta["data"], **facts, "Time": readable_duration(training_seconds(top)), "File": size}
    rows = model_card.evaluations(top, meta["images"], stored.meta.get("data", {}).get("fingerprint"))
    opened = TrainedGenerator(formats.FORMATS["safetensors"].open(content, "cpu"), meta)
    if (opened.sample(SAMPLES) - generator.sample(SAMPLES)).abs().max().item() > LEVEL:
        raise SystemExit(f"the file does not give the images of {run}: nothing is written")
    write_atomic(critic, discriminator)
    write_atomic(file, content)
    write_atomic(file.with_suffix(".md"), card(name, meta, rows, facts).encode())
    return [file, file.with_suffix(".md"), critic]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run, or one checkpoint of it")
    parser.add_argument("name", help="its name in the package")
    parser.add_argument("--command", required=True, help="the command that trained it")
    parser.add_argument("--data-license", required=True, help="license and authors of the data")
    parser.add_argument("--machine", default=device_name(torch.device("cpu")), help="where it was trained")
    parser.add_argument("--license", default="apache-2.0", help="of the weights")
    parser.add_argument("--out", type=Path, default=trained.FOLDER)
    args = parser.parse_args(argv)
    facts = {"License of the data": args.data_license, "Command": f"`{args.command}`", "Machine": args.machine}
    for file in box(args.run, args.name, args.out, args.license, facts):
        print(f"{file}: {readable_size(file.stat().st_size)}")


if __name__ == "__main__":
    main()
