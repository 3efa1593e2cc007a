from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernelcases import random
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck

from fastgan import models, ops
from fastgan.ops import gradient_penalty, wasserstein_divergence, zero_centered_penalty


def zero_centered(
    critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, *, weight: Tensor, **settings: Any
) -> Tensor:
    """`zero_centered_penalty` with the signature of the other two."""
    return zero_centered_penalty(critic, torch.lerp(real, fake, weight[:, None].to(real.dtype)), **settings)


Penalty = Callable[..., Tensor]
PENALTIES: dict[str, Penalty] = {
    "gradient penalty": gradient_penalty,
    "gradient penalty to 0": functools.partial(gradient_penalty, target=0.0),
    "divergence p=6": wasserstein_divergence,
    "divergence p=2": functools.partial(wasserstein_divergence, p=2),
    "divergence p=3": functools.partial(wasserstein_divergence, p=3, k=0.5),
    "zero-centered": zero_centered,
}
each_penalty = pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES.keys())


def of_norms(name: str, norms: Tensor) -> Tensor:
    """The penalty called `name` of the norms [N], written out."""
    each = {
        "gradient penalty": (norms - 1) ** 2,
        "gradient penalty to 0": norms**2,
        "divergence p=6": 2 * norms**6,
        "divergence p=2": 2 * norms**2,
        "divergence p=3": 0.5 * norms**3,
        "zero-centered": norms**2,
    }[name]
    return each.sum() / len(norms)


def critic_of(w1: Tensor, b1: Tensor, w2: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(x @ w1.T + b1) @ w2


def norms_of(w1: Tensor, b1: Tensor, w2: Tensor, x: Tensor) -> Tensor:
    """|d critic_of / dx|, [N], with the derivative taken on paper."""
    slope = 1 - torch.tanh(x @ w1.T + b1) ** 2
    return torch.sqrt((((slope * w2) @ w1) ** 2).sum(dim=1))


def setting() -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor, Tensor]:
    """Weights of two layers, real, fake and interpolation weights."""
    weights = (random(4, 3, seed=1), random(4, seed=2), random(4, seed=3))
    return weights, random(5, 3, seed=4), random(5, 3, seed=5), torch.linspace(0, 1, 5, dtype=torch.float64)


@pytest.mark.parametrize("name", PENALTIES)
def test_value_matches_the_derivative_on_paper(name: str) -> None:
    weights, real, fake, t = setting()
    actual = PENALTIES[name](functools.partial(critic_of, *weights), real, fake, weight=t)
    x = real + t[:, None] * (fake - real)
    torch.testing.assert_close(actual, of_norms(name, norms_of(*weights, x)))


@pytest.mark.parametrize("name", PENALTIES)
def test_weight_gradient_matches_finite_differences(name: str) -> None:
    """If a backward is not differentiable, terms of this gradient are missing without an error: the seed of the inner
    gradient is a constant."""
    weights, real, fake, t = setting()
    weights = tuple(w.requires_grad_() for w in weights)
    value = PENALTIES[name](functools.partial(critic_of, *weights), real, fake, weight=t)
    gradients = torch.autograd.grad(value, weights)
    x = real + t[:, None] * (fake - real)
    step = 1e-6
    for i, weight in enumerate(weights):
        expected = torch.empty_like(weight)
        for j in range(weight.numel()):
            sides = []
            for sign in (1, -1):
                moved = [w.detach().clone() for w in weights]
                moved[i].view(-1)[j] += sign * step
                sides.append(of_norms(name, norms_of(*moved, x)).item())
            expected.view(-1)[j] = (sides[0] - sides[1]) / (2 * step)
        torch.testing.assert_close(gradients[i], expected, rtol=1e-6, atol=1e-7)


