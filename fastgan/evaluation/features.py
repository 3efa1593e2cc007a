"""What stands between images and the metrics of features: networks that turn an image into a vector.

`digits` is a classifier of scikit-learn's digits, trained here in seconds; the others are torch-fidelity's, with
published weights from torch's cache of downloads or from a file. Weights are read without unpickling anything.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import math
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.errors import ArgumentError

INCEPTION = "inception-v3-compat"
DINO = "dinov2-vit-l-14"
ALIASES = {"inception": INCEPTION, "dinov2": DINO}
# timm's name of the network; the name of the published file.
_DINO = {
    "dinov2-vit-s-14": ("vit_small_patch14_dinov2", "dinov2_vits14"),
    "dinov2-vit-b-14": ("vit_base_patch14_dinov2", "dinov2_vitb14"),
    "dinov2-vit-l-14": ("vit_large_patch14_dinov2", "dinov2_vitl14"),
}
EXTRACTORS = ("digits", INCEPTION, "vgg16", *_DINO)
_VGG16 = "https://download.pytorch.org/models/vgg16-397923af.pth"
_DINO_SIDE, _DINO_PATCH = 224, 14


class Extracted(NamedTuple):
    """features: float32 [N, D]; logits: float32 [N, groups, classes], or None from a network that classifies nothing.

    There is one group for a whole image, or one for each channel.
    """

    features: Tensor
    logits: Tensor | None


class Extractor(ABC):
    """Images to features.

    Attributes:
        name: as in `--features`; dimension: D; resize: how images reach the network's size, in words; fingerprint: 16
        hex digits of the weights; scores: whether `logits` can be asked for a class score.
    """

    name: str
    dimension: int
    resize: str
    fingerprint: str
    scores: bool = False

    @property
    def is_inception(self) -> bool:
        """Whether a Frechet distance of its features is the published FID."""
        return self.name == INCEPTION

    @abstractmethod
    def __call__(self, images: Tensor) -> Extracted:
        """images: uint8 [N, C, R, R], C 1 or 3."""


class DigitsExtractor(Extractor):
    """The digit classifier's last hidden layer, of each channel by itself: D is 1024 for each of `channels`."""

    name = "digits"
    resize = "bilinear, antialiased, to 16 px"

    def __init__(self, channels: int) -> None:
        from fastgan.evaluation import digits

        self._describe = digits.describe
        self.accuracy = digits.classifier()[1]
        self.dimension = 1024 * channels
        self.fingerprint = _fingerprint(digits.classifier()[0].state_dict())
        self.scores = channels == 1

    def __call__(self, images: Tensor) -> Extracted:
        inside, logits = self._describe(images.float() / 127.5 - 1)
        return Extracted(inside.flatten(1).float(), logits.float())


class FidelityExtractor(Extractor):
    """A network of torch-fidelity's; gray images are given to it three times over."""

    def __init__(self, name: str, network: nn.Module, dimension: int, side: int, fingerprint: str) -> None:
        self.name = name
        self.dimension = dimension
        self.fingerprint = fingerprint
        self.resize = f"bilinear, not antialiased, as TensorFlow 1, to {side} px"
        self.scores = name == INCEPTION
        self._network = network

    def to(self, device: torch.device | str) -> None:
        self._network.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Extracted:
        device = next(self._network.parameters()).device
        features = self._network(images.to(device).expand(-1, 3, -1, -1))
        return Extracted(features[0].float(), features[1].float()[:, None] if self.scores else None)


def canonical(name: str) -> str:
    """The full name of an extractor.

    Raises:
        ArgumentError: there is none of that name.
    """
    name = ALIASES.get(name, name)
    if name not in EXTRACTORS:
        raise ArgumentError("--features", name, f"must be {', '.join([*EXTRACTORS, *ALIASES])}")
    return name


def open_extractor(
    name: str, channels: int, device: torch.device | str = "cpu", weights: str | None = None
) -> Extractor:
    """The extractor `name` for images of `channels`, on `device`.

    weights: file with its weights (.pth as published, or .safetensors); None: torch's cache of downloads, or the
    network.

    Raises:
        ArgumentError: no such extractor, weights that cannot be had, or a file that does not hold them.
    """
    name = canonical(name)
    if name == "digits":
        if weights is not None:
            raise ArgumentError("--feature-weights", weights, "it may be left out: --features digits trains its own")
        return DigitsExtractor(channels)
    fidelity = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    path = Path(weights).expanduser() if weights is not None else _published(name, fidelity.URL_INCEPTION_V3)
    try:
        extractor = _from_file(path, name, fidelity)
    except ArgumentError as error:
        if weights is not None:
            raise
        # torch takes a download that was cut short for whole.
        reason = f"{path} cannot be used: {error.problem}; delete it, and it is fetched again"
        raise ArgumentError("--features", name, reason) from None
    extractor.to(device)
    return extractor


