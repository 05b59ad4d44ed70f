"""Scattering: updates added to, or written over, places that are known only at run time.

The result takes over the memory of the operand. Updates to one place are applied in order by one thread, so the
result does not depend on the number of threads: parallel loops run over what lies beside the scattered axis.
"""

from __future__ import annotations

import math
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
    join_index,
    lane_loop,
    lanes_of,
    loop,
    parallel,
    split_index,
    when,
    write_kernel,
)
from .lower_slots import Kernel, cast, let
from .sizes import is_dynamic

COLUMNS = 4  # vectors that one step of a parallel loop over columns takes


def _rows(node: Node, target: Any, name: str, outer: int, size: int, inner: int, count: int,
          row_at: Callable[[Row, Any], tuple[Any, Any]], add: bool) -> Any:
    """Updates (outer, count, inner) applied to rows of (outer, size, inner); `row_at(indices, i)` gives the row of
    update i and whether it lies inside."""
    lanes = at_most(lanes_of(node.results, target), inner if is_dynamic(inner) else max(inner, 1))
    width = lanes * COLUMNS
    whole = 0 if is_dynamic(inner) else inner // width

    def body(operands: list[Row], results: list[Row]) -> None:
        _, indices, updates = operands
        (out,) = results

        def columns(o: Any, first: Any, extent: int) -> None:
            with loop(count) as i:
                row, inside = row_at(indices, i)
                with when(inside):
                    each_vector(extent, lanes, lambda start, n: vector(o, i, row, first + start, n))

        def vector(o: Any, i: Any, row: Any, start: Any, n: int) -> None:
            with lane_loop(n) as lane:
                element = updates.load((o * count + i) * inner + start + lane)
                at = (o * size + row) * inner + start + lane
                (out.add if add else out.store)(at, element)

        if not count or not inner:
            return _nothing()
        with parallel(outer * max(whole, 1), outer * count * inner, target) as step:
            o, block = step // max(whole, 1), step % max(whole, 1)
            if whole:
                columns(let(o), let(block * width), width)
            else:
                columns(let(o), index(0), inner)
        if whole and inner % width:
            with parallel(outer, outer * count * (inner - whole * width), target) as o:
                columns(o, index(whole * width), inner - whole * width)

    return write_kernel(node, name, body, inplace=[(0, 0)])


def _nothing() -> None:
    T.evaluate(0)


def _scatter_add(node: Node, target: Any, name: str) -> Any:
    x, indices, _ = node.operands
    outer, size, inner = around(x.shape, node.attrs["axis"])
    count = math.prod(indices.shape)

    def row_at(row: Row, i: Any) -> tuple[Any, Any]:
        place = let(cast(row.load(i), "int64"))
        return place, tirx.And(place >= 0, place < size)

    return _rows(node, target, name, outer, size, inner, count, row_at, add=True)


def _nd(add: bool) -> Kernel:
    def kernel(node: Node, target: Any, name: str) -> Any:
        x, indices, _ = node.operands
        depth = indices.shape[-1]
        lead = x.shape[:depth]

        def row_at(row: Row, i: Any) -> tuple[Any, Any]:
            parts = [let(cast(row.load(i * depth + d), "int64")) for d in range(depth)]
            inside = tirx.And(parts[0] >= 0, parts[0] < lead[0])
            for part, size in zip(parts[1:], lead[1:]):
                inside = tirx.And(inside, tirx.And(part >= 0, part < size))
            return let(join_index(parts, lead)), inside

        count = math.prod(indices.shape[:-1])
        return _rows(node, target, name, 1, math.prod(lead), math.prod(x.shape[depth:]), count, row_at, add)

    return Kernel(kernel, inplace=((0, 0),))


fill("lower", "scatter_add", Kernel(_scatter_add, inplace=((0, 0),)))
fill("lower", "scatter_add_nd", _nd(add=True))
fill("lower", "scatter_nd", _nd(add=False))


def _scatter_add_along_axis(node: Node, target: Any, name: str) -> Any:
    x, indices, _ = node.operands
    outer, size, inner = around(x.shape, node.attrs["axis"])
    count = indices.shape[node.attrs["axis"]]

    def body(operands: list[Row], results: list[Row]) -> None:
        _, places, updates = operands
        (out,) = results
        if not count:
            return _nothing()
        with parallel(outer, outer * count * inner, target) as o, loop(count) as i, loop(inner) as c:
            at = (o * count + i) * inner + c
            place = let(cast(places.load(at), "int64"))
            with when(tirx.And(place >= 0, place < size)):
                out.add((o * size + place) * inner + c, updates.load(at))

    return write_kernel(node, name, body, inplace=[(0, 0)])


fill("lower", "scatter_add_along_axis", Kernel(_scatter_add_along_axis, inplace=((0, 0),)))


def _dynamic_update_slice(node: Node, target: Any, name: str) -> Any:
    x, update, *_ = node.operands
    shape = update.shape
    rows: Any = math.prod(shape[:-1])
    width: Any = shape[-1] if shape else 1
    lanes = at_most(lanes_of([x], target), width if is_dynamic(width) else max(width, 1))

    def body(operands: list[Row], results: list[Row]) -> None:
        _, block, *starts = operands
        (out,) = results
        if not update.type.size:
            return _nothing()
        first = [let(tirx.max(tirx.min(cast(s.load(0), "int64"), index(n - m)), index(0)))
                 for s, n, m in zip(starts, x.shape, shape)]
        with parallel(rows, rows * width, target) as row:
            lead = split_index(row, shape[:-1])
            at = join_index([p + f for p, f in zip(lead, first)], x.shape[:-1])
            base = let(at * x.shape[-1] + first[-1]) if shape else index(0)

            def vector(start: Any, n: int) -> None:
                with lane_loop(n) as lane:
                    out.store(base + start + lane, block.load(row * width + start + lane))

            each_vector(width, lanes, vector)

    return write_kernel(node, name, body, inplace=[(0, 0)])


fill("lower", "dynamic_update_slice", Kernel(_dynamic_update_slice, inplace=((0, 0),)))
