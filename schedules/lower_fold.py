"""Running sums and products, and the place of the largest or smallest element, along an axis.

The axis is walked in order, so results do not depend on the number of threads. Vectors run over what lies behind
the axis; where nothing does, rows are scalar loops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from ..ir.graph import Node
from ..ir.opdef import fill
from .lower_kernel import (
    Row,
    around,
    at_most,
    each_vector,
    index,
    key_dtype,
    lane_loop,
    lanes_of,
    local,
    loop,
    parallel,
    write_kernel,
)
from .lower_slots import Kernel, compute_dtype, const, is_nan, let


def _along_axis(node: Node, target: Any, name: str, column: Callable[..., None]) -> Any:
    """A kernel that runs `column(operands, results, outer, inner start, lanes)` for every vector of columns."""
    outer, size, inner = around(node.operands[0].shape, node.attrs["axis"])
    lanes = at_most(lanes_of([*node.operands, *node.results], target), inner)

    def body(operands: list[Row], results: list[Row]) -> None:
        with parallel(outer, outer * size * inner, target) as o:
            each_vector(inner, lanes, lambda start, count: column(operands, results, o, start, count))

    return write_kernel(node, name, body)


def _running(identity: int, combine: Callable[[Any, Any], Any]) -> Kernel:
    def kernel(node: Node, target: Any, name: str) -> Any:
        _, size, inner = around(node.operands[0].shape, node.attrs["axis"])
        dtype = compute_dtype(node.operands[0].dtype)
        exclusive, reverse = node.attrs["exclusive"], node.attrs["reverse"]

        def column(operands: list[Row], results: list[Row], o: Any, start: Any, count: int) -> None:
            (x,), (y,) = operands, results
            total = local(count, dtype)
            with lane_loop(count) as lane:
                T.buffer_store(total, const(identity, dtype), [lane])
            with loop(size) as step, lane_loop(count) as lane:
                k = size - 1 - step if reverse else step
                at = (o * size + k) * inner + start + lane
                before = let(total[lane])
                after = let(combine(before, x.load(at)))
                T.buffer_store(total, after, [lane])
                y.store(at, before if exclusive else after)

        return _along_axis(node, target, name, column)

    return Kernel(kernel)


fill("lower", "cumsum", _running(0, lambda a, b: a + b))
fill("lower", "cumprod", _running(1, lambda a, b: a * b))


def _place(better: Callable[[Any, Any], Any]) -> Kernel:
    """The first place whose element no other is better than; NaN is better than any number."""
    def kernel(node: Node, target: Any, name: str) -> Any:
        _, size, inner = around(node.operands[0].shape, node.attrs["axis"])
        dtype = key_dtype(node.operands[0].dtype)
        floating = dtype.startswith("float")

        def column(operands: list[Row], results: list[Row], o: Any, start: Any, count: int) -> None:
            (x,), (place,) = operands, results
            best, found = local(count, dtype), local(count, "int64")
            with lane_loop(count) as lane:
                T.buffer_store(best, x.key(o * size * inner + start + lane), [lane])
                T.buffer_store(found, index(0), [lane])
            with loop(size) as k, lane_loop(count) as lane:
                element = let(x.key((o * size + k) * inner + start + lane))
                held = let(best[lane])
                wins = better(element, held)
                if floating:
                    wins = tirx.Or(wins, tirx.And(is_nan(element), tirx.Not(is_nan(held))))
                T.buffer_store(found, tirx.Select(wins, k + index(0), found[lane]), [lane])
                T.buffer_store(best, tirx.Select(wins, element, held), [lane])
            with lane_loop(count) as lane:
                place.store(o * inner + start + lane, found[lane])

        return _along_axis(node, target, name, column)

    return Kernel(kernel)


fill("lower", "argmax", _place(lambda a, b: a > b))
fill("lower", "argmin", _place(lambda a, b: a < b))
