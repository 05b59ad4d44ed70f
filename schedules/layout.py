"""Chooses channels-last activations for the whole graph.

Convolution and pooling kernels are fastest when vectors run over channels, models are written channels first.
One walk rewrites them to their channels-last form and lets that layout spread: an elementwise op, a reduction, a
concatenation of values that exist channels last is computed channels last as well, so that a transposition
remains only where a graph input enters and where an op needs the original order (a flattening reshape, a graph
output). Runs after differentiation, so forward and backward share one layout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ..ir.builder import GraphBuilder
from ..ir.context import emit
from ..ir.graph import Graph, Node, Value
from ..ir.ops_layout import to_last
from ..ir.pipeline import Pass, PassResult
from ..ir.types import Shape

# op -> numbers of the operands, and of the results, that have channels
IMAGE_OPS = {
    "conv": ((0,), (0,)),
    "conv_input_grad": ((0,), (0,)),
    "conv_weight_grad": ((0, 1), ()),
    "max_pool": ((0,), (0, 1)),
    "max_pool_grad": ((0, 1), (0,)),
    "avg_pool": ((0,), (0,)),
    "avg_pool_grad": ((0,), (0,)),
}


def channels_last(graph: Graph) -> PassResult:
    """The graph with channels-last convolutions and pools; unchanged if it has no convolution of an image."""
    convolutions = [n for n in graph.nodes if n.op.name.startswith("conv") and not n.attrs["channels_last"]]
    if not any(n.operands[0].rank >= 4 for n in convolutions):
        return PassResult(graph, False)
    walk = _Walk(graph)
    return PassResult(walk.run(), True, dict(walk.stats))


PASS = Pass("channels_last", channels_last)


def _last_axis(axis: int, rank: int) -> int:
    """Where axis `axis` of (N, C, *spatial) lies in (N, *spatial, C)."""
    return 0 if axis == 0 else rank - 1 if axis == 1 else axis - 1


def _moved(items: Sequence[Any]) -> tuple[Any, ...]:
    """Per-axis attributes in the channels-last order."""
    return to_last(tuple(items))


class _Walk:
    """One rewrite. Every value of the old graph exists in the new one in its own order (`first`), channels last
    (`last`), or both; the missing one is made when a node asks for it."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.builder = GraphBuilder(graph.name)
        self.first: dict[Value, Value] = {}
        self.last: dict[Value, Value] = {}
        self.stats: Counter[str] = Counter()

    def run(self) -> Graph:
        old = self.graph
        with self.builder as builder:
            for value, role in zip(old.inputs, old.roles):
                self.first[value] = builder.input(value.type, value.name, role)
            for node in old.nodes:
                with builder.at(node.loc):
                    self._node(node)
            builder.output(*(self.in_order(v) for v in old.outputs))
        new = builder.graph
        new.aliases, new.meta = dict(old.aliases), dict(old.meta)
        return new

    # Values ---------------------------------------------------------------------------------------------------------

    def in_order(self, value: Value) -> Value:
        """The value as the old graph has it."""
        if value not in self.first:
            rank = value.rank
            self.first[value] = self._transposed(self.last[value], (0, rank - 1, *range(1, rank - 1)))
        return self.first[value]

    def channels_last(self, value: Value) -> Value:
        """The value channels last."""
        if value not in self.last:
            self.last[value] = self._transposed(self.first[value], (0, *range(2, value.rank), 1))
        return self.last[value]

    def _transposed(self, value: Value, perm: tuple[int, ...]) -> Value:
        if value.producer is not None and value.producer.op.name == "transpose":
            perm = tuple(value.producer.attrs["perm"][p] for p in perm)
            (value,) = value.producer.operands
            if perm == tuple(range(value.rank)):
                return value
        shape = tuple(value.shape[p] for p in perm)
        sizes = [s for s in value.shape if s != 1]
        if sizes == [s for s in shape if s != 1] and len(set(map(str, sizes))) == len(sizes):
            return emit("reshape", value, shape=shape)  # only axes of size 1 move
        self.stats["transposed"] += 1
        return emit("transpose", value, perm=perm)

    def _broadcast_operand(self, value: Value, rank: int) -> Value:
        """An operand that broadcasts against values of the given rank, channels last."""
        if value.rank == rank:
            return self.channels_last(value)
        if value.rank < 1 or all(s == 1 for s in value.shape):
            return self.in_order(value) if value.rank == 0 else emit("reshape", self.in_order(value), shape=())
        padded: Shape = (1,) * (rank - value.rank) + value.shape
        return self._transposed(emit("reshape", self.in_order(value), shape=padded), (0, *range(2, rank), 1))

    # Nodes ----------------------------------------------------------------------------------------------------------

    def _node(self, node: Node) -> None:
        if node.op.name in IMAGE_OPS and node.operands[0].rank >= 4 and not node.attrs["channels_last"]:
            return self._image_op(node)
        rule = _RULES.get(node.op.name) or (_elementwise if node.op.has("elementwise") else
                                            _reduction if node.op.has("reduction") else None)
        if rule is not None and any(v in self.last and v not in self.first for v in node.operands):
            made = rule(self, node)
            if made is not None:
                self.stats["spread"] += 1
                return
        operands = [self.in_order(v) for v in node.operands]
        results = self.builder.emit(node.op.name, operands, node.attrs, node.regions)
        self._name(node, results)
        self.first.update(zip(node.results, results))

    def _image_op(self, node: Node) -> None:
        activations, images = IMAGE_OPS[node.op.name]
        operands = [self.channels_last(v) if i in activations else self.in_order(v)
                    for i, v in enumerate(node.operands)]
        results = self.builder.emit(node.op.name, operands, {**node.attrs, "channels_last": True})
        self._name(node, results)
        for i, (old, new) in enumerate(zip(node.results, results)):
            (self.last if i in images else self.first)[old] = new
        self.stats["image ops"] += 1

    def give_last(self, node: Node, *operands: Value, **attrs: Any) -> bool:
        """Emits the node with channels-last operands; its results are channels last."""
        results = self.builder.emit(node.op.name, operands, attrs)
        self._name(node, results)
        self.last.update(zip(node.results, results))
        return True

    @staticmethod
    def _name(node: Node, results: Sequence[Value]) -> None:
        for old, new in zip(node.results, results):
            new.name = old.name


