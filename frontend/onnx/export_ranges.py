"""What is known of an index without running the graph: whether it lies inside an axis."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ...ir.dims import Dim, Size
from ...ir.graph import Value
from ...ir.simplify_match import constant_of, made_by, uniform

VIEWS = frozenset({"reshape", "broadcast_to", "transpose", "slice", "concat", "identity", "stop_gradient", "barrier",
                   "take", "gather_nd", "take_along_axis", "dynamic_slice", "reverse"})
MOVES = frozenset({"reshape", "broadcast_to", "transpose", "identity", "stop_gradient"})


def root(value: Value) -> Value:
    """The value before it was reshaped, repeated, or widened as an integer."""
    while value.producer is not None and (value.producer.op.name in MOVES or _widens(value)):
        value = value.producer.operands[0]
    return value


def _widens(value: Value) -> bool:
    node = value.producer
    if node is None or node.op.name != "cast":
        return False
    before, after = node.operands[0].dtype, value.dtype
    return before.is_integer and after.is_integer and (before.bits < after.bits or before == "int64")


def wrapped(value: Value, size: Size) -> Value | None:
    """i of where(i < 0, i + size, i); None if the value is something else."""
    value = root(value)
    if value.producer is None or not made_by(value, "where"):
        return None
    test, moved, index = value.producer.operands
    if not (made_by(test, "lt") and made_by(moved, "add")) or test.producer is None or moved.producer is None:
        return None
    if test.producer.operands[0] is not index or uniform(test.producer.operands[1]) != 0:
        return None
    first, second = moved.producer.operands
    if second is index:
        first, second = second, first
    if first is not index:
        return None
    return index if is_size(second, size) else None


def is_size(value: Value, size: Size) -> bool:
    """Whether a value is a size as a number."""
    number = uniform(value)
    if not isinstance(size, Dim):
        return bool(number == size)
    value = root(value)
    if value.producer is None or not made_by(value, "reduce_sum"):
        return False
    (ones,) = value.producer.operands
    return uniform(ones) == 1 and ones.type.size == size and len(value.producer.attrs["axes"]) == ones.rank


def within(value: Value, size: Size, given: Collection[Value], depth: int = 8) -> bool:
    """Whether all elements lie in [0, size), or are given by the caller as they are."""
    value = root(value)
    node = value.producer
    if node is None:
        return value in given
    if isinstance(size, int):
        bounds = interval(value, depth)
        return bounds is not None and bounds[0] >= 0 and bounds[1] < size
    if node.op.name == "iota":
        return bool(node.attrs["shape"][node.attrs["axis"]] == size)
    if node.op.name in ("argmax", "argmin", "sort", "top_k"):
        axis = node.attrs["axis"]
        return bool(node.operands[0].shape[axis] == size) and (node.op.name not in ("sort", "top_k") or value.index == 1)
    found = wrapped(value, size)
    return found is not None and root(found) in given


def interval(value: Value, depth: int = 8) -> tuple[int, int] | None:
    """The least and the largest element of an integer value; None if they are not known."""
    value = root(value)
    node = value.producer
    if node is None or depth == 0:
        return None
    array = constant_of(value)
    if array is not None:
        return (int(array.min()), int(array.max())) if array.size else (0, 0)
    name, attrs = node.op.name, node.attrs
    if name in ("iota", "argmax", "argmin") or name in ("sort", "top_k") and value.index == 1:
        shape = attrs["shape"] if name == "iota" else node.operands[0].shape
        size = shape[attrs["axis"]]
        return None if isinstance(size, Dim) else (0, max(size - 1, 0))
    if name == "cast" and node.operands[0].dtype.is_bool:
        return (0, 1)
    if name in VIEWS:
        operands = node.operands if name == "concat" else node.operands[:1]
        return _join([interval(v, depth - 1) for v in operands])
    if name == "where":
        return _where(node, depth)
    return _arithmetic(node, depth)


def _join(parts: list[Any]) -> tuple[int, int] | None:
    known = [p for p in parts if p is not None]
    return (min(p[0] for p in known), max(p[1] for p in known)) if known and len(known) == len(parts) else None


def _where(node: Any, depth: int) -> tuple[int, int] | None:
    """where(i < 0, i + n, i) brings [-n, n) into [0, n)."""
    whole = _join([interval(v, depth - 1) for v in node.operands[1:]])
    index = node.operands[2]
    bounds = interval(index, depth - 1)
    test = node.operands[0].producer
    if test is not None and test.op.name == "lt" and test.operands[0] is index and uniform(test.operands[1]) == 0:
        moved = node.operands[1].producer
        number = uniform(moved.operands[1]) if moved is not None and moved.op.name == "add" else None
        if bounds is not None and number is not None and wrapped(node.result, int(number)) is index:
            low = min(0, bounds[0] + int(number)) if bounds[0] < 0 else bounds[0]
            return (low, max(bounds[1], int(number) - 1 if bounds[0] < 0 else bounds[1]))
    return whole


def _arithmetic(node: Any, depth: int) -> tuple[int, int] | None:
    parts = [interval(v, depth - 1) for v in node.operands]
    if node.op.name == "clip":
        lo, hi = node.attrs["lo"], node.attrs["hi"]
        known = parts[0] or (None, None)
        low, high = (known[0] if lo is None else lo), (known[1] if hi is None else hi)
        return None if low is None or high is None else (int(low), int(high))
    if node.op.name == "remainder" and parts[1] is not None and parts[1][0] > 0:
        return (0, parts[1][1] - 1)
    if any(p is None for p in parts):
        return None
    if node.op.name == "add":
        (a, b), (c, d) = parts
        return (a + c, b + d)
    if node.op.name == "sub":
        (a, b), (c, d) = parts
        return (a - d, b - c)
    if node.op.name in ("maximum", "minimum"):
        pick = max if node.op.name == "maximum" else min
        return (pick(p[0] for p in parts), pick(p[1] for p in parts))
    if node.op.name == "mul":
        products = [x * y for x in parts[0] for y in parts[1]]
        return (min(products), max(products))
    return None


__all__ = ["interval", "root", "within", "wrapped"]
