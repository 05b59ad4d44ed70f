"""Gather, scatter, one-hot, and the ops whose result is as long as the data says.

Negative indices count from the end; where an axis is symbolic its length is a number that the graph computes. What has
a length that depends on data (`NonZero`, `Unique`, `Compress`, `NonMaxSuppression`) is a mask of candidates, of which
those that hold are taken: their count becomes a symbolic size (`OnnxNode.size`).
"""

from __future__ import annotations

import math
from typing import Any

from ...ir.dims import Dim
from ...ir.dtypes import bool_, int64
from .. import functions as F
from ..control import scan, while_loop
from ..data_sizes import size_tensor
from ..dispatch import apply, cast, constant
from ..tensor import Tensor
from .node import OnnxNode
from .rules import onnx_rule
from .rules_shape import axis_of, slice_axis
from .sizes import as_number, numbers, sizes
from .values import tensor


def wrapped(index: Tensor, size: Any) -> Tensor:
    """Indices counted from the start of an axis of the given size."""
    if index.dtype.is_unsigned:
        return index
    index = index if index.dtype.bits >= 32 else cast(index, int64)
    length: Any = size
    if isinstance(size, Dim):
        index, length = cast(index, int64), size_tensor(size)
    return F.where(index < 0, index + length, index)


# One axis --------------------------------------------------------------------------------------------------------

@onnx_rule("Gather")
def gather(node: OnnxNode, x: Any, indices: Any) -> Tensor:
    x = tensor(x)
    axis = axis_of(node, int(node.attr("axis", 0)), x.ndim)
    result: Tensor = apply("take", x, wrapped(tensor(indices), x.shape[axis]), axis=axis)
    return result


@onnx_rule("GatherElements")
def gather_elements(node: OnnxNode, x: Any, indices: Any) -> Tensor:
    """Element by element along an axis; the other axes of the indices may be shorter than those of x."""
    x, indices = tensor(x), tensor(indices)
    axis = axis_of(node, int(node.attr("axis", 0)), x.ndim)
    for i, size in enumerate(indices.shape):
        if i != axis and size != x.shape[i]:
            x = slice_axis(x, i, 0, size)
    result: Tensor = apply("take_along_axis", x, wrapped(indices, x.shape[axis]), axis=axis)
    return result


@onnx_rule("GatherND")
def gather_nd(node: OnnxNode, x: Any, indices: Any) -> Tensor:
    """Slices x[b_1, ..., i_1, ..., i_k]: the first `batch_dims` axes of both are the same."""
    x, indices = tensor(x), tensor(indices)
    batch = int(node.attr("batch_dims", 0))
    depth = indices.shape[-1]
    parts = [wrapped(indices[..., i], x.shape[batch + i]) for i in range(depth)]
    lead = indices.shape[:-1]
    places = [F.broadcast_to(apply("iota", shape=tuple(n if i == b else 1 for i, n in enumerate(lead)), axis=b,
                                   dtype=parts[0].dtype), lead) for b in range(batch)]
    return F.gather_nd(x, F.stack([*places, *parts], -1))


@onnx_rule("OneHot", since=9, static=(1,))
def one_hot(node: OnnxNode, indices: Any, depth: Any, values: Any) -> Tensor:
    """values[1] at the index along a new axis, values[0] elsewhere and for an index out of range."""
    indices, values = tensor(indices), tensor(values)
    (size,) = sizes(node, depth, "depth")
    axis = int(node.attr("axis", -1)) % (indices.ndim + 1)
    if not indices.dtype.is_integer:
        indices = cast(indices, int64)
    hot = F.expand_dims(wrapped(indices, size), -1) == F.arange(size)
    hot = F.moveaxis(hot, -1, axis)
    return F.where(hot, values[1], values[0])


