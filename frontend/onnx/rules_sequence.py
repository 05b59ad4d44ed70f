"""Sequences and optionals: Python lists, and None for an optional without a value.

They exist while tracing only, so positions and lengths must be known; a position that depends on data cuts the program.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import functions as td
from .node import OnnxNode
from .rules import onnx_rule
from .values import require_ints, require_known, tensor


def _sequence(node: OnnxNode, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise node.fail("the operand is not a sequence")
    return value


def _position(node: OnnxNode, value: Any, low: int, high: int) -> int:
    index = int(require_known(node, value, "position").reshape(-1)[0])
    if not low <= index <= high:
        raise node.fail(f"the position {index} is outside the sequence: {low} to {high}")
    return index


@onnx_rule("SequenceEmpty", since=11)
def sequence_empty(node: OnnxNode) -> Any:
    return []


@onnx_rule("SequenceConstruct", since=11, fold=False)
def sequence_construct(node: OnnxNode, *elements: Any) -> Any:
    return list(elements)


@onnx_rule("SequenceInsert", since=11, static=(2,))
def sequence_insert(node: OnnxNode, sequence: Any, element: Any, position: Any = None) -> Any:
    """Before a position, or at the end."""
    items = list(_sequence(node, sequence))
    at = len(items) if position is None else _position(node, position, -len(items), len(items))
    items.insert(at if at >= 0 else at + len(items), element)
    return items


@onnx_rule("SequenceErase", since=11, static=(1,))
def sequence_erase(node: OnnxNode, sequence: Any, position: Any = None) -> Any:
    items = list(_sequence(node, sequence))
    at = -1 if position is None else _position(node, position, -len(items), len(items) - 1)
    del items[at]
    return items


@onnx_rule("SequenceAt", since=11, static=(1,))
def sequence_at(node: OnnxNode, sequence: Any, position: Any) -> Any:
    items = _sequence(node, sequence)
    return items[_position(node, position, -len(items), len(items) - 1)]


@onnx_rule("SequenceLength", since=11)
def sequence_length(node: OnnxNode, sequence: Any) -> Any:
    return np.array(len(_sequence(node, sequence)), np.int64)


@onnx_rule("SplitToSequence", since=11, static=(1,), fold=False)
def split_to_sequence(node: OnnxNode, x: Any, split: Any = None) -> Any:
    """Pieces of given sizes, of one size, or slices without the axis."""
    x = tensor(x)
    axis = node.attr("axis", 0) % max(x.ndim, 1)
    size = x.shape[axis]
    if split is None:
        pieces = [td.take(x, np.int64(i), axis=axis) for i in range(size)]
        return [td.expand_dims(p, axis) for p in pieces] if node.attr("keepdims", 1) else pieces
    sizes = require_ints(node, split, "split")
    if np.ndim(require_known(node, split, "split")) == 0:
        step = sizes[0]
        if step <= 0:
            raise node.fail(f"pieces of size {step}")
        sizes = [min(step, size - start) for start in range(0, size, step)]
    if sum(sizes) != size:
        raise node.fail(f"pieces of sizes {sizes} do not make up an axis of {size}")
    bounds = np.cumsum(sizes)[:-1].tolist()
    return list(td.split(x, bounds, axis))


@onnx_rule("ConcatFromSequence", since=11)
def concat_from_sequence(node: OnnxNode, sequence: Any) -> Any:
    items = [tensor(x) for x in _sequence(node, sequence)]
    if not items:
        raise node.fail("the sequence is empty")
    join = td.stack if node.attr("new_axis", 0) else td.concat
    return join(items, axis=node.require("axis"))


@onnx_rule("SequenceMap", since=17, fold=False)
def sequence_map(node: OnnxNode, sequence: Any, *others: Any) -> Any:
    """A subgraph of each element, with the elements of other sequences and with tensors as they are."""
    body = node.require("body")
    results = [body(x, *(o[i] if isinstance(o, list) else o for o in others))
               for i, x in enumerate(_sequence(node, sequence))]
    return tuple([row[k] for row in results] for k in range(len(body.outputs)))


@onnx_rule("Optional", since=15, fold=False)
def optional(node: OnnxNode, value: Any = None) -> Any:
    return value


@onnx_rule("OptionalHasElement", since=15, fold=False)
def optional_has_element(node: OnnxNode, value: Any = None) -> Any:
    return np.array(value is not None)


@onnx_rule("OptionalGetElement", since=15, fold=False)
def optional_get_element(node: OnnxNode, value: Any = None) -> Any:
    if value is None:
        raise node.fail("the optional has no value")
    return value


