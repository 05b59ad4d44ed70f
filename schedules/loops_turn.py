"""Elementwise kernels that read something transposed.

Where an input runs contiguously along another axis than the outputs, vectors along either side would touch one
cache line per element on the other. Such an input is brought in by square tiles, turned in registers, and the loops
go over tiles; all other inputs are read as ever.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from ..ir.dims import Dim, Size
from ..ir.graph import Value
from .conv_tir import Transpose, import_llvm
from .loops_eval import Idx, InMemory, as_offset
from .loops_index import Axis, Index, Merged
from .lower_slots import compute_dtype
from .sizes import expression, hint, is_dynamic, trunc_div, trunc_mod

# What a tile of an element type is turned as: (source, destination) types of the shuffles.
TURNED_AS = {"float32": ("float32", "float32"), "int32": ("float32", "float32"), "uint32": ("float32", "float32"),
             "float64": ("float64", "float64"), "int64": ("float64", "float64"), "uint64": ("float64", "float64"),
             "bfloat16": ("bfloat16", "float32"), "float16": ("float16", "float32")}


def stride_on(strides: Mapping[Axis, int], axis: Axis) -> int:
    """The stride of an access along a (perhaps collapsed) axis."""
    if isinstance(axis, Merged):
        inner = [p for p in axis.parts if p.extent != 1][-1]
        return strides.get(inner, 0)
    return strides.get(axis, 0)


@dataclass
class Tile:
    """A turned tile: element (row of the tile, lane)."""

    buffer: Any
    lanes: int
    row: Any = 0
    lane: Any = 0

    def load(self, idx: Idx) -> Any:
        return self.buffer[self.row * self.lanes + self.lane]


@dataclass(frozen=True)
class Turn:
    """How the inputs of a kernel are turned: `across` is the axis along which they are contiguous."""

    across: Axis
    strides: Mapping[Value, int]      # of each turned input, along the vector axis
    positions: Mapping[Value, Index]


def find_turn(loops: list[Axis], accesses: list[Any], lanes: int) -> Turn | None:
    """The inputs of an elementwise kernel to be turned, if it is worth it."""
    if len(loops) < 2:
        return None
    inner = loops[-1]
    across: Axis | None = None
    strides: dict[Value, int] = {}
    positions: dict[Value, Index] = {}
    places: dict[Value, set[Index]] = {}
    for access in accesses:
        places.setdefault(access.value, set()).add(access.position)
    for access in accesses:
        own = {a: c for a, c in access.position.terms.items() if isinstance(a, Axis)}
        if not access.position.plain or stride_on(own, inner) in (0, 1) or access.value.dtype not in TURNED_AS:
            continue
        along = [a for a in loops[:-1] if stride_on(own, a) == 1]
        if not along or hint(along[0].extent) < lanes or hint(inner.extent) < lanes or across not in (None, along[0]):
            continue
        if len(places[access.value]) > 1:
            continue
        across = along[0]
        strides[access.value] = stride_on(own, inner)
        positions[access.value] = access.position
    return None if across is None else Turn(across, strides, positions)


def emit_turned(kernel: Any, turn: Turn) -> None:
    """The loops of an `ElementwiseKernel` over tiles; edges that fill no tile are read element by element."""
    inner, across, lanes = kernel.domain.loops[-1], turn.across, kernel.lanes
    others = [a for a in kernel.domain.loops[:-1] if a is not across]
    rows: Any = math.prod(a.extent for a in others)
    tiles, rest = across.extent // lanes, across.extent % lanes
    plain = {v: kernel.evaluator.places[v] for v in turn.strides}
    shuffles = {v: Transpose(lanes, *TURNED_AS[v.dtype]) for v in turn.strides}

    def wide(count: Size) -> Any:
        if isinstance(count, Dim):
            return expression(count)
        return tirx.const(count, "int64") if any(place.wide for place in plain.values()) else count

    with import_llvm(*shuffles.values()):
        with kernel.steps(rows * tiles) as p:
            kernel.bind_outer(others, trunc_div(p, tiles) if isinstance(tiles, Dim) else p // tiles)
            first = T.bind((trunc_mod(p, tiles) if isinstance(tiles, Dim) else p % tiles) * lanes)
            with T.serial(wide(inner.extent // lanes)) as j:
                _one_tile(kernel, turn, plain, shuffles, first, T.bind(j * lanes))
            kernel.evaluator.places.update(plain)
            if tail := inner.extent % lanes:
                with T.serial(wide(lanes)) as i:
                    across.bind(first + i)
                    if isinstance(tail, Dim):
                        with T.serial(expression(tail)) as lane:
                            kernel.vector(inner, expression(inner.extent - tail) + lane, 1)
                    else:
                        kernel.vector(inner, inner.extent - tail, tail)
        if rest:
            with kernel.steps(rows * rest) as p:
                kernel.bind_outer(others, trunc_div(p, rest) if isinstance(rest, Dim) else p // rest)
                place = trunc_mod(p, rest) if isinstance(rest, Dim) else p % rest
                across.bind(T.bind(expression(tiles) * lanes + place))
                kernel.row(inner)


def _one_tile(kernel: Any, turn: Turn, plain: Mapping[Value, InMemory], shuffles: Mapping[Value, Transpose],
              first: Any, start: Any) -> None:
    """Turns the inputs' tiles at (first, start), then computes their rows as vectors along the inner axis."""
    inner, across, lanes = kernel.domain.loops[-1], turn.across, kernel.lanes
    across.bind(first)
    inner.bind(start)
    tiles = {}
    for v, place in plain.items():
        dtype = compute_dtype(v.dtype)
        tiles[v] = Tile(T.alloc_buffer((lanes * lanes,), dtype), lanes)
        offset = as_offset(turn.positions[v], place.wide)
        shuffles[v].emit(tiles[v].buffer[0], lanes, place.buffer[offset], turn.strides[v])
    kernel.evaluator.places.update(tiles)
    with T.serial(lanes) as i:
        across.bind(first + i)
        with T.vectorized(tirx.const(lanes, "int64") if is_dynamic(inner.extent, across.extent) else lanes) as lane:
            inner.bind(start + lane)
            for tile in tiles.values():
                tile.row, tile.lane = i, lane
            kernel.element()