@onnx_rule("TensorScatter", since=24)
def tensor_scatter(node: OnnxNode, cache: Any, update: Any, starts: Any = None) -> Tensor:
    """The cache with the update written along an axis, from a place of its own for each element of the batch."""
    cache, update = tensor(cache), tensor(update)
    axis = axis_of(node, int(node.attr("axis", -2)), cache.ndim)
    length, steps = cache.shape[axis], update.shape[axis]
    first = F.zeros((cache.shape[0],), int64) if starts is None else cast(tensor(starts), int64)
    place = F.reshape(first, (-1, 1)) + F.arange(steps)                       # (batch, steps)
    if node.attr("mode", "linear") == "circular":
        place = F.remainder(place, length)
    batch = F.broadcast_to(F.reshape(F.arange(cache.shape[0]), (-1, 1)), place.shape)
    order = (0, axis, *(i for i in range(1, cache.ndim) if i != axis))
    back = tuple(order.index(i) for i in range(cache.ndim))
    result = apply("scatter_nd", F.transpose(cache, order), F.stack([batch, place], -1), F.transpose(update, order))
    return F.transpose(result, back)


def slices_at(x: Tensor, index: Tensor, axis: int = 0) -> Tensor:
    """Slices at places that lie inside; `F.take` would look for negative ones."""
    result: Tensor = apply("take", x, index, axis=axis)
    return result


# Scatter ---------------------------------------------------------------------------------------------------------

REDUCTIONS = {"add": "scatter_add_nd", "none": "scatter_nd"}


