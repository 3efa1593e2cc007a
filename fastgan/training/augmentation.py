"""Augmentation of what the discriminator sees, real and generated images alike, for training with few pictures.

`Adaptive` is ADA (Karras et al. 2020, "Training generative adversarial networks with limited data"), `Differentiable`
is DiffAugment (Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training"). Both are functions of
(seed, use, position of the sample) alone, linear in the image but for an offset, and differentiable to any order. The
generator is trained through them and never draws augmented images.

The strength of ADA is a tensor on the device. A step reads it and adds to its statistics; between two steps
`Adaptive.adapt` changes it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastgan import ops
from fastgan.ops.autograd import without_autocast
from fastgan.utils import counter_rng

Map = Callable[[Tensor], Tensor]
"""From images to images."""
MAX_STRENGTH = 0.8
"""Most that ADA's strength reaches: above, augmented images look like the data often enough to leak (section 2.2)."""
ADAPT_IMAGES = 256
"""Real images between two changes of ADA's strength: the paper's four batches of 64."""


def color_basis(channels: int) -> Tensor:
    """[5, C (C + 1)]: what the coefficients of colors are multiplied with, a matrix with an offset for each.

    A color x in [-1, 1] becomes alpha P x + beta (I - P) x + gamma K x + t, where P projects onto the gray axis, and K,
    of three colors, turns about it by 90 degrees. With four channels the colors are premultiplied by the fourth, alpha:
    there the same map of colors that are not is linear too, and what is transparent stays so.
    """
    colors = 3 if channels == 4 else channels
    gray = torch.full((colors, colors), 1.0 / colors)
    turn = torch.zeros(colors, colors)
    if colors == 3:
        turn = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3.0)
    basis = torch.zeros(5, channels, channels + 1)
    for i, matrix in enumerate((gray, torch.eye(colors) - gray, turn)):
        basis[i, :colors, :colors] = matrix
    if channels < 4:
        basis[3, :colors, -1] = 1.0
    else:
        # With a = (x_4 + 1) / 2 and x + 1 - a for a times the color: M (x + 1 - a) + t a + a - 1, and M 1 = alpha.
        for column, constant in ((3, 0.5), (4, -0.5)):
            basis[3, :3, column] = 0.5
            basis[4, :3, column] = constant
        basis[0, :3, 3], basis[0, :3, 4] = -0.5, 0.5
        basis[4, 3, 3] = 1.0
    return basis.flatten(1)


def _recolor(images: Tensor, matrix: Tensor) -> Tensor:
    """Images [N, C, H, W] with new colors: `matrix` [N, C, C + 1] has a matrix and an offset for each image."""
    channels = images.shape[1]
    matrix = matrix.to(images.dtype)
    if channels == 1:
        return torch.addcmul(matrix[:, :, 1:, None], images, matrix[:, :, :1, None])
    m, offset = matrix[:, :, :channels], matrix[:, :, channels:]
    if images.is_contiguous():
        return torch.baddbmm(offset, m, images.flatten(2)).view(images.shape)
    pixels = images.permute(0, 2, 3, 1)
    return torch.baddbmm(offset.mT, pixels.flatten(1, 2), m.mT).view(pixels.shape).permute(0, 3, 1, 2)


def _rows(numbers: Tensor, count: int) -> Tensor:
    """[N, count K] -> [count N, K]."""
    return numbers.view(len(numbers), count, -1).transpose(0, 1).reshape(count * len(numbers), -1)