# How the layout spreads: a rule emits the node channels last, or answers None to keep it as it is.

def _elementwise(walk: _Walk, node: Node) -> bool | None:
    rank = node.results[0].rank
    if rank < 3 or any(v in walk.last and v.rank != rank for v in node.operands):
        return None
    return walk.give_last(node, *(walk._broadcast_operand(v, rank) for v in node.operands), **node.attrs)


def _reduction(walk: _Walk, node: Node) -> bool | None:
    (x,), axes = node.operands, node.attrs["axes"]
    kept = [a for a in range(x.rank) if a not in axes]
    attrs = {**node.attrs, "axes": tuple(sorted(_last_axis(a, x.rank) for a in axes))}
    if node.attrs["keepdims"]:
        return walk.give_last(node, walk.channels_last(x), **attrs)
    if 1 in kept and any(a > 1 for a in kept):
        return None  # what is left would be in another order
    (result,) = walk.builder.emit(node.op.name, [walk.channels_last(x)], attrs)
    walk.first[node.results[0]] = result
    return True


def _concat(walk: _Walk, node: Node) -> bool | None:
    rank = node.results[0].rank
    return walk.give_last(node, *map(walk.channels_last, node.operands), axis=_last_axis(node.attrs["axis"], rank))


def _per_axis(*names: str) -> Callable[[_Walk, Node], bool | None]:
    def rule(walk: _Walk, node: Node) -> bool | None:
        moved = {k: _moved(v) if k in names else v for k, v in node.attrs.items()}
        return walk.give_last(node, walk.channels_last(node.operands[0]), **moved)
    return rule


def _reverse(walk: _Walk, node: Node) -> bool | None:
    axes = tuple(sorted(_last_axis(a, node.operands[0].rank) for a in node.attrs["axes"]))
    return walk.give_last(node, walk.channels_last(node.operands[0]), axes=axes)


def _broadcast_to(walk: _Walk, node: Node) -> bool | None:
    (x,), shape = node.operands, node.attrs["shape"]
    if x.rank != len(shape):
        return None
    return walk.give_last(node, walk.channels_last(x), shape=_moved(shape))


def _reshape(walk: _Walk, node: Node) -> bool | None:
    """Of the spatial axes only: channels stay where they are."""
    (x,), shape = node.operands, node.result.shape
    if len(shape) < 3 or x.shape[:2] != shape[:2]:
        return None
    return walk.give_last(node, walk.channels_last(x), shape=_moved(shape))


_RULES = {
    "concat": _concat,
    "slice": _per_axis("starts", "limits", "strides"),
    "pad": _per_axis("low", "high", "interior"),
    "reverse": _reverse,
    "broadcast_to": _broadcast_to,
    "reshape": _reshape,
}
