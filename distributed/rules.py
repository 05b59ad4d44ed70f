"""The slot `shard` of an op: which dimensions of operands and results go together.

A rule gives every dimension a *label*. Dimensions that carry the same label are split together: in `matmul: (m k), (k
n) -> (m n)` splitting `n` splits the second operand and the result; splitting `k`, which the result lacks, leaves a
partial sum. A dimension without a label (None) has to be whole. From this follow all ways to run the op along one
mesh axis, its *strategies*:

* `None`: whole operands, whole results;
* a label: the dimensions that carry it are split;
* `Linear(k)`: the operands of the k-th linear set are partial sums, and so are the results (the sum is taken later).

The notation is that of Shardy's op sharding rules and of einsum. Where an op's attributes change with its shape, or a
split dimension needs another program (an embedding of which each rank has some rows), the rule's `local` emits that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..ir.context import emit
from ..ir.graph import Node, Value
from .mesh import Mesh
from .sharding import PARTIAL, WHOLE

Label = Any  # any hashable; None: has to be whole
Labels = tuple[Label, ...]


@dataclass(frozen=True)
class Linear:
    """The strategy that passes partial sums through: the number of a linear set."""

    set: int


Strategy = Any  # None, a label, or Linear


@dataclass(frozen=True)
class Factors:
    """How the dimensions of a node go together.

    Attributes:
        operands, results: a label for each dimension.
        summed: labels that no result has; split, they leave a partial sum.
        combined: labels that no result has whose parts are combined at once: label -> "max" or "min".
        addends: label -> operands that are added to what the split leaves, and so are partial sums as well.
        linear: sets of operands in which the op is linear, together: all of a set may be partial sums.
        limits: label -> what the number of ranks has to divide, besides the extents themselves.
    """

    operands: tuple[Labels, ...]
    results: tuple[Labels, ...]
    summed: frozenset[Label] = frozenset()
    combined: Mapping[Label, str] = field(default_factory=dict)
    addends: Mapping[Label, tuple[int, ...]] = field(default_factory=dict)
    linear: tuple[frozenset[int], ...] = ()
    limits: Mapping[Label, int] = field(default_factory=dict)

    def splittable(self, node: Node) -> dict[Label, int]:
        """Label -> the number that the ranks along an axis must divide."""
        found: dict[Label, int] = {}
        for labels, value in zip((*self.operands, *self.results), (*node.operands, *node.results)):
            for label, size in zip(labels, value.shape):
                if label is not None:
                    found[label] = math.gcd(found.get(label, 0), size) if isinstance(size, int) else 1
        for label, limit in self.limits.items():
            if label in found:
                found[label] = math.gcd(found[label], limit)
        return found

    def operand_placement(self, strategy: Strategy, i: int) -> int:
        """Where operand i lies along the axis under a strategy."""
        if isinstance(strategy, Linear):
            return PARTIAL if i in self.linear[strategy.set] else WHOLE
        if strategy is None:
            return WHOLE
        if strategy in self.operands[i]:
            return self.operands[i].index(strategy)
        return PARTIAL if i in self.addends.get(strategy, ()) else WHOLE

    def result_placement(self, strategy: Strategy, i: int) -> int:
        """Where result i lies along the axis under a strategy."""
        if isinstance(strategy, Linear):
            return PARTIAL
        if strategy is None:
            return WHOLE
        if strategy in self.results[i]:
            return self.results[i].index(strategy)
        return PARTIAL if strategy in self.summed else WHOLE


class Local:
    """What a rule sees when it emits one rank's part of a node.

    Attributes:
        node: the node of the whole graph.
        axes: label -> the mesh axis that it is split over.
        types: the types of one rank's part of each result.
    """

    def __init__(self, node: Node, mesh: Mesh, axes: Mapping[Label, str], types: Sequence[Any],
                 place: Callable[[str], Value]):
        self.node, self.mesh, self.axes, self.types, self.place = node, mesh, dict(axes), list(types), place

    def ranks(self, label: Label) -> int:
        """Over how many ranks a label is split."""
        return self.mesh[self.axes[label]] if label in self.axes else 1

    def index(self, label: Label) -> Value:
        """The rank's place along the axis that a label is split over."""
        return self.place(self.axes[label])

    def emit(self, *operands: Value, **changed: Any) -> tuple[Value, ...]:
        """The node's own op on local operands, some attributes changed."""
        found = emit(self.node.op.name, *operands, regions=self.node.regions, **{**self.node.attrs, **changed})
        return found if isinstance(found, tuple) else (found,)


FactorsRule = Callable[[Node], Factors]
LocalRule = Callable[..., Any]  # (Local, *local operands) -> value or tuple of values


@dataclass(frozen=True)
class Shard:
    """What the slot holds. `local(ctx, *operands)` emits one rank's part; None: the same op, unchanged."""

    factors: FactorsRule
    local: LocalRule | None = None

    def emit(self, context: Local, operands: Sequence[Value]) -> tuple[Value, ...]:
        """One rank's part of a node, from the parts of its operands."""
        if self.local is None:
            return context.emit(*operands)
        found = self.local(context, *operands)
        return found if isinstance(found, tuple) else (found,)


def whole(node: Node) -> Factors:
    """The op is not split: every rank runs all of it."""
    return Factors(tuple((None,) * v.rank for v in node.operands), tuple((None,) * v.rank for v in node.results))


def without(labels: Sequence[Label], *dims: int) -> Labels:
    """The labels with None at some dimensions."""
    return tuple(None if i in dims else label for i, label in enumerate(labels))
