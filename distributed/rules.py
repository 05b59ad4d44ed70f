"""The slot `shard` of an op: which dimensions of operands and results go together.

A rule gives every dimension a *label*. Dimensions that carry the same label are split together: in `matmul: (m k), (k
n) -> (m n)` splitting `n` splits the second operand and the result; splitting `k`, which the result lacks, leaves a
partial sum. A dimension without a label (None) has to be whole. From this follow all ways to run the op along one
mesh axis, its *strategies*:

* `None`: whole operands, whole results;
* a label: the dimensions that carry it are split;
* `Blocked(label, n)`: they are split in n blocks. Which elements of a dimension a rank has is all one to most ops, so
  long as it is the same elements everywhere;
* `Linear(k)`: the operands of the k-th linear set are partial sums, and so are the results (the sum is taken later).

Ops that move elements (reshape, slice, concat) turn a split in blocks into a plain one and back; they say so by labels
in `views`, which name a placement for each operand and result.

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
from .sharding import PARTIAL, WHOLE, blocks_of, dim_of, split

Label = Any  # any hashable; None: has to be whole
Labels = tuple[Label, ...]


@dataclass(frozen=True)
class Linear:
    """The strategy that passes partial sums through: the number of a linear set."""

    set: int


@dataclass(frozen=True)
class Blocked:
    """The strategy that splits the dimensions of a label in blocks."""

    label: Label
    blocks: int


Strategy = Any  # None, a label, Blocked, or Linear
Places = tuple["int | None", ...]


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
        views: label -> the placement of each operand and of each result (None: whole) when it is split.
        ordered: labels whose elements' places matter: they are split into runs only, not in blocks.
    """

    operands: tuple[Labels, ...]
    results: tuple[Labels, ...]
    summed: frozenset[Label] = frozenset()
    combined: Mapping[Label, str] = field(default_factory=dict)
    addends: Mapping[Label, tuple[int, ...]] = field(default_factory=dict)
    linear: tuple[frozenset[int], ...] = ()
    limits: Mapping[Label, int] = field(default_factory=dict)
    views: Mapping[Label, tuple[Places, Places]] = field(default_factory=dict)
    ordered: frozenset[Label] = frozenset()

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
        for label, (operands, results) in self.views.items():
            for place, value in zip((*operands, *results), (*node.operands, *node.results)):
                if place is not None:
                    found[label] = math.gcd(found.get(label, 0), value.shape[dim_of(place)] // blocks_of(place))
        return found

    def operand_placement(self, strategy: Strategy, i: int) -> int:
        """Where operand i lies along the axis under a strategy."""
        if isinstance(strategy, Linear):
            return PARTIAL if i in self.linear[strategy.set] else WHOLE
        place = self._place(strategy, self.operands[i], 0, i)
        label = base(strategy)
        return PARTIAL if place == WHOLE and label is not None and i in self.addends.get(label, ()) else place

    def result_placement(self, strategy: Strategy, i: int) -> int:
        """Where result i lies along the axis under a strategy."""
        if isinstance(strategy, Linear):
            return PARTIAL
        place = self._place(strategy, self.results[i], 1, i)
        return PARTIAL if place == WHOLE and base(strategy) in self.summed else place

    def _place(self, strategy: Strategy, labels: Labels, side: int, i: int) -> int:
        label = base(strategy)
        if label is None:
            return WHOLE
        if label in self.views:
            place = self.views[label][side][i]
            return WHOLE if place is None else place
        if label not in labels:
            return WHOLE
        return split(labels.index(label), strategy.blocks if isinstance(strategy, Blocked) else 1)

    def strategies(self, side: int, i: int, place: int) -> list[Strategy]:
        """The strategies under which operand (side 0) or result (side 1) i is split so: one, or none."""
        labels = (self.operands, self.results)[side][i]
        dim, blocks = dim_of(place), blocks_of(place)
        found: list[Strategy] = [x for x, sides in self.views.items() if sides[side][i] == place]
        label = labels[dim] if dim < len(labels) else None
        if label is not None and (blocks == 1 or label not in self.ordered):
            found.append(label if blocks == 1 else Blocked(label, blocks))
        return found


def base(strategy: Strategy) -> Label:
    """The label that a strategy splits; None if it splits none."""
    return None if isinstance(strategy, Linear) else strategy.label if isinstance(strategy, Blocked) else strategy


class Local:
    """What a rule sees when it emits one rank's part of a node.

    Attributes:
        node: the node of the whole graph.
        axes: label -> the mesh axes that it is split over, the one that cuts first in front.
        types: the types of one rank's part of each result.
    """

    def __init__(self, node: Node, mesh: Mesh, axes: Mapping[Label, Sequence[str]], types: Sequence[Any],
                 place: Callable[[str], Value]):
        self.node, self.mesh, self.axes, self.types, self.place = node, mesh, dict(axes), list(types), place

    def ranks(self, label: Label) -> int:
        """Over how many ranks a label is split."""
        return math.prod(self.mesh[axis] for axis in self.axes.get(label, ()))

    def index(self, label: Label) -> Value:
        """The number of the rank's part among those that a label is split into."""
        first, *rest = self.axes[label]
        number = self.place(first)
        for axis in rest:
            number = number * self.mesh[axis] + self.place(axis)
        return number

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
