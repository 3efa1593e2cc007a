"""A trained generator from a run, an exported file or by name: `fastgan.load("RUN").sample(16, seed=0)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.errors import ArgumentError, printable
from fastgan.ops.qualification.drawing import drawing
from fastgan.utils import counter_rng
from fastgan.utils.system import missing_device

__all__ = ["TrainedGenerator", "generate", "great_circle", "load"]


class TrainedGenerator:
    """The averaged generator of a run or of an exported file, in evaluation mode.

    Attributes:
        module: latent [N, latent] (and labels int64 [N] if `num_classes` > 0) -> images [N, C, R, R]; the network, or
            a `fastgan.export.formats.ExportedModule`.
        meta: metadata of its file: "networks" (arguments of `fastgan.models.build`), and if known "variant", "images"
            (real images seen) and others.
    """

    def __init__(self, module: nn.Module, meta: dict[str, Any]) -> None:
        self.module = module
        self.meta = meta

    def __str__(self) -> str:
        """As in `pggan at 150 kimg`; without the second part if it is not known."""
        name = self.meta.get("variant") or self.meta["networks"]["model"]
        seen = self.meta.get("images")
        return printable(f"{name} at {seen / 1000:g} kimg" if seen else str(name))

    @property
    def num_classes(self) -> int:
        return int(self.meta["networks"]["num_classes"])

    @property
    def class_names(self) -> list[str]:
        """Names of the classes by label; numbers where the data had no names."""
        names = self.meta.get("classes")
        known = isinstance(names, list) and len(names) == self.num_classes
        return [str(name) for name in (names if known else range(self.num_classes))]  # type: ignore[union-attr]

    @property
    def latent(self) -> int:
        """Size of the latent vector."""
        return int(self.meta["networks"]["latent"])

    @property
    def truncates(self) -> bool:
        """Whether truncation has an effect: not for pggan, which normalizes its latents."""
        return self.meta["networks"]["model"] != "pggan"

    def sample(self, n: int, seed: int = 0, truncation: float = 1.0) -> Tensor:
        """`n` images, float32 [n, C, R, R] in [-1, 1]. Sample i depends only on (seed, i).

        Args:
            truncation: factor of the latents, in (0, 1]; a smaller one gives images that vary less.

        Raises:
            ValueError: an argument is out of its range, or `truncation` is below 1 and `truncates` is False.
        """
        self._require_valid(seed, truncation, n=n)
        return sample_images(self.module, n, seed, self.meta["networks"], truncation)

    def interpolate(self, rows: int, columns: int, seed: int = 0, truncation: float = 1.0) -> Tensor:
        """`rows` interpolations of `columns` images between two random latents, float32 [rows * columns, C, R, R].

        They follow the great circle: Gaussian latents of high dimension lie near a sphere (White 2016).

        Raises:
            ValueError: as for `sample`.
        """
        self._require_valid(seed, truncation, rows=rows, columns=columns)
        device = device_of(self.module)
        latents = counter_rng.normal(seed, "sample", torch.arange(2 * rows, device=device), self.latent)
        t = torch.linspace(0, 1, columns, device=device)
        walk = great_circle(latents[:rows, None], latents[rows:, None], t[None, :, None]).flatten(0, 1)
        labels = None
        if self.num_classes:
            labels = (torch.arange(rows, device=device) % self.num_classes).repeat_interleave(columns)
        return generate(self.module, truncation * walk, labels, self.meta["networks"]["resolution"])

    def _require_valid(self, seed: int, truncation: float, **counts: int) -> None:
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        if not 0 < truncation <= 1:
            raise ValueError(f"truncation must be above 0 and at most 1, got {truncation}")
        if truncation < 1 and not self.truncates:
            raise ValueError(f"truncation must be 1 for pggan, which normalizes its latents, got {truncation}")


def great_circle(start: Tensor, end: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation from `start` (t = 0) to `end` (t = 1); all are broadcast to [..., latent]."""
    unit = torch.nn.functional.normalize
    angle = torch.acos((unit(start, dim=-1) * unit(end, dim=-1)).sum(-1, keepdim=True).clamp(-1, 1))
    circle = (torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end) / torch.sin(angle)
    # Parallel latents (always, if the latent has one number) define no circle: interpolate linearly.
    return torch.where(torch.sin(angle) < 1e-5, (1 - t) * start + t * end, circle)


