"""Adversarial losses: pure functions of scores, in float32.

Scores are logits, [N]; each loss is the mean over samples. `--loss` takes the names in `LossName` of
`fastgan/config/sections.py`; `register` makes further ones known to Python programs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


def _score(real: Tensor, fake: Tensor) -> Tensor:
    return real


def _difference(real: Tensor, fake: Tensor) -> Tensor:
    return real - fake


class Loss(NamedTuple):
    """The losses of both networks.

    Attributes:
        discriminator: (scores of real images, scores of fake images) -> scalar.
        generator: scores of fake images -> scalar; where `paired`, (those of fake, those of real images) -> scalar.
        margin: (scores of real images, scores of fake images) -> [N], positive where the discriminator takes a real
            image for real. Where scores have no zero, as a constant may be added to all, it compares pairs.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[..., Tensor]
    margin: Callable[[Tensor, Tensor], Tensor] = _score
    paired: bool = False


def minimax(saturating: bool = False) -> Loss:
    """-log D(x) - log(1 - D(G(z))), where D is the sigmoid of the score (Goodfellow et al. 2014, eq. 1).

    The generator maximizes log D(G(z)), section 3's remedy for vanishing gradients, or with `saturating` minimizes
    log(1 - D(G(z))), as in equation 1.
    """

    def discriminator(real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    def generator(fake: Tensor) -> Tensor:
        return -F.softplus(fake).mean() if saturating else F.softplus(-fake).mean()

    return Loss(discriminator, generator)


def least_squares(a: float = 0.0, b: float = 1.0, c: float = 1.0) -> Loss:
    """Half squared distances to the labels a (fake), b (real) and c (for the generator) (Mao et al. 2017, eq. 2)."""

    def discriminator(real: Tensor, fake: Tensor) -> Tensor:
        return 0.5 * ((real - b).square().mean() + (fake - a).square().mean())

    def generator(fake: Tensor) -> Tensor:
        return 0.5 * (fake - c).square().mean()

    def margin(real: Tensor, fake: Tensor) -> Tensor:
        return (real - 0.5 * (a + b)) * (b - a)

    return Loss(discriminator, generator, margin)


def wasserstein() -> Loss:
    """Difference of mean scores (Arjovsky et al. 2017, eq. 2); the critic needs a regularizer to stay Lipschitz."""

    def discriminator(real: Tensor, fake: Tensor) -> Tensor:
        return fake.mean() - real.mean()

    def generator(fake: Tensor) -> Tensor:
        return -fake.mean()

    return Loss(discriminator, generator, _difference)


def hinge() -> Loss:
    """max(0, 1 - D(x)) + max(0, 1 + D(G(z))) (Lim and Ye 2017; Zhang et al. 2018, eq. 4)."""

    def discriminator(real: Tensor, fake: Tensor) -> Tensor:
        return F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean()

    def generator(fake: Tensor) -> Tensor:
        return -fake.mean()

    return Loss(discriminator, generator)


def relativistic() -> Loss:
    """log(1 + exp(D(G(z)) - D(x))) over pairs of one real and one generated image, and the same with the sign changed.

    The pairing loss of Jolicoeur-Martineau 2019 as in Huang et al. 2024, eq. 2: the generator moves its images above
    real ones rather than above a boundary, so that no mode may stay below it.
    """

    def discriminator(real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(fake - real).mean()

    def generator(fake: Tensor, real: Tensor) -> Tensor:
        return F.softplus(real - fake).mean()

    return Loss(discriminator, generator, _difference, paired=True)


LOSSES: dict[str, Loss] = {
    "minimax": minimax(),
    "minimax-saturating": minimax(saturating=True),
    "least-squares": least_squares(),
    "wasserstein": wasserstein(),
    "hinge": hinge(),
    "relativistic": relativistic(),
}
"""Losses by name, those of `register` among them."""
_OWN = frozenset(LOSSES)


def register(name: str, loss: Loss) -> None:
    """Make a loss of your own known in this process: `fastgan.training.train(..., objective={"loss": name})`.

    Args:
        name: up to 60 letters, digits, - and _; not that of a loss of fastgan. Another one replaces the one before.
        loss: its functions.

    Raises:
        ValueError: the name cannot be used.
    """
    if not re.fullmatch(r"[\w-]{1,60}", name) or name in _OWN:
        raise ValueError(f"name must be 1 to 60 letters and digits that name no loss of fastgan, got {name!r}")
    LOSSES[name] = loss