class Augmentation(nn.Module):
    """Base of both: (images [N, C, H, W], positions int64 [N], stream) -> images.

    Args:
        channels: of the images: 1, 3 or, premultiplied by alpha, 4; any other number is of gray values.
        seed: of the run.
    """

    metrics: tuple[str, ...] = ()
    """Names of what `observe` returns."""
    basis: Tensor

    def __init__(self, channels: int, seed: int) -> None:
        super().__init__()
        self.channels = channels
        self.seed: counter_rng.Seed = seed
        self.register_buffer("basis", color_basis(channels), persistent=False)

    def forward(self, images: Tensor, positions: Tensor, stream: str) -> Tensor:
        return self.draw(positions, stream, 1, images.shape)[0](images)

    @torch.no_grad()
    def draw(self, positions: Tensor, stream: str, count: int, shape: Sequence[int]) -> list[Map]:
        """`count` augmentations of images of these positions, from images to images of the same shape.

        One call for all that a step needs: on small images drawing takes longer than augmenting.

        Args:
            positions: int64 [N].
            stream: names the random numbers.
            count: how many.
            shape: of the images, [..., H, W].
        """
        height, width = shape[-2:]
        drawn = self._draw(positions, f"augmentation, {stream}", count, height, width)
        return [functools.partial(self._apply_float32, [t[i] for t in drawn]) for i in range(count)]

    def _apply_float32(self, drawn: list[Tensor], images: Tensor) -> Tensor:
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        with without_autocast(images):
            return self.augment(images, drawn)

    def _draw(self, positions: Tensor, stream: str, count: int, height: int, width: int) -> list[Tensor]:
        """What `augment` needs, as tensors [count, N, ...]."""
        raise NotImplementedError

    def augment(self, images: Tensor, drawn: list[Tensor]) -> Tensor:
        """Augment images with the tensors [N, ...] of one of the draws."""
        raise NotImplementedError

    def _color_matrix(self, coefficients: list[Tensor]) -> Tensor:
        """[N, C, C + 1] from alpha, beta, gamma and t of `color_basis`, each [N]."""
        rows = torch.stack([*coefficients, torch.ones_like(coefficients[0])], dim=1)
        return (rows @ self.basis).view(-1, self.channels, self.channels + 1)

    def observe(self, margins: Tensor) -> dict[str, Tensor]:
        """Take note of the discriminator's margins on real images [N] (`Loss.margin`); what to log, scalars."""
        return {}


# The columns of ADA's draws: what the numbers are multiplied with, and which of the 13 transformations they belong to.
# Uniform numbers are in (-0.5, 0.5). Angles are in radians, translations in [-1, 1] across the image, and scales and
# gains in powers of two (appendix B).
_UNIFORM = {
    "flip": (1.0, 0),
    "luma flip": (1.0, 1),
    "quarter turns": (4.0, 2),
    "whole pixels x": (0.5, 3),
    "whole pixels y": (0.5, 3),
    "rotation before": (2 * math.pi, 4),
    "rotation after": (2 * math.pi, 5),
    "hue": (2 * math.pi, 6),
}
_NORMAL = {
    "scale": (0.2, 7),
    "aspect": (0.2, 8),
    "contrast": (0.5, 9),
    "saturation": (1.0, 10),
    "shift x": (0.25, 11),
    "shift y": (0.25, 11),
    "brightness": (0.2, 12),
}
_TRANSFORMATIONS = 13
_ROTATIONS = (4, 5)


