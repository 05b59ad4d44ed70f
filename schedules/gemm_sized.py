"""Products whose sizes are known only when they run.

The loops are those of gemm_tir. What they take for granted, that a register tile fits into C, is asked at run time: a
kernel holds a schedule for a tile of full size, chosen for the expected sizes, and others for results with fewer rows
or columns than that. An unknown K is always cut into blocks, of which there may be one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from . import gemm_llvm
from .gemm import GemmConfig, GemmHooks, GemmProblem, GemmTarget, dtype_bits
from .gemm_dot import DotEmitter
from .gemm_propose import SERIAL_FLOPS
from .gemm_tir import Emitter, Index, TileEmitter, Where, fold_hooks, maybe, store, swap_hooks
from .lower_slots import hide
from .sizes import expression, hint, hinted, is_dynamic, trunc_div

LEAST = 64    # sizes that a schedule for large products is chosen for
K_BLOCK = 384
FEW = 4       # rows of the tile for results with fewer rows than the full tile
UNBLOCKED = 1 << 30


class Sized(Emitter):
    """An emitter of a product with unknown sizes. `rows` and `cols` fit into C where its code runs, but with `narrow`
    C has fewer columns than the tile."""

    def __init__(self, problem: GemmProblem, config: GemmConfig, hooks: GemmHooks, lanes: int, narrow: bool):
        self.p, self.c, self.hooks, self.lanes, self.narrow = problem, config, hooks, lanes, narrow
        self.acc_dtype = problem.acc_dtype
        self.index_dtype = "int64"
        self.rows, self.cols = config.tile_rows, config.tile_cols
        self.tiles = (problem.m + (self.rows - 1)) // self.rows
        self.panels = 1 if narrow else (problem.n + (self.cols - 1)) // self.cols
        self.row_tiles = min(config.row_tiles, max(hint(self.tiles), 1))
        self.col_panels = min(config.col_panels, max(hint(self.panels), 1))
        self.pack_tiles = min(config.pack_tiles, self.row_tiles)
        self.row_blocks = (self.tiles + (self.row_tiles - 1)) // self.row_tiles
        self.col_blocks = (self.panels + (self.col_panels - 1)) // self.col_panels

    def extent(self, n: Index) -> Index:
        return tirx.IntImm("int64", n) if isinstance(n, int) else expression(n)

    def settle(self) -> None:
        """Binds the numbers of tiles and blocks to variables of the kernel."""
        for name in ("tiles", "panels", "row_blocks", "col_blocks", "k_blocks"):
            if is_dynamic(count := getattr(self, name, 1)):
                setattr(self, name, bound(count))

    def emit_tasks(self) -> None:
        self.settle()
        super().emit_tasks()  # type: ignore[misc]

    def task(self, t: Index) -> tuple[tuple[Index, ...], Index, Index]:
        batch, col_block, row_block = super().task(t)
        return tuple(bound(i) for i in batch), bound(col_block), bound(row_block)

    def tasks(self) -> Any:
        count: Any = 1
        for n in (*self.p.batch, self.col_blocks, self.row_blocks):
            count = count * n
        return (T.parallel if self.c.parallel else T.serial)(self.extent(count))

    def write_stack(self, at: Where, stack: tirx.Buffer) -> None:
        if not is_dynamic(self.p.n):
            super().write_stack(at, stack)
            return
        with self.serial(self.rows) as r:
            if self.narrow:
                self.write_row(at, r, stack, (r,), 0, self.p.n)
            elif self.hooks.again:
                self.write_row(at, r, stack, (r,), 0, self.cols)
            else:
                with T.If(at.panel < self.panels - 1):
                    with T.Then():
                        self.write_row(at, r, stack, (r,), 0, self.cols)
                    with T.Else():
                        self.write_row(at, r, stack, (r,), self.panels * self.cols - self.p.n, self.cols)

    def write_row(self, at: Where, r: Index, tile: tirx.Buffer, prefix: tuple[Index, ...], low: Any, high: Any) -> None:
        if not is_dynamic(low, high):
            super().write_row(at, r, tile, prefix, low, high)
            return
        owned = self.p.m % self.rows == 0
        with maybe(owned or at.row + r >= at.tile * self.rows), self.serial(high - low) as c:
            index = (*prefix, expression(low) + c)
            store(self.hooks, at.batch, at.row + r, at.col + index[-1], tile[index])


def bound(value: Any) -> Any:
    """A number or size as a variable that TVM does not look behind (it would put a division wherever it is used)."""
    return value if isinstance(value, int) else T.bind(hide(expression(value)))


class SizedTiles(Sized, TileEmitter):
    """Register tiles."""

    def __init__(self, problem: GemmProblem, config: GemmConfig, hooks: GemmHooks, lanes: int, narrow: bool):
        from .gemm_pack import packing
        super().__init__(problem, config, hooks, lanes, narrow)
        self.k_block = config.k_block
        if is_dynamic(problem.k):
            self.blocked = config.pack_b or config.pack_a
            count = tirx.max(trunc_div(expression(problem.k) + (self.k_block - 1), self.k_block), 1)
            self.k_blocks: Any = count if self.blocked else 1
            self.k_block = config.k_block if self.blocked else problem.k
        else:
            self.k_blocks = -(-problem.k // min(config.k_block, problem.k))
            self.k_block = problem.k if self.k_blocks == 1 else config.k_block
            self.blocked = self.k_blocks > 1
        self.pack = packing(self)


class SizedDot(Sized, DotEmitter):
    """Dot products, for few rows."""


def emit_sized(problem: GemmProblem, target: GemmTarget, hooks: GemmHooks) -> None:
    """Emit the product's loops into the current TIR frame."""
    if problem.folds:
        hooks = fold_hooks(problem, hooks)
        problem = problem.folded()
    lanes = target.vector_bits // dtype_bits(problem.acc_dtype)
    if not is_dynamic(problem.n) and problem.n < lanes and (is_dynamic(problem.m) or problem.m >= lanes):
        problem, hooks = problem.swapped(), swap_hooks(hooks)
    main = proposed(problem, target, hooks)
    variants = [(main, True), *((few_rows(problem, main, r, lanes), False) for r in rows_below(problem, main))]
    emitters = [e for config, full in variants for e in versions(problem, config, hooks, lanes, full)]
    with T.attr(0, "pragma_import_llvm", imports(emitters)):
        choose(emitters)


