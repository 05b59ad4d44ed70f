"""Convolutions of any rank and dtype, and of empty operands, as plain loops.

For what the tiled kernels do not take: integers, 8-bit floats, more than three spatial axes, axes of no elements. One
element of the result at a time: a sum over taps and channels, with guards at the border.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from ..ir.graph import Node, Value
from ..ir.ops_layout import spatial_sizes
from .conv_problem import DTYPES
from .lower_slots import cast, compute_dtype, const, let, read
from .sizes import is_dynamic

Reader = Callable[[Value, Sequence[Any]], Any]
ACCUMULATED = {"bfloat16": "float32", "float16": "float32"}  # the tiled kernels' sums, which a result may keep


def needs_plain(node: Node) -> bool:
    """Whether the tiled kernels decline a convolution."""
    values = (*node.operands, node.result)
    weights = node.result if node.op.name == "conv_weight_grad" else node.operands[1]
    images = [v for v in values if v is not weights]
    if is_dynamic(*weights.shape, *(v.shape[-1 if node.attrs["channels_last"] else 1] for v in images)):
        return True
    x, w = (v.dtype for v in node.operands)
    return any(v.type.size == 0 for v in values) or not 3 <= node.result.rank <= 5 \
        or x not in DTYPES or x != w or node.result.dtype not in (x, ACCUMULATED.get(x, x))


def plain_kernel(node: Node, epilogue: Any, name: str) -> Any:
    """The PrimFunc of a convolution or one of its gradients."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tirx.noalias": True})
            for i, buffer in enumerate(epilogue.params):
                T.arg(f"p{i}", buffer)
            size = node.result.type.size
            if size:
                with T.parallel(size) as flat:
                    _element(node, epilogue, _unflat(flat, node.result.shape))
            else:
                T.evaluate(0)
    return builder.get()


def _unflat(flat: Any, shape: Sequence[int]) -> list[Any]:
    """The index of an element. Quotients by named sizes are kept from TVM's rewriting, which took minutes for them."""
    parts = []
    for n in reversed(shape):
        held = let if is_dynamic(n) else T.bind
        parts.append(held(tirx.floormod(flat, n)))
        flat = held(tirx.floordiv(flat, n))
    return parts[::-1]


def _element(node: Node, epilogue: Any, at: Sequence[Any]) -> None:
    total = T.alloc_buffer((1,), _accumulator(node))
    T.buffer_store(total, const(0, _accumulator(node)), [0])

    def add(extents: Sequence[int], term: Callable[[list[Any]], tuple[Any, Any]]) -> None:
        """Adds term(position) = (condition, product) over a box."""
        if not math.prod(extents):
            return
        with T.serial(math.prod(extents)) as flat:
            condition, product = term(_unflat(flat, extents))
            with T.If(condition), T.Then():
                T.buffer_store(total, total[0] + product(), [0])

    {"conv": _forward, "conv_input_grad": _input_grad, "conv_weight_grad": _weight_grad}[node.op.name](
        node, epilogue, at, add)
    epilogue.store(at, let(total[0]))


def _accumulator(node: Node) -> str:
    return compute_dtype(node.result.dtype)


def _load(node: Node, epilogue: Any, v: Value, at: Sequence[Any]) -> Any:
    return cast(read(epilogue.buffer(v)[tuple(at)], v.dtype), _accumulator(node))


def _image(node: Node, n: Any, c: Any, place: Sequence[Any]) -> list[Any]:
    """The index of an activation, as it lies in memory."""
    return [n, *place, c] if node.attrs["channels_last"] else [n, c, *place]


def _place(node: Node, at: Sequence[Any]) -> tuple[Any, Any, list[Any]]:
    """(n, c, spatial) of an activation's index."""
    return (at[0], at[-1], list(at[1:-1])) if node.attrs["channels_last"] else (at[0], at[1], list(at[2:]))


def _windowed(node: Node, q: Sequence[Any], k: Sequence[Any], sizes: Sequence[int]) -> tuple[list[Any], Any]:
    """(input position of tap k of window q, whether it is inside)."""
    attrs = node.attrs
    place = [i * s + j * d - lo for i, j, s, d, (lo, _) in
             zip(q, k, attrs["stride"], attrs["dilation"], attrs["padding"])]
    return place, _all([tirx.And(p >= 0, p < n) for p, n in zip(place, sizes)])


def _all(conditions: Sequence[Any]) -> Any:
    result = conditions[0]
    for condition in conditions[1:]:
        result = tirx.And(result, condition)
    return result


def _forward(node: Node, epilogue: Any, at: Sequence[Any], add: Any) -> None:
    x, w = node.operands
    n, o, q = _place(node, at)
    inner, per_group = w.shape[1], w.shape[0] // node.attrs["groups"]
    sizes: Any = spatial_sizes(x.shape, node.attrs["channels_last"])

    def term(p: list[Any]) -> tuple[Any, Any]:
        i, *k = p
        place, inside = _windowed(node, q, k, sizes)
        channel = tirx.floordiv(o, per_group) * inner + i
        return inside, lambda: _load(node, epilogue, x, _image(node, n, channel, place)) \
            * _load(node, epilogue, w, [o, i, *k])

    add([inner, *w.shape[2:]], term)


def _input_grad(node: Node, epilogue: Any, at: Sequence[Any], add: Any) -> None:
    dy, w = node.operands
    n, c, p = _place(node, at)
    inner, per_group = w.shape[1], w.shape[0] // node.attrs["groups"]
    sizes = spatial_sizes(dy.shape, node.attrs["channels_last"])
    attrs = node.attrs

    def term(position: list[Any]) -> tuple[Any, Any]:
        j, *k = position
        o = tirx.floordiv(c, inner) * per_group + j
        offsets = [i + lo - t * d for i, t, d, (lo, _) in zip(p, k, attrs["dilation"], attrs["padding"])]
        q = [tirx.floordiv(v, s) for v, s in zip(offsets, attrs["stride"])]
        inside = _all([_all([v >= 0, tirx.floormod(v, s) < 1, i < size])
                       for v, s, i, size in zip(offsets, attrs["stride"], q, sizes)])
        return inside, lambda: _load(node, epilogue, dy, _image(node, n, o, q)) \
            * _load(node, epilogue, w, [o, tirx.floormod(c, inner), *k])

    add([per_group, *w.shape[2:]], term)


def _weight_grad(node: Node, epilogue: Any, at: Sequence[Any], add: Any) -> None:
    x, dy = node.operands
    o, i, *k = at
    last = node.attrs["channels_last"]
    inner, per_group = node.result.shape[1], node.result.shape[0] // node.attrs["groups"]
    sizes: Any = spatial_sizes(x.shape, last)

    def term(position: list[Any]) -> tuple[Any, Any]:
        n, *q = position
        place, inside = _windowed(node, q, k, sizes)
        channel = tirx.floordiv(o, per_group) * inner + i
        return inside, lambda: _load(node, epilogue, x, _image(node, n, channel, place)) \
            * _load(node, epilogue, dy, _image(node, n, o, q))

    add([x.shape[0], *spatial_sizes(dy.shape, last)], term)
