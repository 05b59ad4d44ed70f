"""Sorting and selecting along an axis, stably, NaN as the largest value.

Rows are independent and sorted by a bottom-up merge sort of (key, place) pairs in scratch memory. The k best of a
row, for small k, come from one pass that keeps them in order, which rarely touches more than the last of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from ..ir.dims import Dim, Size
from ..ir.graph import Node
from ..ir.opdef import fill
from .lower_kernel import (
    Row,
    around,
    index,
    key_dtype,
    local,
    loop,
    parallel,
    split_index,
    when,
    write_kernel,
)
from .lower_slots import Kernel, is_nan, let
from .sizes import at_least, expression, hint, trunc_div

SMALL_K = 64  # up to here an ordered list of the best is shorter work than sorting

Before = Callable[[Any, Any], Any]


def _before(dtype: str, descending: bool) -> Before:
    """Whether a stands strictly before b."""
    def ahead(a: Any, b: Any) -> Any:
        first, second = (a, b) if descending else (b, a)  # `first` must be the larger
        larger = first > second
        if dtype.startswith("float"):
            larger = tirx.Or(larger, tirx.And(is_nan(first), tirx.Not(is_nan(second))))
        return larger
    return ahead


def _rows(node: Node, target: Any, name: str, row: Callable[..., None]) -> Any:
    """A kernel that runs `row(x, values, places, base, base of the results, stride)` for each row along the axis."""
    outer, size, inner = around(node.operands[0].shape, node.attrs["axis"])
    kept = node.results[0].shape[node.attrs["axis"]]

    def body(operands: list[Row], results: list[Row]) -> None:
        with parallel(outer * inner, outer * inner * size * max(hint(size).bit_length(), 1), target) as r:
            o, c = split_index(r, (outer, inner))
            row(operands[0], *results, let(o * (size * inner) + c), let(o * (kept * inner) + c), inner)

    return write_kernel(node, name, body)


def _merge_sort(x: Row, base: Any, stride: Any, size: Size, ahead: Before) -> tuple[Any, Any]:
    """Scratch buffers that hold the sorted keys and their places."""
    dtype = key_dtype(x.value.dtype)
    keys = [T.alloc_buffer((expression(size),), dtype, scope="global") for _ in range(2)]
    places = [T.alloc_buffer((expression(size),), "int64", scope="global") for _ in range(2)]
    with loop(size) as i:
        T.buffer_store(keys[0], x.key(base + i * stride), [i])
        T.buffer_store(places[0], i + index(0), [i])
    if isinstance(size, Dim):  # two passes at a time end in the first pair of buffers
        run = local(1, "int64")
        T.buffer_store(run, index(1), [0])
        with T.While(run[0] < size):
            length = let(run[0])
            _merge_runs(keys, places, 0, length, size, ahead)
            _merge_runs(keys, places, 1, let(length * 2), size, ahead)
            T.buffer_store(run, length * 4, [0])
        return keys[0], places[0]
    now, width = 0, 1
    while width < size:
        _merge_runs(keys, places, now, width, size, ahead)
        now, width = 1 - now, width * 2
    return keys[now], places[now]


def _merge_runs(keys: list[Any], places: list[Any], now: int, width: Any, size: Size, ahead: Before) -> None:
    """One pass: neighbouring sorted runs of `width` become runs twice as long, in the other pair of buffers."""
    key, place, new_key, new_place = keys[now], places[now], keys[1 - now], places[1 - now]
    runs = trunc_div(index(size) + (2 * width - 1), 2 * width) if isinstance(size, Dim) else -(-size // (2 * width))
    with loop(runs) as run:
        start = let(run * (2 * width))
        middle = let(tirx.min(start + width, index(size)))
        end = let(tirx.min(start + 2 * width, index(size)))
        left, right = local(1, "int64"), local(1, "int64")
        T.buffer_store(left, start, [0])
        T.buffer_store(right, middle, [0])
        with T.serial(start, end) as out:
            i, j = let(left[0]), let(right[0])
            a = let(key[tirx.min(i, index(size - 1))])
            b = let(key[tirx.min(j, index(size - 1))])
            from_right = tirx.And(j < end, tirx.Or(i >= middle, ahead(b, a)))
            with T.If(from_right):
                with T.Then():
                    T.buffer_store(new_key, b, [out])
                    T.buffer_store(new_place, place[j], [out])
                    T.buffer_store(right, j + 1, [0])
                with T.Else():
                    T.buffer_store(new_key, a, [out])
                    T.buffer_store(new_place, place[i], [out])
                    T.buffer_store(left, i + 1, [0])


def _sorted_row(node: Node, ahead: Before, kept: int) -> Callable[..., None]:
    size = node.operands[0].shape[node.attrs["axis"]]

    def row(x: Row, values: Row, places: Row, base: Any, to: Any, stride: int) -> None:
        key, place = _merge_sort(x, base, stride, size, ahead)
        with loop(kept) as i:
            values.store(to + i * stride, key[i])
            places.store(to + i * stride, place[i])

    return row


def _best_row(node: Node, ahead: Before, kept: int) -> Callable[..., None]:
    size = node.operands[0].shape[node.attrs["axis"]]

    def row(x: Row, values: Row, places: Row, base: Any, to: Any, stride: int) -> None:
        key, place = local(kept, key_dtype(x.value.dtype)), local(kept, "int64")
        held, at = local(1, "int64"), local(1, "int64")
        T.buffer_store(held, index(0), [0])
        with loop(size) as i:
            element = let(x.key(base + i * stride))
            with when(tirx.Or(held[0] < kept, ahead(element, key[kept - 1]))):
                T.buffer_store(at, tirx.min(held[0], index(kept - 1)), [0])
                previous = tirx.max(at[0] - 1, index(0))
                with T.While(tirx.And(at[0] > 0, ahead(element, key[previous]))):
                    T.buffer_store(key, key[at[0] - 1], [at[0]])
                    T.buffer_store(place, place[at[0] - 1], [at[0]])
                    T.buffer_store(at, at[0] - 1, [0])
                T.buffer_store(key, element, [at[0]])
                T.buffer_store(place, i + index(0), [at[0]])
                T.buffer_store(held, tirx.min(held[0] + 1, index(kept)), [0])
        with loop(kept) as i:
            values.store(to + i * stride, key[i])
            places.store(to + i * stride, place[i])

    return row


def _sort(node: Node, target: Any, name: str) -> Any:
    x = node.operands[0]
    ahead = _before(key_dtype(x.dtype), node.attrs["descending"])
    return _rows(node, target, name, _sorted_row(node, ahead, x.shape[node.attrs["axis"]]))


def _top_k(node: Node, target: Any, name: str) -> Any:
    ahead, kept = _before(key_dtype(node.operands[0].dtype), node.attrs["largest"]), node.attrs["k"]
    row = _best_row if at_least(SMALL_K, kept) else _sorted_row
    return _rows(node, target, name, row(node, ahead, kept))


fill("lower", "sort", Kernel(_sort))
fill("lower", "top_k", Kernel(_top_k))
