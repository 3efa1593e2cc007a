from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from fastgan import ops
from fastgan.nn import (
    Activation,
    ConditionalBatchNorm2d,
    Conv2d,
    EqualizedConv2d,
    EqualizedLinear,
    Maxout,
    MinibatchStdDev,
    PixelNorm,
)


def test_equalized_linear_is_a_scaled_linear_layer() -> None:
    layer, x = EqualizedLinear(6, 4, gain=3.0), torch.randn(5, 6)
    with torch.no_grad():
        layer.bias.uniform_()
    expected = torch.empty(5, 4)
    for n in range(5):
        for o in range(4):
            products = [layer.weight[o, i].item() * x[n, i].item() for i in range(6)]
            expected[n, o] = 3.0 / math.sqrt(6) * sum(products) + layer.bias[o].item()
    torch.testing.assert_close(layer(x), expected)


def test_equalized_weights_are_standard_normal_and_biases_zero() -> None:
    for layer in (EqualizedLinear(200, 100), EqualizedConv2d(40, 60, 3)):
        assert layer.weight.std().item() == pytest.approx(1.0, abs=0.02)
        assert layer.weight.mean().item() == pytest.approx(0.0, abs=0.02)
        assert layer.bias.abs().max() == 0


def test_equalized_layers_keep_the_scale_of_a_rectified_signal() -> None:
    """The default gain is He's: the mean square after a rectifier equals the mean square before the layer."""
    x = torch.randn(256, 512)
    assert F.relu(EqualizedLinear(512, 512)(x)).square().mean().item() == pytest.approx(1.0, abs=0.05)
    y = torch.randn(8, 64, 16, 16)
    inner = F.relu(EqualizedConv2d(64, 64, 3)(y))[:, :, 1:-1, 1:-1]
    assert inner.square().mean().item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_equalized_conv(kernel_size: int) -> None:
    layer, x = EqualizedConv2d(3, 4, kernel_size, gain=0.7), torch.randn(2, 3, 6, 5)
    with torch.no_grad():
        layer.bias.uniform_()
    plain = nn.Conv2d(3, 4, kernel_size, padding="same")
    with torch.no_grad():
        plain.weight.copy_(layer.weight * (0.7 / math.sqrt(3 * kernel_size**2)))
        plain.bias.copy_(layer.bias)  # type: ignore[union-attr]
    torch.testing.assert_close(layer(x), plain(x))


def test_equalized_conv_resamples() -> None:
    x = torch.randn(2, 3, 4, 6)
    for resample, size in (("up", (8, 12)), ("down", (2, 3))):
        layer = EqualizedConv2d(3, 5, 3, resample=resample)
        with torch.no_grad():
            layer.bias.uniform_()
        plain = EqualizedConv2d(3, 5, 3)
        plain.load_state_dict(layer.state_dict())
        expected = plain(F.interpolate(x, scale_factor=2)) if resample == "up" else F.avg_pool2d(plain(x), 2)
        assert layer(x).shape == (2, 5, *size)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_equalized_conv_argument_errors() -> None:
    with pytest.raises(ValueError, match="resample must be none, up or down, got 'half'"):
        EqualizedConv2d(3, 3, 3, resample="half")
    with pytest.raises(ValueError, match="kernel_size must be 3 with resample 'up', got 1"):
        EqualizedConv2d(3, 3, 1, resample="up")
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        EqualizedConv2d(3, 3, 4)


def test_thin_modules_equal_their_ops() -> None:
    x = torch.randn(6, 4, 3, 3)
    assert torch.equal(PixelNorm()(x), ops.pixel_norm(x))
    assert torch.equal(MinibatchStdDev()(x), ops.minibatch_stddev(x))
    assert torch.equal(MinibatchStdDev(2, 4)(x), ops.minibatch_stddev(x, 2, 4))


