"""Matrix multiplication: what is multiplied, how it is tiled, and which tiling to take.

    C[batch..., M, N] = epilogue(op(A)[batch..., M, K] @ op(B)[batch..., K, N])

The schedule is Goto and van de Geijn's ("Anatomy of High-Performance Matrix Multiplication", TOMS 2008) with
two changes. Every task packs for itself, so one parallel region does everything and nothing crosses threads.
And A is read where it lies unless its layout forbids it: only B is always copied into panels.

    task = (batch, block of row tiles, block of column panels)          one iteration of the parallel loop
      for each block of k_block steps along K                           a panel of B then stays in the L2 cache
        pack the panels of B                                            [panel, k, tile_cols]
        for each row tile, for each panel (or the other way round)      `order`
          tile_rows x tile_cols accumulators, held in registers over the whole K block

Tiles are always full. The last tile of an edge is moved back until it fits, and stores only what no other
tile owns; so inner loops have no guards and no read is out of bounds.

A one- or few-row product with B stored transposed is a set of dot products instead (`kind="dot"`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ..ir.errors import DTypeError, ShapeError

FLOAT_BITS = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16, "float8_e4m3fn": 8, "float8_e5m2": 8}
INT_BITS = {f"{sign}int{bits}": bits for sign in ("", "u") for bits in (8, 16, 32, 64)}


class GemmTarget(Protocol):
    """What a GEMM asks of a target (see target.py)."""

    vector_bits: int
    threads: int
    tvm_target: Any

    def has(self, feature: str) -> bool: ...


def dtype_bits(dtype: str) -> int:
    bits = FLOAT_BITS.get(dtype) or INT_BITS.get(dtype)
    if bits is None:
        raise DTypeError(f"matmul of {dtype} is not defined; cast the operands to a float or integer type first")
    return bits


@dataclass(frozen=True)
class GemmProblem:
    """One (batched) product. `batch_a` and `batch_b` broadcast by NumPy's rules; A is stored
    [batch_a..., M, K], or [batch_a..., K, M] if `transpose_a`; B [batch_b..., K, N] or [batch_b..., N, K].

    Floats of 16 bits and less accumulate in float32. Integers accumulate in `out_dtype`."""

    m: int
    n: int
    k: int
    transpose_a: bool = False
    transpose_b: bool = False
    batch_a: tuple[int, ...] = ()
    batch_b: tuple[int, ...] = ()
    dtype_a: str = "float32"
    dtype_b: str = "float32"
    out_dtype: str = "float32"

    def __post_init__(self) -> None:
        for dtype in (self.dtype_a, self.dtype_b, self.out_dtype):
            dtype_bits(dtype)
        _ = self.batch  # raises if the batch dimensions do not broadcast

    @property
    def batch(self) -> tuple[int, ...]:
        """The batch dimensions of C."""
        pairs = itertools.zip_longest(reversed(self.batch_a), reversed(self.batch_b), fillvalue=1)
        dims = []
        for x, y in pairs:
            if x != y and 1 not in (x, y):
                raise ShapeError(f"matmul: batch dimensions {self.batch_a} and {self.batch_b} do not broadcast")
            dims.append(y if x == 1 else x)
        return tuple(reversed(dims))

    @property
    def shape_a(self) -> tuple[int, ...]:
        return (*self.batch_a, *((self.k, self.m) if self.transpose_a else (self.m, self.k)))

    @property
    def shape_b(self) -> tuple[int, ...]:
        return (*self.batch_b, *((self.n, self.k) if self.transpose_b else (self.k, self.n)))

    @property
    def shape_c(self) -> tuple[int, ...]:
        return (*self.batch, self.m, self.n)

    @property
    def acc_dtype(self) -> str:
        """The type products are summed in, and that the epilogue receives."""
        operands = (self.dtype_a, self.dtype_b)
        if "float64" in (*operands, self.out_dtype):
            return "float64"
        if any(dtype in FLOAT_BITS for dtype in operands):
            return "float32"
        return self.out_dtype if self.out_dtype in INT_BITS else "int64"

    @property
    def flops(self) -> int:
        return 2 * math.prod(self.batch) * self.m * self.n * self.k

    def swapped(self) -> GemmProblem:
        """The same product written as C^T = op(B)^T op(A)^T."""
        return replace(self, m=self.n, n=self.m, transpose_a=not self.transpose_b,
                       transpose_b=not self.transpose_a, batch_a=self.batch_b, batch_b=self.batch_a,
                       dtype_a=self.dtype_b, dtype_b=self.dtype_a)

    @property
    def folds(self) -> bool:
        """Whether the batch of A is just more rows: B is shared and A lies row by row."""
        return bool(self.batch_a) and math.prod(self.batch_b) == 1 and not self.transpose_a \
            and len(self.batch_b) <= len(self.batch_a)

    def folded(self) -> GemmProblem:
        return replace(self, m=self.m * math.prod(self.batch_a), batch_a=(), batch_b=())


@dataclass(frozen=True)
class GemmConfig:
    """A schedule of one product.

    kind:        "tile" (register tiles of outer products) or "dot" (vectors along K; B stored transposed)
    tile_rows:   rows of A in a register tile
    tile_cols:   columns of B in a register tile: a multiple of the vector length
    k_block:     steps along K between which accumulators are put aside; K or more: never
    row_tiles:   row tiles per task
    col_panels:  column panels per task
    order:       "rows" (a panel stays, row tiles pass by) or "panels" (a row tile stays, panels pass by)
    pack_a:      copy row tiles of A before use (they then serve all panels of the task: implies "panels")
    pack_tiles:  row tiles copied at once. A transposed A is read along m, in runs of so many tiles' rows
    pack_b:      copy B into panels (else it is read in place, for one row tile)
    dot_bf16:    multiply bfloat16 pairs with the machine's instruction (AVX512_BF16)
    swap:        compute C^T = op(B)^T op(A)^T
    parallel:    False for products too small to wake a second thread
    """

    kind: str = "tile"
    tile_rows: int = 12
    tile_cols: int = 32
    k_block: int = 1 << 30
    row_tiles: int = 1 << 30
    col_panels: int = 1
    order: str = "rows"
    pack_a: bool = False
    pack_tiles: int = 1
    pack_b: bool = True
    dot_bf16: bool = False
    swap: bool = False
    parallel: bool = True


@dataclass(frozen=True)
class GemmHooks:
    """Where a kernel's numbers come from and go to; the buffers are the caller's (`tvm.tirx.decl_buffer`).

    params:  all buffers of the PrimFunc, in order
    a, b, c: the buffers of operands and result, in the problem's stored shapes; needed where there is no hook
    load_a:  (batch, i, k) -> element of op(A); batch indexes A's own batch dimensions. All are scalars, also
             inside vector loops (along k, or along i if A is transposed)
    load_b:  (batch, k, j) -> element of op(B)
    packed:  B in panels already (gemm_pack.panels_of); with `pack_b` nothing is copied then
    store:   (batch, i, j, value) emits the stores of one element; value is of `acc_dtype`, batch indexes C's

    again:   the stores of an element may run twice (none reads what it wrote)
    by_row:  gives the `store` of a product whose batch is folded into its rows; default: the row's number is split

    apart:   compile the stores of a tile as a function of their own. For a store that computes much, whose constants
             would otherwise take registers from the accumulators (gelu behind a product: four times slower)

    A load hook gives elements of `dtype_a` / `dtype_b` and may be called several times for one element, so it is
    best cheap. A store is called exactly once for each element, and so may update a buffer that it reads.
    """

    params: Sequence[Any]
    a: Any = None
    b: Any = None
    c: Any = None
    load_a: Callable[..., Any] | None = None
    load_b: Callable[..., Any] | None = None
    store: Callable[..., None] | None = None
    apart: bool = False
    again: bool = False
    by_row: Callable[[], Callable[..., None]] | None = None
    packed: Any = None


def gemm_primfunc(problem: GemmProblem, config: GemmConfig | None, target: GemmTarget, name: str = "gemm",
                  hooks: GemmHooks | None = None) -> Any:
    """The PrimFunc of one product, named `name`, ready to be built for `target.tvm_target`.

    Without hooks its parameters are (A, B, C) with shapes `problem.shape_a`, `.shape_b`, `.shape_c` and dtypes
    `dtype_a`, `dtype_b`, `out_dtype`; C is the sum cast to `out_dtype`. With hooks the parameters are
    `hooks.params` and C is written by `hooks.store` (see GemmHooks). K = 0 stores zeros; an empty C stores nothing.
    `config=None` takes `propose(problem, target)`.
    """
    from .gemm_tir import build_primfunc
    return build_primfunc(problem, config, target, name, hooks)


def propose(problem: GemmProblem, target: GemmTarget) -> GemmConfig:
    """The schedule taken when nothing was measured: see gemm_propose.py."""
    from .gemm_propose import propose as proposed
    return proposed(problem, target)


def candidates(problem: GemmProblem, target: GemmTarget) -> Iterator[GemmConfig]:
    """Schedules worth measuring, the proposed one first."""
    from .gemm_propose import candidates as generated
    return generated(problem, target)
