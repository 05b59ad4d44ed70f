"""What communication costs: the alpha-beta model.

A message of B bytes takes `latency + B / bandwidth`. Of n ranks (Thakur, Rabenseifner & Gropp, "Optimization of
Collective Communication Operations in MPICH", 2005): gathering B bytes, or reducing and scattering them, takes log2 n
messages that hold B (n - 1) / n bytes together; an all-reduce both of these or, when it is short, log2 n messages of B
bytes each; an all-to-all of parts that hold B / n each n - 1 messages of B / n^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from .mesh import Mesh


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
        near: the link between ranks of one host, of which there are `per_host`; None: all links are alike.
    """

    link: Link = Link()
    links: tuple[tuple[str, Link], ...] = ()
    flops: float = 5e10
    memory: float = 1e10
    near: Link | None = None
    per_host: int = 0

    def on(self, mesh: Mesh) -> Cluster:
        """The cluster as the axes of a mesh see it: an axis whose groups never leave a host has the near link.

        Ranks are numbered host by host, so the last axes of a mesh stay inside.
        """
        if self.near is None or self.per_host < 2:
            return self
        found, span = [], 1
        for axis, size in reversed(mesh.axes):
            span *= size
            found.append((axis, self.near if self.per_host % span == 0 else self.link))
        return replace(self, links=(*found, *(x for x in self.links if x[0] not in mesh)))

    def along(self, axis: str) -> Link:
        """The link between the ranks of an axis."""
        return dict(self.links).get(axis, self.link)

    def rounds(self, axis: str, ranks: int, messages: int, nbytes: float) -> float:
        """Seconds of `messages` messages of each rank, `nbytes` in all."""
        link = self.along(axis)
        return 0.0 if ranks < 2 else messages * link.latency + nbytes / link.bandwidth

    def all_gather(self, axis: str, ranks: int, whole: float) -> float:
        """Seconds until every rank has the `whole` bytes of which it had its part."""
        return self.rounds(axis, ranks, doublings(ranks), whole * (ranks - 1) / ranks)

    reduce_scatter = all_gather

    def all_reduce(self, axis: str, ranks: int, nbytes: float) -> float:
        """Seconds to sum tensors of `nbytes` everywhere."""
        count = doublings(ranks)
        return min(2 * self.all_gather(axis, ranks, nbytes), self.rounds(axis, ranks, count, count * nbytes))

    def all_reduces(self, axis: str, ranks: int, nbytes: np.ndarray) -> np.ndarray:
        """`all_reduce` for tensors of several sizes."""
        count = doublings(ranks)
        twice = self.rounds(axis, ranks, 2 * count, 2 * nbytes * (ranks - 1) / ranks)  # type: ignore[arg-type]
        return np.minimum(twice, self.rounds(axis, ranks, count, count * nbytes))  # type: ignore[arg-type]

    def all_to_all(self, axis: str, ranks: int, whole: float) -> float:
        """Seconds to split `whole` bytes along another dimension than before."""
        return self.rounds(axis, ranks, ranks - 1, whole / ranks * (ranks - 1) / ranks)

    def touch(self, nbytes: float) -> float:
        """Seconds to read or write bytes in memory."""
        return nbytes / self.memory


def doublings(ranks: int) -> int:
    """log2 of the ranks, rounded up: the rounds in which something reaches all."""
    return math.ceil(math.log2(ranks)) if ranks > 1 else 0


def sent_bytes(op: str, ranks: int, whole: float) -> float:
    """Bytes that each rank sends in a collective over `whole` bytes (of the gathered, or of the summed tensor)."""
    once = whole * (ranks - 1) / ranks
    return {"all_reduce": 2 * once, "all_gather": once, "reduce_scatter": once, "all_to_all": once / ranks}[op]