def device_of(generator: nn.Module) -> torch.device:
    """The device of a generator's inputs."""
    device = getattr(generator, "device", None)
    return device if isinstance(device, torch.device) else next(generator.parameters()).device


@torch.no_grad()
def generate(generator: nn.Module, latent: Tensor, labels: Tensor | None, resolution: int) -> Tensor:
    """Images of latents [N, latent], float32 [N, C, R, R] in [-1, 1] on the CPU, in batches that fit their size."""
    batch = max(1, min(64, 2**20 // resolution**2))
    parts = []
    with drawing(latent.device):
        for i in range(0, len(latent), batch):
            images = generator(latent[i : i + batch], None if labels is None else labels[i : i + batch])
            parts.append(images.float().clamp(-1, 1).cpu())
    return torch.cat(parts)


def sample_images(generator: nn.Module, n: int, seed: int, networks: dict[str, Any], truncation: float = 1.0) -> Tensor:
    """`n` images, float32 [n, C, R, R] in [-1, 1] on the CPU. Sample i depends only on (seed, i).

    Args:
        networks: the generator's arguments of `fastgan.models.build`. With classes, sample i has label
            i mod `num_classes`.
        truncation: factor of the latents.
    """
    index = torch.arange(n, device=device_of(generator))
    latent = counter_rng.normal(seed, "sample", index, networks["latent"]) * truncation
    labels = index % networks["num_classes"] if networks["num_classes"] else None
    return generate(generator, latent, labels, networks["resolution"])


def _require_device(name: str) -> None:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ArgumentError("device", name, "must be cpu, cuda, cuda:N or mps") from None
    if device.type == "mps":
        problem = missing_device("mps")
        if problem:
            raise ArgumentError("device", name, problem)
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        available = f"cuda:0 to cuda:{gpus - 1}, or cpu" if gpus else "cpu; torch sees no GPU here"
        raise ArgumentError("device", name, f"must be {available}")


def load(path: str | Path, device: str = "cpu") -> TrainedGenerator:
    """The averaged generator of a run's newest checkpoint, of one checkpoint, of an exported file, or by name.

    Nothing in the file is executed.

    Args:
        path: a run, a checkpoint, a .safetensors or .onnx file that `fastgan export` or `save_pretrained` wrote, a
            folder with one, or the name of a generator that comes with fastgan (`fastgan.trained.names()`).
        device: "cpu", "cuda", "cuda:1" or "mps"; an ONNX file runs on the CPU.

    Raises:
        ArgumentError: `path` has no generator, is damaged or holds a program, or there is no such device. (It is a
            ValueError.)
    """
    from fastgan import checkpoint, models, trained
    from fastgan.export import formats

    _require_device(device)
    path = trained.resolve(path)
    try:
        file = formats.find_export(path)
        if file is not None:
            return TrainedGenerator(*formats.read(file, device))
        stored = checkpoint.read(path, "RUN")
    except ArgumentError as error:
        raise trained.hint(error) from None
    stored.require("networks")
    try:
        generator = models.load_generator(stored.meta["networks"], stored.generator())
    except ValueError as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError("RUN", str(stored.path), f"generator.safetensors does not fit: {error}") from None
    except FileNotFoundError:
        return load(path, device)  # training has replaced this checkpoint by a newer one since it was verified
    return TrainedGenerator(generator.to(device).eval().requires_grad_(False), stored.meta)
