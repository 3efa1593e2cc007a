"""The arithmetic of one step: from images and sample positions to losses.

Everything here is a function of static shapes. Nothing is read back to the host and no Python branch looks at data, so
that a step neither waits for its device nor changes from one call to the next; a test counts the host reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from fastgan.objectives import Loss
from fastgan.utils import counter_rng


class Regularizer(Protocol):
    """Penalty on a critic between real and fake images; `weight` [N] says where between."""

    def __call__(self, critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, *, weight: Tensor) -> Tensor: ...


class Step:
    """Losses of a generator and a discriminator on one micro-batch.

    Args:
        generator, discriminator: the networks as the engines hold them.
        loss: the adversarial loss.
        penalty: the regularizer that is part of the discriminator's loss, with its coefficient, or None.
        drift: coefficient of the mean squared score of real images.
        num_classes: above 0, the networks take labels.
        seed: of latents, interpolation weights and labels.
        precision, penalty_precision: fp32, or bf16 for autocast.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        *,
        loss: Loss,
        penalty: tuple[float, Regularizer] | None = None,
        drift: float = 0.0,
        num_classes: int = 0,
        seed: int = 0,
        precision: str = "fp32",
        penalty_precision: str = "fp32",
    ) -> None:
        self.generator = generator
        self.discriminator = discriminator
        self.loss = loss
        self.penalty = penalty
        self.drift = drift
        self.num_classes = num_classes
        self.seed = seed
        self.precision = precision
        self.penalty_precision = penalty_precision
        self.latent: int = generator.latent  # type: ignore[assignment]

    def _autocast(self, device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
        if precision == "bf16":
            return torch.autocast(device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def discriminator_loss(
        self, real: Tensor, positions: Tensor, labels: Tensor | None = None, *, generator_first: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of the discriminator and what to log, each a scalar on the device.

        Args:
            real: [N, C, R, R] in [-1, 1]; positions: int64 [N], the global index of each sample; labels: int64 [N].
            generator_first: whether fake images are made before real ones are scored. The network that stepped last
                should come last, as other ranks' gradients for it may still be on their way.
        """
        labels = labels if self.num_classes else None
        with self._autocast(real.device, self.precision):
            if not generator_first:
                score_real = self.discriminator(real, labels)
            with torch.no_grad():
                latent = counter_rng.normal(self.seed, "latent of D's step", positions, self.latent)
                fake = self.generator(latent, labels)
            fake = fake.to(real.dtype)
            if generator_first:
                score_real = self.discriminator(real, labels)
            score_fake = self.discriminator(fake, labels).float()
            score_real = score_real.float()
        loss = self.loss.discriminator(score_real, score_fake)
        seen = {"score_real": score_real.mean(), "score_fake": score_fake.mean()}
        if self.drift:
            loss = loss + self.drift * score_real.square().mean()
        if self.penalty is not None:
            coefficient, regularizer = self.penalty
            weight = counter_rng.uniform(self.seed, "interpolation", positions, 1)[:, 0]
            with self._autocast(real.device, self.penalty_precision):
                penalty = regularizer(lambda x: self.discriminator(x, labels), real, fake, weight=weight)
            seen["penalty"] = penalty
            loss = loss + coefficient * penalty
        seen["loss_d"] = loss
        return loss, {name: value.detach() for name, value in seen.items()}

    @property
    def metrics(self) -> list[str]:
        """Names of what both losses log, in order; the same on a rank that computes none."""
        penalty = ["penalty"] if self.penalty is not None else []
        return ["loss_d", "loss_g", *penalty, "score_fake", "score_real"]

    def generator_loss(self, positions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of the generator; `positions`, int64 [N], are those of the last discriminator step."""
        with self._autocast(positions.device, self.precision):
            latent = counter_rng.normal(self.seed, "latent of G's step", positions, self.latent)
            labels = None
            if self.num_classes:
                labels = counter_rng.integers(self.seed, "label of G's step", positions, self.num_classes)
            scores = self.discriminator(self.generator(latent, labels), labels).float()
        loss = self.loss.generator(scores)
        return loss, {"loss_g": loss.detach()}


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for the parameters of `module` inside: none are computed, and no engine hook fires."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


class Meters:
    """Running sums of what steps log, kept on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.float()
            self._counts[name] = self._counts.get(name, 0) + 1

    def totals(self, names: list[str], device: torch.device) -> Tensor:
        """Sums and counts of `names`, float32 [2, names] on `device`; zeros for what was never added."""
        zero = torch.zeros((), device=device)
        sums = torch.stack([self._sums.get(name, zero) for name in names])
        counts = torch.tensor([self._counts.get(name, 0) for name in names], dtype=torch.float32)
        return torch.stack([sums, counts.to(device)])

    def clear(self) -> None:
        self._sums.clear()
        self._counts.clear()