def test_maxout_is_the_largest_of_its_pieces() -> None:
    layer, x = Maxout(3, 4, pieces=5), torch.randn(6, 3)
    y = layer(x)
    assert y.shape == (6, 4)
    linear = layer.linear(x)
    for n in range(6):
        for o in range(4):
            assert y[n, o].item() == max(linear[n, 5 * o : 5 * o + 5].tolist())
    assert gradcheck(layer.double(), torch.randn(2, 3, dtype=torch.float64, requires_grad=True))


def test_conditional_batch_norm_without_classes_is_batch_norm() -> None:
    layer, plain, x = ConditionalBatchNorm2d(4), nn.BatchNorm2d(4), torch.randn(5, 4, 3, 3)
    torch.testing.assert_close(layer(x), plain(x))
    assert len(list(layer.parameters())) == 2


def test_conditional_batch_norm_has_a_gain_and_a_bias_for_each_class() -> None:
    layer, x = ConditionalBatchNorm2d(4, num_classes=3), torch.randn(6, 4, 3, 3)
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    normalized = nn.BatchNorm2d(4, affine=False)(x)
    torch.testing.assert_close(layer(x, labels), normalized)  # gain 1 and bias 0 to begin with
    assert layer.affine is not None
    with torch.no_grad():
        layer.affine.weight.normal_()
    y = layer(x, labels)
    for n, label in enumerate(labels.tolist()):
        for c in range(4):
            gain, bias = layer.affine.weight[label, c], layer.affine.weight[label, 4 + c]
            torch.testing.assert_close(y[n, c], normalized[n, c] * gain + bias)


@pytest.mark.parametrize("resample", ["none", "up", "down"])
@pytest.mark.parametrize("normalize", [False, True])
def test_equalized_conv_with_its_epilogue_is_the_steps_one_by_one(resample: str, normalize: bool) -> None:
    fused = EqualizedConv2d(3, 4, 3, resample=resample, act="lrelu", normalize=normalize)
    steps = EqualizedConv2d(3, 4, 3, resample=resample)
    with torch.no_grad():
        fused.bias.uniform_(-1, 1)
    steps.load_state_dict(fused.state_dict())
    x = torch.randn(2, 3, 6, 4)
    expected = F.leaky_relu(steps(x), 0.2)
    torch.testing.assert_close(fused(x), ops.pixel_norm(expected) if normalize else expected)


def test_equalized_linear_with_an_activation() -> None:
    fused, plain = EqualizedLinear(6, 4, act="lrelu"), EqualizedLinear(6, 4)
    with torch.no_grad():
        fused.bias.uniform_(-1, 1)
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(5, 6)
    torch.testing.assert_close(fused(x), F.leaky_relu(plain(x), 0.2))


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_conv2d_is_that_of_torch(padding_mode: str) -> None:
    ours, theirs = (cls(3, 4, 3, stride=2, padding=1, padding_mode=padding_mode) for cls in (Conv2d, nn.Conv2d))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 7, 6)
    torch.testing.assert_close(ours(x), theirs(x))


def test_activation() -> None:
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(Activation("lrelu", 0.3)(x), F.leaky_relu(x, 0.3))
    torch.testing.assert_close(Activation("relu")(x), F.relu(x))
    assert (
        str(Activation("lrelu", 0.3)) == "Activation(lrelu, negative_slope=0.3)"
        and str(Activation("relu")) == "Activation(relu)"
    )


@pytest.mark.parametrize("act", ["linear", "lrelu", "tanh"])
def test_equalized_layers_without_a_batch_and_with_more_dimensions(act: str) -> None:
    torch.manual_seed(0)
    linear = EqualizedLinear(5, 4, act=act)
    x = torch.randn(4, 4, 5)  # the size that a bias on the wrong dimension would fit
    with torch.no_grad():
        linear.bias.copy_(torch.randn(4))
    torch.testing.assert_close(linear(x), torch.stack([linear(rows) for rows in x]))
    torch.testing.assert_close(linear(x)[1, 2], linear(x[1, 2]))
    conv = EqualizedConv2d(3, 6, 3, act=act)
    image = torch.randn(3, 6, 6)
    with torch.no_grad():
        conv.bias.copy_(torch.randn(6))
    torch.testing.assert_close(conv(image), conv(image[None])[0])
