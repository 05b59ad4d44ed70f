"""Parameters as constants: what a program that only serves can compute once and for all.

`bind` makes constants of a graph's parameters. The pass `FREEZE` then

* computes every node whose operands are constants, of any size, where that does not make the program larger;
* folds what is done to each output channel of a convolution, or column of a product, into its weights: an affine
  batch norm, a bias, another scale (`(conv(x, w) + b) * s + t = conv(x, w * s) + (b * s + t)`);
* divides by constants by way of their reciprocals.

The last two round differently from the graph as it was traced, by a few units in the last place of float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from . import interp
from . import ops as _declared  # noqa: F401  (the ops that the rules speak of)
from .builder import GraphBuilder
from .context import emit
from .dce import sweep
from .graph import Graph, Node, Value
from .pipeline import Pass, PassResult
from .rewrite import Rewriter, rewrite, with_operands
from .simplify import FOLD_ELEMENTS
from .simplify_match import constant_of, uniform

GROWTH = 1.25  # a folded result may be so much larger than what it was computed from


def bind(graph: Graph, arrays: Mapping[int, np.ndarray]) -> Graph:
    """The graph with constants in place of the inputs of these positions.

    Inputs whose storage an output takes over must stay.
    """
    builder = GraphBuilder(graph.name)
    mapping: dict[Value, Value] = {}
    kept: dict[int, int] = {}
    with builder:
        for i, (value, role) in enumerate(zip(graph.inputs, graph.roles)):
            if i in arrays:
                array = np.array(arrays[i], dtype=value.dtype.np)
                array.setflags(write=False)
                mapping[value] = emit("constant", value=array)
                mapping[value].name = value.name
            else:
                kept[i] = len(kept)
                mapping[value] = builder.input(value.type, value.name, role)
        replay(graph.nodes, mapping, builder)
    aliases = {output: kept[i] for output, i in graph.aliases.items()}
    return Graph(graph.name, builder.graph.inputs, builder.graph.roles, builder.graph.nodes,
                 [mapping[v] for v in graph.outputs], aliases, graph.meta)


def replay(nodes: Sequence[Node], mapping: dict[Value, Value], builder: GraphBuilder) -> None:
    """Takes nodes into the builder, their operands as `mapping` has them; enters their results there."""
    for node in nodes:
        fresh = with_operands(node, [mapping[v] for v in node.operands])
        builder.take(fresh)
        mapping.update(zip(node.results, fresh.results))


class _Folder(Rewriter):
    """Computes what depends on constants only; replaces divisions by constants."""

    def replace(self, node: Node) -> Sequence[Value] | None:
        if (not node.operands or node.op.name == "broadcast_to" or node.regions
                or any(node.op.has(trait) for trait in ("effect", "barrier", "random"))):
            return None
        if node.op.name == "div":
            return self.reciprocal(node)
        arrays = [constant_of(v) for v in node.operands]
        if any(a is None for a in arrays) or not all(v.type.is_static for v in node.results):
            return None
        made = sum(v.type.nbytes for v in node.results)
        if made > GROWTH * sum(a.nbytes for a in arrays if a is not None) + 8 * FOLD_ELEMENTS:
            return None
        self.stats["computed"] += 1
        return tuple(emit("constant", value=r) for r in interp.run_node(node, arrays))  # type: ignore[arg-type]

    def reciprocal(self, node: Node) -> Sequence[Value] | None:
        """x / c = x * (1 / c)."""
        x, y = node.operands
        array = constant_of(y)
        if array is None and (number := uniform(y)) is not None:
            array = np.asarray(number, y.dtype.np)
        if array is None or not y.dtype.is_float:
            return None
        with np.errstate(all="ignore"):
            inverse = np.asarray(1 / array.astype(np.float64)).astype(array.dtype)
        if not np.isfinite(inverse.astype(np.float64)).all() or not array.astype(np.float64).all():
            return None
        self.stats["reciprocals"] += 1
        return (emit("mul", x, emit("constant", value=inverse)),)


@dataclass
class _Chain:
    """A contraction and the affine arithmetic per channel that follows it: `anchor(x, w * scale) + shift`."""

    anchor: Node
    axis: int  # of the result: channels
    scale: np.ndarray  # float64, one for each channel
    shift: np.ndarray
    nodes: list[Node] = field(default_factory=list)
    last: Value | None = None


def _channel_axes(node: Node) -> tuple[int, int] | None:
    """(axis of the result, axis of the weights) along which the weights of a channel are apart."""
    if node.op.name == "conv":
        return (node.result.rank - 1 if node.attrs["channels_last"] else 1), 0
    if node.op.name == "conv_input_grad" and node.attrs["groups"] == 1:
        return (node.result.rank - 1 if node.attrs["channels_last"] else 1), 1
    if node.op.name == "matmul" and node.operands[1].rank == 2:
        return node.result.rank - 1, 0 if node.attrs["transpose_y"] else 1
    return None


def _per_channel(value: Value, axis: int, like: Value) -> np.ndarray | None:
    """The elements of a constant operand that differ along one axis of the result only, as float64."""
    array = constant_of(value)
    if array is None and (number := uniform(value)) is not None:
        array = np.asarray(number)
    if array is None or array.ndim > like.rank:
        return None
    shape = (1,) * (like.rank - array.ndim) + array.shape
    if any(n != 1 for i, n in enumerate(shape) if i != axis):
        return None
    return np.broadcast_to(array.reshape(-1).astype(np.float64), (like.shape[axis],))


def _chain_of(node: Node, graph: Graph, readers: Mapping[Value, Sequence[Node]]) -> _Chain | None:
    """The chain that starts at a node, if there is one."""
    axes = _channel_axes(node)
    if axes is None or constant_of(node.operands[1]) is None or node.result.dtype not in ("float32", "float64"):
        return None
    size = node.result.shape[axes[0]]
    if not isinstance(size, int):
        return None
    chain = _Chain(node, axes[0], np.ones(size), np.zeros(size), last=node.result)
    while True:
        value = chain.last
        assert value is not None
        following = readers.get(value, ())
        if len(following) != 1 or value in graph.outputs or not _absorb(chain, following[0], value):
            break
        chain.nodes.append(following[0])
        chain.last = following[0].result
    return chain if (chain.scale != 1).any() or len(chain.nodes) > 1 else None


def _absorb(chain: _Chain, node: Node, value: Value) -> bool:
    """Takes one more node into the chain, if it is affine per channel."""
    if node.op.name not in ("mul", "add", "sub") or node.result.type != value.type or \
            node.operands[0] is node.operands[1]:
        return False
    position = 0 if node.operands[0] is value else 1
    other = _per_channel(node.operands[1 - position], chain.axis, value)
    if other is None or not np.isfinite(other).all():
        return False
    if node.op.name == "mul":
        chain.scale, chain.shift = chain.scale * other, chain.shift * other
    elif node.op.name == "add":
        chain.shift = chain.shift + other
    elif position == 0:
        chain.shift = chain.shift - other
    else:
        chain.scale, chain.shift = -chain.scale, other - chain.shift
    return True


def fold_scales(graph: Graph) -> PassResult:
    """Folds affine arithmetic per channel into the weights before it."""
    readers = graph.uses()
    chains = {c.last: c for n in graph.nodes if (c := _chain_of(n, graph, readers)) is not None}
    if not chains:
        return PassResult(graph, False)
    inside = {n for c in chains.values() for n in (c.anchor, *c.nodes)}
    builder = GraphBuilder(graph.name)
    mapping: dict[Value, Value] = {}
    with builder:
        for value, role in zip(graph.inputs, graph.roles):
            mapping[value] = builder.input(value.type, value.name, role)
        for node in graph.nodes:
            chain = chains.get(node.results[0]) if node.results else None
            if chain is not None:
                with builder.at(chain.anchor.loc):
                    mapping[node.result] = _folded(chain, mapping)
            elif node not in inside:
                replay([node], mapping, builder)
    made = builder.graph
    outputs = [mapping[v] for v in graph.outputs]
    return PassResult(Graph(graph.name, made.inputs, graph.roles, made.nodes, outputs, graph.aliases, graph.meta), True,
                      {"scales folded": len(chains)})


def _folded(chain: _Chain, mapping: Mapping[Value, Value]) -> Value:
    anchor = chain.anchor
    axes = _channel_axes(anchor)
    weights = constant_of(anchor.operands[1])
    assert axes is not None and weights is not None
    along = [1] * weights.ndim
    along[axes[1]] = -1
    if (chain.scale != 1).any():
        weights = (weights * chain.scale.reshape(along)).astype(weights.dtype)
    result = emit(anchor.op.name, mapping[anchor.operands[0]], emit("constant", value=weights), **anchor.attrs)
    if not chain.shift.any():
        return result
    shape = [1] * anchor.result.rank
    shape[chain.axis] = -1
    return emit("add", result, emit("constant", value=chain.shift.reshape(shape).astype(weights.dtype)))


def freeze(graph: Graph) -> PassResult:
    """See the head of this file."""
    folder = _Folder(graph.name)
    current = sweep(rewrite(graph, folder)).graph
    scaled = fold_scales(current)
    again = folder.fresh(graph.name)
    after = sweep(rewrite(scaled.graph, again)).graph
    return PassResult(after, after is not graph, {**folder.stats, **scaled.stats})


FREEZE = Pass("freeze", freeze)
