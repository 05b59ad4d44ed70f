"""Packing for the register tile, and the multiplication that reads what was packed.

A panel of B is [step, tile_cols]: the inner loop reads it front to back. B stored transposed is turned by register
transposes, L x L elements at a time. A tile of A is packed [tile_rows, k] if A lies row by row, and [step, tile_rows]
if it lies transposed: both are copied by vectors.

A step is one k, or two for instructions that multiply pairs of 16-bit elements: a pair (k, k+1) then is
one 32-bit word, and an odd K is completed by zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from . import gemm_llvm
from .gemm import dtype_bits
from .sizes import expression

if TYPE_CHECKING:
    from .gemm_tir import Index, TileEmitter, Where

    RowOf = Callable[[Index], Index]


def panels_of(b: np.ndarray, cols: int) -> np.ndarray:
    """B (K, N), known while compiling, as [panel, K, cols]. The last panel is moved back until it fits; where N is less
    than a panel, zeros follow."""
    n = b.shape[1]
    if n < cols:
        return np.ascontiguousarray(np.pad(b, ((0, 0), (0, cols - n))))[None]
    return np.stack([b[:, min(first, n - cols):][:, :cols] for first in range(0, n, cols)])


def packing(emitter: TileEmitter) -> Packing:
    if emitter.c.dot_bf16:
        from .gemm_bf16 import PairPacking
        return PairPacking(emitter)
    return Packing(emitter)


class Packing:
    """Operands in the type they are multiplied in, one k per step."""

    def __init__(self, emitter: TileEmitter):
        self.e, self.lanes = emitter, emitter.lanes
        self.dtype = emitter.acc_dtype  # of a packed element
        self.steps = emitter.k_block
        self.panel: Any = None  # buffers, once allocated
        self.tile: Any = None
        self.staged: Any = None

    def llvm_ir(self) -> str:
        return gemm_llvm.transpose_ir(self.lanes, dtype_bits(self.dtype))

    def allocate(self) -> None:
        e = self.e
        if e.c.pack_b and e.hooks.packed is None:
            self.panel = e.buffer((e.col_panels, self.steps, e.cols), self.dtype)
        if e.c.pack_a:
            self.tile = e.buffer(self.tile_shape(), self.dtype)
        if e.c.pack_b and e.p.transpose_b and e.hooks.packed is None:
            self.staged = e.buffer((self.lanes, self.lanes), self.dtype, "local")

    def tile_shape(self) -> tuple[int, int, int]:
        e = self.e
        # Rows a multiple of 4 KB apart would share their sets of the L1 cache: one more vector between them.
        padded = -(-self.steps // self.lanes) * self.lanes + self.lanes
        return (e.pack_tiles, *((self.steps, e.rows) if e.p.transpose_a else (e.rows, padded)))

    # B

    def b(self, batch: Any, k: Index, j: Index) -> Any:
        return self.e.acc(self.e.b(batch, k, j))

    def pack_b(self, batch: Any, q: Index, col: Index, k0: Index, length: Index) -> None:
        """Copy columns col... of rows k0...k0+length-1 into panel q."""
        e = self.e
        if e.narrow:
            self.pack_b_narrow(batch, q, k0, length)
        elif not e.p.transpose_b:
            with e.serial(length) as k, e.unroll(e.cols // self.lanes) as v, e.vector() as lane:
                c = v * self.lanes + lane
                T.buffer_store(self.panel, self.b(batch, k0 + k, col + c), [q, k, c])
        elif e.k_blocks == 1 and e.p.k >= self.lanes:
            self.pack_b_transposed(batch, q, col, k0, length)
        else:
            with T.If(length >= self.lanes):
                with T.Then():
                    self.pack_b_transposed(batch, q, col, k0, length)
                with T.Else():
                    with e.serial(length) as k, e.serial(e.cols) as c:
                        T.buffer_store(self.panel, self.b(batch, k0 + k, col + c), [q, k, c])

    def pack_b_narrow(self, batch: Any, q: Index, k0: Index, length: Index) -> None:
        """B has fewer columns than a panel: the others are zero."""
        e = self.e
        with e.serial(length) as k, e.serial(e.cols) as c:
            T.buffer_store(self.panel, T.if_then_else(
                c < e.p.n, self.b(batch, k0 + k, T.min(c, e.p.n - 1)), tirx.const(0, self.dtype)), [q, k, c])

    def pack_b_transposed(self, batch: Any, q: Index, col: Index, k0: Index, length: Index) -> None:
        """By squares of L x L; the last one along K is moved back until it fits, and repeats some of its neighbour."""
        e, lanes = self.e, self.lanes
        with e.serial((length + lanes - 1) // lanes) as kb, e.unroll(e.cols // lanes) as v:
            k = T.min(kb * lanes, length - lanes)
            self.transpose(self.panel, (q, k, v * lanes), batch, k0 + k, col + v * lanes)

    def transpose(self, panel: tirx.Buffer, at: Any, batch: Any, k: Index, j: Index) -> None:
        """panel[at: L rows, L columns] = op(B)[k.., j..], read along K."""
        e, lanes, size = self.e, self.lanes, dtype_bits(self.dtype) // 8
        if e.hooks.load_b is None and e.p.dtype_b == self.dtype:
            source, stride = e.b(batch, k, j), e.p.k
        else:
            with e.unroll(lanes) as row, e.vector() as lane:
                T.buffer_store(self.staged, self.b(batch, k + lane, j + row), [row, lane])
            source, stride = self.staged[0, 0], lanes
        call_transpose(lanes, size * 8, panel[at], e.cols * size, source, stride * size)

    # A

    def a(self, batch: Any, i: Index, k: Index) -> Any:
        return self.e.acc(self.e.a(batch, i, k))

    def pack_a(self, batch: Any, row: RowOf, k0: Index, length: Index, count: Index = 1) -> None:
        """Copy `count` tiles of A; `row(i)` is the first row of tile i."""
        e, lanes = self.e, self.lanes
        if e.p.transpose_a:
            with e.serial(length) as k, e.serial(count) as i, e.vector(e.rows) as r:
                T.buffer_store(self.tile, self.a(batch, row(i) + r, k0 + k), [i, k, r])
            return
        with e.serial(count) as i, e.serial(e.rows) as r:
            with e.serial(length // lanes) as kb, e.vector() as lane:
                k = kb * lanes + lane
                T.buffer_store(self.tile, self.a(batch, row(i) + r, k0 + k), [i, r, k])
            if not (isinstance(length, int) and length % lanes == 0):
                done = length // lanes * lanes
                with e.serial(length - done) as k:
                    T.buffer_store(self.tile, self.a(batch, row(i) + r, k0 + done + k), [i, r, done + k])

    # The register tile

    def multiply(self, acc: list[tirx.Buffer], at: Where, q: Index, k0: Index, length: Index) -> None:
        """acc[r][c] += sum over k of A[row + r, k] * B[k, col + c]."""
        e = self.e

        def multiply_add(k: Index, r: int, c: Index) -> None:
            a = self.a(at.batch, at.row + r, k0 + k) if not e.c.pack_a else \
                self.tile[at.slot, k, r] if e.p.transpose_a else self.tile[at.slot, r, k]
            b = e.hooks.packed[at.panel, k0 + k, c] if e.hooks.packed is not None else \
                self.panel[q, k, c] if e.c.pack_b else self.b(at.batch, k0 + k, at.col + c)
            T.buffer_store(acc[r], acc[r][c] + a * b, [c])

        with e.serial(length) as k:
            e.each(lambda r, c: multiply_add(k, r, c))


def call_transpose(lanes: int, bits: int, dst: Any, dst_stride: int, src: Any, src_stride: int) -> None:
    """Strides are in bytes."""
    name = gemm_llvm.TRANSPOSE.format(bits=bits, lanes=lanes)
    T.evaluate(T.call_extern("void", name, T.address_of(dst), T.int64(dst_stride), T.address_of(src),
                             T.int64(src_stride) if isinstance(src_stride, int) else expression(src_stride)))
