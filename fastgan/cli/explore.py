"""Look at a trained generator on a page of this machine: `fastgan explore RUN`."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastgan.cli.main import check_device, command
from fastgan.errors import ArgumentError

if TYPE_CHECKING:
    import numpy as np

    from fastgan.generator import TrainedGenerator

SHOWN = 512  # pixels of the picture's side at least, by repetition: a small image is enlarged without blur
MOST_SEEDS = 9999


@dataclass(frozen=True)
class Explore:
    """Look at a trained generator on a local page, with sliders for seed, interpolation and truncation."""

    run: Annotated[str, tyro.conf.Positional]
    """Run directory, one checkpoint in it, or an exported file."""
    port: int | None = None
    """Port of the page; None: a free one from 7860 on."""
    device: str = "cpu"
    """cpu or cuda."""
    open: bool = False
    """Open the page in the default browser."""


def picture(
    trained: TrainedGenerator, columns: int, seed: float, other: float, share: float, truncation: float, label: float
) -> np.ndarray:
    """`columns` squared images as one picture, uint8 [S, S] or [S, S, 3].

    Image i is at `share` of the great circle from latent i of `seed` to latent i of `other`, times `truncation`, of
    class `label` where there are classes (-1: they go round).
    """
    import torch

    from fastgan.generator import device_of, generate, great_circle
    from fastgan.utils import counter_rng

    device = device_of(trained.module)
    index = torch.arange(columns**2, device=device)
    latent = counter_rng.normal(int(seed), "sample", index, trained.latent)
    if share > 0 and int(other) != int(seed):
        latent = great_circle(
            latent, counter_rng.normal(int(other), "sample", index, trained.latent), torch.tensor(share)
        )
    if trained.truncates:
        latent = latent * truncation
    labels = None
    if trained.num_classes:
        labels = index % trained.num_classes if label < 0 else torch.full_like(index, int(label))
    images = generate(trained.module, latent, labels, trained.meta["networks"]["resolution"])
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    c, r = pixels.shape[1:3]
    sheet = pixels.view(columns, columns, c, r, r).permute(0, 3, 1, 4, 2).reshape(columns * r, columns * r, c)
    scale = max(1, SHOWN // (columns * r))
    sheet = sheet.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return (sheet if c == 3 else sheet[..., 0]).numpy()


def page(trained: TrainedGenerator) -> Any:
    """The page, a `gradio.Blocks`; its function is also at the API name `/picture`."""
    import gradio

    def draw(*values: Any) -> np.ndarray:
        columns, *rest = values
        return picture(trained, int(columns), *rest)

    networks = trained.meta["networks"]
    size = networks["resolution"]
    classes = trained.num_classes
    with gradio.Blocks(title=f"fastgan: {trained}", analytics_enabled=False) as blocks:
        gradio.Markdown(f"## {trained}, {size} px")
        with gradio.Row():
            with gradio.Column(scale=1):
                most = max(1, min(8, 1024 // size))
                columns = gradio.Slider(1, most, min(4, most), step=1, label="columns")
                seed = gradio.Slider(0, MOST_SEEDS, 0, step=1, label="seed")
                other = gradio.Slider(0, MOST_SEEDS, 1, step=1, label="second seed")
                share = gradio.Slider(0.0, 1.0, 0.0, step=0.01, label="interpolation towards the second seed")
                why = None if trained.truncates else "pggan normalizes its latents: their length changes nothing"
                truncation = gradio.Slider(
                    0.05, 1.0, 1.0, step=0.05, label="truncation", info=why, interactive=trained.truncates
                )
                label = gradio.Slider(-1, max(0, classes - 1), -1, step=1, label="class (-1: all)", visible=classes > 0)
            with gradio.Column(scale=2):
                first = draw(min(4, most), 0, 1, 0.0, 1.0, -1)
                image = gradio.Image(value=first, label="images", format="png", buttons=["download", "fullscreen"])
        inputs = [columns, seed, other, share, truncation, label]
        gradio.on([it.change for it in inputs], draw, inputs, image, api_name="picture", show_progress="hidden")
    return blocks


def _free_port(asked: int | None) -> int:
    """The port, or the first free one from 7860 on."""
    for port in (asked,) if asked is not None else range(7860, 7960):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ArgumentError("--port", asked, "must be a free one; this one is taken")


def launch(trained: TrainedGenerator, port: int, browser: bool = False) -> Any:
    """Serve the page on 127.0.0.1 alone and return at once, with the `gradio.Blocks` to close."""
    # Read when gradio is imported: it would otherwise tell its makers of every start, and ask for newer versions.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import gradio

    blocks = page(trained)
    blocks.launch(
        theme=gradio.themes.Default(font=["sans-serif"], font_mono=["monospace"]),  # its own come from another host
        server_name="127.0.0.1",
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        inbrowser=browser,
    )
    return blocks


@command
def main(argv: list[str]) -> int:
    asked = tyro.cli(Explore, args=argv, prog="fastgan explore")
    if asked.port is not None and not 1 <= asked.port <= 65535:
        raise ArgumentError("--port", asked.port, "must be 1 to 65535")
    check_device(asked.device)
    from fastgan.generator import load

    trained = load(asked.run, asked.device)
    blocks = launch(trained, _free_port(asked.port), asked.open)
    print(f"{trained}: {blocks.local_url} (Ctrl-C ends it)", flush=True)
    blocks.block_thread()
    return 0