@each_penalty
def test_gradcheck_through_modules(penalty: Penalty) -> None:
    """Through convolution, attention, minibatch statistics and leaky rectifiers, with respect to every weight."""
    real, fake = random(3, 2, 4, 4, seed=1), random(3, 2, 4, 4, seed=2)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)

    def value(w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        def critic(x: Tensor) -> Tensor:
            y = torch.nn.functional.leaky_relu(ops.conv2d_downsample(x.view(3, 2, 4, 4), w1), 0.2)
            y = ops.pixel_norm(y)
            rows = y.flatten(2).transpose(1, 2)
            y = y + ops.scaled_dot_product_attention(rows @ w2, rows, rows).transpose(1, 2).view_as(y)
            return ops.minibatch_stddev(y, 3).flatten(1) @ w3

        return penalty(critic, real.flatten(1), fake.flatten(1), weight=t)

    weights = (random(2, 2, 3, 3, seed=3), random(2, 2, seed=4), random(12, seed=5))
    assert gradcheck(value, tuple(w.requires_grad_() for w in weights))


@each_penalty
@pytest.mark.parametrize("curved", [False, True])
def test_tangent_gives_the_gradients_of_reverse(penalty: Penalty, curved: bool) -> None:
    real, fake, t = random(3, 2, 4, 4, seed=1), random(3, 2, 4, 4, seed=2), torch.tensor([0.2, 0.5, 0.9]).double()
    weights = [w.requires_grad_() for w in (random(2, 2, 3, 3, seed=3), random(2, seed=4), random(1, 8, seed=5))]
    calls = []

    def critic(x: Tensor) -> Tensor:
        calls.append(1)
        y = ops.conv2d(x.view(3, 2, 4, 4), weights[0], weights[1], padding=1)
        y = torch.tanh(y) if curved else torch.nn.functional.leaky_relu(y, 0.2)
        return ops.linear(ops.avg_pool2d(y).flatten(1), weights[2])

    found = []
    for method, expected_calls in (("reverse", 1), ("tangent", 2)):
        calls.clear()
        value = penalty(critic, real.flatten(1), fake.flatten(1), weight=t, method=method)
        slopes = torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)
        found.append([value, *slopes])
        assert len(calls) == expected_calls
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)
    assert (found[0][2].abs().max() > 0) == curved  # the bias
    with pytest.raises(ValueError, match=r"method must be reverse(,| or) tangent.*, got 'forward'"):
        penalty(critic, real.flatten(1), fake.flatten(1), weight=t, method="forward")


@pytest.mark.parametrize("model", ["dcgan", "pggan", "r3gan", "sagan"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tangent_of_the_critics_of_this_package(model: str, precision: str) -> None:
    """pggan's in a fade-in and sagan's shortcut pool the images before any weight is there to be tracked."""
    torch.manual_seed(0)
    _, critic = models.build(
        model, resolution=16, channels=3, latent=4, width=8, max_width=8, norm_d="none", fmap_base=64, fmap_max=8
    )
    critic.eval()  # spectral norm is one function then, not another at each call
    if model == "pggan":
        critic.set_alpha(0.5)  # type: ignore[operator]
    if model == "sagan":
        for block in critic.attention.values():  # type: ignore[operator, union-attr]
            torch.nn.init.ones_(block.gamma)
    weights = [p for p in critic.parameters() if p.requires_grad]
    real, fake, t = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16), torch.rand(4)
    found = []
    for method in ("reverse", "tangent"):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            value = gradient_penalty(critic, real, fake, weight=t, method=method)
        found.append([value, *torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)])
    total = torch.stack([g.square().sum() for g in found[0][1:]]).sum().sqrt()
    difference = torch.stack([(a - b).square().sum() for a, b in zip(*found, strict=True)]).sum().sqrt()
    assert total > 0 and difference < (1e-4 if precision == "fp32" else 0.1) * total