def proposed(problem: GemmProblem, target: GemmTarget, hooks: GemmHooks) -> GemmConfig:
    """The schedule for large products, from the expected sizes."""
    from .gemm_propose import propose

    def large(n: Any) -> int:
        return max(hint(n), LEAST) if is_dynamic(n) else n

    expected = replace(problem, m=large(problem.m), n=large(problem.n), k=large(problem.k),
                       batch_a=hinted(problem.batch_a), batch_b=hinted(problem.batch_b))
    config = propose(expected, target, hooks.load_a is None, hooks.load_b is None)
    if config.kind == "dot":
        return config
    if is_dynamic(problem.k):
        k_block = config.k_block if config.k_block < UNBLOCKED else K_BLOCK
        config = replace(config, k_block=k_block, dot_bf16=False, pack_a=config.pack_a or config.dot_bf16)
    return replace(config, swap=False, parallel=True)


def rows_below(problem: GemmProblem, main: GemmConfig) -> list[int]:
    """Rows of the tiles for results that the full tile does not fit into."""
    if not is_dynamic(problem.m):
        return []
    return [r for r in ((1,) if is_dynamic(problem.n) else (FEW, 1)) if r < main.tile_rows]


def few_rows(problem: GemmProblem, main: GemmConfig, rows: int, lanes: int) -> GemmConfig:
    """The schedule of a tile with few rows: B is read where it lies."""
    batch: Any = 1
    for n in problem.batch:
        batch = batch * n
    parallel = hint(batch * problem.n * problem.k) * rows * 2 > SERIAL_FLOPS
    if problem.transpose_b and not problem.transpose_a:
        return GemmConfig(kind="dot", tile_rows=rows, tile_cols=lanes, parallel=parallel)
    vectors = max(1, min(4, hint(problem.n) // lanes))
    return GemmConfig(tile_rows=rows, tile_cols=vectors * lanes, k_block=main.k_block, pack_b=problem.transpose_b,
                      dot_bf16=main.dot_bf16, parallel=parallel)


def versions(problem: GemmProblem, config: GemmConfig, hooks: GemmHooks, lanes: int, full: bool) -> list[Any]:
    """Emitters of a schedule: for results with enough columns, and for narrower ones."""
    kind = SizedDot if config.kind == "dot" else SizedTiles
    hooks = hooks if full else replace(hooks, apart=False)
    if not is_dynamic(problem.m):
        config = replace(config, tile_rows=min(config.tile_rows, problem.m))
    if not is_dynamic(problem.n):
        return [kind(problem, config, hooks, lanes, problem.n < config.tile_cols)]
    narrow = config if config.kind == "dot" else replace(config, pack_b=True)
    return [kind(problem, config, hooks, lanes, False),
            kind(problem, narrow, replace(hooks, apart=False), lanes, True)]


def imports(emitters: Sequence[Any]) -> str:
    """The LLVM functions that the emitters call, each once."""
    texts = [e.pack.llvm_ir() if isinstance(e, TileEmitter)
             else gemm_llvm.transpose_ir(e.lanes, dtype_bits(e.acc_dtype)) for e in emitters]
    parts: dict[str, None] = {}
    for text in texts:
        for part in text.split("\n\n"):
            parts[part.strip("\n")] = None
    return max(texts, key=len) if len(set(texts)) <= 2 else "\n\n".join(parts)


def choose(emitters: Sequence[Any]) -> None:
    """The first emitter whose tile fits."""
    *first, last = emitters
    with ExitStack() as nest:
        for emitter in first:
            p, conditions = emitter.p, []
            if is_dynamic(p.m) and emitter.rows > 1:
                conditions.append(expression(p.m) >= emitter.rows)
            if is_dynamic(p.n) and not emitter.narrow:
                conditions.append(expression(p.n) >= emitter.cols)
            branch = T.If(conditions[0] if len(conditions) == 1 else tirx.And(*conditions))
            nest.enter_context(branch)
            with T.Then():
                emitter.emit_tasks()
            nest.enter_context(T.Else())
        last.emit_tasks()