def scattered(node: OnnxNode, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    """x with updates written, added, multiplied, or compared in at index vectors; repeated ones add up."""
    how = node.attr("reduction", "none")
    if how in REDUCTIONS:
        result: Tensor = apply(REDUCTIONS[how], x, index, updates)
        return result
    if how not in ("mul", "min", "max"):
        raise node.fail(f'reduction is "none", "add", "mul", "min" or "max", not {how!r}')
    return _folded(x, index, updates, how)


def _folded(x: Tensor, index: Tensor, updates: Tensor, how: str) -> Tensor:
    """Products and extremes of what meets at one place.

    Updates are put in order of their place; each run of equal places is then combined by doubling: in step s every
    element takes in the one 2**s before it, if that belongs to the same run. The last of a run is the result.
    """
    depth = index.shape[-1]
    width = x.shape[depth:]
    rows = math.prod(x.shape[:depth])
    strides = [math.prod(x.shape[i + 1:depth]) for i in range(depth)]
    flat = F.ravel(F.sum(cast(index, int64) * F.asarray(strides), -1))            # (updates,)
    count = flat.shape[0]
    order = F.argsort(flat)
    place, total = slices_at(flat, order), slices_at(F.reshape(updates, (count, *width)), order, axis=0)
    combine = {"mul": F.multiply, "min": F.minimum, "max": F.maximum}[how]
    column = (count, *(1,) * len(width))

    def double(total: Tensor, step: Tensor) -> tuple[Tensor, None]:
        before = F.maximum(F.arange(count) - step, 0)
        same = F.logical_and(F.arange(count) >= step, slices_at(place, before) == place)
        return F.where(F.reshape(same, column), combine(total, slices_at(total, before, axis=0)), total), None

    steps = [1 << i for i in range(max(count - 1, 0).bit_length())]
    if steps:
        total, _ = scan(double, total, F.asarray(steps))
    after = F.minimum(F.arange(count) + 1, count - 1)
    last = F.logical_or(F.arange(count) == count - 1, slices_at(place, after) != place)
    old = F.reshape(x, (rows, *width))
    fresh = combine(slices_at(old, place, axis=0), total)
    target = F.where(last, place, rows)                                             # outside: dropped
    result = apply("scatter_nd", old, F.expand_dims(target, -1), fresh)
    return F.reshape(result, x.shape)


@onnx_rule("ScatterND")
def scatter_nd(node: OnnxNode, x: Any, indices: Any, updates: Any) -> Tensor:
    x, indices = tensor(x), tensor(indices)
    parts = [wrapped(indices[..., i], x.shape[i]) for i in range(indices.shape[-1])]
    return scattered(node, x, F.stack(parts, -1), tensor(updates))


@onnx_rule(("ScatterElements", "Scatter"))
def scatter_elements(node: OnnxNode, x: Any, indices: Any, updates: Any) -> Tensor:
    """Element by element: an update goes to its own place, but along the axis to where its index says."""
    x, updates, indices = tensor(x), tensor(updates), tensor(indices)
    axis = axis_of(node, int(node.attr("axis", 0)), x.ndim)
    index = wrapped(indices, x.shape[axis])
    shape = index.shape
    places = [index if i == axis else F.broadcast_to(
        apply("iota", shape=tuple(n if i == j else 1 for j, n in enumerate(shape)), axis=i, dtype=index.dtype), shape)
        for i in range(x.ndim)]
    return scattered(node, x, F.stack(places, -1), updates)


# As long as the data says ----------------------------------------------------------------------------------------

def taken(node: OnnxNode, mask: Tensor, what: str) -> Tensor:
    """The places of what is true in a mask (n,), in order."""
    mask = cast(mask, bool_)
    number = node.size(F.count_nonzero(mask), what, mask.shape[0])
    result: Tensor = apply("true_places", mask, size=number)
    return result


@onnx_rule("NonZero")
def nonzero(node: OnnxNode, x: Any) -> Tensor:
    """The index vectors (rank, count) of what is not zero, in row-major order."""
    x = tensor(x)
    flat = taken(node, F.ravel(F.not_equal(x, constant(0, x.dtype))), "the number of elements that are not zero")
    rows = []
    for size in reversed(x.shape[1:]):
        rows.append(F.remainder(flat, size_tensor(size)) if size != 0 else flat)
        flat = F.floor_divide(flat, size_tensor(size)) if size != 0 else flat
    return F.stack([flat, *reversed(rows)], 0) if x.ndim else F.zeros((0, *flat.shape), int64)


@onnx_rule("Compress")
def compress(node: OnnxNode, x: Any, condition: Any) -> Tensor:
    """The slices along an axis (without one: the elements) whose condition holds."""
    x, mask = tensor(x), tensor(condition)
    axis = node.attr("axis", None)
    if axis is None:
        x, place = F.ravel(x), 0
    else:
        place = axis_of(node, int(axis), x.ndim)
    if mask.shape[0] != x.shape[place] and all(isinstance(n, int) for n in (mask.shape[0], x.shape[place])):
        mask = mask[:x.shape[place]]  # a condition may be shorter, which drops the rest, and is never longer
    return slices_at(x, taken(node, mask, "the number of slices kept"), axis=place)


@onnx_rule("Unique")
def unique(node: OnnxNode, x: Any) -> tuple[Tensor, ...]:
    """(values, where each comes first, which of them each element is, how often each comes)."""
    x = tensor(x)
    axis = node.attr("axis", None)
    rows = F.reshape(x, (x.size, 1)) if axis is None else F.moveaxis(x, axis_of(node, int(axis), x.ndim), 0)
    shape = rows.shape
    rows = F.reshape(rows, (shape[0], math.prod(shape[1:])))
    n = shape[0]
    order = lexicographic(rows)                                                  # (n,) rows in order, stably
    ordered = slices_at(rows, order, axis=0)
    previous = slices_at(ordered, F.maximum(F.arange(n) - 1, 0), axis=0)
    starts = F.logical_or(F.arange(n) == 0, F.any(differ(ordered, previous), axis=1))
    group = F.cumsum(cast(starts, int64)) - 1                                    # (n,) of each ordered row
    inverse = apply("scatter_nd", F.zeros((n,), int64), F.expand_dims(order, -1), group)
    counts = F.scatter_add(F.zeros((n,), int64), group, F.ones((n,), int64))
    places = taken(node, starts, "the number of different elements")
    first = slices_at(order, places)                                                # where each group comes first
    (number,) = places.shape
    counts = slice_axis(counts, 0, 0, number)
    if not node.attr("sorted", 1):
        by_place = F.argsort(first)
        rank = apply("scatter_nd", F.zeros((number,), int64), F.expand_dims(by_place, -1), F.arange(number))
        first, counts, inverse = slices_at(first, by_place), slices_at(counts, by_place), slices_at(rank, inverse)
    values = slices_at(F.reshape(rows, shape), first, axis=0)
    values = F.reshape(values, (number,)) if axis is None else F.moveaxis(values, 0, axis_of(node, int(axis), x.ndim))
    return values, first, inverse, counts


def differ(x: Tensor, y: Tensor) -> Tensor:
    """x != y, but a NaN is no different from a NaN."""
    if not x.dtype.is_float:
        return F.not_equal(x, y)
    return F.logical_and(F.not_equal(x, y), F.logical_not(F.logical_and(F.isnan(x), F.isnan(y))))


def lexicographic(rows: Tensor) -> Tensor:
    """The order of the rows of a matrix: stable sorts by each column, from the last to the first."""
    rows = cast(rows, F.asarray(0, "uint8").dtype) if rows.dtype.is_bool else rows
    order = F.arange(rows.shape[0])
    for column in reversed(range(rows.shape[1])):
        order = slices_at(order, F.argsort(slices_at(rows[:, column], order)))
    return order


# Boxes -----------------------------------------------------------------------------------------------------------

MOST_PLACES = 1024
"""Places for the boxes that a class keeps, as long as the limit is not larger; else there is one for every box."""


@onnx_rule("NonMaxSuppression", static=(2,))
def non_max_suppression(node: OnnxNode, boxes: Any, scores: Any, most: Any = None, overlap: Any = None,
                        least: Any = None) -> Tensor:
    """(selected, 3): batch, class and box. The best box left is kept, what overlaps it is dropped."""
    boxes, scores = tensor(boxes), tensor(scores)                              # (B, N, 4), (B, C, N)
    (limit,) = numbers(node, most, "max_output_boxes_per_class") if most is not None else (0,)
    batch, classes, count = scores.shape
    if isinstance(limit, int) and limit <= 0 or count == 0:
        return F.zeros((0, 3), int64)
    # as many places as may be needed: a symbolic number of boxes may be less than the limit, or more
    width = limit if isinstance(limit, int) and limit <= MOST_PLACES else count
    width = min(width, count) if isinstance(width, int) and isinstance(count, int) else width
    limit = F.minimum(as_number(limit), as_number(width))
    threshold = constant(0, boxes.dtype) if overlap is None else F.reshape(tensor(overlap), ())
    lowest = constant(-math.inf, scores.dtype)
    if least is not None:
        scores = F.where(scores > F.reshape(tensor(least), ()), scores, lowest)
    corners = corners_of(boxes, bool(node.attr("center_point_box", 0)))

    def go_on(state: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        step, left, _ = state
        return F.logical_and(step < limit, F.max(left) > lowest)

    def keep_best(state: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        step, left, picked = state
        best = apply("argmax", left, axis=2, keepdims=True)                    # (B, C, 1)
        found = F.take_along_axis(left, best, axis=2) > lowest
        gone = F.logical_or(overlaps(corners, best, threshold), F.arange(count) == best)
        left = F.where(F.logical_and(gone, found), lowest, left)
        return step + 1, left, F.dynamic_update_slice(picked, F.where(found, best, -1), (0, 0, step))

    start = (constant(0, int64), scores, F.full((batch, classes, width), -1, int64))
    picked = F.ravel(while_loop(go_on, keep_best, start)[2])
    chosen = taken(node, picked >= 0, "the number of selected boxes")
    group = F.floor_divide(chosen, as_number(width))
    return F.stack([F.floor_divide(group, as_number(classes)), F.remainder(group, as_number(classes)),
                    slices_at(picked, chosen)], 1)


def corners_of(boxes: Tensor, centered: bool) -> tuple[Tensor, ...]:
    """(left, top, right, bottom), each (B, N); from two corners in any order, or from centre and size."""
    a, b, c, d = (boxes[..., i] for i in range(4))
    if centered:
        return a - c / 2, b - d / 2, a + c / 2, b + d / 2
    return F.minimum(b, d), F.minimum(a, c), F.maximum(b, d), F.maximum(a, c)


def overlaps(corners: tuple[Tensor, ...], chosen: Tensor, threshold: Tensor) -> Tensor:
    """Whether each box covers more than a share of its union with the chosen one (B, C, 1): (B, C, N)."""
    all_boxes = [F.expand_dims(c, 1) for c in corners]
    ours = [F.take_along_axis(F.broadcast_to(c, (c.shape[0], chosen.shape[1], c.shape[2])), chosen, axis=2)
            for c in all_boxes]
    (left, top, right, bottom), (x1, y1, x2, y2) = all_boxes, ours
    width = F.maximum(F.minimum(right, x2) - F.maximum(left, x1), 0)
    height = F.maximum(F.minimum(bottom, y2) - F.maximum(top, y1), 0)
    shared = width * height
    union = (right - left) * (bottom - top) + (x2 - x1) * (y2 - y1) - shared
    return F.logical_and(union > 0, shared > threshold * union)
