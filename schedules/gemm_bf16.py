"""Products of bfloat16 by pairs: the machine multiplies (k, k+1) at once and sums in float32.

A step of the packed panels is two k. The pair is one 32-bit word, the even k in its low half; B and a
transposed A interleave two of their rows, and what lies along K already holds its pairs. An odd K is completed by a
pair with a zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tvm import tirx
from tvm.tirx.script import builder as T

from . import gemm_llvm
from .gemm_pack import Packing, call_transpose

if TYPE_CHECKING:
    from .gemm_pack import RowOf
    from .gemm_tir import Index, TileEmitter, Where


class PairPacking(Packing):
    """Pairs along K as 32-bit words, one pair per step."""

    def __init__(self, emitter: TileEmitter):
        super().__init__(emitter)
        self.dtype, self.steps = "uint32", (emitter.k_block + 1) // 2
        self.odd = emitter.p.k % 2 == 1
        self.words: Any = None
        self.pairs_of_a: Any = None  # A itself, where whole pairs lie along its rows

    def llvm_ir(self) -> str:
        return gemm_llvm.transpose_ir(self.lanes, 32) + gemm_llvm.dot_bf16_ir(self.lanes)

    def allocate(self) -> None:
        e = self.e
        if e.c.pack_b:
            self.panel = e.buffer((e.col_panels, self.steps, e.cols), self.dtype)
        else:
            self.words = e.buffer((e.cols,), self.dtype, "local")
        if e.c.pack_a:
            self.tile = e.buffer(self.tile_shape(), self.dtype)
        elif e.hooks.load_a is None and not e.p.transpose_a and not self.odd:
            shape = (*e.p.shape_a[:-1], e.p.k // 2)
            self.pairs_of_a = T.decl_buffer(shape, self.dtype, data=e.hooks.a.data, layout=None)
        if e.c.pack_b and e.p.transpose_b:
            self.staged = e.buffer((self.lanes, 2 * self.lanes), "uint16", "local")

    def a(self, batch: Any, i: Index, k: Index) -> Any:
        return bits_of(self.e.a(batch, i, k), computed=self.e.hooks.load_a is not None)

    def b(self, batch: Any, k: Index, j: Index) -> Any:
        return bits_of(self.e.b(batch, k, j), computed=self.e.hooks.load_b is not None)

    def each_step(self, length: Index, body: Callable[[Index, bool], None]) -> None:
        """body(step, whole): whole pairs in a loop, then the half pair of an odd K."""
        with self.e.serial(length // 2) as s:
            body(s, True)
        if self.odd and isinstance(length, int):
            body(length // 2, False)
        elif self.odd:
            with T.If(length % 2 == 1), T.Then():
                body(length // 2, False)

    # B

    def pair_b(self, batch: Any, k: Index, j: Index, whole: bool) -> Any:
        return pair(self.b(batch, k, j), self.b(batch, k + 1, j) if whole else None)

    def pack_b(self, batch: Any, q: Index, col: Index, k0: Index, length: Index) -> None:
        e, lanes = self.e, self.lanes
        if e.narrow:
            self.pack_b_narrow(batch, q, k0, length)
        elif not e.p.transpose_b:
            def copy(s: Index, whole: bool) -> None:
                with e.unroll(e.cols // lanes) as v, e.vector() as lane:
                    c = v * lanes + lane
                    T.buffer_store(self.panel, self.pair_b(batch, k0 + 2 * s, col + c, whole), [q, s, c])
            self.each_step(length, copy)
        elif e.k_blocks == 1 and e.p.k >= 2 * lanes:
            self.pack_b_transposed(batch, q, col, k0, length)
        else:
            with T.If(length >= 2 * lanes):
                with T.Then():
                    self.pack_b_transposed(batch, q, col, k0, length)
                with T.Else():
                    self.each_step(length, lambda s, whole: self.pack_b_step(batch, q, col, k0, s, whole))

    def pack_b_step(self, batch: Any, q: Index, col: Index, k0: Index, s: Index, whole: bool) -> None:
        with self.e.serial(self.e.cols) as c:
            T.buffer_store(self.panel, self.pair_b(batch, k0 + 2 * s, col + c, whole), [q, s, c])

    def pack_b_narrow(self, batch: Any, q: Index, k0: Index, length: Index) -> None:
        n, zero = self.e.p.n, tirx.const(0, self.dtype)

        def copy(s: Index, whole: bool) -> None:
            with self.e.serial(self.e.cols) as c:
                value = self.pair_b(batch, k0 + 2 * s, T.min(c, n - 1), whole)
                T.buffer_store(self.panel, T.if_then_else(c < n, value, zero), [q, s, c])
        self.each_step(length, copy)

    def pack_b_transposed(self, batch: Any, q: Index, col: Index, k0: Index, length: Index) -> None:
        e, lanes, pairs = self.e, self.lanes, length // 2
        with e.serial((pairs + lanes - 1) // lanes) as kb, e.unroll(e.cols // lanes) as v:
            s, j = T.min(kb * lanes, pairs - lanes), col + v * lanes
            if e.hooks.load_b is None:
                source, stride = e.b(batch, k0 + 2 * s, j), e.p.k
            else:
                with e.unroll(lanes) as row, e.vector(2 * lanes) as lane:
                    T.buffer_store(self.staged, self.b(batch, k0 + 2 * s + lane, j + row), [row, lane])
                source, stride = self.staged[0, 0], 2 * lanes
            call_transpose(lanes, 32, self.panel[q, s, v * lanes], e.cols * 4, source, stride * 2)
        if self.odd:
            with self.maybe_last(length):
                self.pack_b_step(batch, q, col, k0, pairs, False)

    def maybe_last(self, length: Index) -> Any:
        from .gemm_tir import maybe
        return maybe(True if isinstance(length, int) else length % 2 == 1)

    # A

    def pack_a(self, batch: Any, row: RowOf, k0: Index, length: Index, count: Index = 1) -> None:
        e, lanes = self.e, self.lanes

        def word(i: Index, r: Index, s: Index, whole: bool) -> Any:
            k = k0 + 2 * s
            return pair(self.a(batch, row(i) + r, k), self.a(batch, row(i) + r, k + 1) if whole else None)

        def copy_step(s: Index, whole: bool) -> None:
            with e.serial(count) as i, e.vector(e.rows) as r:
                T.buffer_store(self.tile, word(i, r, s, whole), [i, s, r])

        if e.p.transpose_a:
            self.each_step(length, copy_step)
            return
        pairs = length // 2
        with e.serial(count) as i, e.serial(e.rows) as r:
            with e.serial(pairs // lanes) as sb, e.vector() as lane:
                T.buffer_store(self.tile, word(i, r, sb * lanes + lane, True), [i, r, sb * lanes + lane])
            with e.serial(pairs % lanes) as s:
                done = pairs // lanes * lanes
                T.buffer_store(self.tile, word(i, r, done + s, True), [i, r, done + s])
            if self.odd:
                with self.maybe_last(length):
                    T.buffer_store(self.tile, word(i, r, pairs, False), [i, r, pairs])

    def pair_a(self, at: Where, r: Index, k0: Index, s: Index, whole: bool) -> Any:
        e, k = self.e, k0 + 2 * s
        if e.c.pack_a:
            return self.tile[at.slot, s, r] if e.p.transpose_a else self.tile[at.slot, r, s]
        if self.pairs_of_a is not None:
            from .gemm_tir import broadcast_index
            index = (*broadcast_index(at.batch, e.p.batch_a), at.row + r, k0 // 2 + s)
            return self.pairs_of_a[index]
        return pair(self.a(at.batch, at.row + r, k), self.a(at.batch, at.row + r, k + 1) if whole else None)

    # The register tile

    def multiply(self, acc: list[tirx.Buffer], at: Where, q: Index, k0: Index, length: Index) -> None:
        e, lanes = self.e, self.lanes

        def step(s: Index, whole: bool) -> None:
            if not e.c.pack_b:
                with e.unroll(e.cols // lanes) as v, e.vector() as lane:
                    c = v * lanes + lane
                    T.buffer_store(self.words, self.pair_b(at.batch, k0 + 2 * s, at.col + c, whole), [c])
            name = gemm_llvm.DOT_BF16.format(lanes=lanes)
            for r in range(e.rows):
                with e.unroll(e.cols // lanes) as v:
                    c = T.ramp(v * lanes, 1, lanes)
                    b = self.panel[q, s, c] if e.c.pack_b else self.words[c]
                    a = T.broadcast(self.pair_a(at, r, k0, s, whole), lanes)
                    T.buffer_store(acc[r], T.call_extern(f"float32x{lanes}", name, acc[r][c], a, b), [c])
        self.each_step(length, step)


def bits_of(value: Any, computed: bool) -> Any:
    """The 16 bits of a bfloat16. TVM computes bfloat16 in float32 and drops the roundings in between, so the rounding
    of a computed value is spelled out: to nearest, ties to even, NaN stays NaN."""
    if not computed:
        return T.reinterpret("uint16", value)

    def word(x: int) -> Any:
        return tirx.const(x, "uint32")
    single = T.cast(value, "float32")
    bits = T.reinterpret("uint32", single)
    rounded = (bits + word(0x7FFF) + ((bits >> word(16)) & word(1))) >> word(16)
    return T.cast(T.Select(single == single, rounded, word(0x7FC0)), "uint16")


def pair(low: Any, high: Any = None) -> Any:
    """Two bfloat16, as bits, in one word; without `high` its half is zero."""
    word = T.cast(low, "uint32")
    return word if high is None else word | (T.cast(high, "uint32") << tirx.const(16, "uint32"))
