"""What communication costs: the alpha-beta model.

A message of B bytes takes `latency + B / bandwidth`. With n ranks in a ring (Thakur, Rabenseifner & Gropp,
"Optimization of Collective Communication Operations in MPICH", 2005) gathering B bytes, or reducing and scattering
them, takes n - 1 messages of B / n; an all-reduce both of these or, when it is short, log2 n messages of all of it;
an all-to-all of parts that hold B / n each n - 1 messages of B / n^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """`latency` in seconds a message, `bandwidth` in bytes a second."""

    latency: float = 5e-6
    bandwidth: float = 8e9


@dataclass(frozen=True)
class Cluster:
    """What the cost model knows of the machine.

    Attributes:
        link: between ranks; `links` gives another one for some mesh axes, as (axis, link).
        flops: floating-point operations a second of one rank.
        memory: bytes a second that one rank reads or writes.
    """

    link: Link = Link()
    links: tuple[tuple[str, Link], ...] = ()
    flops: float = 5e10
    memory: float = 1e10

    def along(self, axis: str) -> Link:
        """The link between the ranks of an axis."""
        return dict(self.links).get(axis, self.link)

    def ring(self, axis: str, ranks: int, messages: int, nbytes: float) -> float:
        """Seconds of `messages` rounds over the ring, `nbytes` in all per rank."""
        link = self.along(axis)
        return 0.0 if ranks < 2 else messages * link.latency + nbytes / link.bandwidth

    def all_gather(self, axis: str, ranks: int, whole: float) -> float:
        """Seconds until every rank has the `whole` bytes of which it had its part."""
        return self.ring(axis, ranks, ranks - 1, whole * (ranks - 1) / ranks)

    reduce_scatter = all_gather

    def all_reduce(self, axis: str, ranks: int, nbytes: float) -> float:
        """Seconds to sum tensors of `nbytes` everywhere."""
        doublings = math.ceil(math.log2(ranks)) if ranks > 1 else 0
        return min(self.ring(axis, ranks, 2 * (ranks - 1), 2 * nbytes * (ranks - 1) / ranks),
                   self.ring(axis, ranks, doublings, doublings * nbytes))

    def all_to_all(self, axis: str, ranks: int, whole: float) -> float:
        """Seconds to split `whole` bytes along another dimension than before."""
        return self.ring(axis, ranks, ranks - 1, whole / ranks * (ranks - 1) / ranks)

    def touch(self, nbytes: float) -> float:
        """Seconds to read or write bytes in memory."""
        return nbytes / self.memory


def sent_bytes(op: str, ranks: int, whole: float) -> float:
    """Bytes that each rank sends in a collective over `whole` bytes (of the gathered, or of the summed tensor)."""
    once = whole * (ranks - 1) / ranks
    return {"all_reduce": 2 * once, "all_gather": once, "reduce_scatter": once, "all_to_all": once / ranks}[op]
