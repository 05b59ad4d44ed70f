"""The loops of fused attention (the idea: attention.py) around the register tiles of gemm_tir."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ..ir.graph import Value
from . import math as functions
from .attention import AttentionConfig, AttentionProblem
from .gemm import GemmConfig, GemmHooks, GemmProblem
from .gemm_tir import SMALL_BYTES, Index, TileEmitter, Where, broadcast_index, maybe, unflatten
from .lower_anchors import Epilogue
from .lower_slots import const, hide, let, read
from .sizes import expression, is_dynamic

STREAMS = 4  # rows that a pass over scores walks along at once: hides the latency of max, + and exp


def build_primfunc(problem: AttentionProblem, config: AttentionConfig, target: Any, name: str, epilogue: Epilogue,
                   operands: Sequence[Value]) -> tirx.PrimFunc:
    """The PrimFunc with the parameters of the epilogue."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tirx.noalias": True})
            for buffer in epilogue.params:
                T.arg(buffer.name, buffer)
            if is_dynamic(problem.queries, problem.keys, *problem.lead):
                from .attention_sized import emit_sized
                emit_sized(problem, config, target, epilogue, operands)
            else:
                AttentionEmitter(problem, config, target, epilogue, operands).emit()
    return builder.get()


class ValueTiles(TileEmitter):
    """P V of one block of queries. `owned(row)`: whether this block is the one to store a row."""

    owned: Callable[[Index], Any]

    def write_row(self, at: Where, r: Index, tile: tirx.Buffer, prefix: tuple[Index, ...], low: int, high: int) -> None:
        with maybe(self.owned(at.row + r)):
            super().write_row(at, r, tile, prefix, low, high)


