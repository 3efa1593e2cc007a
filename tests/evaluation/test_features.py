from __future__ import annotations

import http.client
import io
import math
import pickle
import socket
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from fastgan.errors import ArgumentError
from fastgan.evaluation import features
from fastgan.evaluation.features import open_extractor


def pictures(n: int, channels: int, size: int) -> Tensor:
    return torch.randint(0, 256, (n, channels, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def random_like(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Random weights scaled so that the signal does not vanish."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for key, value in state.items():
        if not value.is_floating_point():
            made[key] = value
        elif "running_var" in key or (value.ndim < 2 and key.endswith("weight")):
            made[key] = 0.5 + torch.rand(value.shape, generator=generator)
        else:
            fan = max(1, value[0].numel()) if value.ndim > 1 else 100
            made[key] = torch.randn(value.shape, generator=generator) * (2 / fan) ** 0.5
    return made


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the published layout, with random weights."""
    built = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)

    class Stop(Exception):
        pass

    def stop(*_: object, **__: object) -> None:
        raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", stop)
        built.__init__("inception-v3-compat", ["2048"], _empty())  # type: ignore[misc]
    path = tmp_path_factory.mktemp("weights") / "weights-inception.pth"
    torch.save(random_like(built.state_dict()), path)
    return path


def _empty() -> io.BytesIO:
    file = io.BytesIO()
    torch.save({}, file)
    file.seek(0)
    return file


def test_digit_features_are_computed_for_each_channel() -> None:
    gray, color = open_extractor("digits", 1), open_extractor("digits", 3)
    images = pictures(4, 3, 16)
    whole = color(images)
    assert (color.dimension, color.has_class_score, gray.has_class_score) == (3072, False, True)
    assert tuple(whole.features.shape) == (4, 3072)
    assert whole.logits is not None and tuple(whole.logits.shape) == (4, 3, 10)
    for channel in range(3):
        one = gray(images[:, channel : channel + 1])
        assert one.logits is not None
        assert torch.allclose(one.features, whole.features[:, 1024 * channel : 1024 * (channel + 1)], atol=1e-5)
        assert torch.allclose(one.logits[:, 0], whole.logits[:, channel], atol=1e-4)
    assert gray.name == "digits" and len(gray.fingerprint) == 16


def test_digit_features_are_the_last_layers_input() -> None:
    from fastgan.evaluation.digits import classifier

    network = classifier()[0]
    result = open_extractor("digits", 1)(pictures(3, 1, 32))
    assert result.logits is not None
    assert torch.allclose(network[-1](result.features), result.logits[:, 0], atol=1e-5)  # type: ignore[index, operator]


def test_inception_from_a_file_of_its_layout(inception: Path, tmp_path: Path) -> None:
    extractor = open_extractor("inception", 3, weights=str(inception))
    images = pictures(2, 3, 32)
    result = extractor(images)
    assert extractor.name == features.INCEPTION and extractor.dimension == 2048 and extractor.has_class_score
    assert tuple(result.features.shape) == (2, 2048) and result.features.std() > 0
    assert result.logits is not None and tuple(result.logits.shape) == (2, 1, 1008)
    # Inception scores are published of logits without the last layer's bias.
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(inception))
    for ours, expected in zip((result.features, result.logits[:, 0]), theirs(images), strict=True):
        assert torch.allclose(ours, expected, rtol=1e-5)
    # The same weights as safetensors, and a gray image as three equal channels.
    save_file(torch.load(inception, weights_only=True), tmp_path / "w.safetensors")
    again = open_extractor("inception-v3-compat", 1, weights=str(tmp_path / "w.safetensors"))
    assert again.fingerprint == extractor.fingerprint
    gray = images[:, :1]
    assert torch.equal(again(gray).features, extractor(gray.repeat(1, 3, 1, 1)).features)


def test_files_without_the_weights_of_the_network(inception: Path, tmp_path: Path) -> None:
    state = torch.load(inception, weights_only=True)
    del state["fc.bias"]
    torch.save(state, tmp_path / "less.pth")
    torch.save({"fc.bias": 3}, tmp_path / "numbers.pth")
    (tmp_path / "noise.pth").write_bytes(b"no weights")
    cases = {
        "less.pth": r": it does not have the weights of inception-v3-compat \(.*Missing key.*fc.bias",
        "numbers.pth": "must have the weights of inception-v3-compat by name, and nothing else, got",
        "noise.pth": ": it cannot be read as weights without running code",
        "missing.pth": r"must be a readable file with the weights of inception-v3-compat \(No such file",
    }
    for name, problem in cases.items():
        with pytest.raises(ArgumentError, match=f"^--feature-weights .*{problem}") as error:
            open_extractor("inception", 3, weights=str(tmp_path / name))
        assert name in str(error.value)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (Path(tmp_path / "ran"),)  # type: ignore[return-value]

    with (tmp_path / "w.pth").open("wb") as file:
        pickle.dump({"fc.bias": Attack()}, file)
    with pytest.raises(ArgumentError, match="without running code"):
        open_extractor("vgg16", 3, weights=str(tmp_path / "w.pth"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("inception", "weights-inception-"),
        ("vgg16", "vgg16-397923af"),
        ("dinov2", "dinov2_vitl14_pretrain"),
        *((f"dinov2-vit-{size}-14", f"dinov2_vit{size}14_pretrain") for size in "sbl"),
    ],
)
def test_weights_that_cannot_be_downloaded(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(url: str, path: str) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(ArgumentError) as error:
        open_extractor(name, 3)
    text = str(error.value)
    assert text.startswith(f"--features '{features.canonical_name(name)}': its weights cannot be downloaded")
    assert "no route to host" in text and f"{tmp_path}/checkpoints/{file}" in text and "--feature-weights" in text
    assert "download https://" in text


def test_published_weights_are_taken_from_torchs_cache(
    inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").symlink_to(inception)
    named = open_extractor("inception", 3, weights=str(inception))
    assert open_extractor("inception", 3).fingerprint == named.fingerprint


def test_damaged_published_weights_are_not_blamed_on_a_flag(
    inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch does not notice that an earlier download was cut short."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"

    def cut_short(url: str, path: str) -> None:
        Path(path).write_bytes(inception.read_bytes()[:1000])

    monkeypatch.setattr(torch.hub, "download_url_to_file", cut_short)
    for _ in range(2):
        with pytest.raises(ArgumentError) as error:
            open_extractor("inception", 3)
        text = str(error.value)
        assert text.startswith(f"--features 'inception-v3-compat': {file} cannot be used: it cannot be read as weights")
        assert text.endswith("; delete it to download it again") and "\n" not in text
    torch.save({"fc.bias": torch.zeros(3)}, file)
    with pytest.raises(
        ArgumentError, match=f"--features 'inception-v3-compat': {file} cannot be used: it does not have the weights"
    ):
        open_extractor("inception", 3)


def test_a_connection_without_data_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float | None] = []

    def half(url: str, path: str) -> None:
        waits.append(socket.getdefaulttimeout())
        raise http.client.IncompleteRead(b"", 3)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", half)
    with pytest.raises(ArgumentError, match=r"--features 'vgg16': its weights cannot be downloaded \(Incomplete"):
        open_extractor("vgg16", 3)
    assert waits == [20.0] and socket.getdefaulttimeout() is None


def test_fingerprint_depends_on_names_and_values() -> None:
    a, b = torch.zeros(3), torch.ones(3)
    made = features._fingerprint({"a": a, "b": b})
    assert made == features._fingerprint({"b": b, "a": a}) and len(made) == 16
    assert len({made, features._fingerprint({"a": b, "b": a}), features._fingerprint({"a": a, "c": b})}) == 3


def test_weights_in_the_home_folder(inception: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(inception.parent))
    assert open_extractor("inception", 3, weights=f"~/{inception.name}").dimension == 2048


def test_unknown_extractor_and_weights_that_are_not_needed() -> None:
    with pytest.raises(
        ArgumentError,
        match=r"--features must be digits, efficientnet-lite0, .*dinov2, got 'resnet'",
    ):
        open_extractor("resnet", 3)
    with pytest.raises(ArgumentError, match="--feature-weights 'x': is not needed with --features digits: remove it"):
        open_extractor("digits", 1, weights="x")


def dino_state() -> dict[str, Tensor]:
    """A file of DINOv2's layout: 518-pixel position embeddings, a mask token. ViT-S/14."""
    d, state = 384, {}
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d), "pos_embed": (1, 37 * 37 + 1, d), "mask_token": (1, d),
        "patch_embed.proj.weight": (d, 3, 14, 14), "patch_embed.proj.bias": (d,),
        "norm.weight": (d,), "norm.bias": (d,),
    }  # fmt: skip
    for i in range(12):
        for name, shape in {
            "norm1.weight": (d,), "norm1.bias": (d,), "attn.qkv.weight": (3 * d, d), "attn.qkv.bias": (3 * d,),
            "attn.proj.weight": (d, d), "attn.proj.bias": (d,), "ls1.gamma": (d,), "norm2.weight": (d,),
            "norm2.bias": (d,), "mlp.fc1.weight": (4 * d, d), "mlp.fc1.bias": (4 * d,), "mlp.fc2.weight": (d, 4 * d),
            "mlp.fc2.bias": (d,), "ls2.gamma": (d,),
        }.items():  # fmt: skip
            shapes[f"blocks.{i}.{name}"] = shape
    for key, shape in shapes.items():
        state[key] = torch.zeros(shape)
    made = random_like(state)
    made["pos_embed"] = torch.randn(shapes["pos_embed"], generator=torch.Generator().manual_seed(1))
    return made


def dino_forward(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """The class token after the last norm, written from the paper's description, attention as plain products."""
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (images / 255 - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14).flatten(2).mT
    grid = state["pos_embed"][:, 1:].view(1, 37, 37, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=16.1 / 37, mode="bicubic", align_corners=False).flatten(2).mT
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + torch.cat([state["pos_embed"][:, :1], grid], 1)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    for i in range(12):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").unflatten(2, (3, 6, 64)).unbind(2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        a = ((q @ k.mT / math.sqrt(64)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + state[f"blocks.{i}.ls1.gamma"] * linear(a, f"blocks.{i}.attn.proj")
        h = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + state[f"blocks.{i}.ls2.gamma"] * linear(h, f"blocks.{i}.mlp.fc2")
    return norm(x, "norm")[:, 0]


def test_dinov2_from_a_file_of_its_layout(tmp_path: Path) -> None:
    state = dino_state()
    torch.save(state, tmp_path / "dinov2_vits14_pretrain.pth")
    extractor = open_extractor("dinov2-vit-s-14", 3, weights=str(tmp_path / "dinov2_vits14_pretrain.pth"))
    assert extractor.dimension == 384 and not extractor.has_class_score
    images = pictures(2, 3, 224)  # the network's own size: nothing is resized on the way
    result = extractor(images).features
    assert torch.allclose(result, dino_forward(state, images.float()), atol=2e-3 * result.std().item())
    assert np.isfinite(result.numpy()).all()
    del state["blocks.3.ls1.gamma"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(ArgumentError, match=r"it does not have the weights of dinov2-vit-s-14 \(.*blocks.3.ls1.gamma"):
        open_extractor("dinov2-vit-s-14", 3, weights=str(tmp_path / "less.pth"))


@pytest.mark.slow
def test_vgg16_from_a_file_of_its_layout(tmp_path: Path) -> None:
    """Writes and reads half a gigabyte."""
    import torchvision

    torch.save(random_like(torchvision.models.vgg16().state_dict()), tmp_path / "vgg16.pth")
    extractor = open_extractor("vgg16", 1, weights=str(tmp_path / "vgg16.pth"))
    result = extractor(pictures(2, 1, 32))
    assert tuple(result.features.shape) == (2, 4096) and result.logits is None and result.features.min() == 0
    assert result.features.std() > 0
