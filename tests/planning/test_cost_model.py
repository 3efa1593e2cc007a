"""The communication model against hand computation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fastgan.planning.cost_model import (
    Cluster,
    Link,
    UpdateTime,
    all_reduce_seconds,
    reduction_seconds,
    ring_seconds,
    step_cost,
    total_cost,
)

GIGABIT = Link(bandwidth=1e8, latency=1e-3)
FREE = Link(bandwidth=1e12, latency=0.0)
MB16 = 16 * 2**20


def cluster(nodes: int, per_node: int = 1, **changes: Any) -> Cluster:
    return replace(Cluster(nodes, per_node, between=GIGABIT, inside=Link(1e9, 1e-4)), **changes)


def test_ring() -> None:
    # 4 ranks, 8 MB: 2 (4-1) messages of 2 MB at 100 MB/s, 20 ms each, and 1 ms before each.
    assert ring_seconds(8e6, 4, GIGABIT) == pytest.approx(6 * (0.020 + 0.001))
    assert ring_seconds(8e6, 1, GIGABIT) == 0.0


def test_hierarchical_ring() -> None:
    # Inside: 2 (2-1) messages of 4 MB at 1 GB/s; between 4 hosts as a ring of 8 MB.
    inside = 2 * (4e6 / 1e9 + 1e-4)
    assert all_reduce_seconds(8e6, cluster(4, 2)) == pytest.approx(inside + 6 * 0.021)
    assert all_reduce_seconds(8e6, cluster(1, 2)) == pytest.approx(inside)


@pytest.mark.parametrize(
    ("before", "exposed"),
    [
        ((10.0, 0.0), 1.0),  # the first bucket is sent long before the end, the last one starts there
        ((0.5, 0.0), 1.5),  # half of the first bucket is left at the end
        ((0.0, 0.0), 2.0),  # nothing overlaps
        ((10.0, 9.0), 0.0),  # everything is sent before the end
    ],
)
def test_buckets_overlap_with_the_rest_of_the_backward(before: tuple[float, float], exposed: float) -> None:
    # Two hosts: 2 messages of half a bucket, 1 s for a bucket.
    two = cluster(2, between=Link(bandwidth=MB16, latency=0.0), inside=FREE)
    gradients = [(MB16, before[0]), (MB16, before[1])]
    assert reduction_seconds(gradients, two) == pytest.approx((2.0, exposed))
    assert reduction_seconds(gradients, replace(two, overlap=False)) == pytest.approx((2.0, 2.0))
    assert reduction_seconds(gradients, cluster(1)) == (0.0, 0.0)


def test_a_step_reduces_once_for_each_optimizer_step() -> None:
    two = cluster(2, between=Link(bandwidth=1e6, latency=0.0), overlap=False)
    d, g = UpdateTime(2.0, ((1_000_000, 0.0),)), UpdateTime(1.0, ((500_000, 0.0),))
    step = step_cost(d, g, two, n_critic=5, accumulation=3)
    assert step.communication == step.exposed == pytest.approx(5 * 1.0 + 0.5)
    assert step.seconds == pytest.approx(3 * (5 * 2.0 + 1.0) + 5.5)
    # The generator hides 0.3 s of D's second of all-reduce; D hides all of G's half second.
    leading = step_cost(replace(d, lead=0.7), replace(g, lead=0.3), two, n_critic=5, accumulation=3)
    assert leading.exposed == pytest.approx(5 * 0.7) and leading.communication == step.communication
    assert leading.seconds == pytest.approx(3 * (5 * 2.0 + 1.0) + 3.5)
    at_once = step_cost(replace(d, lead=0.7), replace(g, lead=0.3), two, n_critic=5, accumulation=3, deferred=False)
    assert at_once == step
    # 6,000 images fade and 4,000 do not; a generator update takes 5 batches of 8.
    stable = step_cost(d, g, cluster(1), n_critic=5, accumulation=3)
    stage = total_cost([(6000 / (5 * 8), step), (4000 / (5 * 8), stable)])
    assert stage.steps == 250
    assert stage.seconds == pytest.approx(150 * 38.5 + 100 * 33.0)
    assert stage.communication == stage.exposed == pytest.approx(150 * 5.5)


def test_hosts_of_the_first_ranks() -> None:
    four = cluster(4, 8)
    sizes = {n: (four.first(n).nodes, four.first(n).per_node) for n in (1, 8, 12, 16, 32)}
    assert sizes == {1: (1, 1), 8: (1, 8), 12: (2, 8), 16: (2, 8), 32: (4, 8)}