class AttentionEmitter:
    """Blocks of queries and of keys are numbered from 0; the last block of queries is moved back to end with the
    last query, and stores only what no other block owns."""

    def __init__(self, problem: AttentionProblem, config: AttentionConfig, target: Any, epilogue: Epilogue,
                 operands: Sequence[Value]):
        q, k, v = self.take(problem, config, target, epilogue, operands)
        narrow = problem.dtype != self.dtype
        self.qk = TileEmitter(
            problem.scores(), GemmConfig(tile_rows=config.tile_rows, tile_cols=config.score_vectors * self.lanes,
                                         col_panels=config.key_panels, pack_a=narrow, dot_bf16=config.dot_bf16),
            GemmHooks((), a=q, b=k), self.lanes)
        self.keys = self.qk.col_panels * self.qk.cols  # of a block
        self.key_blocks = -(-problem.keys // self.keys)
        self.many = self.key_blocks > 1
        self.pad = self.qk.cols if self.many else 0  # where the last panel, moved back, may reach
        self.pv = ValueTiles(*self.value_product(), GemmHooks((), b=v, load_a=self.load_score, store=self.store),
                             self.lanes)
        self.pv.owned = self.owned
        self.blocks = -(-problem.queries // self.rows)
        self.group = -(-self.blocks // config.groups)  # blocks of queries of a task
        self.groups = -(-self.blocks // self.group)
        shapes = [buffer.shape for buffer in epilogue.params]
        if max(math.prod(int(n) for n in shape) for shape in shapes) > SMALL_BYTES:
            self.qk.index_dtype = self.pv.index_dtype = "int64"
        else:
            self.qk.index_dtype = self.pv.index_dtype = "int32"
        self.serial, self.vector = self.pv.serial, self.pv.vector

    def take(self, problem: AttentionProblem, config: AttentionConfig, target: Any, epilogue: Epilogue,
             operands: Sequence[Value]) -> list[Any]:
        """Notes what is computed; gives the buffers of queries, keys and values."""
        self.p, self.c, self.epilogue = problem, config, epilogue
        q, k, v, *mask = (epilogue.buffer(x) for x in operands)
        self.mask: Any = mask[0] if mask else None
        self.mask_dtype = str(operands[3].dtype) if mask else ""
        self.mask_shape = tuple(operands[3].shape) if mask else ()
        if self.mask_dtype == "bool":  # TVM takes vectors of bool apart, not those of bytes
            self.mask = T.decl_buffer(mask[0].shape, "uint8", data=mask[0].data, align=1)
        self.dtype = problem.acc_dtype
        self.lanes = target.vector_bits // (64 if self.dtype == "float64" else 32)
        self.rows = config.rows
        return [q, k, v]

    def value_product(self) -> tuple[GemmProblem, GemmConfig]:
        """The product P V of a block of queries and one of keys."""
        p = self.p
        product = GemmProblem(self.rows, p.values, self.keys, batch_b=p.lead_v, dtype_a=self.dtype, dtype_b=p.dtype,
                              out_dtype=self.dtype)
        return product, GemmConfig(tile_rows=self.c.tile_rows, col_panels=1 << 30,
                                   tile_cols=self.c.value_vectors * self.lanes)

    def load_score(self, _batch: Any, i: Index, k: Index) -> Any:
        return self.scores[i, self.pad + k]

    # Tasks

    def emit(self) -> None:
        with T.attr(0, "pragma_import_llvm", self.qk.pack.llvm_ir()):
            tasks = math.prod(self.p.lead) * self.groups
            self.emit_tasks((T.parallel if self.c.parallel and tasks > 1 else T.serial)(self.qk.extent(tasks)))

    def emit_tasks(self, loop: Any) -> None:
        several = not (isinstance(self.groups, int) and self.groups == 1)
        with loop as t:
            self.batch = unflatten(t // self.groups, self.p.lead)
            group = t % self.groups if several else 0
            if self.p.causal and several:  # early groups see few keys: pair each with a late one
                group = let_index(T.if_then_else(group % 2 == 0, group // 2, self.groups - 1 - group // 2))
            self.allocate()
            self.first = group * self.group
            count = self.pv.count(self.blocks, self.group, self.first)
            if self.many:
                self.clear(count)
            with self.serial(self.key_blocks) as block:
                self.k0 = block * self.keys if self.many else 0
                length = self.pv.count(self.p.keys, self.keys, self.k0) if self.many else expression(self.p.keys)
                if self.p.causal:
                    length = let_index(T.min(length, (self.first + count) * self.rows - self.k0))
                with maybe(length > 0 if self.may_be_blind else True):
                    self.over_queries(block, count, length)
            if self.many:
                self.finish(count)

    @property
    def may_be_blind(self) -> bool:
        """Whether queries may see nothing of a block of keys."""
        return self.p.causal and self.many

    def allocate(self) -> None:
        buffer, rows = self.pv.buffer, self.rows
        self.allocate_panels()
        self.scores = buffer((rows, self.pad + self.keys), self.dtype)
        self.stack = buffer((self.pv.rows, self.pv.cols), self.dtype)
        self.shift, self.factor = buffer((rows,), self.dtype), buffer((rows,), self.dtype)
        if self.many:
            self.peak = buffer((self.group, rows), self.dtype)
            self.total = buffer((self.group, rows), self.dtype)
            self.part = buffer((self.group, rows, self.pv.panels, self.pv.cols), self.dtype)

    def allocate_panels(self) -> None:
        self.qk.pack.allocate()
        self.pv.pack.allocate()

    def clear(self, count: Index) -> None:
        with self.serial(count) as b, self.serial(self.rows) as r:
            T.buffer_store(self.peak, self.const(-math.inf), [b, r])
            T.buffer_store(self.total, self.const(0), [b, r])
            with self.serial(self.pv.panels) as q, self.serial(self.pv.cols // self.lanes) as v, self.vector() as lane:
                T.buffer_store(self.part, self.const(0), [b, r, q, v * self.lanes + lane])

    def over_queries(self, block: Index, count: Index, length: Index) -> None:
        """Everything for one block of keys: packs what the group sees of it, then goes from queries to queries."""
        self.pack(block, length)
        panel = block * self.qk.col_panels
        with self.serial(count) as b:
            self.place(b)
            self.visible = length
            if self.p.causal:
                self.visible = let_index(T.min(length, self.q0 + self.rows - self.k0))
            with maybe(self.visible > 0 if self.may_be_blind else True):
                self.emit_scores(panel)
                self.emit_mask()
                with self.serial(self.rows // self.streams) as s:
                    self.emit_softmax(b, s * self.streams)
                self.emit_values(b)

    def pack(self, block: Index, length: Index) -> None:
        """Packs what the group sees of a block of keys, and their values."""
        qk, pv = self.qk, self.pv
        with self.serial(ceil_div(length, qk.cols)) as q:
            qk.pack.pack_b(self.batch, q, qk.panel_col(block * qk.col_panels + q), 0, self.p.features)
        with self.serial(pv.panels) as q:
            pv.pack.pack_b(self.batch, q, pv.panel_col(q), self.k0, length)

    def place(self, b: Index) -> None:
        """Goes to block b of the group."""
        self.start = (self.first + b) * self.rows
        self.q0 = self.start if self.p.queries % self.rows == 0 else \
            let_index(T.min(self.start, self.p.queries - self.rows))

    def owned(self, row: Index) -> Any:
        return True if self.p.queries % self.rows == 0 else self.q0 + row >= self.start

    def store(self, batch: Sequence[Index], i: Index, j: Index, value: Any) -> None:
        self.epilogue.store((*batch, self.q0 + i, j), value)

    def const(self, value: float) -> Any:
        return const(value, self.dtype)

    # Scores

    def emit_scores(self, panel: Index) -> None:
        """scores[row, pad + key] = Q K^T * scale, in whole panels."""
        qk, scale = self.qk, self.const(self.p.scale)
        panels = ceil_div(self.visible, qk.cols)

        def tile(mi: Index, q: Index) -> None:
            row, col = mi * qk.rows, qk.panel_col(panel + q)
            at = Where(self.batch, mi, self.q0 + row, panel + q, col)
            acc = qk.accumulators()
            qk.pack.multiply(acc, at, q, 0, self.p.features)
            here = self.pad + col - self.k0
            qk.each(lambda r, c: T.buffer_store(self.scores, acc[r][c] * scale, [row + r, here + c]))

        if not qk.c.pack_a:
            with self.serial(panels) as q, self.serial(self.c.tiles) as mi:
                tile(mi, q)
            return
        with self.serial(self.c.tiles) as mi:
            qk.pack.pack_a(self.batch, lambda _: self.q0 + mi * qk.rows, 0, self.p.features)
            with self.serial(panels) as q:
                tile(mi, q)

    def emit_mask(self) -> None:
        if self.mask is None:
            return

        def apply(r: Index, key: Index) -> None:
            index = broadcast_index((*self.batch, self.q0 + r, self.k0 + key), self.mask_shape)
            score, seen = self.scores[r, self.pad + key], self.mask[tuple(index) or (0,)]
            value = tirx.Select(seen != const(0, "uint8"), score, self.const(-math.inf)) if self.mask_dtype == "bool" \
                else score + read(seen, self.mask_dtype)
            T.buffer_store(self.scores, value, [r, self.pad + key])

        whole = self.visible // self.lanes
        with self.serial(self.rows) as r:
            with self.serial(whole) as v, self.vector() as lane:
                apply(r, v * self.lanes + lane)
            if not isinstance(self.visible, int) or self.visible % self.lanes:
                with self.serial(self.visible - whole * self.lanes) as key:
                    apply(r, whole * self.lanes + key)

    # Softmax

    @property
    def streams(self) -> int:
        return next(n for n in (STREAMS, 3, 5, 2, 1) if self.rows % n == 0)

    def accumulators(self, value: float) -> list[Any]:
        rows = [T.alloc_buffer((self.lanes,), self.dtype) for _ in range(self.streams)]
        for row in rows:
            with self.vector() as lane:
                T.buffer_store(row, self.const(value), [lane])
        return rows

    def fold(self, rows: Sequence[Any], combine: Callable[[Any, Any], Any]) -> None:
        """Each accumulator into its first lane, by halves."""
        half = self.lanes // 2
        while half:
            for row in rows:
                with self.vector(half) as lane:
                    T.buffer_store(row, combine(row[lane], row[lane + half]), [lane])
            half //= 2

    def emit_softmax(self, b: Index, row: Index) -> None:
        """Scores of `streams` rows become exp(score - peak); sets their shift and factor (see `settle`)."""
        peaks = self.accumulators(-math.inf)
        vectors = ceil_div(self.visible, self.lanes)
        whole = self.visible // self.lanes
        if self.p.causal:  # what the first query of the block sees, all see
            whole = let_index(T.max(T.min((self.q0 + 1 - self.k0) // self.lanes, whole), 0))
        with self.serial(whole) as v:
            for r, peak in enumerate(peaks):
                with self.vector() as lane:
                    score = self.scores[row + r, self.pad + v * self.lanes + lane]
                    T.buffer_store(peak, tirx.Max(peak[lane], score), [lane])
        if not (isinstance(vectors, int) and vectors == whole):
            with self.serial(vectors - whole) as v:
                for r, peak in enumerate(peaks):
                    self.emit_edge(row + r, (whole + v) * self.lanes, peak)
        self.fold(peaks, tirx.Max)
        for r, peak in enumerate(peaks):
            self.set_shift(b, row + r, peak[0])
        sums = self.accumulators(0)
        with self.serial(vectors) as v:
            for r, total in enumerate(sums):
                with self.vector() as lane:
                    key = self.pad + v * self.lanes + lane
                    weight = let(functions.exp(self.scores[row + r, key] - self.shift[row + r]))
                    T.buffer_store(self.scores, weight, [row + r, key])
                    T.buffer_store(total, total[lane] + weight, [lane])
        self.fold(sums, lambda x, y: x + y)
        for r, total in enumerate(sums):
            self.settle(b, row + r, total[0])

    def emit_edge(self, row: Index, key: Index, peak: Any) -> None:
        """A vector of which a row may see only some keys: the others are -inf from here on."""
        seen = self.visible
        if self.p.causal:
            seen = let_index(T.min(seen, self.q0 + row + 1 - self.k0))
        with self.vector() as lane:
            score = tirx.Select(key + lane < seen, self.scores[row, self.pad + key + lane], self.const(-math.inf))
            score = let(score)
            T.buffer_store(self.scores, score, [row, self.pad + key + lane])
            T.buffer_store(peak, tirx.Max(peak[lane], score), [lane])

    def set_shift(self, b: Index, row: Index, peak: Any) -> None:
        """What is subtracted from the scores of a row: their peak so far, 0 for a row that saw nothing."""
        none = self.const(-math.inf)
        if self.many:
            before = let(self.peak[b, row])
            peak = let(tirx.Max(before, peak))
            T.buffer_store(self.peak, peak, [b, row])
            T.buffer_store(self.shift, tirx.Select(peak == none, self.const(0), peak), [row])
            T.buffer_store(self.factor, functions.exp(before - self.shift[row]), [row])
        else:
            peak = let(peak)
            T.buffer_store(self.shift, tirx.Select(peak == none, self.const(0), peak), [row])

    def settle(self, b: Index, row: Index, total: Any) -> None:
        """`factor`: what O of this row is multiplied with, the reciprocal of the sum if all keys are one block."""
        if self.many:
            T.buffer_store(self.total, self.total[b, row] * self.factor[row] + total, [b, row])
        else:
            T.buffer_store(self.factor, self.reciprocal(let(total)), [row])

    def reciprocal(self, total: Any) -> Any:
        return self.const(1) / tirx.Select(total == self.const(0), self.const(1), total)

    # Values

    def emit_values(self, b: Index) -> None:
        pv = self.pv
        with self.serial(pv.panels) as q, self.serial(self.c.tiles) as mi:
            row = mi * pv.rows
            at = Where(self.batch, mi, row, q, pv.panel_col(q))
            acc = pv.accumulators()
            pv.pack.multiply(acc, at, q, 0, self.visible)
            if not self.many:
                pv.each(lambda r, c: T.buffer_store(self.stack, acc[r][c] * self.factor[row + r], [r, c]))
                pv.write_stack(at, self.stack)
            else:
                pv.each(lambda r, c: T.buffer_store(
                    self.part, self.part[b, row + r, q, c] * self.factor[row + r] + acc[r][c], [b, row + r, q, c]))

    def finish(self, count: Index) -> None:
        """Stores O / sum after the last block of keys."""
        pv = self.pv
        with self.serial(count) as b:
            self.place(b)
            with self.serial(self.rows) as r:
                T.buffer_store(self.factor, self.reciprocal(let(self.total[b, r])), [r])
            with self.serial(pv.panels) as q, self.serial(self.c.tiles) as mi:
                row = mi * pv.rows
                at = Where(self.batch, mi, row, q, pv.panel_col(q))
                pv.each(lambda r, c: T.buffer_store(
                    self.stack, self.part[b, row + r, q, c] * self.factor[row + r], [r, c]))
                pv.write_stack(at, self.stack)


def ceil_div(n: Index, by: int) -> Index:
    return (n + by - 1) // by


def let_index(value: Index) -> Index:
    if isinstance(value, int):
        return value
    # TVM follows a variable to what it is bound to, which takes seconds where sizes are unknown (and so 64-bit).
    return T.bind(hide(value) if str(value.ty.dtype) == "int64" else value)



