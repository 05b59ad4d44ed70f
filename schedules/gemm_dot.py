"""Few rows times a transposed B: C[i, j] is a dot product of two rows in memory, so the vectors lie along K.

Packing B would cost more than multiplying it. L columns (L: the vector length) make one task; each element of C
has an accumulator of L partial sums. An L x L transposition then turns "sum the lanes of each of L vectors" into "sum
L vectors", whose lanes are L neighbouring columns of C: the epilogue sees the same vectors as that of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from . import gemm_llvm
from .gemm import dtype_bits
from .gemm_pack import call_transpose
from .gemm_tir import Emitter, Index, Where

COLUMNS = 4  # accumulated together: more rows of B in flight than this confuse the prefetcher


class DotEmitter(Emitter):
    """tile_rows dot products with each of L columns at once."""

    def emit(self) -> None:
        bits = dtype_bits(self.acc_dtype)
        with T.attr(0, "pragma_import_llvm", gemm_llvm.transpose_ir(self.lanes, bits)):
            self.emit_tasks()

    def emit_tasks(self) -> None:
        assert self.cols == self.lanes, "a dot schedule reduces L columns at once"
        with self.tasks() as t:
            batch, col_block, row_block = self.task(t)
            self.sums = self.buffer((self.rows, self.lanes, self.lanes), self.acc_dtype)  # [row, column, lane]
            self.stack = self.buffer((self.rows, self.cols), self.acc_dtype)
            with self.serial(self.col_panels) as q, self.serial(self.row_tiles) as mi:
                # Counts divide or the last block repeats its neighbour's... so each block is clipped to what exists.
                panel, tile = col_block * self.col_panels + q, row_block * self.row_tiles + mi
                with T.If(T.And(panel < self.panels, tile < self.tiles)), T.Then():
                    self.emit_panel(Where(batch, tile, self.tile_row(tile), panel, self.panel_col(panel)))

    def emit_panel(self, at: Where) -> None:
        lanes, sums, result = self.lanes, self.sums, self.stack
        turned = self.buffer((lanes, lanes), self.acc_dtype, "local")  # [lane, column]
        group = min(COLUMNS, lanes)
        with self.serial(lanes // group) as g:
            self.accumulate(at, sums, g * group, group)
        size = dtype_bits(self.acc_dtype) // 8
        with self.serial(self.rows) as r:
            call_transpose(lanes, size * 8, turned[0, 0], lanes * size, sums[r, 0, 0], lanes * size)
            with self.vector() as lane:
                T.buffer_store(result, tree_sum([turned[i, lane] for i in range(lanes)]), [r, lane])
            self.add_rest(at, result, r)
        self.write_stack(at, result)

    def column(self, at: Where, c: Index) -> Index:
        return T.min(c, self.p.n - 1) if self.narrow else at.col + c

    def accumulate(self, at: Where, sums: tirx.Buffer, first: Index, group: int) -> None:
        """sums[r, first + c, lane] = sum over k = lane mod L of A[r, k] * B[k, first + c]."""
        lanes = self.lanes
        acc = self.buffer((self.rows, group, lanes), self.acc_dtype, "local")
        zero = tirx.const(0, self.acc_dtype)
        with self.unroll(self.rows) as r, self.unroll(group) as c, self.vector() as lane:
            T.buffer_store(acc, zero, [r, c, lane])
        with self.serial(self.p.k // lanes) as kb, self.unroll(group) as c, self.unroll(self.rows) as r:
            with self.vector() as lane:
                k = kb * lanes + lane
                product = self.acc(self.a(at.batch, at.row + r, k)) * \
                    self.acc(self.b(at.batch, k, self.column(at, first + c)))
                T.buffer_store(acc, acc[r, c, lane] + product, [r, c, lane])
        with self.unroll(self.rows) as r, self.unroll(group) as c, self.vector() as lane:
            T.buffer_store(sums, acc[r, c, lane], [r, first + c, lane])

    def add_rest(self, at: Where, result: tirx.Buffer, r: Index) -> None:
        """The last K % L products of each column."""
        rest = self.p.k % self.lanes
        if rest:
            with self.serial(self.lanes) as c, self.serial(rest) as s:
                k = self.p.k - rest + s
                product = self.acc(self.a(at.batch, at.row + r, k)) * \
                    self.acc(self.b(at.batch, k, self.column(at, c)))
                T.buffer_store(result, result[r, c] + product, [r, c])


def tree_sum(values: Sequence[Any]) -> Any:
    while len(values) > 1:
        values = [x + y for x, y in zip(values[::2], values[1::2])]
    return values[0]
