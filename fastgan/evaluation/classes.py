"""Metrics of what a classifier says of generated images: inception score, and modes."""

from __future__ import annotations

import torch
from torch import Tensor


class ClassScore:
    """Inception score (Salimans et al. 2016, section 4): exp of the mean KL(p(y|x) || p(y)), over 10 parts of the set.

    Image i belongs to part i mod 10; sums over each part are kept, in float64, so that memory does not grow with their
    number and ranks add up.
    """

    PARTS = 10

    def __init__(self, classes: int) -> None:
        self.count = torch.zeros(self.PARTS, dtype=torch.float64)
        self.probability = torch.zeros(self.PARTS, classes, dtype=torch.float64)
        self.negentropy = torch.zeros(self.PARTS, dtype=torch.float64)

    def update(self, indices: Tensor, logits: Tensor) -> None:
        """Take in images `indices` (int64 [N]) with logits [N, classes]."""
        part = indices % self.PARTS
        log_p = logits.cpu().double().log_softmax(dim=1)
        p = log_p.exp()
        self.count.index_add_(0, part, torch.ones_like(log_p[:, 0]))
        self.probability.index_add_(0, part, p)
        self.negentropy.index_add_(0, part, torch.special.xlogy(p, p).sum(dim=1))

    def merge(self, other: ClassScore) -> None:
        self.count += other.count
        self.probability += other.probability
        self.negentropy += other.negentropy

    def result(self) -> tuple[float, float]:
        """Mean and standard deviation over the parts that have images; 1 to the number of classes."""
        used = self.count > 0
        p = self.probability[used] / self.count[used, None]
        divergence = self.negentropy[used] / self.count[used] - torch.special.xlogy(p, p).sum(dim=1)
        score = divergence.exp()
        return score.mean().item(), score.std(correction=0).item()

    def state(self) -> dict[str, Tensor]:
        return {"count": self.count, "probability": self.probability, "negentropy": self.negentropy}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> ClassScore:
        score = cls(0)
        score.count, score.probability = state["count"].clone(), state["probability"].clone()
        score.negentropy = state["negentropy"].clone()
        return score


class ModeCounts:
    """Which modes images are of, and how surely.

    A mode is a class, or with C channels classified one by one a C-tuple of classes.

    Attributes:
        said: int64 [modes], images given each mode; sure: those among them whose every channel has a class of
        probability `CONFIDENT` or more.
    """

    CONFIDENT = 0.9

    def __init__(self, classes: int, channels: int) -> None:
        self.classes, self.channels = classes, channels
        self.said = torch.zeros(classes**channels, dtype=torch.int64)
        self.sure = torch.zeros(classes**channels, dtype=torch.int64)

    def update(self, probability: Tensor) -> None:
        """Take in class probabilities [N, channels, classes]."""
        top = probability.cpu().max(dim=2)
        place = self.classes ** torch.arange(self.channels - 1, -1, -1)
        mode = (top.indices * place).sum(dim=1)
        self.said += torch.bincount(mode, minlength=len(self.said))
        sure = mode[(top.values >= self.CONFIDENT).all(dim=1)]
        self.sure += torch.bincount(sure, minlength=len(self.sure))

    def merge(self, other: ModeCounts) -> None:
        self.said += other.said
        self.sure += other.sure

    def result(self, expected: Tensor) -> dict[str, float]:
        """Against the real modes' probabilities `expected` [modes].

        modes: number of modes with a confident image; confident: share of images that are; kl: KL(generated ||
        expected) of the modes that images were given, in nats (Metz et al. 2017). There every image counts, confident
        or not: a generator cannot improve it by failing.
        """
        total = int(self.said.sum())
        q = self.said.double() / total
        kl = (torch.special.xlogy(q, q) - torch.special.xlogy(q, expected.double())).sum().item()
        return {"modes": int((self.sure > 0).sum()), "confident": int(self.sure.sum()) / total, "kl": kl}

    def state(self) -> dict[str, Tensor]:
        shape = torch.tensor([self.classes, self.channels])
        return {"shape": shape, "said": self.said, "sure": self.sure}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> ModeCounts:
        counts = cls(*state["shape"].tolist())
        counts.said, counts.sure = state["said"].clone(), state["sure"].clone()
        return counts
