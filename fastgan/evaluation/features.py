"""Feature extractors: networks that turn an image into a vector.

`digits` is a classifier of scikit-learn's digits, trained here in seconds. `efficientnet-lite0` is in lite0.py; its
weights come with a Python package. The others are torch-fidelity's, with published weights from torch's download cache
or from a file. Weights are read without unpickling anything.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import math
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.errors import ArgumentError
from fastgan.evaluation import lite0
from fastgan.utils.text import first_line

INCEPTION = "inception-v3-compat"
DINO = "dinov2-vit-l-14"
ALIASES = {"inception": INCEPTION, "dinov2": DINO}
# Name of the network in timm, name of the published file.
_DINO = {
    "dinov2-vit-s-14": ("vit_small_patch14_dinov2", "dinov2_vits14"),
    "dinov2-vit-b-14": ("vit_base_patch14_dinov2", "dinov2_vitb14"),
    "dinov2-vit-l-14": ("vit_large_patch14_dinov2", "dinov2_vitl14"),
}
EXTRACTORS = ("digits", lite0.NAME, INCEPTION, "vgg16", *_DINO)
_VGG16 = "https://download.pytorch.org/models/vgg16-397923af.pth"
_DINO_SIDE, _DINO_PATCH = 224, 14
_LITE0_BATCH = 32  # images whose feature maps stay in a CPU's cache better than those of 256

Built = TypeVar("Built")


class Extracted(NamedTuple):
    """Output of an extractor.

    Attributes:
        features: float32 [N, D].
        logits: float32 [N, groups, classes], one group for the image or one for each channel; None from a network that
            is no classifier.
    """

    features: Tensor
    logits: Tensor | None


class Extractor(ABC):
    """A network from images to features.

    Attributes:
        name: as in `--features`.
        dimension: number of features, D.
        resize: how images are resized to the network's input, in words.
        fingerprint: hash of the weights, 16 hexadecimal digits.
        has_class_score: whether an inception score of `logits` makes sense.
    """

    name: str
    dimension: int
    resize: str
    fingerprint: str
    has_class_score: bool = False

    @abstractmethod
    def __call__(self, images: Tensor) -> Extracted:
        """images: uint8 [N, C, R, R], C 1, 3 or 4."""


class DigitsExtractor(Extractor):
    """The last hidden layer of the digit classifier, applied to each channel: D is 1024 times `channels`."""

    name = "digits"
    resize = "bilinear, antialiased, to 16 px"

    def __init__(self, channels: int) -> None:
        from fastgan.evaluation import digits

        self._features_and_logits = digits.features_and_logits
        self.dimension = 1024 * channels
        self.fingerprint = _fingerprint(digits.classifier()[0].state_dict())
        self.has_class_score = channels == 1

    def __call__(self, images: Tensor) -> Extracted:
        features, logits = self._features_and_logits(images.float() / 127.5 - 1)
        return Extracted(features.flatten(1).float(), logits.float())


class FidelityExtractor(Extractor):
    """A network of torch-fidelity; images as from `to_rgb`."""

    def __init__(self, name: str, network: nn.Module, dimension: int, side: int, fingerprint: str) -> None:
        self.name = name
        self.dimension = dimension
        self.fingerprint = fingerprint
        self.resize = f"bilinear, not antialiased, as TensorFlow 1, to {side} px"
        self.has_class_score = name == INCEPTION
        self._network = network

    def to(self, device: torch.device | str) -> None:
        self._network.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Extracted:
        device = next(self._network.parameters()).device
        features = self._network(to_rgb(images.to(device)))
        return Extracted(features[0].float(), features[1].float()[:, None] if self.has_class_score else None)


class Lite0Extractor(Extractor):
    """EfficientNet-Lite0; images as from `to_rgb`."""

    name = lite0.NAME
    dimension = lite0.DIMENSION
    resize = f"bilinear, antialiased, to {lite0.SIDE} px"

    def __init__(self, state: dict[str, Tensor], device: torch.device | str) -> None:
        self.fingerprint = _fingerprint(state)
        self._network = lite0.EfficientNetLite0(state).to(device)
        self._device = device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Extracted:
        parts = [self._network(to_rgb(part.to(self._device))) for part in images.split(_LITE0_BATCH)]
        return Extracted(torch.cat(parts), None)


def to_rgb(images: Tensor) -> Tensor:
    """Images with 1, 3 or 4 channels to 3: gray is repeated, and RGBA, colors multiplied by alpha, put on white.

    Args:
        images: uint8 [N, C, R, R].
    """
    if images.shape[1] != 4:
        return images.expand(-1, 3, -1, -1)
    color, alpha = images[:, :3], images[:, 3:]
    return torch.minimum(color, alpha) + (255 - alpha)


def published_weights_exist(name: str = INCEPTION) -> bool:
    """Whether the weights of Inception are in torch's download cache, and torch-fidelity, which uses them, is there."""
    try:
        fidelity = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError:
        return False
    return _cached_file(_url(name, fidelity.URL_INCEPTION_V3)).is_file()


