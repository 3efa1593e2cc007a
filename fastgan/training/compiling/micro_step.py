"""What one micro-batch computes before its optimizer step, as functions of tensors that can be recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastgan import data
from fastgan.compiled.recording import Outputs, with_strides_of
from fastgan.models.pggan import Progressive
from fastgan.training.distributed.engine import trainable_parameters
from fastgan.training.step import Step, frozen


class MicroStep(NamedTuple):
    """Results of a micro-batch.

    Attributes:
        loss: of the network that is trained.
        seen: what to log.
        gradients: of its trainable parameters, in their order, divided by the accumulation; None where there is none.
        largest: the largest magnitude in each gradient, float32 [parameters]; 0 where there is none.
    """

    loss: Tensor
    seen: dict[str, Tensor]
    gradients: list[Tensor | None]
    largest: Tensor


def real_images(images: Tensor, discriminator: nn.Module, memory_format: torch.memory_format) -> Tensor:
    """The images of a batch as the discriminator gets them: in its memory format, blended while a level fades in."""
    real = images.to(memory_format=memory_format)
    if isinstance(discriminator, Progressive) and discriminator.fade:
        real = data.fade(real, discriminator.alpha)
    return real


def _largest(gradients: Sequence[Tensor | None], like: Tensor) -> Tensor:
    zero = torch.zeros((), device=like.device)
    norms = [zero if g is None else torch.linalg.vector_norm(g, ord=torch.inf, dtype=torch.float32) for g in gradients]
    return torch.stack(norms)


@dataclass(frozen=True)
class MicroSteps:
    """The functions of a micro-batch, in eager mode, by the names of their programs.

    Attributes:
        step: computes the losses.
        accumulation: micro-batches of an update.
        memory_format: of images.
    """

    step: Step
    accumulation: int
    memory_format: torch.memory_format

    def discriminator(self, images: Tensor, positions: Tensor, labels: Tensor | None = None) -> MicroStep:
        """Arguments as for `Step.discriminator_loss`; `images` as the pipeline has them."""
        real = real_images(images, self.step.discriminator, self.memory_format)
        loss, seen = self.step.discriminator_loss(real, positions, labels)
        return self._finish(self.step.discriminator, loss, seen)

    def penalty(self, images: Tensor, positions: Tensor, labels: Tensor | None = None) -> MicroStep:
        """The step of the penalty alone; arguments as for `discriminator`."""
        real = real_images(images, self.step.discriminator, self.memory_format)
        loss, seen = self.step.penalty_loss(real, positions, labels)
        return self._finish(self.step.discriminator, loss, seen)

    def generator(self, positions: Tensor, real: Tensor | None = None, labels: Tensor | None = None) -> MicroStep:
        """Arguments as for `Step.generator_loss`."""
        with frozen(self.step.discriminator):
            loss, seen = self.step.generator_loss(positions, real, labels)
            return self._finish(self.step.generator, loss, seen)

    def _finish(self, network: nn.Module, loss: Tensor, seen: dict[str, Tensor]) -> MicroStep:
        parameters = [p for _, p in trainable_parameters(network)]
        mean = loss / self.accumulation if self.accumulation > 1 else loss
        found = torch.autograd.grad(mean, parameters, allow_unused=True)
        gradients: list[Tensor | None] = [
            None if g is None else with_strides_of(g, p) for g, p in zip(found, parameters, strict=True)
        ]
        return MicroStep(loss.detach(), seen, gradients, _largest(gradients, loss))


def flat(function: Callable[..., MicroStep], names: list[str]) -> Callable[..., Outputs]:
    """`function` with a list of tensors for a result, which `unflat` reads; the names of `seen` go into `names`."""

    def run(*inputs: Tensor) -> Outputs:
        found = function(*inputs)
        names[:] = found.seen
        return [found.loss, found.largest, *found.seen.values(), *found.gradients]

    return run


def unflat(outputs: Outputs, names: Sequence[str]) -> MicroStep:
    """The result of a recorded `flat` function."""
    loss, largest, *rest = outputs
    assert loss is not None and largest is not None
    seen = {name: value for name, value in zip(names, rest, strict=False) if value is not None}
    return MicroStep(loss, seen, rest[len(names) :], largest)
