"""Kernels of groups with reductions: one pass over each row for every level of dependent reductions.

If the innermost axis is reduced, a step of the parallel loop is one row, and vectors run along it with several
accumulators that are folded at the end. If it is kept, a step is a tile of neighbouring columns, with an accumulator
for each lane. Everything that happens in a row or tile stays in cache: values that are expensive to compute
and needed by a later pass are put aside in a row buffer.

Few rows of many elements are split along the first reduced axis into chunks whose number depends on the shape alone,
so that results do not change with the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from ..ir.dims import Dim, Size
from ..ir.graph import Node, Value
from ..ir.opdef import rule
from .loops import (
    SERIAL_WORK,
    KernelFrame,
    Signature,
    alone_if_small,
    bind_flat,
    each_vector,
    lanes_for,
    loop,
    narrowing,
    vectorizable,
    work_per_element,
)
from .loops_eval import Evaluator, Idx, as_offset, count_uses, operand_index
from .loops_index import Axis, Index, flatten
from .lower_slots import compute_dtype, const, hide, let
from .rows_domain import EXPENSIVE, RowDomain, analyse, cost_of, is_reduction
from .rows_split import CHUNK, Scratch, emit_split
from .sizes import expression, hint, is_dynamic, trunc_div, trunc_mod

UNROLL = 4           # vectors in flight: the latency of an addition over its throughput

Segments = list[tuple[int, int, int]]  # (first lane, vectors, lanes of each)


def segments(extent: int, lanes: int) -> Segments:
    """A fixed number of lanes as vectors: full ones, and a narrower last."""
    full, tail = divmod(extent, lanes)
    result = [(0, full, lanes)] if full else []
    return [*result, (full * lanes, 1, tail)] if tail else result


@dataclass
class Held:
    """A row value of the current row or tile: one element for each lane."""

    buffer: Scratch
    kernel: RowKernel

    def load(self, idx: Idx) -> Any:
        return self.buffer[self.kernel.lane]

    def put(self, value: Any) -> None:
        self.buffer.put(value, self.kernel.lane)


class RowEvaluator(Evaluator):
    """Divides by a row value by multiplying with its reciprocal, computed once a row (at most one ulp apart).

    Not so where the quotient is rounded to a whole number: a quantized 25.5 would become 25 instead of 26.
    """

    rounded: frozenset[Node] = frozenset()

    def compute(self, v: Value, idx: Idx) -> Any:
        node = v.producer
        if node is not None and node.op.name == "div" and node in self.nodes and node not in self.rounded:
            inverse = self.places.get((node.operands[1], "inverse"))
            if inverse is not None and v.type.size != node.operands[1].type.size:
                x, y = node.operands
                return hide(self.value(x, operand_index(idx, x)) * inverse.load(operand_index(idx, y)))
        return super().compute(v, idx)


def rounded(nodes: Sequence[Node]) -> frozenset[Node]:
    """The nodes whose results are rounded to whole numbers by others of them, at once or after more arithmetic."""
    found: set[Node] = set()
    for node in reversed(nodes):
        to_integer = node.op.name == "cast" and not node.result.dtype.is_float
        if node in found or to_integer or node.op.name in ("floor", "ceil", "round", "trunc"):
            found.update(v.producer for v in node.operands if v.producer is not None)
    return frozenset(found)


@dataclass
class RowBuffer:
    """A full value of the current row or tile, put aside in the compute dtype."""

    buffer: Scratch
    kernel: RowKernel
    value: Value

    def offset(self, idx: Idx) -> Any:
        kernel = self.kernel
        position = flatten(idx, self.value.shape)
        # The part of the index along reduced axes, in their own row-major order, then the lane.
        place: Any = Index({}, 0)
        step = 1
        full = kernel.domain.full_index(self.value)
        if idx == full:
            inner = [Index.of(a) for a in kernel.domain.axes if a in kernel.domain.reduced]
            place = flatten(inner, [a.extent for a in kernel.domain.axes if a in kernel.domain.reduced])
        else:
            inside = [(i, n) for i, f, n in zip(idx, full, self.value.shape) if f.axes & kernel.domain.reduced]
            for i, n in reversed(inside):
                place = place + i * step
                step *= n
        del position
        offset = as_offset(place, kernel.wide)
        return offset * kernel.width + kernel.lane if kernel.width > 1 else offset

    def load(self, idx: Idx) -> Any:
        return self.buffer[self.offset(idx)]

    def put(self, idx: Idx, value: Any) -> None:
        self.buffer.put(value, self.offset(idx))


class RowKernel:
    """Writes one kernel; `lane` is the current lane of a column tile (0 in a row), `width` the lanes of a tile."""

    def __init__(self, frame: KernelFrame, domain: RowDomain, target: Any):
        self.domain = domain
        self.wide = frame.signature.wide
        self.places = dict(frame.places)
        self.sinks = {v: self.places.pop(v) for v in domain.outputs}
        self.evaluator = RowEvaluator(frozenset(domain.nodes), dict(self.places),
                                      count_uses(domain.nodes, domain.outputs))
        self.evaluator.rounded = rounded(domain.nodes)
        self.divisors = {n.operands[1] for n in domain.nodes if n.op.name == "div"
                         and domain.is_row(n.operands[1]) and not domain.is_row(n.result)}
        self.loops = domain.loops()
        self.reduced = [a for a in self.loops if self.folds(a)]
        self.columns = bool(self.loops) and not self.folds(self.loops[-1])
        self.vector = self.loops[-1] if self.loops else Axis(1)
        self.lanes = lanes_for([v for n in domain.nodes for v in n.results], target.vector_bits)
        if not vectorizable(domain.nodes):
            self.lanes = 1
        if not self.columns and isinstance(self.vector.extent, int):
            self.lanes = min(self.lanes, 1 << max(self.vector.extent.bit_length() - 1, 0))
        self.outer = [a for a in self.loops if not self.folds(a) and a is not (self.vector if self.columns else None)]
        self.work = hint(domain.size) * work_per_element(domain.nodes)
        self.parallel = target.threads > 1 and self.work > SERIAL_WORK
        self.threads = target.threads
        self.lane: Any = 0
        self.width = 1
        self.base: Any = 0
        self.unroll = UNROLL
        self.chunk: tuple[Any, Any] | None = None
        self.to_keep = self.buffered()

    def folds(self, axis: Axis) -> bool:
        part = axis.parts[0] if hasattr(axis, "parts") else axis
        return part in self.domain.reduced

    # What goes where ---------------------------------------------------------------------------------------------

    def roots(self, stage: int) -> list[Value]:
        """The full values that the pass `stage` computes: operands of its reductions, outputs known by then."""
        domain = self.domain
        last = domain.passes + 1
        wanted = [n.operands[0] for n in domain.reductions(stage)]
        return wanted + [v for v in self.full_outputs() if min(domain.levels[v] + 1, last) == stage]

    def full_outputs(self) -> list[Value]:
        return [v for v in self.domain.outputs if self.domain.is_full(v)]

    def buffered(self) -> dict[Value, int]:
        """Expensive full values needed by several passes, with the first of these."""
        first: dict[Value, int] = {}
        again: set[Value] = set()
        for stage in range(1, self.domain.passes + 2):
            seen: set[Value] = set()
            stack = list(self.roots(stage))
            while stack:
                v = stack.pop()
                node = v.producer
                if v in seen or node is None or node not in self.evaluator.nodes or is_reduction(node):
                    continue
                seen.add(v)
                if cost_of(node) >= EXPENSIVE and self.domain.is_full(v) and self.in_its_row(v):
                    if v in first:
                        again.add(v)
                        continue
                    first[v] = stage
                stack.extend(node.operands)
        return {v: first[v] for v in again}

    def in_its_row(self, v: Value) -> bool:
        """Whether each row reads a full value in that row alone: through a transposition it may be another's."""
        domain = self.domain
        full = domain.full_index(v)
        return all(i == f or (bool(f.axes) and f.axes <= domain.reduced) for w, idx in domain.recorder.memo if w is v
                   for i, f in zip(idx, full))

    def row_values(self, level: int) -> list[Value]:
        """Row values that are computed once, after the pass `level`, since later passes or results need them."""
        domain = self.domain
        readers: dict[Value, list[Node]] = {}
        for node in domain.nodes:
            for v in node.operands:
                readers.setdefault(v, []).append(node)
        chosen = []
        for node in domain.nodes:
            v = node.results[0]
            if is_reduction(node) or not domain.is_row(v) or domain.levels[v] != level or domain.is_full(v) \
                    or cost_of(node) == 0 or domain.rows == domain.size:
                continue
            if level == 0 and domain.recorder.computed.get(v, 0) != 1:
                continue
            if any(not domain.is_row(r.results[0]) or is_reduction(r) or domain.levels[r.results[0]] != level
                   for r in readers.get(v, [])) or v in domain.outputs:
                if level or (v, domain.row_index(v)) in domain.recorder.memo:
                    chosen.append(v)
        return chosen

    # Loops -------------------------------------------------------------------------------------------------------

    def over_lanes(self, body: Callable[[], None]) -> None:
        """Once for each lane of the tile, in vectors (once, in a row)."""
        if not self.columns:
            self.lane = 0
            self.evaluator.fresh()
            body()
            return
        for first, count, lanes in segments(self.width, self.lanes):
            with loop(count, "unroll") as u, loop(lanes, "vectorized") as lane:
                self.lane = first + u * lanes + lane
                self.vector.bind(self.base + self.lane)
                self.evaluator.fresh()
                body()

    def over_row(self, body: Callable[[Any], None]) -> None:
        """Once for each element of the row or tile; `body(slot)` gets the accumulator that the element belongs to."""
        self._over_axes(self.reduced if self.columns else self.reduced[:-1], body, first=True)

    def _over_axes(self, axes: Sequence[Axis], body: Callable[[Any], None], first: bool) -> None:
        if not axes:
            if self.columns or not self.reduced:
                self.over_lanes(lambda: body(self.lane))
            else:
                self._over_vector_axis(body, self.chunk if first else None)
            return
        axis, *rest = axes
        start, extent = self.chunk if first and self.chunk else (0, axis.extent)
        with loop(extent) as j:
            axis.bind(start + j)
            self._over_axes(rest, body, first=False)

    def _over_vector_axis(self, body: Callable[[Any], None], chunk: tuple[Any, Any] | None) -> None:
        start, extent = chunk or (0, self.vector.extent)
        block = self.lanes * self.unroll

        def vector(at: Any, slot: Any, lanes: int) -> None:
            with loop(lanes, "vectorized") as lane:
                self.vector.bind(at + lane)
                self.evaluator.fresh()
                body(slot + lane)

        blocks, rest = extent // block, extent % block
        if blocks:
            with loop(blocks) as j, loop(self.unroll, "unroll") as u:
                vector(start + j * block + u * self.lanes, u * self.lanes, self.lanes)
        done = blocks * block
        if isinstance(rest, Dim):
            done = T.bind(expression(done))
            each_vector(rest, self.lanes, lambda at, lanes: vector(start + done + at, 0, lanes))
            return
        vectors, tail = divmod(rest, self.lanes)
        if vectors:
            with loop(vectors) as j:
                vector(start + done + j * self.lanes, 0, self.lanes)
        if tail:
            vector(start + done + vectors * self.lanes, 0, tail)

    # Passes ------------------------------------------------------------------------------------------------------

    def accumulators(self, nodes: Sequence[Node]) -> dict[Node, Any]:
        size = self.width if self.columns or not self.reduced else self.lanes * self.unroll
        result = {}
        for node in nodes:
            dtype = compute_dtype(node.result.dtype)
            result[node] = Scratch(size, dtype)
            identity = rule("lower", node.op).identity(node)
            for first, count, lanes in segments(size, self.lanes):
                with loop(count, "unroll") as u, loop(lanes, "vectorized") as lane:
                    result[node].put(identity, first + u * lanes + lane)
        return result

    def accumulate(self, stage: int, totals: dict[Node, Any]) -> None:
        """One pass: folds the reductions of a level, puts values aside, writes outputs that are known."""
        domain, evaluator = self.domain, self.evaluator
        keep = [v for v, first in self.to_keep.items() if first == stage]
        for v in keep:
            size: Any = math.prod(a.extent for a in domain.axes if a in domain.reduced) * self.width
            size = expression(size) if isinstance(size, Dim) else max(size, 1)
            evaluator.places[v] = RowBuffer(Scratch(size, compute_dtype(v.dtype)), self, v)
        outputs = [v for v in self.roots(stage) if v in self.sinks and domain.is_full(v)]
        outputs = list(dict.fromkeys(outputs))

        def body(slot: Any) -> None:
            for v in keep:
                place = evaluator.places.pop(v)
                value = let(evaluator.value(v, domain.full_index(v)))
                evaluator.places[v] = place
                evaluator.memo[(v, domain.full_index(v))] = value
                place.put(domain.full_index(v), value)
            found = [let(evaluator.value(n.operands[0], domain.full_index(n.operands[0]))) for n in totals]
            written = [let(evaluator.value(v, domain.full_index(v))) for v in outputs]
            for (node, acc), value in zip(totals.items(), found):
                acc.put(rule("lower", node.op).combine(node, acc[slot], value), slot)
            for v, value in zip(outputs, written):
                self.sinks[v].store(domain.full_index(v), value)

        self.over_row(body)

    def fold(self, node: Node, acc: Any) -> None:
        """The accumulators of a row into the first: by halves, in a fixed order."""
        if self.columns or not self.reduced:
            return
        half = self.lanes * self.unroll // 2
        combine = rule("lower", node.op).combine
        while half:
            with loop(half, "vectorized") as lane:
                acc.put(combine(node, acc[lane], acc[lane + half]), lane)
            half //= 2

    def settle(self, totals: dict[Node, Any]) -> None:
        """Finished reductions become row values."""
        count = math.prod(a.extent for a in self.domain.axes if a in self.domain.reduced)
        for node, acc in totals.items():
            held = Held(Scratch(self.width, compute_dtype(node.result.dtype)), self)

            def body(node: Node = node, acc: Any = acc, held: Held = held) -> None:
                held.put(rule("lower", node.op).finish(node, acc[self.lane], count))

            self.over_lanes(body)
            self.evaluator.places[node.result] = held
            self.invert(node.result)

    def invert(self, v: Value) -> None:
        """Keeps the reciprocal of a row value that later passes divide by."""
        if v not in self.divisors:
            return
        held = Held(Scratch(self.width, compute_dtype(v.dtype)), self)
        one = const(1, compute_dtype(v.dtype))
        self.over_lanes(lambda: held.put(one / self.evaluator.value(v, self.domain.row_index(v))))
        self.evaluator.places[(v, "inverse")] = held

    def hoist(self, level: int) -> None:
        """Computes the row values that are known after a pass and needed later."""
        for v in self.row_values(level):
            held = Held(Scratch(self.width, compute_dtype(v.dtype)), self)

            def body(v: Value = v, held: Held = held) -> None:
                held.put(let(self.evaluator.value(v, self.domain.row_index(v))))

            self.over_lanes(body)
            self.evaluator.places[v] = held
            self.invert(v)

    def store_rows(self) -> None:
        rows = [v for v in self.domain.outputs if not self.domain.is_full(v)]

        def body() -> None:
            values = [let(self.evaluator.value(v, self.domain.row_index(v))) for v in rows]
            for v, value in zip(rows, values):
                self.sinks[v].store(self.domain.row_index(v), value)

        if rows:
            self.over_lanes(body)

    def passes(self) -> None:
        """Everything that is computed for the current row or tile."""
        self.evaluator.places = dict(self.places)
        self.hoist(0)
        for stage in range(1, self.domain.passes + 1):
            totals = self.accumulators(self.domain.reductions(stage))
            self.accumulate(stage, totals)
            for node, acc in totals.items():
                self.fold(node, acc)
            self.settle(totals)
            self.hoist(stage)
        if self.roots(self.domain.passes + 1):
            self.accumulate(self.domain.passes + 1, {})
        self.store_rows()

    # The whole kernel --------------------------------------------------------------------------------------------

    def tile_width(self, cache_bytes: int) -> int:
        """Lanes of a column tile: enough vectors to hide latency, few enough that row buffers stay in cache."""
        width = self.lanes * self.unroll
        folded = hint(math.prod(a.extent for a in self.reduced))
        while self.to_keep and width > self.lanes and folded * width * 4 * len(self.to_keep) > cache_bytes // 2:
            width //= 2
        return max(min(width, self.vector.extent), 1) if isinstance(self.vector.extent, int) else width

    def over_tiles(self, body: Callable[[Any], None], also: int = 1) -> None:
        """`body(step)` for each row or tile, in parallel; with `also` > 1 so many times each (`step` counts them)."""
        rows: Any = math.prod(a.extent for a in self.outer)
        kind = "parallel" if self.parallel else "serial"
        plans: list[tuple[Any, Any, int]] = [(1, 0, 1)]
        if self.columns and isinstance(self.vector.extent, Dim):
            plans = self.dynamic_plans(self.vector.extent)
        elif self.columns:
            extent: Any = self.vector.extent
            tiles, tail = divmod(extent, self.tile)
            plans = [(tiles, 0, self.tile)] * (tiles > 0) + [(1, tiles * self.tile, tail)] * (tail > 0)
        for tiles, start, width in plans:
            self.width = width
            with loop(rows * tiles * also, kind) as p:
                step, p = (let_index(p % also), let_index(p // also)) if also > 1 else (0, p)
                one = isinstance(tiles, int) and tiles == 1
                tile = 0 if one else let_index(trunc_mod(p, tiles) if isinstance(tiles, Dim) else p % tiles)
                row = p if one else let_index(trunc_div(p, tiles) if isinstance(tiles, Dim) else p // tiles)
                bind_flat(self.outer, row)
                self.base = expression(start) + tile * width
                body(step)

    def dynamic_plans(self, extent: Size) -> list[tuple[Any, Any, int]]:
        """(tiles, start, width) that cover a number of columns that is not known: ever narrower tiles."""
        plans: list[tuple[Any, Any, int]] = []
        done: Size = 0
        for width in dict.fromkeys((self.tile, *narrowing(self.lanes))):
            tiles = (extent - done) // width
            if tiles == 0:  # an even number of columns leaves nothing to single ones
                continue
            plans.append((tiles, done, width))
            done = done + tiles * width
        return plans

    def emit(self, cache_bytes: int) -> None:
        self.tile = self.tile_width(cache_bytes) if self.columns else 1
        rows: Any = math.prod(a.extent for a in self.outer)
        steps = rows * (-(-self.vector.extent // self.tile) if self.columns else 1)
        if hint(steps) < 2 * self.threads and self.can_split():
            emit_split(self, steps)
        elif self.parallel and isinstance(self.domain.size, Dim):
            alone_if_small(self, self.domain.size, work_per_element(self.domain.nodes),
                           lambda: self.over_tiles(lambda step: self.passes()))
        else:
            self.over_tiles(lambda step: self.passes())

    def can_split(self) -> bool:
        """One level of reductions and no full output: chunks of a row can be folded apart."""
        return (not is_dynamic(self.domain.size) and self.parallel and self.domain.passes == 1
                and not self.full_outputs() and self.domain.size >= 2 * CHUNK and self.reduced[0].extent > 1)


def let_index(value: Any) -> Any:
    return value if isinstance(value, int) else T.bind(value)


def row_kernel(name: str, signature: Signature, nodes: Sequence[Node], target: Any) -> Any:
    """The PrimFunc of a group with reductions.

    Raises:
        NotAligned: the group cannot be one kernel.
    """
    domain = analyse(nodes, signature.outputs)
    frame = KernelFrame(name, signature)
    with frame.building():
        if any(v.type.size for v in signature.outputs):
            RowKernel(frame, domain, target).emit(target.l2_bytes)
        else:
            T.evaluate(0)
    return frame.function


__all__ = ["RowKernel", "row_kernel", "tirx"]
