"""How long a step takes on many hosts: measured computing, and a model of what the ranks send each other.

Plain arithmetic over numbers that `steptimes` measures and `plan` counts; seconds, bytes and images throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

# A gradient bucket is sent as soon as it holds this much; large enough that bandwidth and not latency decides, small
# enough that several are sent during a backward of 20 million parameters.
BUCKET_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Link:
    """bandwidth: bytes/s in each direction; latency: seconds from a message's start to its arrival when empty."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """`nodes` hosts of `per_node` ranks; `between` is the link of a whole host, shared by its ranks, `inside` a rank's.

    overlap: whether buckets are sent while the backward goes on.
    """

    nodes: int
    per_node: int
    between: Link
    inside: Link
    overlap: bool = True

    @property
    def size(self) -> int:
        return self.nodes * self.per_node

    def first(self, ranks: int) -> Cluster:
        """The hosts of the first `ranks` ranks; one that they fill in part counts whole, if it is not the only one."""
        return replace(self, nodes=-(-ranks // self.per_node), per_node=min(ranks, self.per_node))


def ring_seconds(nbytes: float, ranks: int, link: Link) -> float:
    """Ring all-reduce: 2 (n-1) messages one after the other, each of 1/n of the bytes (Patarasuk and Yuan 2009)."""
    steps = 2 * (ranks - 1)
    return steps * (nbytes / ranks / link.bandwidth + link.latency)


def all_reduce_seconds(nbytes: float, cluster: Cluster) -> float:
    """A hierarchical ring: inside hosts reduce-scatter and all-gather, between them a ring of each slot's share.

    The `per_node` rings between hosts run at once and share their host's link, so together they move what one ring of
    all the bytes would.
    """
    inside = ring_seconds(nbytes, cluster.per_node, cluster.inside)
    return inside + ring_seconds(nbytes, cluster.nodes, cluster.between)


def pack(sizes: Sequence[int], limit: int = BUCKET_BYTES) -> list[list[int]]:
    """Indices of `sizes` (bytes) in order, cut into buckets that are closed once they hold `limit` or more."""
    buckets: list[list[int]] = []
    held = limit
    for index, size in enumerate(sizes):
        if held >= limit:
            buckets.append([])
            held = 0
        buckets[-1].append(index)
        held += size
    return buckets


def reduction_seconds(gradients: Sequence[tuple[int, float]], cluster: Cluster) -> tuple[float, float]:
    """(all seconds of sending, those by which the step gets longer) of one network's gradients.

    gradients: (bytes, seconds before the end of the backward at which it is ready), in the order of becoming ready.
    Buckets are sent one after the other, each from when its last gradient is there.
    """
    if cluster.size == 1:
        return 0.0, 0.0
    total, free = 0.0, -float("inf")
    for bucket in pack([size for size, _ in gradients]):
        takes = all_reduce_seconds(sum(gradients[i][0] for i in bucket), cluster)
        ready = max(-gradients[i][1] for i in bucket) if cluster.overlap else 0.0
        free = max(free, ready) + takes
        total += takes
    return total, max(free, 0.0)


@dataclass(frozen=True)
class NetworkTime:
    """One step of one network on a rank's micro-batch.

    seconds: forward, backward and optimizer, alone. gradients: as for `reduction_seconds`. lead: seconds of it before
    the other network is used, whose gradients may still be on their way then.
    """

    seconds: float
    gradients: tuple[tuple[int, float], ...]
    lead: float = 0.0

    def scaled(self, factor: float) -> NetworkTime:
        """The same step, so many times as long."""
        gradients = tuple((size, before * factor) for size, before in self.gradients)
        return NetworkTime(self.seconds * factor, gradients, self.lead * factor)


@dataclass(frozen=True)
class Step:
    """One generator step with its discriminator steps: seconds in all, those of sending, and those not hidden."""

    seconds: float
    communication: float
    exposed: float


def step_seconds(
    d: NetworkTime, g: NetworkTime, cluster: Cluster, *, n_critic: int, accumulation: int, deferred: bool = True
) -> Step:
    """Gradients are reduced once for each optimizer step, with the last micro-batch.

    deferred: whether they are waited for when the weights are next used, and not when the backward ends. Between two
    steps of D that is after the generator has made images, which takes it about as long as in its own step.
    """
    sent_d, exposed_d = reduction_seconds(d.gradients, cluster)
    sent_g, exposed_g = reduction_seconds(g.gradients, cluster)
    if deferred:
        exposed_d, exposed_g = max(exposed_d - g.lead, 0.0), max(exposed_g - d.lead, 0.0)
    computing = accumulation * (n_critic * d.seconds + g.seconds)
    exposed = n_critic * exposed_d + exposed_g
    return Step(computing + exposed, n_critic * sent_d + sent_g, exposed)


@dataclass(frozen=True)
class StageTime:
    """A stage of the plan; `seconds` to train it, `steps` generator steps, and the step in its two forms."""

    steps: float
    seconds: float
    communication: float
    exposed: float

    @property
    def step(self) -> float:
        return self.seconds / self.steps


def stage_seconds(parts: Sequence[tuple[float, Step]], batch: int, n_critic: int) -> StageTime:
    """A stage of parts (images, step): while it fades, and after."""
    counted = [(images / (batch * n_critic), step) for images, step in parts if images > 0]
    return StageTime(
        sum(n for n, _ in counted),
        sum(n * step.seconds for n, step in counted),
        sum(n * step.communication for n, step in counted),
        sum(n * step.exposed for n, step in counted),
    )