def canonical_name(name: str) -> str:
    """The full name of an extractor.

    Raises:
        ArgumentError: there is no such extractor.
    """
    name = ALIASES.get(name, name)
    if name not in EXTRACTORS:
        raise ArgumentError("--features", name, f"must be {', '.join([*EXTRACTORS, *ALIASES])}")
    return name


def open_extractor(
    name: str, channels: int, device: torch.device | str = "cpu", weights: str | None = None
) -> Extractor:
    """An extractor by name.

    Args:
        name: as in `--features`.
        channels: channels of the images: 1, 3 or 4.
        weights: file with the weights (.pth as published, or .safetensors); None: torch's download cache, or a
            download.

    Raises:
        ArgumentError: there is no such extractor, its weights cannot be downloaded, or the file has other content.
    """
    name = canonical_name(name)
    if name == "digits":
        if weights is not None:
            raise ArgumentError("--feature-weights", weights, "is not needed with --features digits: remove it")
        return DigitsExtractor(channels)
    if name == lite0.NAME:
        file = lite0.require_weights_file() if weights is None else Path(weights).expanduser()
        state = _read_weights(file, name)
        return _build(lambda: Lite0Extractor(state, device), name, file)
    fidelity = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    path = Path(weights).expanduser() if weights is not None else _published_weights(name, fidelity.URL_INCEPTION_V3)
    try:
        extractor = _from_file(path, name, fidelity)
    except ArgumentError as error:
        if weights is not None:
            raise
        # torch does not notice that an earlier download was cut short.
        problem = f"{path} cannot be used: {error.problem}; delete it to download it again"
        raise ArgumentError("--features", name, problem) from None
    extractor.to(device)
    return extractor


def load_lite0(device: torch.device | str) -> lite0.EfficientNetLite0:
    """EfficientNet-Lite0 with the weights of its package; images and their gradients pass through it.

    Raises:
        ArgumentError: the package is not installed, or its file is damaged.
    """
    file = lite0.require_weights_file()
    state = _read_weights(file, lite0.NAME)
    return _build(lambda: lite0.EfficientNetLite0(state).to(device), lite0.NAME, file)


def _from_file(path: Path, name: str, fidelity: Any) -> FidelityExtractor:
    state = _read_weights(path, name)
    if name == INCEPTION:
        layers = ["2048", "logits_unbiased"]
        network = _build(lambda: fidelity.FeatureExtractorInceptionV3(name, layers, _as_file(state)), name, path)
        return FidelityExtractor(name, network, 2048, 299, _fingerprint(state))
    if name == "vgg16":
        vgg16 = importlib.import_module("torch_fidelity.feature_extractor_vgg16").FeatureExtractorVGG16
        network = _build(lambda: vgg16(name, ["fc2_relu"], _as_file(state)), name, path)
        return FidelityExtractor(name, network, 4096, 224, _fingerprint(state))
    network = _build(lambda: _dino(name, state), name, path)
    return FidelityExtractor(name, network, network.model.num_features, _DINO_SIDE, _fingerprint(state))  # type: ignore[union-attr, arg-type]


