"""Reductions of few, long rows: folded in chunks by many threads, then the chunks.

The number of chunks depends on the shape alone, so that results do not change with the number of threads.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from ..ir.graph import Node, Value
from ..ir.opdef import rule
from .loops import loop
from .loops_eval import InMemory
from .lower_slots import cast, compute_dtype, const

CHUNK = 16_384       # elements of a chunk
MOST_CHUNKS = 64


class Scratch:
    """A buffer of the kernel's own, in a compute dtype; bools are bytes in it."""

    def __init__(self, size: Any, dtype: str):
        self.is_bool = dtype == "bool"
        self.buffer = T.alloc_buffer((size,), "int8" if self.is_bool else dtype)

    def __getitem__(self, at: Any) -> Any:
        element = self.buffer[at]
        return element != const(0, "int8") if self.is_bool else element

    def put(self, value: Any, at: Any) -> None:
        T.buffer_store(self.buffer, cast(value, "int8") if self.is_bool else value, [at])


class Split:
    """How the rows of a `RowKernel` are cut along their first reduced axis: `count` chunks, the last of `rest`."""

    def __init__(self, kernel: Any, steps: int):
        self.kernel = kernel
        axis = kernel.reduced[0]
        unit = kernel.lanes * kernel.unroll if axis is kernel.vector else 1
        chunks = min(kernel.domain.size // CHUNK // max(steps, 1), MOST_CHUNKS, axis.extent // unit)
        self.chunks = max(chunks, 1)
        self.length = axis.extent // self.chunks // unit * unit
        self.rest = axis.extent - self.chunks * self.length
        self.count = self.chunks + (self.rest > 0)
        self.nodes: list[Node] = kernel.domain.reductions(1)
        self.partial = {n: Scratch(self.count * kernel.domain.rows, compute_dtype(n.result.dtype))
                        for n in self.nodes}

    def place(self, v: Value, chunk: Any) -> Any:
        """Where the partial result of the current row lies."""
        kernel = self.kernel
        return chunk * kernel.domain.rows + InMemory(v, None, kernel.wide).offset(kernel.domain.row_index(v))

    def part(self, chunk: Any, start: Any, extent: int) -> None:
        """Folds one chunk of the current row or tile."""
        kernel = self.kernel
        kernel.evaluator.places = dict(kernel.places)
        kernel.hoist(0)
        kernel.chunk = (start, extent)
        totals = kernel.accumulators(self.nodes)
        kernel.accumulate(1, totals)
        kernel.chunk = None
        for node, total in totals.items():
            kernel.fold(node, total)
            self.keep(node, total, chunk)

    def keep(self, node: Node, total: Scratch, chunk: Any) -> None:
        kernel = self.kernel
        kernel.over_lanes(lambda: self.partial[node].put(total[kernel.lane], self.place(node.result, chunk)))

    def finish(self, step: Any) -> None:
        """Folds the chunks of the current row or tile, in order, and stores what follows from them."""
        kernel = self.kernel
        kernel.evaluator.places = dict(kernel.places)
        kernel.hoist(0)
        totals = {n: Scratch(kernel.width, compute_dtype(n.result.dtype)) for n in self.nodes}
        for node, total in totals.items():
            self.gather(node, total)
        kernel.settle(totals)
        kernel.hoist(1)
        kernel.store_rows()

    def gather(self, node: Node, total: Scratch) -> None:
        kernel, partial = self.kernel, self.partial[node]
        combine = rule("lower", node.op).combine
        kernel.over_lanes(lambda: total.put(partial[self.place(node.result, 0)], kernel.lane))
        with loop(self.count - 1) as c:
            kernel.over_lanes(lambda: total.put(
                combine(node, total[kernel.lane], partial[self.place(node.result, c + 1)]), kernel.lane))


def emit_split(kernel: Any, steps: int) -> None:
    """Writes the kernel; `steps`: its rows or tiles."""
    split = Split(kernel, steps)
    kernel.over_tiles(lambda chunk: split.part(chunk, chunk * split.length, split.length), also=split.chunks)
    if split.rest:
        kernel.over_tiles(lambda step: split.part(split.chunks, split.chunks * split.length, split.rest))
    kernel.parallel = False
    kernel.over_tiles(split.finish)
