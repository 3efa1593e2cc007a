"""Metrics from the classes of generated images: inception score, and modes."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastgan.evaluation.statistic import Sums


class ClassScore(Sums):
    """Inception score: exp of the mean KL(p(y|x) || p(y)), over 10 parts of the set (Salimans et al. 2016, section 4).

    Image i belongs to part i mod 10. Only sums over each part are stored, in float64: memory does not grow with the
    number of images, and the sums of several ranks can be added.
    """

    PARTS = 10
    FIELDS: ClassVar = {"count": "count", "probability": "probability", "negentropy": "negentropy"}

    def __init__(self) -> None:
        self.count = torch.zeros(self.PARTS, dtype=torch.float64)
        self.probability = torch.zeros(self.PARTS, 0, dtype=torch.float64)  # the number of classes is not known yet
        self.negentropy = torch.zeros(self.PARTS, dtype=torch.float64)

    def update(self, indices: Tensor, logits: Tensor) -> None:
        """Add images `indices` (int64 [N]) with logits [N, classes]."""
        part = indices % self.PARTS
        log_p = logits.cpu().double().log_softmax(dim=1)
        p = log_p.exp()
        if not self.probability.shape[1]:
            self.probability = torch.zeros(self.PARTS, p.shape[1], dtype=torch.float64)
        self.count.index_add_(0, part, torch.ones_like(log_p[:, 0]))
        self.probability.index_add_(0, part, p)
        self.negentropy.index_add_(0, part, torch.special.xlogy(p, p).sum(dim=1))

    def merge(self, other: ClassScore) -> None:
        if not self.probability.shape[1]:
            self.load_state(other.state())
        elif other.probability.shape[1]:
            super().merge(other)

    def result(self) -> tuple[float, float]:
        """Mean and standard deviation over the parts that have images; the score is 1 to the number of classes."""
        used = self.count > 0
        p = self.probability[used] / self.count[used, None]
        divergence = self.negentropy[used] / self.count[used] - torch.special.xlogy(p, p).sum(dim=1)
        score = divergence.exp()
        return score.mean().item(), score.std(correction=0).item()


class ModeCounts(Sums):
    """Number of images in each mode.

    A mode is a class, or for images whose C channels are classified separately a C-tuple of classes.

    Attributes:
        counts: images in each mode, int64 [modes].
        confident: of these, images whose channels all have a class with a probability of at least `CONFIDENT`.
    """

    CONFIDENT = 0.9
    # Names in stored files are those of an earlier version.
    FIELDS: ClassVar = {"said": "counts", "sure": "confident"}

    def __init__(self, classes: int, channels: int) -> None:
        self.classes, self.channels = classes, channels
        self.counts = torch.zeros(classes**channels, dtype=torch.int64)
        self.confident = torch.zeros(classes**channels, dtype=torch.int64)

    def update(self, probability: Tensor) -> None:
        """Add images with class probabilities [N, channels, classes]."""
        top = probability.cpu().max(dim=2)
        place = self.classes ** torch.arange(self.channels - 1, -1, -1)
        mode = (top.indices * place).sum(dim=1)
        self.counts += torch.bincount(mode, minlength=len(self.counts))
        confident = mode[(top.values >= self.CONFIDENT).all(dim=1)]
        self.confident += torch.bincount(confident, minlength=len(self.confident))

    def result(self, expected: Tensor) -> dict[str, float]:
        """Metrics against the probabilities of the modes in real images.

        Args:
            expected: probabilities [modes].

        Returns:
            "modes": number of modes with a confident image; "confident": share of confident images; "kl": KL(generated
            || expected), in nats (Metz et al. 2017). All images count in the last, so that images which belong to no
            class cannot improve it.
        """
        total = int(self.counts.sum())
        q = self.counts.double() / total
        kl = (torch.special.xlogy(q, q) - torch.special.xlogy(q, expected.double())).sum().item()
        return {"modes": int((self.confident > 0).sum()), "confident": int(self.confident.sum()) / total, "kl": kl}

    def state(self) -> dict[str, Tensor]:
        return {"shape": torch.tensor([self.classes, self.channels]), **super().state()}