def _from_file(path: Path, name: str, fidelity: Any) -> FidelityExtractor:
    state = _read(path, name)
    flag = str(path)
    if name == INCEPTION:
        layers = ["2048", "logits_unbiased"]
        network = _load(lambda: fidelity.FeatureExtractorInceptionV3(name, layers, _file_of(state)), name, flag)
        return FidelityExtractor(name, network, 2048, 299, _fingerprint(state))
    if name == "vgg16":
        vgg16 = importlib.import_module("torch_fidelity.feature_extractor_vgg16").FeatureExtractorVGG16
        network = _load(lambda: vgg16(name, ["fc2_relu"], _file_of(state)), name, flag)
        return FidelityExtractor(name, network, 4096, 224, _fingerprint(state))
    network = _load(lambda: _dino(name, state), name, flag)
    return FidelityExtractor(name, network, network.model.num_features, _DINO_SIDE, _fingerprint(state))  # type: ignore[union-attr, arg-type]


def _url(name: str, inception: str) -> str:
    if name == INCEPTION:
        return inception
    if name == "vgg16":
        return _VGG16
    file = _DINO[name][1]
    return f"https://dl.fbaipublicfiles.com/dinov2/{file}/{file}_pretrain.pth"


def _published(name: str, inception: str) -> Path:
    """The published weights in torch's cache of downloads, where torch-fidelity looks too, fetched if need be."""
    url = _url(name, inception)
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _patience(20.0):
            torch.hub.download_url_to_file(url, str(path))  # to another name first, then renamed
    except (OSError, RuntimeError, HTTPException) as error:  # no network, no such file, a full disk, half an answer
        where = f"download {url} to {path}, or name the file with --feature-weights"
        raise ArgumentError("--features", name, f"its weights could not be fetched ({error}); {where}") from None
    return path


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """A connection that says nothing for `seconds` is given up."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _read(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a weights file."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        may_be = f"must be a readable file with the weights of {name} ({error.strerror or error})"
        raise ArgumentError("--feature-weights", str(path), may_be) from None
    except Exception as error:  # zip, pickle and safetensors errors of many kinds; nothing was executed
        reason = f"it is no weights file that can be read without running code ({_first(error)})"
        raise ArgumentError("--feature-weights", str(path), reason) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ArgumentError(
            "--feature-weights", str(path), f"must hold the weights of {name} by name, and nothing else"
        )
    return state


def _file_of(state: dict[str, Tensor]) -> io.BytesIO:
    """What was read, as a file again: torch-fidelity's loaders unpickle, so they are given what was written here."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def _load(build: Any, name: str, path: str) -> nn.Module:
    try:
        return build()
    except RuntimeError as error:  # load_state_dict: keys or shapes that differ
        reason = f"it does not hold the weights of {name} ({' '.join(str(error).split())[:200]})"
        raise ArgumentError("--feature-weights", path, reason) from None


def _dino(name: str, state: dict[str, Tensor]) -> nn.Module:
    """torch-fidelity's extractor around timm's network: its own loader runs code from the network."""
    fidelity = importlib.import_module("torch_fidelity.feature_extractor_dinov2")
    timm = importlib.import_module("timm")

    class Extractor(fidelity.FeatureExtractorDinoV2):  # type: ignore[name-defined]
        def __init__(self, model: nn.Module) -> None:
            fidelity.FeatureExtractorBase.__init__(self, name, ["dinov2"])
            self.feature_extractor_internal_dtype = torch.float32
            self.model = model.eval().requires_grad_(False)

    model = timm.create_model(_DINO[name][0], pretrained=False, img_size=_DINO_SIDE, num_classes=0)
    state = {key: value for key, value in state.items() if key != "mask_token"}  # of pre-training alone
    if "pos_embed" in state:
        state["pos_embed"] = _at_side(state["pos_embed"], _DINO_SIDE // _DINO_PATCH)
    model.load_state_dict(state)
    return Extractor(model)


def _at_side(embedding: Tensor, side: int) -> Tensor:
    """Position embeddings [1, 1 + s^2, D] for side^2 patches: bicubic, to a tenth of a patch more, as DINOv2 does."""
    old = math.isqrt(embedding.shape[1] - 1)
    if old == side:
        return embedding
    first, rest = embedding[:, :1], embedding[:, 1:]
    grid = rest.unflatten(1, (old, old)).permute(0, 3, 1, 2).float()
    scale = (side + 0.1) / old
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([first, grid.permute(0, 2, 3, 1).flatten(1, 2).to(first)], dim=1)


def _fingerprint(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _first(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