class Adaptive(Augmentation):
    """ADA's pixel blits, geometric and color transformations (the paper's choice, "bgc"), each with chance `strength`.

    Unlike in the paper's code, images are sampled bilinearly and not at twice the resolution through a wavelet.

    The strength grows while the discriminator is too sure of real images. The heuristic of the paper, r_t, is the mean
    sign of its scores on them; here of `Loss.margin`, which losses whose scores have no zero define by pairs. At
    `target` it stays as it is.

    Args:
        channels, seed: see `Augmentation`.
        target: r_t at which the strength stays (0.6 in the paper).
        kimg: thousands of real images in which the strength can rise from 0 to 1 (500 in the paper).
        strength: at the start.

    Attributes:
        strength: float32 scalar, the chance of each transformation, at most `MAX_STRENGTH` once it adapts.
        signs, seen: sum of the signs and number of the real images since the strength was last changed; float32
            scalars, exact as they are integers.
    """

    metrics = ("augment_strength", "overfitting")
    strength: Tensor
    signs: Tensor
    seen: Tensor
    scale: Tensor
    owner: Tensor
    is_rotation: Tensor

    def __init__(
        self, channels: int, seed: int, *, target: float = 0.6, kimg: float = 500.0, strength: float = 0.0
    ) -> None:
        super().__init__(channels, seed)
        self.target, self.kimg = target, kimg
        for name, value in (("strength", strength), ("signs", 0.0), ("seen", 0.0)):
            self.register_buffer(name, torch.tensor(value))
        columns = [*_UNIFORM.values(), *_NORMAL.values()]
        constants = {
            "scale": torch.tensor([scale for scale, _ in columns]),
            "owner": torch.tensor([owner for _, owner in columns]),
            "is_rotation": torch.tensor([i in _ROTATIONS for i in range(_TRANSFORMATIONS)]),
        }
        for name, tensor in constants.items():
            self.register_buffer(name, tensor, persistent=False)

    def numbers(self, positions: Tensor, stream: str, count: int) -> Tensor:
        """What each transformation is given, float32 [count N, 15], by the columns above; 0 changes nothing."""
        size = _TRANSFORMATIONS + len(_UNIFORM)
        uniform = _rows(counter_rng.uniform(self.seed, stream, positions, count * size), count)
        normal = _rows(counter_rng.normal(self.seed, f"{stream}, normal", positions, count * len(_NORMAL)), count)
        # Two rotations, so that each is less likely: together they rotate with the chance of the others.
        chance = torch.where(self.is_rotation, 1.0 - torch.sqrt(1.0 - self.strength), self.strength)
        on = (uniform[:, :_TRANSFORMATIONS] < chance).to(torch.float32)
        drawn = torch.cat([uniform[:, _TRANSFORMATIONS:] - 0.5, normal], dim=1)
        return drawn * self.scale * on.index_select(1, self.owner)

    @staticmethod
    def _theta(drawn: Tensor, height: int, width: int, cos: Tensor, sin: Tensor) -> Tensor:
        """Maps from output to input coordinates, [N, 2, 3], for `ops.affine_grid_sample`.

        cos, sin: [N, 4] of the quarter turns, the rotations before and after the change of aspect, and the hue.

        Every transformation is as likely as its inverse, so that inverses need not be taken, but for their order.
        """
        rotations = torch.stack([cos, -sin, sin, cos], dim=2).view(-1, 4, 2, 2)
        blit = torch.round(rotations[:, 0])  # exact, as the blits are
        flip = 1.0 - 2.0 * (drawn[:, 0] > 0)
        blit = torch.stack([blit[:, 0] * flip[:, None], blit[:, 1]], dim=1)
        scale, aspect = drawn[:, 8], drawn[:, 9]
        scales = torch.exp2(torch.stack([scale + aspect, scale - aspect], dim=1))
        linear = (rotations[:, 1] * scales[:, None]) @ rotations[:, 2]
        whole = [torch.round(drawn[:, 3 + i] * (0.5 * size)) * (2.0 / size) for i, size in enumerate((width, height))]
        offset = linear @ drawn[:, 12:14, None] + torch.stack(whole, dim=1)[:, :, None]
        return blit @ torch.cat([linear, offset], dim=2)

    def _draw(self, positions: Tensor, stream: str, count: int, height: int, width: int) -> list[Tensor]:
        """Maps for `ops.affine_grid_sample`, and matrices of colors."""
        numbers = self.numbers(positions, stream, count)
        quarters = torch.floor(numbers[:, 2:3]) * (0.5 * math.pi)
        angles = torch.cat([quarters, numbers[:, 5:8]], dim=1)
        cos, sin = torch.cos(angles), torch.sin(angles)
        gain = torch.exp2(numbers[:, 10])
        alpha = gain * (1.0 - 2.0 * (numbers[:, 1] > 0))
        chroma = gain * torch.exp2(numbers[:, 11])
        coefficients = [alpha, chroma * cos[:, 3], chroma * sin[:, 3], alpha * numbers[:, 14]]
        theta = self._theta(numbers, height, width, cos, sin)
        return [t.view(count, -1, *t.shape[1:]) for t in (theta, self._color_matrix(coefficients))]

    def augment(self, images: Tensor, drawn: list[Tensor]) -> Tensor:
        theta, matrix = drawn
        return _recolor(ops.affine_grid_sample(images, theta), matrix)

    @torch.no_grad()
    def observe(self, margins: Tensor) -> dict[str, Tensor]:
        signs = torch.sign(margins.detach().float()).sum()
        self.signs.add_(signs)
        self.seen.add_(len(margins))
        return {"augment_strength": self.strength.clone(), "overfitting": signs / len(margins)}

    @torch.no_grad()
    def adapt(self) -> None:
        """Change the strength by what has been seen since the last call, up to `MAX_STRENGTH`; no host read."""
        change = torch.sign(self.signs - self.target * self.seen) * self.seen
        self.strength.add_(change / (1000.0 * self.kimg)).clamp_(0.0, MAX_STRENGTH)
        self.signs.zero_()
        self.seen.zero_()


