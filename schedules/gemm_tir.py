"""A GEMM schedule as TIR: the loops of one product around its register tile (the idea: gemm.py).

Vectors are written as `T.vectorized` loops over scalar expressions, so that the caller's loads and stores, which
know only scalars, become vector code with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ..ir.dims import Dim
from .gemm import GemmConfig, GemmHooks, GemmProblem, GemmTarget, dtype_bits
from .sizes import expressions, is_dynamic, trunc_div, trunc_mod

Index = Any  # int or tirx.PrimExpr
SMALL_BYTES = 2**31 - 1  # above this many elements in one buffer, indices are 64-bit


def build_primfunc(problem: GemmProblem, config: GemmConfig | None, target: GemmTarget, name: str,
                   hooks: GemmHooks | None) -> tirx.PrimFunc:
    """See gemm.gemm_primfunc."""
    hooks = hooks or default_hooks(problem)
    sized = is_dynamic(problem.m, problem.n, problem.k, *problem.batch_a, *problem.batch_b)
    config = config or (None if sized else propose_for(problem, target, hooks))
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tirx.noalias": True})
            for buffer in hooks.params:
                T.arg(buffer.name, buffer)
            if config is None:
                from .gemm_sized import emit_sized
                emit_sized(problem, target, hooks)
            else:
                emit_gemm(problem, config, target, hooks)
    return builder.get()


def propose_for(problem: GemmProblem, target: GemmTarget, hooks: GemmHooks) -> GemmConfig:
    """The proposal, which reads an operand in place only where that is a plain load."""
    from .gemm_propose import propose
    return propose(problem, target, plain_a=hooks.load_a is None, plain_b=hooks.load_b is None)


def default_hooks(problem: GemmProblem) -> GemmHooks:
    a = tirx.decl_buffer(problem.shape_a, problem.dtype_a, name="A")
    b = tirx.decl_buffer(problem.shape_b, problem.dtype_b, name="B")
    c = tirx.decl_buffer(problem.shape_c, problem.out_dtype, name="C")
    return GemmHooks(params=(a, b, c), a=a, b=b, c=c)


def store(hooks: GemmHooks, batch: Sequence[Index], i: Index, j: Index, value: Any) -> None:
    if hooks.store:
        hooks.store(batch, i, j, value)
    else:
        T.buffer_store(hooks.c, convert(value, hooks.c.dtype), [*batch, i, j])


def convert(value: Any, dtype: str) -> Any:
    return value if str(value.ty.dtype) == str(dtype) else T.cast(value, dtype)


def emit_gemm(problem: GemmProblem, config: GemmConfig, target: GemmTarget, hooks: GemmHooks) -> None:
    """Emit the product's loops into the current TIR frame."""
    if not math.prod(problem.shape_c):
        T.evaluate(0)
        return
    if problem.folds:
        hooks = fold_hooks(problem, hooks)
        problem = problem.folded()
    if config.swap:
        problem, hooks = problem.swapped(), swap_hooks(hooks)
    lanes = target.vector_bits // dtype_bits(problem.acc_dtype)
    if problem.k == 0:
        emit_zeros(problem, hooks)
    elif config.kind == "dot":
        from .gemm_dot import DotEmitter
        DotEmitter(problem, config, hooks, lanes).emit()
    else:
        TileEmitter(problem, config, hooks, lanes).emit()


def emit_zeros(problem: GemmProblem, hooks: GemmHooks) -> None:
    with T.serial(math.prod(problem.batch)) as b, T.serial(problem.m) as i, T.serial(problem.n) as j:
        store(hooks, unflatten(b, problem.batch), i, j, tirx.const(0, problem.acc_dtype))


def unflatten(flat: Index, dims: Sequence[int]) -> tuple[Index, ...]:
    """The multi-index of a row-major flat index."""
    index: list[Index] = []
    for dim in reversed(dims):
        if isinstance(dim, Dim):
            index.append(trunc_mod(flat, dim))
            flat = trunc_div(flat, dim)
            continue
        index.append(flat % dim if dim > 1 else 0)
        flat = flat // dim
    return tuple(reversed(index))


