"""Shape arithmetic with symbolic sizes: the few ops that shapes pass through, on object arrays of ints and `Dim`s.

What does not fit (a quotient that is no size, a comparison of sizes that are not known) gives None: then the op is
traced as a computation with numbers that exist at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...ir.dims import Dim
from ...ir.errors import ShapeError
from ..data_sizes import is_data_size
from .node import OnnxNode

Fold = Callable[..., Any]


def fold_symbolic(node: OnnxNode, operands: Sequence[Any]) -> Any:
    """The result of a node whose operands are known and contain symbolic sizes; None if it is none of these ops."""
    rule = _FOLDS.get(node.op_type) if node.domain == "" else None
    if rule is None:
        return None
    try:
        result = rule(node, *operands)
    except (ShapeError, TypeError, ZeroDivisionError):
        return None
    return result


def _each(fn: Callable[..., Any]) -> Fold:
    """An elementwise function of sizes."""
    ufunc = np.frompyfunc(fn, fn.__code__.co_argcount, 1)

    def fold(node: OnnxNode, *operands: Any) -> Any:
        result = ufunc(*(np.asarray(x, object) for x in operands))
        return np.array(result, object)

    return fold


def _compare(decide: Callable[[bool], bool]) -> Fold:
    def fold(node: OnnxNode, x: Any, y: Any) -> Any:
        return np.array(np.frompyfunc(lambda a, b: decide(_equal(a, b)), 2, 1)(x, y), bool)

    return fold


def _equal(a: Any, b: Any) -> bool:
    """Whether two sizes are the same; a symbolic size is never negative, and only where data decide it zero."""
    if not isinstance(a, Dim) and not isinstance(b, Dim):
        return bool(a == b)
    difference = a - b
    if isinstance(difference, int):
        return difference == 0
    for x, y in ((a, b), (b, a)):
        if isinstance(x, Dim) and isinstance(y, (int, np.integer)) and _is_positive(x) and y <= -is_data_size(x):
            return False
    raise ShapeError("not known before run time")


def _is_positive(size: Dim) -> bool:
    return all(c > 0 for c in size.terms.values())


def _quotient(x: Any, y: Any) -> Any:
    if isinstance(x, Dim) or isinstance(y, Dim):
        return x // y if isinstance(x, Dim) else _whole(x, y)
    return int(np.trunc(x / y)) if x % y else x // y


def _whole(x: Any, y: Any) -> Any:
    raise ShapeError("no size")


def _reduce(combine: Callable[[Any, Any], Any]) -> Fold:
    def fold(node: OnnxNode, x: Any, axes: Any = None) -> Any:
        if np.ndim(x) != 1:
            return None
        total = x[0]
        for size in x[1:]:
            total = combine(total, size)
        keep = node.attr("keepdims", 1)
        result = np.empty((1,) if keep else (), object)
        result[...] = total
        return result

    return fold


def _concat(node: OnnxNode, *parts: Any) -> Any:
    return np.concatenate([np.asarray(p, object) for p in parts], axis=node.attr("axis"))


def _gather(node: OnnxNode, x: Any, indices: Any) -> Any:
    picked = np.take(x, np.asarray(indices, np.int64), axis=node.attr("axis", 0))
    result = np.empty(np.shape(picked), object)
    result[...] = picked
    return result


def _slice(node: OnnxNode, x: Any, *bounds: Any) -> Any:
    given: list[Any]
    if bounds:
        given = [None if b is None else np.asarray(b, np.int64).reshape(-1) for b in bounds]
    else:
        given = [np.asarray(node.attr("starts")), np.asarray(node.attr("ends")),
                 None if node.attr("axes", None) is None else np.asarray(node.attr("axes"))]
    starts, ends, axes, steps = [*given, None, None][:4]
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    index = [slice(None)] * np.ndim(x)
    for axis, start, end, step in zip(axes, starts, ends, steps):
        size = x.shape[axis]
        low = max(int(start) + size, -1) if start < 0 else int(start)
        high = int(end) + size if end < 0 else int(end)
        index[axis] = slice(low, high if high >= 0 or step > 0 else None, int(step))
        if step > 0:
            index[axis] = slice(max(low, 0), max(high, 0), int(step))
    return x[tuple(index)]


def _axes(node: OnnxNode, axes: Any) -> list[int] | None:
    return [int(a) for a in np.reshape(axes, -1)] if axes is not None else node.attr("axes", None)


def _squeeze(node: OnnxNode, x: Any, axes: Any = None) -> Any:
    chosen = _axes(node, axes)
    return np.squeeze(x) if chosen is None else np.squeeze(x, tuple(chosen))


def _unsqueeze(node: OnnxNode, x: Any, axes: Any = None) -> Any:
    return np.expand_dims(np.asarray(x, object), tuple(_axes(node, axes) or ()))


def _reshape(node: OnnxNode, x: Any, shape: Any = None) -> Any:
    return np.reshape(x, [int(s) for s in np.reshape(node.attr("shape") if shape is None else shape, -1)])


def _cast(node: OnnxNode, x: Any) -> Any:
    # only integers are sizes; FLOAT and the like are computed at run time
    return x if node.attr("to") in (6, 7, 12, 13) else None


def _where(node: OnnxNode, condition: Any, x: Any, y: Any) -> Any:
    if condition.dtype == object:
        return None
    return np.array(np.where(condition, np.asarray(x, object), np.asarray(y, object)), object)


def _split(node: OnnxNode, x: Any, sizes: Any = None) -> Any:
    axis = node.attr("axis", 0)
    given = node.attr("split", None) if sizes is None else [int(s) for s in sizes]
    count = len(node.outputs)
    if given is None:
        step = -(-x.shape[axis] // count)
        bounds = [step * (i + 1) for i in range(count - 1)]
    else:
        bounds = np.cumsum(given)[:-1].tolist()
    return tuple(np.split(x, bounds, axis))


def _shape(node: OnnxNode, x: Any) -> Any:
    start, end = node.attr("start", 0), node.attr("end", None)
    return np.array(np.shape(x)[slice(start, end)], np.int64)


def _expand(node: OnnxNode, x: Any, shape: Any) -> Any:
    return np.array(x * np.ones([int(s) for s in shape], object), object) if np.size(x) == 1 else None


_FOLDS: dict[str, Fold] = {
    "Add": _each(lambda x, y: x + y),
    "Sub": _each(lambda x, y: x - y),
    "Mul": _each(lambda x, y: x * y),
    "Div": _each(_quotient),
    "Neg": _each(lambda x: -x),
    "Identity": lambda node, x: x,
    "Equal": _compare(lambda same: same),
    "ReduceProd": _reduce(lambda x, y: x * y),
    "ReduceSum": _reduce(lambda x, y: x + y),
    "Concat": _concat,
    "Gather": _gather,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Cast": _cast,
    "Where": _where,
    "Split": _split,
    "Shape": _shape,
    "Expand": _expand,
}
