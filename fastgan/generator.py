"""A trained generator to draw images from, wherever it is stored: `fastgan.load("RUN").sample(16, seed=0)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.errors import ArgumentError
from fastgan.utils import counter_rng


class TrainedGenerator:
    """The averaged generator of a run or of an exported file, in evaluation mode.

    Attributes:
        module: latent [N, latent] (and labels int64 [N] when `num_classes`) -> images [N, C, R, R]; the network itself,
            or what runs an exported file.
        meta: what its file says of it: variant, networks, images seen.
    """

    def __init__(self, module: nn.Module, meta: dict[str, Any]) -> None:
        self.module = module
        self.meta = meta

    def __str__(self) -> str:
        """`pggan at 150 kimg`, or what is known of it."""
        name = self.meta.get("variant") or self.meta["networks"]["model"]
        seen = self.meta.get("images")
        return f"{name} at {seen / 1000:g} kimg" if seen else name

    @property
    def num_classes(self) -> int:
        return int(self.meta["networks"]["num_classes"])

    @property
    def latent(self) -> int:
        """Size of the latent vector."""
        return int(self.meta["networks"]["latent"])

    @property
    def truncates(self) -> bool:
        """Whether the length of a latent matters to the images: pggan normalizes it away."""
        return self.meta["networks"]["model"] != "pggan"

    def sample(self, n: int, seed: int = 0, truncation: float = 1.0) -> Tensor:
        """`n` images, float32 [n, C, R, R] in [-1, 1]; sample i depends on (seed, i) alone.

        Args:
            truncation: factor of the latents; below 1 images are nearer to the average one, and vary less.

        Raises:
            ValueError: `n` is below 1 or `seed` below 0, or this generator does not see how long a latent is.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        self._check(seed, truncation)
        return sample_images(self.module, n, seed, self.meta["networks"], truncation)

    def interpolate(self, rows: int, columns: int, seed: int = 0, truncation: float = 1.0) -> Tensor:
        """`rows` walks of `columns` images each between two random latents, float32 [rows * columns, C, R, R].

        The walk is along the great circle, on which Gaussian latents of high dimension lie (White 2016).

        Raises:
            ValueError: `rows` or `columns` is below 1, or as `sample` does.
        """
        for name, value in (("rows", rows), ("columns", columns)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._check(seed, truncation)
        device = device_of(self.module)
        ends = counter_rng.normal(seed, "sample", torch.arange(2 * rows, device=device), self.latent)
        t = torch.linspace(0, 1, columns, device=device)
        walk = great_circle(ends[:rows, None], ends[rows:, None], t[None, :, None]).flatten(0, 1)
        labels = None
        if self.num_classes:
            labels = (torch.arange(rows, device=device) % self.num_classes).repeat_interleave(columns)
        return generate(self.module, truncation * walk, labels, self.meta["networks"]["resolution"])

    def _check(self, seed: int, truncation: float) -> None:
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        if not 0 < truncation <= 1:
            raise ValueError(f"truncation must be above 0 and up to 1, got {truncation}")
        if truncation < 1 and not self.truncates:
            raise ValueError(f"truncation: was {truncation}; pggan normalizes its latents, for it it may be 1")


def great_circle(start: Tensor, end: Tensor, t: Tensor) -> Tensor:
    """The latents at share `t` of the way from `start` to `end`, all broadcast against each other, [..., latent]."""
    unit = torch.nn.functional.normalize
    angle = torch.acos((unit(start, dim=-1) * unit(end, dim=-1)).sum(-1, keepdim=True).clamp(-1, 1))
    circle = (torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end) / torch.sin(angle)
    # Between latents on one line, as all of one number are, no circle is the great one.
    return torch.where(torch.sin(angle) < 1e-5, (1 - t) * start + t * end, circle)


def device_of(generator: nn.Module) -> torch.device:
    """Where its latents belong."""
    found = getattr(generator, "device", None)
    return found if isinstance(found, torch.device) else next(generator.parameters()).device


@torch.no_grad()
def generate(generator: nn.Module, latent: Tensor, labels: Tensor | None, resolution: int) -> Tensor:
    """Images of latents [N, latent]: float32 [N, C, R, R] in [-1, 1] on the CPU, made few at a time if large."""
    batch = max(1, min(64, 2**20 // resolution**2))
    parts = []
    for i in range(0, len(latent), batch):
        images = generator(latent[i : i + batch], None if labels is None else labels[i : i + batch])
        parts.append(images.float().clamp(-1, 1).cpu())
    return torch.cat(parts)


def sample_images(generator: nn.Module, n: int, seed: int, networks: dict[str, Any], truncation: float = 1.0) -> Tensor:
    """`n` images [n, C, R, R], float32 in [-1, 1] on the CPU; sample i depends on (seed, i) alone.

    `networks` are the `network_values` of the generator. With classes, labels go round: sample i has label
    i mod `num_classes`. `truncation` scales the latents.
    """
    index = torch.arange(n, device=device_of(generator))
    latent = counter_rng.normal(seed, "sample", index, networks["latent"]) * truncation
    labels = index % networks["num_classes"] if networks["num_classes"] else None
    return generate(generator, latent, labels, networks["resolution"])


def _check_device(device: str) -> None:
    try:
        asked = torch.device(device)
    except (RuntimeError, TypeError):
        raise ArgumentError("device", device, "must be cpu, cuda or cuda:N") from None
    if asked.type == "cuda" and (asked.index or 0) >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        here = f"cuda:0 to cuda:{gpus - 1}, or cpu" if gpus else "cpu: torch sees no GPU here"
        raise ArgumentError("device", device, f"must be {here}")


def load(path: str | Path, device: str = "cpu") -> TrainedGenerator:
    """The averaged generator of a run's newest checkpoint, of one checkpoint folder, or of an exported file.

    Args:
        path: a run, a checkpoint, a file that `fastgan export` or `save_pretrained` wrote, or a folder with one.
        device: "cpu", "cuda" or "cuda:1"; an ONNX file runs on the CPU.

    Raises:
        ArgumentError (a ValueError): there is none, it is damaged, or it holds what loading would have to execute; or
            there is no such device.
    """
    from fastgan import checkpoint, models
    from fastgan.export import formats

    _check_device(device)
    path = Path(path)
    file = formats.find(path)
    if file is not None:
        return TrainedGenerator(*formats.read(file, device))
    stored = checkpoint.read(path, "RUN")
    generator, _ = models.build(**stored.meta["networks"])
    try:
        generator.load_state_dict(stored.generator())
    except FileNotFoundError:
        return load(path, device)  # who trains dropped it for a newer one since it was verified
    return TrainedGenerator(generator.to(device).eval().requires_grad_(False), stored.meta)