def fold_hooks(problem: GemmProblem, hooks: GemmHooks) -> GemmHooks:
    """Hooks of the folded problem: row i of it is row i % m of batch i // m."""
    def split(i: Index) -> tuple[tuple[Index, ...], Index]:
        *batch, row = unflatten(i, (*problem.batch, problem.m)) if isinstance(problem.m, Dim) else (
            *unflatten(i // problem.m, problem.batch), i % problem.m)
        return tuple(batch), row

    la, lb, put = hooks.load_a, hooks.load_b, hooks.store
    batch_b = (0,) * len(problem.batch_b)

    def view(buffer: tirx.Buffer | None, shape: Sequence[int]) -> tirx.Buffer | None:
        sizes = expressions(shape)
        return None if buffer is None else T.decl_buffer(sizes, buffer.dtype, data=buffer.data, layout=None)

    folded = problem.folded()
    return replace(
        hooks, load_a=la and (lambda _, i, k: la(*split(i), k)), load_b=lb and (lambda _, k, j: lb(batch_b, k, j)),
        store=hooks.by_row() if hooks.by_row else put and (lambda _, i, j, value: put(*split(i), j, value)),
        a=view(hooks.a, folded.shape_a), b=view(hooks.b, folded.shape_b), c=view(hooks.c, folded.shape_c))


def swap_hooks(hooks: GemmHooks) -> GemmHooks:
    """Hooks of C^T = op(B)^T op(A)^T."""
    la, lb = hooks.load_a, hooks.load_b
    return replace(
        hooks, a=hooks.b, b=hooks.a,
        load_a=lb and (lambda batch, i, k: lb(batch, k, i)),
        load_b=la and (lambda batch, k, j: la(batch, j, k)),
        store=lambda batch, i, j, value: store(hooks, batch, j, i, value))


@contextmanager
def maybe(condition: Any):
    """`if condition:` around what is emitted; nothing at all for True."""
    if condition is True:
        yield
    else:
        with T.If(condition), T.Then():
            yield


@dataclass
class Where:
    """The place of the current register tile. Row and column starts are those of full tiles moved inside C."""

    batch: tuple[Index, ...]
    tile: Index  # row tile number
    row: Index  # its first row
    panel: Index  # column panel number
    col: Index  # its first column
    slot: Index = 0  # where its rows of A are packed


class Emitter:
    """What tile and dot schedules share: operands as scalar loads, batches, tasks, tiles moved inside the edge."""

    def __init__(self, problem: GemmProblem, config: GemmConfig, hooks: GemmHooks, lanes: int):
        self.p, self.c, self.hooks, self.lanes = problem, config, hooks, lanes
        self.acc_dtype = problem.acc_dtype
        self.rows, self.cols = min(config.tile_rows, problem.m), config.tile_cols
        self.narrow = problem.n < self.cols
        self.tiles = -(-problem.m // self.rows)
        self.panels = -(-problem.n // self.cols)
        self.row_tiles = min(config.row_tiles, self.tiles)
        self.col_panels = min(config.col_panels, self.panels)
        self.pack_tiles = min(config.pack_tiles, self.row_tiles)
        self.row_blocks = -(-self.tiles // self.row_tiles)
        self.col_blocks = -(-self.panels // self.col_panels)
        largest = max(math.prod(shape) for shape in (problem.shape_a, problem.shape_b, problem.shape_c))
        self.index_dtype = "int64" if largest > SMALL_BYTES else "int32"

    # Loops

    def extent(self, n: Index) -> Index:
        return tirx.IntImm(self.index_dtype, n) if isinstance(n, int) else n

    def serial(self, n: Index) -> Any:
        return T.serial(self.extent(n))

    def unroll(self, n: int) -> Any:
        return T.unroll(self.extent(n))

    def vector(self, n: int | None = None) -> Any:
        return T.vectorized(self.extent(self.lanes if n is None else n))

    def tasks(self) -> Any:
        n = math.prod(self.p.batch) * self.col_blocks * self.row_blocks
        return (T.parallel if self.c.parallel and n > 1 else T.serial)(self.extent(n))

    def task(self, t: Index) -> tuple[tuple[Index, ...], Index, Index]:
        """(batch, column block, row block) of a task; neighbours share the column block."""
        blocks = self.col_blocks * self.row_blocks
        return unflatten(t // blocks, self.p.batch), (t % blocks) // self.row_blocks, t % self.row_blocks

    def tile_row(self, tile: Index) -> Index:
        return tile * self.rows if self.p.m % self.rows == 0 else T.min(tile * self.rows, self.p.m - self.rows)

    def panel_col(self, panel: Index) -> Index:
        if self.narrow:
            return 0
        return panel * self.cols if self.p.n % self.cols == 0 else T.min(panel * self.cols, self.p.n - self.cols)

    # Operands

    def a(self, batch: Sequence[Index], i: Index, k: Index) -> Any:
        batch = broadcast_index(batch, self.p.batch_a)
        if self.hooks.load_a:
            return self.hooks.load_a(batch, i, k)
        index = (*batch, k, i) if self.p.transpose_a else (*batch, i, k)
        return self.hooks.a[index]

    def b(self, batch: Sequence[Index], k: Index, j: Index) -> Any:
        batch = broadcast_index(batch, self.p.batch_b)
        if self.hooks.load_b:
            return self.hooks.load_b(batch, k, j)
        index = (*batch, j, k) if self.p.transpose_b else (*batch, k, j)
        return self.hooks.b[index]

    def acc(self, value: Any) -> Any:
        return convert(value, self.acc_dtype)

    def buffer(self, shape: Sequence[int], dtype: str, scope: str = "global") -> tirx.Buffer:
        """Scratch memory, from the thread's workspace pool: TVM takes "local" buffers from it too, which is why
        whatever the inner loop reads must be a typed load (an opaque one might alias the accumulators)."""
        return T.alloc_buffer(tuple(shape), dtype, scope=scope, layout=None)

    # Results

    def accumulators(self) -> list[tirx.Buffer]:
        """The register tile, zeroed: a buffer per row."""
        rows = [self.buffer((self.cols,), self.acc_dtype, "local") for _ in range(self.rows)]
        self.each(lambda r, c: T.buffer_store(rows[r], tirx.const(0, self.acc_dtype), [c]))
        return rows

    def each(self, body: Callable[[int, Index], None]) -> None:
        """Every element of the register tile, in vectors."""
        for r in range(self.rows):
            with self.unroll(self.cols // self.lanes) as v, self.vector() as lane:
                body(r, v * self.lanes + lane)

    def write_tile(self, at: Where, acc: list[tirx.Buffer], stack: tirx.Buffer) -> None:
        """Store what the tile owns of its accumulators. `stack` holds them while a loop stores row after row: an
        epilogue is then compiled once, not for each register."""
        if self.hooks.store is None and self.p.n % self.cols == 0:
            for r in range(self.rows):
                self.write_row(at, r, acc[r], (), 0, self.cols)
        else:
            self.each(lambda r, c: T.buffer_store(stack, acc[r][c], [r, c]))
            with T.attr(0, "compute_scope", "store_tile") if self.hooks.apart else nullcontext():
                self.write_stack(at, stack)
            if self.hooks.apart:  # any statement here: TVM leaves its debug location in the other function
                T.buffer_store(stack, tirx.const(0, stack.dtype), [0, 0])

    def write_stack(self, at: Where, stack: tirx.Buffer) -> None:
        def write_rows(low: int, high: int) -> None:
            with self.serial(self.rows) as r:
                self.write_row(at, r, stack, (r,), low, high)
        if self.p.n <= self.cols or self.p.n % self.cols == 0:
            write_rows(0, min(self.p.n, self.cols))
            return
        with T.If(at.panel < self.panels - 1):
            with T.Then():
                write_rows(0, self.cols)
            with T.Else():
                write_rows(self.panels * self.cols - self.p.n, self.cols)

    def write_row(self, at: Where, r: Index, tile: tirx.Buffer, prefix: tuple[Index, ...], low: int, high: int) -> None:
        """Store columns low...high - 1 of row r, `tile[*prefix, column]`, if the tile owns it."""
        owned = self.p.m % self.rows == 0
        with maybe(owned or at.row + r >= at.tile * self.rows):
            for start in range(0, self.cols, self.lanes):
                first, stop = max(low, start), min(high, start + self.lanes)
                if first >= stop:
                    continue
                with (self.vector() if stop - first == self.lanes else self.serial(stop - first)) as lane:
                    index = (*prefix, first + lane)
                    store(self.hooks, at.batch, at.row + r, at.col + first + lane, tile[index])


def broadcast_index(batch: Sequence[Index], dims: Sequence[int]) -> tuple[Index, ...]:
    """An operand's batch index from C's: right-aligned, 0 where the operand has one."""
    own = batch[len(batch) - len(dims):]
    return tuple(0 if dim == 1 else index for index, dim in zip(own, dims))


class TileEmitter(Emitter):
    """Register tiles of outer products over packed panels."""

    def __init__(self, problem: GemmProblem, config: GemmConfig, hooks: GemmHooks, lanes: int):
        from .gemm_pack import packing
        super().__init__(problem, config, hooks, lanes)
        self.k_blocks = -(-problem.k // min(config.k_block, problem.k))
        self.k_block = problem.k if self.k_blocks == 1 else config.k_block
        self.blocked = self.k_blocks > 1
        self.pack = packing(self)
        assert config.tile_cols % lanes == 0, "tile_cols: a multiple of the vector length"
        assert self.k_blocks == 1 or self.k_block % (2 * lanes) == 0, "k_block: a multiple of two vectors"

    def emit(self) -> None:
        with T.attr(0, "pragma_import_llvm", self.pack.llvm_ir()):
            self.emit_tasks()

    def emit_tasks(self) -> None:
        with self.tasks() as t:
            batch, col_block, row_block = self.task(t)
            self.pack.allocate()
            self.stack = self.buffer((self.rows, self.cols), self.acc_dtype)
            part = None
            if self.blocked:
                shape = (self.row_tiles, self.col_panels, self.rows, self.cols)
                part = self.buffer(shape, self.acc_dtype)
            first_tile, first_panel = row_block * self.row_tiles, col_block * self.col_panels
            tiles = self.count(self.tiles, self.row_tiles, first_tile)
            panels = self.count(self.panels, self.col_panels, first_panel)
            with self.serial(self.k_blocks) as kb:
                k0 = kb * self.k_block if self.blocked else 0
                length = self.count(self.p.k, self.k_block, k0)
                if self.c.pack_b and self.hooks.packed is None:
                    with self.serial(panels) as q:
                        self.pack.pack_b(batch, q, self.panel_col(first_panel + q), k0, length)
                self.emit_tiles(batch, (first_tile, tiles), (first_panel, panels), (kb, k0, length), part)

    def prefetch(self, part: tirx.Buffer, at: tuple[Index, Index]) -> None:
        """Ask for the tile's sums of earlier blocks, which have left the near caches; they are there when K is done."""
        line = 64 // (dtype_bits(self.acc_dtype) // 8)
        with self.unroll(self.rows) as r, self.unroll(max(1, self.cols // line)) as v:
            place = (*at, r, v * line)
            address = T.address_of(part[place])
            T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, *(T.int32(i) for i in (1, 3, 1))))

    def count(self, total: int, block: int, first: Index) -> Index:
        """How many of `total` things fall into the block that starts at `first`."""
        return block if total % block == 0 else T.min(block, total - first)

    def emit_tiles(self, batch: Any, tiles: Any, panels: Any, k: Any, part: tirx.Buffer | None) -> None:
        (first_tile, n_tiles), (first_panel, n_panels) = tiles, panels

        def tile(mi: Index, q: Index, slot: Index = 0) -> None:
            tile, panel = first_tile + mi, first_panel + q
            at = Where(batch, tile, self.tile_row(tile), panel, self.panel_col(panel), slot)
            self.emit_tile(at, mi, q, k, part)

        if self.c.pack_a:
            group = self.pack_tiles
            with self.serial((n_tiles + group - 1) // group) as g:
                first = g * group
                count = 1 if group == 1 else T.min(group, n_tiles - first)
                self.pack.pack_a(batch, lambda i: self.tile_row(first_tile + first + i), k[1], k[2], count)
                with self.serial(count) as slot, self.serial(n_panels) as q:
                    tile(first + slot, q, slot)
        elif self.c.order == "rows":
            with self.serial(n_panels) as q, self.serial(n_tiles) as mi:
                tile(mi, q)
        else:
            with self.serial(n_tiles) as mi, self.serial(n_panels) as q:
                tile(mi, q)

    def emit_tile(self, at: Where, mi: Index, q: Index, k: Any, part: tirx.Buffer | None) -> None:
        kb, k0, length = k
        if part is not None:
            self.prefetch(part, (mi, q))
        acc = self.accumulators()
        self.pack.multiply(acc, at, q, k0, length)
        if part is None:
            self.write_tile(at, acc, self.stack)
            return
        with T.If(kb > 0), T.Then():
            self.each(lambda r, c: T.buffer_store(acc[r], acc[r][c] + part[mi, q, r, c], [c]))
        with T.If(kb < self.k_blocks - 1):
            with T.Then():
                self.each(lambda r, c: T.buffer_store(part, acc[r][c], [mi, q, r, c]))
            with T.Else():
                self.write_tile(at, acc, self.stack)
