from __future__ import annotations

import numpy as np
import pytest

from fastgan.data import Sampler, rank_positions
from fastgan.errors import ArgumentError


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 7, 100, 101])
def test_every_image_once_per_epoch(size: int, world: int) -> None:
    """Whatever the batch and the ranks: positions [e * size, (e + 1) * size) hold each image once."""
    batch, epochs = 2 * world, 3
    seen = np.full((epochs + 1) * size + batch, -1)
    samplers = [Sampler(size, seed=5) for _ in range(world)]
    for start in range(0, epochs * size, batch):
        for rank, sampler in enumerate(samplers):
            positions = rank_positions(start, batch, rank, world)
            assert (seen[positions] == -1).all()
            seen[positions] = sampler.indices(positions)
    for epoch in range(epochs):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_each_epoch_has_its_own_order() -> None:
    sampler = Sampler(50, seed=0)
    orders = [tuple(sampler.order(epoch)) for epoch in range(5)]
    assert len(set(orders)) == 5
    assert tuple(range(50)) not in orders


def test_order_depends_on_seed_only() -> None:
    one, other = Sampler(64, seed=3), Sampler(64, seed=3)
    late = other.indices(range(64 * 9, 64 * 10))
    np.testing.assert_array_equal(other.indices(range(100)), one.indices(range(100)))
    np.testing.assert_array_equal(one.indices(range(64 * 9, 64 * 10)), late)
    assert (Sampler(64, seed=4).indices(range(64)) != one.indices(range(64))).any()


def test_order_is_pinned() -> None:
    """A stored run must find its order again with any later version of this code or of NumPy."""
    order = [3, 5, 2, 7, 0, 6, 1, 4, 0, 6, 5, 3, 4, 7, 2, 1]
    np.testing.assert_array_equal(Sampler(8, seed=1).indices(range(16)), order)


def test_any_int_is_a_seed() -> None:
    """Of 64 bits: those that differ in the upper ones alone have orders of their own."""
    orders = [tuple(Sampler(64, seed).order(0)) for seed in (-1, 2**32 - 1, 2**63, 0)]
    assert all(sorted(order) == list(range(64)) for order in orders) and len(set(orders)) == 4
    assert tuple(Sampler(64, 2**64 - 1).order(0)) == orders[0]


def test_positions_in_any_order_and_over_an_epoch_end() -> None:
    sampler = Sampler(10, seed=2)
    both = np.concatenate([sampler.order(0), sampler.order(1)])
    positions = np.array([12, 9, 10, 0, 19])
    found = sampler.indices(positions)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, both[positions])


def test_keeps_two_orders() -> None:
    sampler = Sampler(10, seed=2)
    sampler.indices(range(50))
    assert sampler.order(4) is sampler.order(4)
    assert len(sampler._orders) == 2


def test_share_is_strided() -> None:
    np.testing.assert_array_equal(rank_positions(100, 12, 1, 3), [101, 104, 107, 110])
    assert rank_positions(0, 4, 0, 1).dtype == np.int64


@pytest.mark.parametrize("world", [1, 2, 4])
def test_stddev_groups_of_a_rank_are_groups_of_the_batch(world: int) -> None:
    batch, group = 32, 4

    def groups(positions: np.ndarray) -> set[frozenset[int]]:
        return {frozenset(column.tolist()) for column in positions.reshape(group, -1).T}

    shares = [groups(rank_positions(64, batch, rank, world)) for rank in range(world)]
    assert set.union(*shares) == groups(np.arange(64, 64 + batch))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ((0, 10, 0, 3), "--batch"),
        ((0, 0, 0, 1), "--batch"),
        ((-1, 4, 0, 1), "start"),
        ((0, 4, 2, 2), "rank"),
        ((0, 4, -1, 2), "rank"),
        ((0, 4, 0, 0), "world"),
    ],
)
def test_refuses(call: tuple[int, int, int, int], named: str) -> None:
    with pytest.raises(ArgumentError) as error:
        rank_positions(*call)
    assert error.value.argument == named


def test_sampler_refuses() -> None:
    with pytest.raises(ArgumentError):
        Sampler(0, seed=0)
    with pytest.raises(ArgumentError):
        Sampler(3, seed=0).indices(np.array([2, -1]))
