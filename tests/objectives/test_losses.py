from __future__ import annotations

import math

import pytest
import torch

from fastgan.objectives import Loss, hinge, least_squares, minimax, relativistic, wasserstein

REAL, FAKE = [2.0, -0.5, 0.25], [-1.0, 3.0, 0.5]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def both(loss: Loss) -> tuple[float, float]:
    real, fake = torch.tensor(REAL), torch.tensor(FAKE)
    return loss.discriminator(real, fake).item(), loss.generator(fake).item()


def test_minimax() -> None:
    d, g = both(minimax())
    d_expected = mean([-math.log(sigmoid(s)) for s in REAL]) + mean([-math.log(1 - sigmoid(s)) for s in FAKE])
    assert d == pytest.approx(d_expected, rel=1e-6)
    assert g == pytest.approx(mean([-math.log(sigmoid(s)) for s in FAKE]), rel=1e-6)


def test_minimax_saturating() -> None:
    d, g = both(minimax(saturating=True))
    assert d == both(minimax())[0]
    assert g == pytest.approx(mean([math.log(1 - sigmoid(s)) for s in FAKE]), rel=1e-6)


def test_saturating_gradient_vanishes_where_the_other_does_not() -> None:
    slopes = {}
    for saturating in (True, False):
        fake = torch.tensor([-20.0], requires_grad=True)
        minimax(saturating).generator(fake).backward()
        slopes[saturating] = fake.grad.item()  # type: ignore[union-attr]
    assert -1e-8 < slopes[True] < 0
    assert slopes[False] == pytest.approx(-1.0)


def test_minimax_stays_finite_for_large_scores() -> None:
    large = torch.tensor([-1000.0, 1000.0])
    assert minimax().discriminator(large, large).item() == 1000.0
    assert minimax().generator(large).item() == 500.0


def test_least_squares() -> None:
    d, g = both(least_squares())
    assert d == pytest.approx(0.5 * mean([(s - 1) ** 2 for s in REAL]) + 0.5 * mean([s**2 for s in FAKE]))
    assert g == pytest.approx(0.5 * mean([(s - 1) ** 2 for s in FAKE]))


def test_least_squares_labels() -> None:
    d, g = both(least_squares(a=-1.0, b=2.0, c=0.5))
    assert d == pytest.approx(0.5 * mean([(s - 2) ** 2 for s in REAL]) + 0.5 * mean([(s + 1) ** 2 for s in FAKE]))
    assert g == pytest.approx(0.5 * mean([(s - 0.5) ** 2 for s in FAKE]))


def test_wasserstein() -> None:
    d, g = both(wasserstein())
    assert d == pytest.approx(mean(FAKE) - mean(REAL))
    assert g == pytest.approx(-mean(FAKE))


def test_hinge() -> None:
    d, g = both(hinge())
    assert d == pytest.approx(mean([max(0, 1 - s) for s in REAL]) + mean([max(0, 1 + s) for s in FAKE]))
    assert g == pytest.approx(-mean(FAKE))


@pytest.mark.parametrize("loss", [minimax(), minimax(True), least_squares(), wasserstein(), hinge()])
def test_signs(loss: Loss) -> None:
    """A discriminator gains from higher scores of real and lower ones of fake images, a generator the reverse."""
    real, fake = torch.tensor([0.1, -0.2], requires_grad=True), torch.tensor([0.3, 0.2], requires_grad=True)
    up, down = torch.autograd.grad(loss.discriminator(real, fake), (real, fake))
    assert (up < 0).all() and (down > 0).all()
    (toward,) = torch.autograd.grad(loss.generator(fake), fake)
    assert (toward < 0).all()
    assert loss.discriminator(real, fake).shape == loss.generator(fake).shape == ()


def test_relativistic() -> None:
    """Pairs of one real and one fake score; a constant added to all changes nothing."""
    loss, real, fake = relativistic(), torch.tensor(REAL), torch.tensor(FAKE)
    d_expected = mean([-math.log(sigmoid(r - f)) for r, f in zip(REAL, FAKE, strict=True)])
    g_expected = mean([-math.log(sigmoid(f - r)) for r, f in zip(REAL, FAKE, strict=True)])
    for shift in (0.0, 40.0):
        assert loss.discriminator(real + shift, fake + shift).item() == pytest.approx(d_expected, rel=1e-5)
        assert loss.generator(fake + shift, real + shift).item() == pytest.approx(g_expected, rel=1e-5)
    assert loss.paired and not any(other.paired for other in (minimax(), hinge(), least_squares(), wasserstein()))


def test_margins() -> None:
    """Positive where the discriminator takes the real image for real, by the boundary of each loss."""
    real, fake = torch.tensor(REAL), torch.tensor(FAKE)
    signs = {
        minimax(): [1, -1, 1],
        hinge(): [1, -1, 1],
        least_squares(0.0, 1.0): [1, -1, -1],
        least_squares(1.0, -1.0): [-1, 1, -1],  # labels the other way round
        wasserstein(): [1, -1, -1],
        relativistic(): [1, -1, -1],
    }
    for loss, expected in signs.items():
        assert loss.margin(real, fake).sign().tolist() == expected