def test_a_lost_tangent_is_an_error() -> None:
    real, w = random(4, 3), random(3, seed=1).requires_grad_()
    with pytest.raises(RuntimeError, match="critic: a layer lost the forward-mode derivative"):
        gradient_penalty(lambda x: forward_ad.unpack_dual(x).primal @ w, real, real, method="tangent")


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: nn.LayerNorm([4, 6, 6]),
    "instance norm": lambda: nn.InstanceNorm2d(4),
    "batch norm": lambda: nn.BatchNorm2d(4),
    "batch norm, not training": lambda: nn.BatchNorm2d(4).eval(),
    "group norm": lambda: nn.GroupNorm(2, 4),
}


@pytest.mark.parametrize("name", NORMS)
def test_tangent_rejects_norms_that_pytorch_differentiates_wrongly(name: str) -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 4, 3, padding=1).double()
    norm = NORMS[name]().double()
    critic = nn.Sequential(first, norm, nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(144, 1).double())
    real, fake = random(3, 3, 6, 6), random(3, 3, 6, 6, seed=1)
    weight = random(3, seed=2).sigmoid()

    def slope(method: str) -> Tensor:
        return torch.autograd.grad(gradient_penalty(critic, real, fake, weight=weight, method=method), first.weight)[0]

    if name in ("group norm", "batch norm, not training"):
        torch.testing.assert_close(slope("tangent"), slope("reverse"))
        return
    assert slope("reverse").abs().max() > 0
    with pytest.raises(
        RuntimeError, match=r"critic: the forward-mode derivative of (layer|batch) norm.*method='reverse'"
    ):
        slope("tangent")


X = torch.zeros(2, 3)
REFUSED: list[tuple[Callable[[], object], type[Exception], str]] = [
    (
        lambda: gradient_penalty(lambda x: x.sum(1), X, X.bfloat16()),
        TypeError,
        r"fake must be torch\.float32, as real, got torch\.bfloat16",
    ),
    (
        lambda: gradient_penalty(lambda x: x.mean(), X, X),
        ValueError,
        r"critic must return \[2\] or \[2, 1\], one score for each sample, got \(\)",
    ),
    (
        lambda: gradient_penalty(lambda x: x.mean(0), X, X),
        ValueError,
        r"critic must return \[2\] or \[2, 1\], one score for each sample, got \(3,\)",
    ),
    (
        lambda: gradient_penalty(lambda x: (x, x), X, X),
        TypeError,
        r"critic must return a floating-point tensor, \[N\] or \[N, 1\], got tuple",
    ),
    (
        lambda: gradient_penalty(lambda x: x, X[0], X[0]),
        ValueError,
        r"real must be \[N, ...\] with at least two dimensions, got shape \(3,\)",
    ),
    (
        lambda: gradient_penalty(lambda x: x, X.int(), X.int()),
        TypeError,
        r"real must have a floating-point dtype, got torch\.int32",
    ),
    (
        lambda: zero_centered_penalty(lambda x: x, X.int()),
        TypeError,
        r"x must have a floating-point dtype, got torch\.int32",
    ),
    (
        lambda: gradient_penalty(lambda x: x, X, X, weight=[0.5, 0.5]),
        TypeError,
        r"weight must be a tensor \[2\], got list",
    ),  # type: ignore[arg-type]
    (
        lambda: gradient_penalty(lambda x: x, X, X, weight=torch.empty(2, device="meta")),
        ValueError,
        "weight must be on cpu, as real, got meta",
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), REFUSED)
def test_argument_errors_of_critics_and_tensors(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_no_penalty_without_gradients() -> None:
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"a penalty needs gradients: call it outside torch.no_grad"),
    ):
        gradient_penalty(lambda x: x.sum(1), X, X)


def test_scores_of_patches_are_added_up() -> None:
    real, fake, weight, w = random(2, 1, 6, 6), random(2, 1, 6, 6, seed=1), random(2).sigmoid(), random(1, 1, 3, 3)
    patches = gradient_penalty(lambda x: ops.conv2d(x, w), real, fake, weight=weight)
    summed = gradient_penalty(lambda x: ops.conv2d(x, w).sum((1, 2, 3)), real, fake, weight=weight)
    torch.testing.assert_close(patches, summed)


