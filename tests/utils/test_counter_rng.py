from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastgan.utils import counter_rng, splitmix

MANY = torch.arange(20_000)

Draw = Callable[[int, str, Tensor], Tensor]
DRAWS: dict[str, Draw] = {
    "uniform": lambda seed, stream, index: counter_rng.uniform(seed, stream, index, 5),
    "normal": lambda seed, stream, index: counter_rng.normal(seed, stream, index, 5),
    "integers": lambda seed, stream, index: counter_rng.integers(seed, stream, index, 1000)[:, None],
}
each_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.double().flatten(), b.double().flatten()]))[0, 1].item()


@each_draw
def test_a_sample_has_its_numbers_whatever_the_batch(draw: Draw) -> None:
    whole = draw(3, "latent", torch.arange(100, 164))
    parts = torch.cat([draw(3, "latent", torch.arange(a, b)) for a, b in ((100, 101), (101, 140), (140, 164))])
    assert torch.equal(whole, parts)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(3, "latent", 100 + order), whole[order])
    assert torch.equal(draw(3, "latent", torch.arange(100, 164, dtype=torch.int32)), whole)


@each_draw
def test_global_random_state_is_neither_used_nor_moved(draw: Draw) -> None:
    state = torch.get_rng_state()
    first = draw(0, "latent", torch.arange(4))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1234)
    assert torch.equal(draw(0, "latent", torch.arange(4)), first)


def test_splitmix64() -> None:
    """The mixing function is the finaliser of SplitMix64: state 0 steps to these outputs in the reference in C."""
    golden = 0x9E3779B97F4A7C15
    states = torch.tensor([splitmix.signed64(golden * k) for k in (1, 2, 3)])
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [x % 2**64 for x in splitmix.splitmix64(states).tolist()] == expected


def test_bits_are_steps_of_splitmix64_from_a_state_of_the_samples_own() -> None:
    """A stored run must draw the same numbers again with any later version: the definition, in Python's integers."""

    def mix(x: int) -> int:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            x = (x ^ x >> shift) * factor % 2**64
        return x

    golden = 0x9E3779B97F4A7C15
    key = int.from_bytes(hashlib.blake2b(b"3 latent", digest_size=8).digest(), "little")
    index = [0, 1, 2**40]
    states = [mix((i * golden + key) % 2**64) for i in index]
    expected = [[mix((state + k * golden) % 2**64) for k in (1, 2, 3)] for state in states]
    found = counter_rng._bits(counter_rng._key(3, "latent"), torch.tensor(index), 3)
    assert [[x % 2**64 for x in row] for row in found.tolist()] == expected


def test_dtypes_and_shapes() -> None:
    index = torch.arange(7)
    for size in (1, 2, 5, 512):
        for function in (counter_rng.uniform, counter_rng.normal):
            numbers = function(0, "x", index, size)
            assert numbers.dtype == torch.float32 and numbers.shape == (7, size)
    assert counter_rng.integers(0, "x", index, 10).dtype == torch.int64
    assert counter_rng.normal(0, "x", index[:0], 4).shape == (0, 4)


def test_uniform_is_uniform() -> None:
    u = counter_rng.uniform(1, "interpolation", MANY, 8).double()
    n = u.numel()
    assert u.min() > 0 and u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / n))
    assert u.var().item() == pytest.approx(1 / 12, abs=5 * math.sqrt(1 / 180 / n))
    counts = torch.histc(u, bins=64, min=0, max=1)
    chi_squared = ((counts - n / 64) ** 2 / (n / 64)).sum().item()
    assert 63 - 5 * math.sqrt(126) < chi_squared < 63 + 5 * math.sqrt(126)


def test_uniform_excludes_its_ends() -> None:
    """Every 24-bit pattern must land strictly inside (0, 1)."""
    ends = counter_rng._unit(torch.tensor([0, 1, 2**23, 2**24 - 2, 2**24 - 1]))
    assert ends.min() > 0 and ends.max() < 1


def test_normal_is_normal() -> None:
    z = counter_rng.normal(1, "latent", MANY, 8).double()
    n = z.numel()
    assert torch.isfinite(z).all()
    assert z.mean().item() == pytest.approx(0.0, abs=5 / math.sqrt(n))
    assert z.var().item() == pytest.approx(1.0, abs=5 * math.sqrt(2 / n))
    assert (z**3).mean().item() == pytest.approx(0.0, abs=5 * math.sqrt(15 / n))
    assert (z**4).mean().item() == pytest.approx(3.0, abs=5 * math.sqrt(96 / n))
    # Kolmogorov-Smirnov distance to the normal distribution; 2.3 / sqrt(n) is exceeded once in 20,000 draws.
    ranked = torch.special.ndtr(z.flatten().sort().values)
    steps = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert (ranked - steps).abs().max() < 2.3 / math.sqrt(n)


def test_positions_of_a_latent_are_independent() -> None:
    """Box-Muller gives pairs: both halves, and any two positions, are uncorrelated, and so are their squares."""
    z = counter_rng.normal(0, "latent", MANY, 6).double()
    limit = 5 / math.sqrt(len(MANY))
    for numbers in (z, z.square(), z.abs()):
        matrix = torch.corrcoef(numbers.T) - torch.eye(6, dtype=torch.float64)
        assert matrix.abs().max() < limit


@each_draw
def test_neighbors_are_uncorrelated(draw: Draw) -> None:
    x = draw(0, "latent", MANY)
    for lag in (1, 2, 64):
        for numbers in (x.double(), (x.double() - x.double().mean()).square()):
            assert abs(correlation(numbers[lag:], numbers[:-lag])) < 5 / math.sqrt(x.numel() - lag)


@each_draw
def test_streams_are_independent(draw: Draw) -> None:
    streams = ["latent of D's step", "latent of G's step", "interpolation", "sample", "label of G's step"]
    drawn = [draw(0, stream, MANY) for stream in streams]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert abs(correlation(a, b)) < 5 / math.sqrt(a.numel())


@each_draw
@pytest.mark.parametrize("shift", [0, 1, 2, -1])
def test_seeds_are_independent(draw: Draw, shift: int) -> None:
    """At equal indices and at shifted ones: one seed's samples are not another's under other numbers."""
    index = torch.arange(100, 20_100)
    for a, b in ((0, 1), (1, 2), (0, 2), (7, 8)):
        x, y = draw(a, "latent", index), draw(b, "latent", index + shift)
        assert abs(correlation(x, y)) < 5 / math.sqrt(x.numel()), f"seeds {a} and {b}"


@pytest.mark.parametrize("high", [1, 2, 10, 1000])
def test_integers_are_uniform(high: int) -> None:
    drawn = counter_rng.integers(2, "label", MANY, high)
    assert drawn.shape == MANY.shape and drawn.min() >= 0 and drawn.max() < high
    if high > 1:
        counts = torch.bincount(drawn, minlength=high).double()
        expected = len(MANY) / high
        chi_squared = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(chi_squared - (high - 1)) < 5 * math.sqrt(2 * (high - 1))


def test_large_indices_and_seeds() -> None:
    """A run of the largest published size sees under 2^30 images; the arithmetic wraps, and nothing overflows."""
    index = torch.tensor([0, 2**31, 2**40, 2**62])
    for seed in (0, 2**31, 2**63, 2**64 - 1):
        u = counter_rng.uniform(seed, "x", index, 64)
        assert u.min() > 0 and u.max() < 1
        assert len({tuple(row) for row in u.tolist()}) == 4
