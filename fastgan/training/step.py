"""The arithmetic of one step: from images and sample positions to losses.

Everything here is a function of static shapes: there is no device-to-host synchronization, and no Python branch depends
on data. A step then never waits for its device, and is the same sequence of operations each time. A test counts the
host reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.config import Precision
from fastgan.nn.shared_weights import shared_weights
from fastgan.objectives import Loss, both_penalty
from fastgan.training.augmentation import Augmentation
from fastgan.utils import counter_rng

_AUTOCAST: dict[str, torch.dtype | None] = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Critic = Callable[[Tensor, Tensor | None], Tensor]


Regularizer = Callable[..., Tensor]
"""Penalty on a critic, `(critic, real, fake, *, weight, scale=None)`, for real and fake images [N, C, R, R],
interpolation weights [N] and a loss scale; what else it takes is its own (`fastgan.objectives`)."""


class Step:
    """Losses of a generator and a discriminator on one micro-batch.

    Args:
        generator, discriminator: the networks of the engines.
        loss: the adversarial loss.
        penalty: the regularizer that is part of the discriminator's loss, with its coefficient, or None.
        penalty_every: with more than 1, the penalty is no part of the loss, but in `penalty_loss`.
        penalty_sigma: step of finite differences, in place of second derivatives; None: exact.
        drift: coefficient of the mean squared score of real images.
        num_classes: number of classes; 0: the networks take no labels.
        seed: of latents, interpolation weights and labels.
        precision: fp32, tf32 (the same here, see `torch_settings.allow_tf32`), bf16 or fp16 (autocast).
        augmentation: of every image that the discriminator sees, or None.

    Attributes:
        penalty_scale: scale of the penalty's inner gradient in fp16, a scalar on the device; None: 1.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        *,
        loss: Loss,
        penalty: tuple[float, Regularizer] | None = None,
        penalty_every: int = 1,
        penalty_sigma: float | None = None,
        drift: float = 0.0,
        num_classes: int = 0,
        seed: counter_rng.Seed = 0,
        precision: Precision = "fp32",
        augmentation: Augmentation | None = None,
    ) -> None:
        self.generator = generator
        self.discriminator = discriminator
        self.loss = loss
        self.penalty = penalty
        self.penalty_every = penalty_every
        self.penalty_sigma = penalty_sigma
        self.drift = drift
        self.num_classes = num_classes
        self.seed = seed
        self.autocast_dtype = _AUTOCAST[precision]
        self.penalty_scale: Tensor | None = None
        self.augmentation = augmentation
        self.latent: int = generator.latent  # type: ignore[assignment]

    def modules(self) -> dict[str, nn.Module]:
        """What has the tensors that a step reads and writes, by name."""
        found = {"generator": self.generator, "discriminator": self.discriminator}
        return found if self.augmentation is None else {**found, "augmentation": self.augmentation}

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast_dtype)

    def _critics(self, stream: str, positions: Tensor, count: int, shape: torch.Size) -> list[Critic]:
        """The discriminator as `count` functions of images and labels, each behind an augmentation of its own."""
        if self.augmentation is None:
            return [self.discriminator] * count

        def behind(augment: Callable[[Tensor], Tensor]) -> Critic:
            return lambda images, labels: self.discriminator(augment(images), labels)

        return [behind(augment) for augment in self.augmentation.draw(positions, stream, count, shape)]

    @shared_weights()
    def discriminator_loss(
        self, real: Tensor, positions: Tensor, labels: Tensor | None = None, *, generator_first: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of the discriminator and what to log, each a scalar on the device.

        Args:
            real: [N, C, R, R] in [-1, 1].
            positions: int64 [N], the global index of each sample.
            labels: int64 [N].
            generator_first: whether fake images are made before real ones are scored. The network that was updated
                last should be used last, as the all-reduce of its gradients may still be running.
        """
        labels = labels if self.num_classes else None
        of_real, of_fake, of_penalty = self._critics("D's step", positions, 3, real.shape)
        with self._autocast(real.device):
            if not generator_first:
                score_real = of_real(real, labels)
            fake = self._fake(real, positions, labels)
            if generator_first:
                score_real = of_real(real, labels)
            score_fake = of_fake(fake, labels).float()
            score_real = score_real.float()
        loss = self.loss.discriminator(score_real, score_fake)
        seen = {"score_real": score_real.mean(), "score_fake": score_fake.mean()}
        if self.augmentation is not None:
            seen |= self.augmentation.observe(self.loss.margin(score_real, score_fake))
        if self.drift:
            loss = loss + self.drift * score_real.square().mean()
        if self.penalty is not None and self.penalty_every == 1:
            # Scores behind the penalty's augmentation, and in its precision, can be used once more.
            known = self.augmentation is None and self.autocast_dtype is None
            scores = (score_real, score_fake) if known else (None, None)
            penalty = self._penalty(of_penalty, real, fake, positions, labels, scores)
            seen["penalty"] = penalty
            loss = loss + self.penalty[0] * penalty
        seen["loss_d"] = loss
        return loss, {name: value.detach() for name, value in seen.items()}

    def _fake(self, real: Tensor, positions: Tensor, labels: Tensor | None) -> Tensor:
        """Generated images of a discriminator step, in the dtype of the real ones."""
        with torch.no_grad():
            latent = counter_rng.normal(self.seed, "latent of D's step", positions, self.latent)
            return self.generator(latent, labels).to(real.dtype)

    def _penalty(
        self,
        critic: Critic,
        real: Tensor,
        fake: Tensor,
        positions: Tensor,
        labels: Tensor | None,
        scores: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Tensor:
        """The penalty without its coefficient; `scores`: of real and fake images, where they are known."""
        assert self.penalty is not None
        rest: dict[str, Any] = {} if self.penalty_scale is None else {"scale": self.penalty_scale}
        if self.penalty_sigma is not None:

            def differences(of: str, scores: Tensor | None) -> dict[str, Any]:
                u = counter_rng.normal(self.seed, f"direction at {of} images", positions, real[0].numel())
                common = {"method": "finite-difference", "sigma": self.penalty_sigma}
                return {**common, "direction": u.view(real.shape), "scores": scores}

            rest = differences("real", scores[0])
            if self.penalty[1] is both_penalty:
                rest["of_fake"] = differences("generated", scores[1])
        weight = counter_rng.uniform(self.seed, "interpolation", positions, 1)[:, 0]
        with self._autocast(real.device):
            return self.penalty[1](lambda x: critic(x, labels), real, fake, weight=weight, **rest)

    @shared_weights()
    def penalty_loss(
        self, real: Tensor, positions: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The penalty's part of the loss, `penalty_every` times, for a step of its own; arguments as there.

        Lazy regularization (Karras et al. 2020, "Analyzing and improving the image quality of StyleGAN", appendix B).
        """
        assert self.penalty is not None
        labels = labels if self.num_classes else None
        *_, of_penalty = self._critics("D's step", positions, 3, real.shape)
        with self._autocast(real.device):
            fake = self._fake(real, positions, labels)
        penalty = self._penalty(of_penalty, real, fake, positions, labels)
        return self.penalty_every * self.penalty[0] * penalty, {"penalty": penalty.detach()}

    @property
    def metrics(self) -> list[str]:
        """Names of what both losses log, in order; the same on ranks that compute none."""
        penalty = ["penalty"] if self.penalty is not None else []
        augmentation = self.augmentation.metrics if self.augmentation is not None else ()
        return ["loss_d", "loss_g", *penalty, "score_fake", "score_real", *augmentation]

    def generator_loss(
        self, positions: Tensor, real: Tensor | None = None, real_labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of the generator and what to log.

        Args:
            positions: int64 [N], those of the last discriminator step.
            real, real_labels: its images and their labels, for a loss that is `paired`.
        """
        with self._autocast(positions.device):
            latent = counter_rng.normal(self.seed, "latent of G's step", positions, self.latent)
            labels = None
            if self.num_classes:
                labels = counter_rng.integers(self.seed, "label of G's step", positions, self.num_classes)
            fake = self.generator(latent, labels)
            of_fake, of_real = self._critics("G's step", positions, 2, fake.shape)
            scores = of_fake(fake, labels).float()
            pairs = []
            if self.loss.paired:
                assert real is not None
                with torch.no_grad():
                    score_real = of_real(real, real_labels if self.num_classes else None)
                pairs = [score_real.float()]
        loss = self.loss.generator(scores, *pairs)
        return loss, {"loss_g": loss.detach()}


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Without gradients for the parameters of `module`: none are computed, and no hook of an engine runs."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
