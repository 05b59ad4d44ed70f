"""A graph for given argument types: symbolic sizes become numbers; and a graph as part of another trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..ir.builder import GraphBuilder, copy_into
from ..ir.dims import Dim, solve, substitute
from ..ir.errors import ArgumentsError
from ..ir.graph import Graph, Value
from ..ir.location import user_location
from ..ir.types import TensorType
from . import eager, tree
from .dispatch import as_tensor
from .recording import Trace
from .tensor import Tensor


def bind_sizes(graph: Graph, types: Sequence[TensorType]) -> dict[str, int]:
    """The values of the symbolic sizes of a graph, from the types of its data inputs (the first ones).

    Raises:
        ArgumentsError: another number of inputs, or a type that does not fit; it is named.
    """
    captures = graph.meta.get("captures", {})
    data = [v for i, v in enumerate(graph.inputs) if i not in captures]
    if len(data) != len(types):
        raise ArgumentsError(f"{graph.name} takes {len(data)} tensors ({', '.join(map(repr, data))}), got {len(types)}",
                             user_location())
    sizes: dict[str, int] = {}
    for _ in range(2):  # a second look checks expressions whose names were found after them
        for value, given in zip(data, types):
            fits = given.dtype == value.dtype and given.rank == value.rank and all(
                solve(declared, int(actual), sizes) for declared, actual in zip(value.shape, given.shape))
            if not fits:
                known = f" with {sizes}" if sizes else ""
                raise ArgumentsError(f"{graph.name}: the input {value!r}{known} got a tensor of type {given}",
                                     user_location())
    if unknown := graph.dims - sizes.keys():
        raise ArgumentsError(f"{graph.name}: the sizes {', '.join(sorted(unknown))} do not follow from the arguments",
                             user_location())
    return sizes


def specialize(graph: Graph, types: Sequence[TensorType]) -> Graph:
    """The graph for arguments of these static types; the same object if it has no symbolic sizes."""
    sizes = bind_sizes(graph, types)
    return with_sizes(graph, sizes) if graph.dims else graph


def with_sizes(graph: Graph, sizes: Mapping[str, int]) -> Graph:
    """A copy with symbolic sizes replaced by numbers, in types, attributes and regions; others stay."""
    with GraphBuilder(graph.name) as builder:
        mapping: dict[Value, Value] = {}
        for value, role in zip(graph.inputs, graph.roles):
            shape = tuple(substitute(n, sizes) for n in value.shape)
            mapping[value] = builder.input(value.type.with_shape(shape), value.name, role)
        for node in graph.nodes:
            attrs = {name: _number(attr, sizes) for name, attr in node.attrs.items()}
            regions = [with_sizes(r, sizes) for r in node.regions]
            with builder.at(node.loc):
                results = builder.emit(node.op.name, [mapping[v] for v in node.operands], attrs, regions)
            for old, new in zip(node.results, results):
                new.name = old.name
                mapping[old] = new
        builder.output(*(mapping[v] for v in graph.outputs))
    builder.graph.aliases.update(graph.aliases)
    builder.graph.meta.update(graph.meta)
    return builder.graph


def _number(attr: Any, sizes: Mapping[str, int]) -> Any:
    if isinstance(attr, Dim):
        return substitute(attr, sizes)
    if isinstance(attr, tuple):
        return tuple(_number(a, sizes) for a in attr)
    return attr


def inline(graph: Graph, args: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """The graph's nodes as part of the open trace (or run at once); gives its results, assigns what it assigns."""
    leaves, _ = tree.flatten((tuple(args), dict(keywords)))
    tensors = [as_tensor(leaf) for leaf in leaves]
    builder = eager.builder()
    sizes = None
    if all(t.type.is_static for t in tensors) and graph.dims:
        sizes = bind_sizes(graph, [t.type for t in tensors])
    body = graph if sizes is None else with_sizes(graph, sizes)
    captures: dict[int, Tensor] = body.meta.get("captures", {})
    given = iter(tensors)
    operands = [builder.lift(captures[i] if i in captures else next(given)) for i in range(len(body.inputs))]
    outputs = copy_into(body, operands, builder)
    trace = builder if isinstance(builder, Trace) else None
    results = [Tensor._of(v, trace) for v in outputs]
    assigns: dict[int, Tensor] = body.meta.get("assigns", {})
    for i, tensor in assigns.items():
        tensor.assign(results[i])
    count = len(results) - len(assigns)
    structure = body.meta.get("out_structure")
    if structure is not None:
        return tree.unflatten(structure, results[:count])
    return results[0] if count == 1 else tuple(results[:count])