def _url(name: str, inception: str) -> str:
    if name == INCEPTION:
        return inception
    if name == "vgg16":
        return _VGG16
    file = _DINO[name][1]
    return f"https://dl.fbaipublicfiles.com/dinov2/{file}/{file}_pretrain.pth"


def _published_weights(name: str, inception: str) -> Path:
    """The published weights in torch's download cache, which torch-fidelity uses too; downloaded if missing."""
    url = _url(name, inception)
    path = _cached_file(url)
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _socket_timeout(20.0):
            torch.hub.download_url_to_file(url, str(path))  # renames the file when it is complete
    except (OSError, RuntimeError, HTTPException) as error:  # no network, no such file, a full disk, half an answer
        advice = f"download {url} to {path}, or name the file with --feature-weights"
        raise ArgumentError("--features", name, f"its weights cannot be downloaded ({error}); {advice}") from None
    return path


def _cached_file(url: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """A connection without data for `seconds` is closed with an error."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _read_weights(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a weights file."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        problem = f"must be a readable file with the weights of {name} ({error.strerror or error})"
        raise ArgumentError("--feature-weights", str(path), problem) from None
    except Exception as error:  # zip, pickle and safetensors errors of many kinds; nothing was executed
        problem = f"it cannot be read as weights without running code ({first_line(error)})"
        raise ArgumentError("--feature-weights", str(path), problem) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        problem = f"must have the weights of {name} by name, and nothing else"
        raise ArgumentError("--feature-weights", str(path), problem)
    return state


def _as_file(state: dict[str, Tensor]) -> io.BytesIO:
    """Weights as a file that was written here: torch-fidelity's loaders unpickle what they are given."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def _build(build: Callable[[], Built], name: str, path: Path) -> Built:
    try:
        return build()
    except RuntimeError as error:  # from load_state_dict: other keys or shapes
        problem = f"it does not have the weights of {name} ({' '.join(str(error).split())[:200]})"
        raise ArgumentError("--feature-weights", str(path), problem) from None


def _dino(name: str, state: dict[str, Tensor]) -> nn.Module:
    """torch-fidelity's extractor around timm's network. (torch-fidelity's own loader runs downloaded code.)"""
    fidelity = importlib.import_module("torch_fidelity.feature_extractor_dinov2")
    timm = importlib.import_module("timm")

    class Extractor(fidelity.FeatureExtractorDinoV2):  # type: ignore[name-defined]
        def __init__(self, model: nn.Module) -> None:
            fidelity.FeatureExtractorBase.__init__(self, name, ["dinov2"])
            self.feature_extractor_internal_dtype = torch.float32
            self.model = model.eval().requires_grad_(False)

    model = timm.create_model(_DINO[name][0], pretrained=False, img_size=_DINO_SIDE, num_classes=0)
    state = {key: value for key, value in state.items() if key != "mask_token"}  # used in pre-training only
    if "pos_embed" in state:
        state["pos_embed"] = _resize_positions(state["pos_embed"], _DINO_SIDE // _DINO_PATCH)
    model.load_state_dict(state)
    return Extractor(model)


def _resize_positions(embedding: Tensor, side: int) -> Tensor:
    """Position embeddings [1, 1 + s^2, D] for side^2 patches: bicubic, with an offset of 0.1 patches, as in DINOv2."""
    old = math.isqrt(embedding.shape[1] - 1)
    if old == side:
        return embedding
    class_token, patches = embedding[:, :1], embedding[:, 1:]
    grid = patches.unflatten(1, (old, old)).permute(0, 3, 1, 2).float()
    scale = (side + 0.1) / old
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([class_token, grid.permute(0, 2, 3, 1).flatten(1, 2).to(class_token)], dim=1)


def _fingerprint(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
