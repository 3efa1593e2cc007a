"""A local web page to explore a trained generator, by gradio."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgan.data.sheets import sheet
from fastgan.errors import ArgumentError
from fastgan.explorer.requests import Argument, LocalOnly
from fastgan.generator import TrainedGenerator, device_of, generate, great_circle
from fastgan.utils import counter_rng

MIN_SIDE = 512  # pixels of the picture's side; small images are enlarged by repetition, without blur
MAX_SEED = 9999


def picture(
    trained: TrainedGenerator, columns: int, seed: int, other: int, share: float, truncation: float, label: int
) -> np.ndarray:
    """A grid of `columns` x `columns` images, uint8 [S, S], [S, S, 3] or with transparency [S, S, 4].

    Args:
        seed, other: image i lies between latent i of `seed` and latent i of `other`.
        share: position on the great circle between the two, 0 to 1.
        truncation: factor of the latents.
        label: class of all images; -1: image i has class i mod `num_classes`. Not used without classes.
    """
    index = torch.arange(columns**2, device=device_of(trained.module))
    latent = counter_rng.normal(int(seed), "sample", index, trained.latent)
    if share > 0 and int(other) != int(seed):
        end = counter_rng.normal(int(other), "sample", index, trained.latent)
        latent = great_circle(latent, end, torch.tensor(share))
    return _grid(trained, latent, index, columns, truncation, label)


def _grid(
    trained: TrainedGenerator, latent: Tensor, index: Tensor, columns: int, truncation: float, label: int
) -> np.ndarray:
    """Images of latents side by side, as `picture` returns them; image k has the class of sample `index[k]`."""
    if trained.truncates:
        latent = latent * truncation
    labels = None
    if trained.num_classes:
        labels = index % trained.num_classes if label < 0 else torch.full_like(index, int(label))
    images = generate(trained.module, latent, labels, trained.meta["networks"]["resolution"])
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    grid = sheet(pixels.numpy(), columns=columns, scale=max(1, MIN_SIDE // (columns * pixels.shape[-1])))
    return grid if grid.shape[2] >= 3 else grid[..., 0]


def neighbors(
    trained: TrainedGenerator, columns: int, seed: int, image: int, distance: float, truncation: float, label: int
) -> np.ndarray:
    """Image `image` of `seed`, first in a grid as `picture` returns it, and others around it.

    Args:
        distance: share of the way from its latent to random ones, 0 to 1.
    """
    device = device_of(trained.module)
    index = torch.full((columns**2,), int(image), device=device)
    start = counter_rng.normal(int(seed), "sample", index, trained.latent)
    ends = counter_rng.normal(int(seed), "neighbors", torch.arange(columns**2, device=device), trained.latent)
    shares = torch.full((columns**2, 1), float(distance), device=device)
    shares[0] = 0
    return _grid(trained, great_circle(start, ends, shares), index, columns, truncation, label)


def walk(trained: TrainedGenerator, columns: int, seed: int, image: int, truncation: float, label: int) -> np.ndarray:
    """A closed walk, row by row: row r leaves image `image + r` of `seed` for the next one, the last row for the first.

    With `label` below 0, all images have the class of the first.
    """
    device = device_of(trained.module)
    corners = int(image) + torch.arange(columns, device=device)
    start = counter_rng.normal(int(seed), "sample", corners, trained.latent)
    shares = torch.arange(columns, device=device)[None, :, None] / columns
    latent = great_circle(start[:, None], start.roll(-1, 0)[:, None], shares).flatten(0, 1)
    return _grid(trained, latent, torch.full((columns**2,), int(image), device=device), columns, truncation, label)


@functools.cache
def _gradio() -> Any:
    """gradio, which contacts no other host, and keeps its pictures in a private folder until this process ends."""
    # gradio reads these when it is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="fastgan-explore-")
    atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)
    import gradio

    return gradio


def page(trained: TrainedGenerator) -> Any:
    """The page, a `gradio.Blocks`. Its function has the API name `/picture`."""
    gradio = _gradio()

    def draw(*values: Any, of: Callable[..., np.ndarray] = picture) -> np.ndarray:
        columns, *rest = values
        return of(trained, int(columns), *rest)

    networks = trained.meta["networks"]
    size = networks["resolution"]
    classes = trained.num_classes
    with gradio.Blocks(title=f"fastgan: {trained}", analytics_enabled=False) as blocks:
        gradio.Markdown(f"## {trained}, {size} px")
        with gradio.Row():
            with gradio.Column(scale=1):
                most = max(1, min(8, 1024 // size))
                columns = gradio.Slider(1, most, min(4, most), step=1, label="columns")
                seed = gradio.Slider(0, MAX_SEED, 0, step=1, label="seed")
                other = gradio.Slider(0, MAX_SEED, 1, step=1, label="second seed")
                share = gradio.Slider(0.0, 1.0, 0.0, step=0.01, label="interpolation towards the second seed")
                why = None if trained.truncates else "pggan normalizes its latents: truncation has no effect"
                truncation = gradio.Slider(
                    0.05, 1.0, 1.0, step=0.05, label="truncation", info=why, interactive=trained.truncates
                )
                label = gradio.Slider(-1, max(0, classes - 1), -1, step=1, label="class (-1: all)", visible=classes > 0)
            with gradio.Column(scale=2):
                first = draw(min(4, most), 0, 1, 0.0, 1.0, -1)
                image = gradio.Image(value=first, label="images", format="png", buttons=["download", "fullscreen"])
        inputs = [columns, seed, other, share, truncation, label]
        gradio.on([it.change for it in inputs], draw, inputs, image, api_name="picture", show_progress="hidden")
        number = gradio.Slider(0, most**2 - 1, 0, step=1, label="image: its neighbors and a walk from it")
        distance = gradio.Slider(0.0, 1.0, 0.2, step=0.01, label="distance of the neighbors")
        start = (min(4, most), 0, 0)
        with gradio.Row():
            around = gradio.Image(value=draw(*start, 0.2, 1.0, -1, of=neighbors), label="neighbors", format="png")
            path = gradio.Image(value=draw(*start, 1.0, -1, of=walk), label="a closed walk, row by row", format="png")
        for of, chosen, shown in (
            (neighbors, [columns, seed, number, distance, truncation, label], around),
            (walk, [columns, seed, number, truncation, label], path),
        ):
            gradio.on(
                [it.change for it in chosen],
                functools.partial(draw, of=of),
                chosen,
                shown,
                api_name=of.__name__,
                show_progress="hidden",
            )
    return blocks


def application(trained: TrainedGenerator, port: int) -> LocalOnly:
    """The ASGI application of the page, for a server on 127.0.0.1:`port`."""
    gradio = _gradio()
    import fastapi

    blocks = page(trained)
    pictures = Path(os.path.abspath(os.environ["GRADIO_TEMP_DIR"]))

    # gradio's own theme loads its fonts from another host.
    theme = gradio.themes.Default(font=["sans-serif"], font_mono=["monospace"])
    app = fastapi.FastAPI(openapi_url=None)
    gradio.mount_gradio_app(app, blocks, "/", "127.0.0.1", port, ssr_mode=False, theme=theme)
    return LocalOnly(app, port, pictures, _functions(blocks))


def _functions(blocks: Any) -> dict[str | int, list[Argument]]:
    """Arguments of each function of the page, by its name and by its number: all are sliders."""
    functions: dict[str | int, list[Argument]] = {}
    for number, function in blocks.fns.items():
        arguments = [
            Argument(it.label.partition(":")[0], it.minimum, it.maximum, it.step == 1) for it in function.inputs
        ]
        functions[number] = functions[function.api_name] = arguments
    return functions


class Server:
    """The page on 127.0.0.1, served by a thread from the start of this object until `close`."""

    def __init__(self, trained: TrainedGenerator, port: int) -> None:
        import uvicorn

        config = uvicorn.Config(
            application(trained, port), "127.0.0.1", port, log_level="warning", timeout_graceful_shutdown=1
        )
        self.url = f"http://127.0.0.1:{port}/"
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise ArgumentError("--port", port, "must be a free port; the page could not be served")
            time.sleep(0.02)

    def wait(self) -> None:
        while self._thread.is_alive():  # a join without a timeout cannot be interrupted on Windows
            self._thread.join(1)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()
