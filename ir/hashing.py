"""Structural hashes: two graphs (or nodes) that compute the same thing in the same way hash alike.

Names, source locations and `meta` do not count; the order of nodes does. Compiled kernels are looked up by these
hashes, across processes, so nothing in them may depend on Python's own `hash`.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from .graph import Graph, Node, Value
from .text import attr_text

_hashes: dict[int, tuple[weakref.ref[np.ndarray], str]] = {}


def content_hash(array: np.ndarray) -> str:
    """The SHA-256 of an array's elements, 64 hexadecimal digits.

    Weights are hundreds of megabytes, and are met by each pass that compares nodes. So the hash of an array that cannot
    change, since it is read-only and shares nobody's memory, is kept for as long as the array lives.
    """
    settled = array.base is None and not array.flags.writeable
    known = _hashes.get(id(array)) if settled else None
    if known is not None and known[0]() is array:
        return known[1]
    found = hashlib.sha256(elements(array)).hexdigest()
    if settled:
        name = id(array)
        _hashes[name] = weakref.ref(array, lambda _: _hashes.pop(name, None)), found
    return found


def elements(array: np.ndarray) -> memoryview:
    """The bytes of an array's elements in row-major order; not copied if they lie so."""
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def attr_key(value: Any) -> Hashable:
    """A hashable stand-in for an attribute: equal exactly when the attributes are."""
    if isinstance(value, np.ndarray):
        return ("array", str(value.dtype), value.shape,
                np.ascontiguousarray(value).tobytes() if value.nbytes <= 64 else content_hash(value))
    if isinstance(value, (tuple, list)):
        return tuple(attr_key(v) for v in value)
    # 1, 1.0 and True are equal to Python but not as attributes; 0.0 and -0.0 neither
    return (type(value).__name__, attr_text(value) if isinstance(value, float) else value)


def node_key(node: Node, number: Callable[[Value], int]) -> Hashable:
    """What a node computes, given a number for each of its operands: op, attributes, operands, regions."""
    operands = [number(v) for v in node.operands]
    if node.op.has("commutative"):
        operands.sort()
    attrs = tuple((k, attr_key(v)) for k, v in sorted(node.attrs.items()))
    return (node.op.name, tuple(operands), attrs, tuple(graph_hash(r) for r in node.regions))


def graph_hash(graph: Graph) -> str:
    """The structural hash of a graph, 64 hexadecimal digits.

    It covers input types and roles, the nodes, the outputs and the aliases.
    """
    numbers: dict[Value, int] = {v: i for i, v in enumerate(graph.inputs)}
    digest = hashlib.sha256()

    def add(item: object) -> None:
        digest.update(repr(item).encode())
        digest.update(b"\0")

    add([(str(v.type), role) for v, role in zip(graph.inputs, graph.roles)])
    for node in graph.nodes:
        add(node_key(node, numbers.__getitem__))
        add([str(v.type) for v in node.results])
        for value in node.results:
            numbers[value] = len(numbers)
    add([numbers[v] for v in graph.outputs])
    add(sorted(graph.aliases.items()))
    return digest.hexdigest()