class Differentiable(Augmentation):
    """DiffAugment's color, translation and cutout, of full strength from the first step.

    Brightness within 0.5, saturation up to 2, contrast of 0.5 to 1.5 about the image's mean (with alpha, about gray),
    translations of up to an eighth of the image, and a square of half its side without content; where there is none,
    images are 0 or, with alpha, transparent.
    """

    @property
    def empty(self) -> float:
        """Value of an image where there is nothing."""
        return -1.0 if self.channels == 4 else 0.0

    def _draw(self, positions: Tensor, stream: str, count: int, height: int, width: int) -> list[Tensor]:
        """Matrices of colors, 1 - contrast, maps for `ops.affine_grid_sample`, and masks without the square."""
        u = _rows(counter_rng.uniform(self.seed, stream, positions, count * 7), count)
        brightness, saturation, contrast = u[:, 0] - 0.5, 2.0 * u[:, 1], u[:, 2] + 0.5
        offset = brightness * contrast if self.empty else brightness
        matrix = self._color_matrix([contrast, contrast * saturation, torch.zeros_like(contrast), offset])
        theta = torch.eye(2, 3, device=u.device).repeat(len(u), 1, 1)
        theta[:, :, 2] = torch.stack([self._shift(u[:, 3], width), self._shift(u[:, 4], height)], dim=1)
        rows, columns = self._cut(u[:, 5], height), self._cut(u[:, 6], width)
        kept = 1.0 - rows[:, None, :, None] * columns[:, None, None, :]
        return [t.view(count, -1, *t.shape[1:]) for t in (matrix, 1.0 - contrast, theta, kept)]

    def augment(self, images: Tensor, drawn: list[Tensor]) -> Tensor:
        matrix, pivot, theta, kept = drawn
        y = _recolor(images, matrix)
        if not self.empty:
            mean = images.mean(dim=(1, 2, 3), keepdim=True)
            y = torch.addcmul(y, mean, pivot.to(y.dtype)[:, None, None, None])
        y = ops.affine_grid_sample(y - self.empty if self.empty else y, theta, "zeros") * kept.to(y.dtype)
        return y + self.empty if self.empty else y

    @staticmethod
    def _shift(u: Tensor, size: int) -> Tensor:
        """A whole number of pixels, at most an eighth of the size, in coordinates of [-1, 1]."""
        most = int(size / 8 + 0.5)
        return (torch.floor(u * (2 * most + 1)) - most) * (2.0 / size)

    @staticmethod
    def _cut(u: Tensor, size: int) -> Tensor:
        """[N, size]: 1 where a run of half the size is, whose center is anywhere in the image."""
        length = int(size / 2 + 0.5)
        start = torch.floor(u * (size + 1 - length % 2)) - length // 2
        at = torch.arange(size, device=u.device, dtype=u.dtype)
        return ((at >= start[:, None]) & (at < start[:, None] + length)).to(u.dtype)