def test_linear_critic() -> None:
    """The gradient of a linear critic is its weight, whatever x is."""
    w = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    real, fake = random(6, 2), random(6, 2, seed=1)
    generator = torch.Generator().manual_seed(0)

    def critic(x: Tensor) -> Tensor:
        return x @ w + 7.0

    penalty = gradient_penalty(critic, real, fake, generator=generator)
    assert penalty.item() == pytest.approx(16.0)  # (5 - 1)^2
    (slope,) = torch.autograd.grad(penalty, w)
    torch.testing.assert_close(slope, 2 * (5 - 1) / 5 * w.detach())
    assert gradient_penalty(critic, real, fake, target=5.0).item() == pytest.approx(0.0, abs=1e-20)
    assert wasserstein_divergence(critic, real, fake).item() == pytest.approx(2 * 5**6)
    assert wasserstein_divergence(critic, real, fake, k=0.5, p=3).item() == pytest.approx(0.5 * 5**3)
    assert zero_centered_penalty(critic, real).item() == pytest.approx(25.0)


def test_scores_may_be_a_column() -> None:
    _, real, fake, t = setting()
    row, column = random(3, seed=6), random(3, seed=6)[:, None]
    for penalty in PENALTIES.values():
        expected = penalty(lambda x: (x @ row).tanh(), real, fake, weight=t)
        torch.testing.assert_close(penalty(lambda x: (x @ column).tanh(), real, fake, weight=t), expected)


@each_penalty
def test_zero_gradient_gives_no_nan(penalty: Penalty) -> None:
    """A critic that is flat at some samples: there the norm has derivative 0, elsewhere its own."""
    real = torch.tensor([[-1.0, -2.0], [1.0, 2.0]], dtype=torch.float64)
    t = torch.zeros(2, dtype=torch.float64)
    w = torch.tensor([[0.5, 0.25], [1.0, 2.0]], dtype=torch.float64, requires_grad=True)

    def score(x: Tensor) -> Tensor:
        return torch.relu(x @ w.T).sum(dim=1)  # the first sample is on the flat side of both units

    both = penalty(score, real, real, weight=t)
    (slope,) = torch.autograd.grad(both, w)
    assert torch.isfinite(both) and torch.isfinite(slope).all()
    (alone,) = torch.autograd.grad(penalty(score, real[1:], real[1:], weight=t[1:]), w)
    torch.testing.assert_close(slope, alone / 2)
    assert alone.abs().max() > 0


@each_penalty
def test_zero_weights_give_no_nan(penalty: Penalty) -> None:
    """|g| = 0 where g does depend on the weights: the square root alone has an infinite slope there."""
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    _, real, fake, t = setting()
    value = penalty(lambda x: x @ w, real, fake, weight=t)
    (slope,) = torch.autograd.grad(value, w)
    assert torch.equal(slope, torch.zeros_like(w))
    assert value.item() == (1.0 if penalty is gradient_penalty else 0.0)


