"""Cost of a training step on a cluster: measured compute time plus a model of the gradient all-reduce.

Pure arithmetic. Times are in seconds, sizes in bytes. What is measured comes from `fastgan.planning.step_times`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated

from pydantic import Field, FiniteFloat, PositiveInt

from fastgan.utils.buckets import pack


@dataclass(frozen=True)
class Link:
    """A network link.

    Attributes:
        bandwidth: bytes per second in each direction.
        latency: seconds from the start of a message to its arrival on an idle link.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """Hosts with the same number of ranks each.

    Attributes:
        nodes: number of hosts.
        per_node: ranks on each host.
        between: link of a whole host to the others, shared by its ranks.
        inside: link of one rank to the others on its host.
        overlap: whether buckets are sent during the backward pass.
    """

    nodes: int
    per_node: int
    between: Link
    inside: Link
    overlap: bool = True

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.per_node

    def first(self, ranks: int) -> Cluster:
        """The hosts of the first `ranks` ranks; of several hosts a partly used one counts as a whole one."""
        return replace(self, nodes=-(-ranks // self.per_node), per_node=min(ranks, self.per_node))


@dataclass(frozen=True)
class UpdateTime:
    """Measured time of one update of one network on a rank's micro-batch.

    Attributes:
        seconds: forward, backward and optimizer step, without communication.
        gradients: (bytes, seconds before the end of the backward pass) of each gradient, in the order in which they
            become ready.
        lead: seconds from the start of the update to the first use of the other network, whose gradients may still
            be in flight until then.
    """

    seconds: Annotated[FiniteFloat, Field(gt=0)]
    gradients: Annotated[tuple[tuple[PositiveInt, FiniteFloat], ...], Field(min_length=1)]
    lead: FiniteFloat = 0.0

    def scaled(self, factor: float) -> UpdateTime:
        """The same update with all times multiplied by `factor`."""
        gradients = tuple((size, before * factor) for size, before in self.gradients)
        return UpdateTime(self.seconds * factor, gradients, self.lead * factor)


@dataclass(frozen=True)
class Cost:
    """Cost of one or several steps, each a generator update with its discriminator updates.

    Attributes:
        seconds: duration.
        communication: seconds of all-reduce, hidden behind compute or not.
        exposed: the part of `communication` that compute does not hide.
        steps: number of steps.
    """

    seconds: float
    communication: float
    exposed: float
    steps: float = 1.0


def ring_seconds(nbytes: float, ranks: int, link: Link) -> float:
    """Ring all-reduce: 2 (n-1) consecutive messages of 1/n of the bytes each (Patarasuk and Yuan 2009)."""
    messages = 2 * (ranks - 1)
    return messages * (nbytes / ranks / link.bandwidth + link.latency)


def all_reduce_seconds(nbytes: float, cluster: Cluster) -> float:
    """Hierarchical ring: reduce-scatter and all-gather inside each host, and one ring per local rank between hosts.

    The `per_node` rings between hosts run at the same time and share the host's link. Together they take as long as
    one ring with all bytes.
    """
    inside = ring_seconds(nbytes, cluster.per_node, cluster.inside)
    return inside + ring_seconds(nbytes, cluster.nodes, cluster.between)


def reduction_seconds(gradients: Sequence[tuple[int, float]], cluster: Cluster) -> tuple[float, float]:
    """Time to all-reduce one network's gradients.

    Buckets are sent one after the other, each no earlier than its last gradient is ready.

    Args:
        gradients: as in `UpdateTime`.
        cluster: the ranks that take part.

    Returns:
        Seconds of all-reduce in total, and seconds of it after the end of the backward pass.
    """
    if cluster.size == 1:
        return 0.0, 0.0
    total, free = 0.0, -float("inf")  # `free`: when the network is idle again; 0 is the end of the backward pass
    for bucket in pack([size for size, _ in gradients]):
        seconds = all_reduce_seconds(sum(gradients[i][0] for i in bucket), cluster)
        ready = max(-gradients[i][1] for i in bucket) if cluster.overlap else 0.0
        free = max(free, ready) + seconds
        total += seconds
    return total, max(free, 0.0)


def step_cost(
    d: UpdateTime, g: UpdateTime, cluster: Cluster, *, n_critic: int, accumulation: int, deferred: bool = True
) -> Cost:
    """Cost of a step on a cluster. Gradients are reduced once per optimizer step, with the last micro-batch.

    Args:
        d, g: one discriminator and one generator update on a micro-batch.
        cluster: the ranks that average gradients.
        n_critic: discriminator updates per generator update.
        accumulation: micro-batches per optimizer step.
        deferred: whether the reduction is waited for at the next use of the weights instead of at the end of the
            backward pass. Between two discriminator updates the next use comes after the generator's forward pass,
            which takes about as long as in the generator's own update.
    """
    sent_d, exposed_d = reduction_seconds(d.gradients, cluster)
    sent_g, exposed_g = reduction_seconds(g.gradients, cluster)
    if deferred:
        exposed_d, exposed_g = max(exposed_d - g.lead, 0.0), max(exposed_g - d.lead, 0.0)
    compute = accumulation * (n_critic * d.seconds + g.seconds)
    exposed = n_critic * exposed_d + exposed_g
    return Cost(compute + exposed, n_critic * sent_d + sent_g, exposed)


def total_cost(parts: Sequence[tuple[float, Cost]]) -> Cost:
    """Sum of costs, each given with the number of its repetitions."""
    return Cost(*(sum(n * getattr(cost, field.name) for n, cost in parts) for field in fields(Cost)))
