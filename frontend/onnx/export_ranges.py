"""What is known of an index without running the graph: whether it lies inside an axis."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ...ir.dims import Dim, Size
from ...ir.graph import Node, Value
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
    return value.producer is not None and made_by(value, "size") and bool(value.producer.attrs["of"] == size)


Bounds = tuple[int, int]


@dataclass
class Known:
    """What is known of the inputs of the main graph.

    Attributes:
        given: those that the caller gives. An index that he gives is taken to be right.
        arrays: the elements of those that are stored in the file.
    """

    given: set[Value] = field(default_factory=set)
    arrays: dict[Value, np.ndarray] = field(default_factory=dict)

    def within(self, value: Value, size: Size, negative: bool = False, depth: int = 8) -> bool:
        """Whether all elements lie in [0, size), or with `negative` in [-size, size); or are given by the caller."""
        value = root(value)
        if value in self.given:
            return True
        if isinstance(size, int):
            bounds = self.interval(value, depth)
            return bounds is not None and bounds[0] >= (-size if negative else 0) and bounds[1] < size
        node = value.producer
        if node is None or depth == 0:
            return False
        if node.op.name == "iota":
            return bool(node.attrs["shape"][node.attrs["axis"]] == size)
        if _is_position(value):
            return bool(_positions(node) == size)
        found = wrapped(value, size)
        return found is not None and self.within(found, size, True, depth - 1)

    def interval(self, value: Value, depth: int = 8) -> Bounds | None:
        """The least and the largest element of an integer value; None if they are not known."""
        value = root(value)
        node = value.producer
        array = self.arrays.get(value) if node is None else constant_of(value)
        if array is not None:
            return (int(array.min()), int(array.max())) if array.size else (0, 0)
        if node is None or depth == 0 or not value.dtype.is_integer:
            return None
        if node.op.name == "iota" or _is_position(value):
            size = node.attrs["shape"][node.attrs["axis"]] if node.op.name == "iota" else _positions(node)
            return None if isinstance(size, Dim) else (0, max(size - 1, 0))
        if node.op.name == "cast" and node.operands[0].dtype.is_bool:
            return (0, 1)
        if node.op.name == "where":
            return self._where(node, depth - 1)
        if node.op.name in VIEWS:
            operands = node.operands if node.op.name == "concat" else node.operands[:1]
            return _join([self.interval(v, depth - 1) for v in operands])
        found = _arithmetic(node, [self.interval(v, depth - 1) for v in node.operands])
        info = np.iinfo(value.dtype.np)
        return found if found is not None and info.min <= found[0] and found[1] <= info.max else None

    def _where(self, node: Node, depth: int) -> Bounds | None:
        """where(i < 0, i + n, i) brings [-n, n) into [0, n)."""
        _, moved, index = node.operands
        bounds = self.interval(index, depth)
        sizes = [uniform(v) for v in moved.producer.operands] if moved.producer and made_by(moved, "add") else []
        for size in (s for s in sizes if isinstance(s, int) and wrapped(node.result, s) is index):
            if bounds is not None and bounds[0] >= -size:
                return bounds if bounds[0] >= 0 else (0, max(bounds[1], size - 1))
        return _join([self.interval(moved, depth), bounds])


def _is_position(value: Value) -> bool:
    """Whether it counts along an axis of an operand: argmax, the order of a sort..."""
    node = value.producer
    return node is not None and (node.op.name in ("argmax", "argmin", "true_places")
                                 or node.op.name in ("sort", "top_k") and value.index == 1)


def _positions(node: Node) -> Size:
    """The size of the axis that `_is_position` means."""
    size: Size = node.operands[0].shape[0 if node.op.name == "true_places" else node.attrs["axis"]]
    return size


def _join(parts: list[Bounds | None]) -> Bounds | None:
    known = [p for p in parts if p is not None]
    return (min(p[0] for p in known), max(p[1] for p in known)) if known and len(known) == len(parts) else None


def _arithmetic(node: Node, parts: list[Bounds | None]) -> Bounds | None:
    name = node.op.name
    if name == "clip":
        low, high = parts[0] or (None, None)
        low, high = (bound if given is None else given
                     for given, bound in ((node.attrs["lo"], low), (node.attrs["hi"], high)))
        return None if low is None or high is None else (int(low), int(high))
    if name == "remainder" and parts[1] is not None and parts[1][0] > 0:
        return (0, parts[1][1] - 1)
    if len(parts) != 2 or parts[0] is None or parts[1] is None:
        return None
    (a, b), (c, d) = parts  # type: ignore[misc]
    corners = {"add": (a + c, b + d), "sub": (a - d, b - c), "maximum": (max(a, c), max(b, d)),
               "minimum": (min(a, c), min(b, d)), "mul": (a * c, a * d, b * c, b * d)}.get(name)
    return None if corners is None else (min(corners), max(corners))