@each_penalty
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_half_precision_critic_gives_a_float32_penalty(penalty: Penalty, input_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    real, fake = torch.randn(6, 8).to(input_dtype), torch.randn(6, 8).to(input_dtype)
    t = torch.rand(6)
    dtypes = []

    def score(x: Tensor) -> Tensor:
        scores = critic(x)
        dtypes.append(scores.dtype)
        return scores

    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = penalty(score, real, fake, weight=t)
    assert dtypes == [torch.bfloat16]
    assert value.dtype == torch.float32
    slopes = torch.autograd.grad(value, list(critic.parameters()), allow_unused=True)
    assert slopes[-1] is None or slopes[-1].abs().max() == 0  # the last bias
    assert all(s is not None and torch.isfinite(s).all() and s.dtype == torch.float32 for s in slopes[:-1])
    exact = penalty(critic, real.float(), fake.float(), weight=t)
    torch.testing.assert_close(value, exact, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("method", ["reverse", "tangent"])
def test_scores_in_half_precision_do_not_overflow_in_a_sum(method: str) -> None:
    """Each sample's score and slope fit into float16, the batch's sums do not."""
    w = torch.full((4,), 200.0, requires_grad=True)
    x = torch.full((8, 4), 80.0)
    value = gradient_penalty(lambda x: (x @ w).half(), x, x, method=method)
    (gradient,) = torch.autograd.grad(value, w)
    assert value.item() == (400 - 1) ** 2
    torch.testing.assert_close(gradient, torch.full((4,), 2 * (400 - 1) * 0.5))


def test_large_gradients_do_not_overflow_half_precision() -> None:
    """1000^2 is beyond float16; the norm must be taken after the cast."""
    w = torch.full((4,), 1000.0, dtype=torch.float16)
    x = torch.ones(2, 4, dtype=torch.float16)
    assert zero_centered_penalty(lambda t: t * w, x).item() == 4e6
    assert gradient_penalty(lambda t: t * w, x, x).item() == 1999.0**2


@pytest.mark.parametrize("penalty", [gradient_penalty, wasserstein_divergence])
def test_weight_and_generator(penalty: Penalty) -> None:
    weights, real, fake, _ = setting()
    critic = functools.partial(critic_of, *weights)

    def seeded(seed: int) -> Tensor:
        return penalty(critic, real, fake, generator=torch.Generator().manual_seed(seed))

    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert seeded(5).item() == seeded(5).item() != seeded(6).item()
    assert torch.equal(torch.get_rng_state(), state)
    drawn = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert penalty(critic, real, fake, weight=drawn).item() == seeded(5).item()
    # 0 is real, 1 is fake, and the shape of the weights does not matter.
    ends = torch.zeros(5), torch.ones(5, 1)
    only_real = penalty(critic, real, real, weight=torch.full((5,), 0.3))
    torch.testing.assert_close(penalty(critic, real, fake, weight=ends[0]), only_real)
    only_fake = penalty(critic, fake, fake, weight=torch.full((5,), 0.3))
    torch.testing.assert_close(penalty(critic, real, fake, weight=ends[1]), only_fake)


def test_interpolation_is_one_weight_for_a_whole_image() -> None:
    seen = []

    def critic(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return x.flatten(1).sum(dim=1)

    real, fake = torch.zeros(4, 2, 3, 3), torch.ones(4, 2, 3, 3)
    gradient_penalty(critic, real, fake, generator=torch.Generator().manual_seed(0))
    (x,) = seen
    flat = x.flatten(1)
    assert torch.equal(flat, flat[:, :1].expand_as(flat))
    assert len(set(flat[:, 0].tolist())) == 4 and flat.min() >= 0 and flat.max() <= 1


@each_penalty
def test_critic_is_called_once_and_no_gradient_reaches_the_images(penalty: Penalty) -> None:
    calls = []
    weights, real, fake, t = setting()
    weights = tuple(w.requires_grad_() for w in weights)
    real.requires_grad_()
    fake.requires_grad_()

    def critic(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return critic_of(*weights, x)

    penalty(critic, real, fake, weight=t).backward()
    assert calls == [(5, 3)]
    assert real.grad is None and fake.grad is None
    assert all(w.grad is not None for w in weights)


@pytest.mark.parametrize("penalty", [gradient_penalty, wasserstein_divergence])
def test_argument_errors(penalty: Penalty) -> None:
    real = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"fake must be \(4, 3\), as real, got shape \(3, 3\)"):
        penalty(lambda x: x.sum(1), real, torch.zeros(3, 3))
    with pytest.raises(ValueError, match="weight must have 4 elements, one for each sample, got 3"):
        penalty(lambda x: x.sum(1), real, real, weight=torch.zeros(3))


WITH_ZEROS: dict[str, Callable[..., Tensor]] = {
    "gradient_penalty": lambda critic, x, **how: ops.gradient_penalty(critic, x, x + 1, **how),
    "wasserstein_divergence": lambda critic, x, **how: ops.wasserstein_divergence(critic, x, x + 1, **how),
    "zero_centered_penalty": ops.zero_centered_penalty,
}


@pytest.mark.parametrize("method", ["reverse", "tangent"])
@pytest.mark.parametrize("name", WITH_ZEROS)
def test_zeros_for_parameters_that_a_penalty_does_not_depend_on(name: str, method: str) -> None:
    """Adam then steps them as with plain PyTorch, by its momentum; it skips a parameter whose gradient is None."""
    weights = [torch.randn(4, 3, 3, 3) * 0.3, torch.randn(4), torch.randn(1, 4)]
    x = torch.randn(2, 3, 6, 6)
    stepped = []
    for zeros in (False, True):
        parameters = [w.clone().requires_grad_() for w in weights]
        frozen = torch.ones(1)
        adam = torch.optim.Adam(parameters, 1e-2)

        def critic(t: Tensor, p: list[Tensor] = parameters) -> Tensor:
            return ops.linear(ops.bias_act(ops.conv2d(t, p[0], p[1])).mean((2, 3)), p[2])

        critic(x).sum().backward()
        adam.step()
        adam.zero_grad()
        how = {"zeros": [*parameters, frozen]} if zeros else {}
        torch.manual_seed(1)
        WITH_ZEROS[name](critic, x, method=method, **how).backward()
        bias = parameters[1].grad
        assert (bias is not None and not bias.any()) if zeros else bias is None
        assert frozen.grad is None
        adam.step()
        stepped.append(parameters)
    assert torch.equal(stepped[0][0], stepped[1][0]) and not torch.equal(stepped[0][1], stepped[1][1])


@each_penalty
@pytest.mark.parametrize("method", ["reverse", "tangent"])
def test_a_scale_of_the_inner_gradient_changes_nothing_in_range(penalty: Penalty, method: str) -> None:
    weights, real, fake, weight = setting()
    weights = tuple(w.requires_grad_() for w in weights)

    def gradients(**scale: Any) -> list[Tensor]:
        value = penalty(functools.partial(critic_of, *weights), real, fake, weight=weight, method=method, **scale)
        return [value.detach(), *torch.autograd.grad(value, weights)]

    for scale in (torch.tensor(1024.0), 2.0**-10):
        for scaled, plain in zip(gradients(scale=scale), gradients(), strict=True):
            torch.testing.assert_close(scaled, plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ["reverse", "tangent"])
@pytest.mark.parametrize("small", [2.0**-30, 2.0**-20])
def test_a_scale_keeps_the_inner_gradient_of_a_float16_critic(small: float, method: str) -> None:
    """Scores that are means of many small terms have gradients that float16 rounds to 0."""
    features = torch.full((8,), small, requires_grad=True)

    def critic(x: Tensor) -> Tensor:
        halves = (x.half() * 1.0).float() * features  # the gradient passes through float16
        return halves.sum(dim=1)

    x = torch.ones(4, 8)
    exact = (8 * small**2) ** 0.5
    for scale, found in ((None, exact if small == 2.0**-20 else 0.0), (2.0**14, exact)):
        settings = {} if scale is None else {"scale": torch.tensor(scale)}
        penalty = gradient_penalty(critic, x, x, target=0.0, weight=torch.zeros(4), method=method, **settings)
        assert penalty.item() == pytest.approx(found**2, rel=1e-3)
        if scale is not None and small == 2.0**-20:  # the loss is scaled as well
            (slope,) = torch.autograd.grad(penalty * scale, features)
            torch.testing.assert_close(slope / scale, torch.full((8,), 2 * small), rtol=1e-3, atol=0)
