"""The latent whose image is nearest to a given picture: `fastgan project RUN IMAGE`.

Random latents are compared with the picture, and the best of them are moved by Adam through the generator, as in the
projection of Karras et al. 2020 (StyleGAN2, appendix D), with a distance of pixels at several sizes and of features of
EfficientNet-Lite0. Other latents would give other minima: several are followed, and the nearest is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.data.faults import raise_if_machine
from fastgan.data.framing import Fit, Framing
from fastgan.data.images import decode, decode_problem, require_size
from fastgan.errors import ArgumentError
from fastgan.evaluation import lite0
from fastgan.evaluation.features import load_lite0
from fastgan.generator import TrainedGenerator, device_of, generate, great_circle
from fastgan.ops.qualification.drawing import drawing
from fastgan.utils import counter_rng
from fastgan.utils.files import read_regular

__all__ = ["Projection", "feature_network", "neighbors", "project", "read_picture"]

CANDIDATES = 512
RATE = 0.1
"""Learning rate of Adam for latents of standard normal numbers."""
FEATURE_WEIGHT = 0.5
"""Of the distance of features, 0 to 2, beside that of pixels, which is at most 4 at each size."""
NORM_WEIGHT = 0.01
_SMALLEST_WITH_FEATURES = 32  # px: below, an image enlarged to the network's 224 px has nothing that it knows
_ROWS, _FARTHEST = 5, 0.5

Distance = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Projection:
    """A picture and what the generator makes of it.

    Attributes:
        target: the picture, float32 [1, C, R, R] in [-1, 1].
        latent: float32 [1, latent].
        label: int64 [1], or None without classes.
        image: the generator's image of them, float32 [1, C, R, R].
        error: root mean square of the difference of pixels, in levels of 0 to 255.
    """

    target: Tensor
    latent: Tensor
    label: Tensor | None
    image: Tensor
    error: float


def read_picture(path: Path, resolution: int, channels: int, fit: Fit = "crop", background: str = "white") -> Tensor:
    """A picture of any size as the generator's images are: float32 [1, channels, resolution, resolution] in [-1, 1].

    Args:
        fit, background: see `fastgan.data.framing.Framing`.

    Raises:
        ArgumentError: the file cannot be read or is no image.
    """
    framing = Framing(fit, background)
    framing.validate()
    try:
        require_size(path.stat().st_size)
        pixels = decode(read_regular(path), resolution, channels, framing=framing)
    except Exception as error:  # Pillow's readers raise nearly any exception on a damaged file
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise_if_machine(error, "IMAGE", str(path))
        raise ArgumentError("IMAGE", str(path), f"must be an image file ({decode_problem(error)})") from None
    return torch.from_numpy(pixels)[None].float() / 127.5 - 1


def feature_network(
    resolution: int, device: torch.device, requested: str | None = None
) -> lite0.EfficientNetLite0 | None:
    """The network whose features are compared, or None for pixels alone.

    Args:
        resolution: of the images, px.
        requested: "efficientnet-lite0", "none", or None: the network where its package is installed and images have at
            least 32 px.

    Raises:
        ArgumentError: the network is requested, and its weights are not here.
    """
    if requested == "none":
        return None
    if requested is None and (resolution < _SMALLEST_WITH_FEATURES or lite0.weights_file() is None):
        return None
    return load_lite0(device)


def project(
    trained: TrainedGenerator,
    target: Tensor,
    *,
    seed: int = 0,
    steps: int = 200,
    starts: int = 4,
    label: int | None = None,
    features: lite0.EfficientNetLite0 | None = None,
) -> Projection:
    """Find the latent whose image is nearest to a picture; the same for the same arguments on the same machine.

    Args:
        trained: its module is a network of fastgan, not an ONNX file.
        target: float32 [1, C, R, R] in [-1, 1], of the generator's size; see `read_picture`.
        seed: of the latents that are tried first.
        steps: of the optimizer for the nearest latent, after half as many for each that is followed; 0 takes the
            nearest that was tried.
        starts: how many latents are followed at first.
        label: class of the image; None: the class of the best latents, of all classes in turn.
        features: see `feature_network`; None: pixels alone.
    """
    device, networks = device_of(trained.module), trained.meta["networks"]
    target = target.to(device)
    distance = _distance(target, features)
    index = torch.arange(CANDIDATES, device=device)
    latents = counter_rng.normal(seed, "projection", index, trained.latent)
    labels = None
    if trained.num_classes:
        labels = index % trained.num_classes if label is None else torch.full_like(index, label)
    images = generate(trained.module, latents, labels, networks["resolution"]).to(device)
    with torch.no_grad():
        pixels = _pixel_distance(images, target)
        nearest = pixels.argsort(stable=True)[: 8 * starts]
        nearest = nearest[distance(images[nearest]).argsort(stable=True)[:starts]]
    chosen = None if labels is None else labels[nearest]
    latents, distances = _descend(trained, latents[nearest], chosen, distance, steps // 2)
    best = distances.argmin()[None]
    own = None if chosen is None else chosen[best]
    latents, _ = _descend(trained, latents[best], own, distance, steps)
    found = generate(trained.module, latents, own, networks["resolution"])
    error = 127.5 * (found - target.cpu()).square().mean().sqrt().item()
    return Projection(target.cpu(), latents.cpu(), None if own is None else own.cpu(), found, error)


def _pixel_distance(images: Tensor, target: Tensor) -> Tensor:
    """Mean square of the difference, averaged over the image and its halvings down to 4 px: [N].

    The smaller ones tell latents apart whose images have the right shape in a wrong place. Values beyond black and
    white are shown as these, and are no difference from them.
    """
    beyond = ((target >= 1) & (images > 1)) | ((target <= -1) & (images < -1))
    difference = torch.where(beyond, 0.0, images - target)
    total, count = torch.zeros(len(images), device=images.device), 0
    while True:
        total, count = total + difference.square().flatten(1).mean(1), count + 1
        if difference.shape[-1] <= 4:
            return total / count
        difference = F.avg_pool2d(difference, 2)


def _distance(target: Tensor, features: lite0.EfficientNetLite0 | None) -> Distance:
    """Images [N, C, R, R] -> their distance from the picture, [N]."""
    if features is None:
        return lambda images: _pixel_distance(images, target)

    def extract(images: Tensor) -> Tensor:
        pixels = (images.clamp(-1, 1) + 1) * 127.5
        if pixels.shape[1] == 4:  # colors multiplied by alpha, on white
            pixels = pixels[:, :3] + (255 - pixels[:, 3:])
        return F.normalize(features(pixels.expand(-1, 3, -1, -1)), dim=1)

    with torch.no_grad():
        wanted = extract(target)
    return lambda images: _pixel_distance(images, target) + FEATURE_WEIGHT * (1 - (extract(images) * wanted).sum(1))


def _descend(
    trained: TrainedGenerator, latents: Tensor, labels: Tensor | None, distance: Distance, steps: int
) -> tuple[Tensor, Tensor]:
    """The nearest latents on the way of `steps` of Adam on each one's own distance, and their distances."""
    z = latents.clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=RATE, betas=(0.9, 0.99))
    best, nearest = latents.clone(), torch.full((len(latents),), math.inf, device=latents.device)
    with torch.enable_grad(), drawing(latents.device):
        for step in range(steps + 1):  # the last one only looks
            optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / (steps + 1)))
            loss = distance(trained.module(z, labels).float())
            with torch.no_grad():
                closer = loss < nearest
                nearest, best = torch.where(closer, loss, nearest), torch.where(closer[:, None], z, best)
            # Latents of training lie near a sphere of radius sqrt(d); where the network does not normalize them, others
            # would give images that it was never trained to make.
            norm = (z.square().mean(1) - 1).square() if trained.truncates else torch.zeros_like(loss)
            (z.grad,) = torch.autograd.grad((loss + NORM_WEIGHT * norm).sum(), z)
            optimizer.step()
    return best.detach(), nearest


def neighbors(trained: TrainedGenerator, found: Projection, columns: int = 8, seed: int = 0) -> Tensor:
    """Images around a projection, float32 [5 * columns, C, R, R]: each row is farther from it than the one above.

    Row r is on the great circles from its latent to `columns` random ones, at (r + 1) / 10 of the way.
    """
    device = device_of(trained.module)
    ends = counter_rng.normal(seed, "neighbors", torch.arange(columns, device=device), trained.latent)
    shares = torch.linspace(_FARTHEST / _ROWS, _FARTHEST, _ROWS, device=device)
    around = great_circle(found.latent.to(device), ends[None], shares[:, None, None]).flatten(0, 1)
    labels = None if found.label is None else found.label.to(device).expand(len(around))
    return generate(trained.module, around, labels, trained.meta["networks"]["resolution"])
