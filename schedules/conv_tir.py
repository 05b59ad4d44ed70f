"""Building blocks shared by the convolution kernels: guards, flat views, tile transposition, weight packing.

Everything here emits into the current `tvm.script.ir_builder` frame.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from .sizes import expression

LLVM_TYPES = {"float32": "float", "float64": "double", "bfloat16": "bfloat", "float16": "half", "uint16": "i16"}
BYTES = {"uint16": 2, "float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


def _long(extent):
    return tirx.const(extent, "int64") if isinstance(extent, int) else T.cast(expression(extent), "int64")


def opaque(index):
    """The same int64, but its range unknown to TVM, which otherwise narrows indices to int32 again.

    Where LLVM loses track of overflow, 32-bit indices cost a sign extension for every element of a tile.
    """
    shift = tirx.const(1 << 40, "int64")  # the code generator does not take a reinterpreted literal 0
    return T.reinterpret("int64", T.reinterpret("uint64", T.cast(expression(index), "int64") + shift)) - shift


# Loops over int64: no tensor is too large.


def serial(extent):
    return T.serial(_long(extent))


def parallel(extent):
    return T.parallel(_long(extent))


def unroll(first, stop=None):
    return T.unroll(_long(first)) if stop is None else T.unroll(_long(first), _long(stop))


def vectorized(extent):
    return T.vectorized(_long(extent))


class Registers:
    """One row of a register tile: `vectors` accumulators inside a shared buffer.

    TVM takes "local" buffers from a heap pool; LLVM turns them into registers because its alias information tells the
    types of TVM's loads apart.  So whatever an inner loop reads must be a plain typed load.
    """

    def __init__(self, buffer, first, wide: int):
        self.buffer, self.first, self.wide = buffer, first, wide

    def __getitem__(self, element):
        return self.buffer[self.first + element]

    def get(self, v):
        return self.buffer[T.ramp(self.first + v * self.wide, 1, self.wide)]

    def set(self, v, value) -> None:
        T.buffer_store(self.buffer, value, [T.ramp(self.first + v * self.wide, 1, self.wide)])


def accumulators(count: int, vectors: int, wide: int, dtype: str) -> list[Registers]:
    """`count` zeroed rows of a register tile."""
    buffer = T.alloc_buffer((count * vectors * wide,), dtype, scope="local")
    with unroll(count * vectors) as i:
        T.buffer_store(buffer, T.broadcast(tirx.const(0.0, dtype), wide), [T.ramp(i * wide, 1, wide)])
    return [Registers(buffer, i * vectors * wide, wide) for i in range(count)]


@contextmanager
def each_task(count: Any, threads: int) -> Iterator:
    """A parallel loop in at most 16 chunks a thread: the tasks of a chunk share their scratch buffers."""
    if not isinstance(count, int):
        count = T.bind(expression(count))
    if threads == 1:
        with serial(count) as task:
            yield task
        return
    if not isinstance(count, int):
        chunks = T.bind(T.min(count, tirx.const(16 * threads, "int64")))
        with parallel(chunks) as chunk:
            first = T.bind(tirx.truncdiv(chunk * count, chunks))
            with serial(tirx.truncdiv((chunk + 1) * count, chunks) - first) as i:
                yield first + i
        return
    chunks = min(count, 16 * threads)
    if chunks == count:
        with parallel(count) as task:
            yield task
    else:
        with parallel(chunks) as chunk:
            first = chunk * count // chunks
            with serial((chunk + 1) * count // chunks - first) as i:
                yield first + i


@contextmanager
def when(condition) -> Iterator[None]:
    """Emit the body under `condition`; None or True means always."""
    if condition is None or condition is True:
        yield
    else:
        with T.If(condition), T.Then():
            yield


def flat(buffer):
    """The same memory as a vector, so that a kernel can do its own address arithmetic."""
    shape = [int(n) if isinstance(n, (int, tirx.IntImm)) else n for n in buffer.shape]
    return T.decl_buffer((math.prod(shape),), buffer.dtype, data=buffer.data)


def within(index, extent: Any):
    """0 <= index < extent, as one unsigned comparison would; an expression."""
    return T.And(index >= 0, index < extent)


def tap_range(axis, q):
    """(first tap, number of taps) that read inside the input at output position `q` of an `AxisTaps`.

    Loop bounds rather than a branch per tap: around the accumulators, branches cost LLVM registers.
    """
    if axis.bounded:
        return 0, axis.taps
    at, last, step = q * axis.in_stride + axis.offset(0), axis.in_extent - 1, abs(axis.offset_step)
    low, high = (-at, last - at) if axis.offset_step > 0 else (at - last, at)  # of tap * step
    first = T.max(0, (low + step - 1) // step)
    return first, T.max(0, T.min(axis.taps, high // step + 1) - first)


def _lesser(x, y):
    """min(x, y) of numbers and sizes."""
    return min(x, y) if isinstance(x, int) and isinstance(y, int) else T.min(_long(x), _long(y))


def row_parts(axis, first, count: int) -> Iterator[tuple[Any, Any, list[int]]]:
    """A row of outputs in parts, as (start, length, taps that read inside): the one where all of the taps `first ..
    first + count` do, and for each tap what is left. Lengths are expressions where sizes are not known."""
    spans = [axis.valid(first + j) for j in range(count)]
    low = max(start for start, _ in spans)
    high = functools.reduce(_lesser, (stop for _, stop in spans))
    high = max(low, high) if isinstance(high, int) else T.bind(T.max(expression(high), tirx.const(low, "int64")))
    parts = [(low, high, list(range(count)))]
    for j, (start, stop) in enumerate(spans):
        parts += [(start, _lesser(stop, low), [j]), (high, stop, [j])]
    for start, stop, taps in parts:
        length = stop - start
        if not isinstance(length, int):
            yield start, T.max(length, tirx.const(0, "int64")), taps
        elif length > 0:
            yield start, length, taps


@dataclass(frozen=True)
class Transpose:
    """dst[j, i] = cast(src[i, j]) for a tile of `lanes` squared, as log2(lanes) rounds of two-source shuffles.

    A `dst_dtype` of uint16 keeps the bits of a 16-bit source.

    LLVM IR, because TIR has no such shuffle that its code generator keeps in registers.
    """

    lanes: int
    src_dtype: str
    dst_dtype: str

    @property
    def name(self) -> str:
        return f"treadle_transpose_{self.lanes}_{LLVM_TYPES[self.src_dtype]}_{LLVM_TYPES[self.dst_dtype]}"

    def llvm(self) -> str:
        n, dst = self.lanes, LLVM_TYPES[self.dst_dtype]
        src = dst if self.dst_dtype == "uint16" else LLVM_TYPES[self.src_dtype]
        lines, rows = [], []
        for i in range(n):
            lines += [f"%o{i} = mul i64 %ss, {i}", f"%p{i} = getelementptr {src}, ptr %src, i64 %o{i}",
                      f"%l{i} = load <{n} x {src}>, ptr %p{i}, align {BYTES[self.src_dtype]}"]
            if src != dst:
                lines.append(f"%c{i} = fpext <{n} x {src}> %l{i} to <{n} x {dst}>")
            rows.append(f"%l{i}" if src == dst else f"%c{i}")
        distance = 1
        while distance < n:
            rows = _shuffle_round(rows, distance, dst, lines)
            distance *= 2
        for i in range(n):
            lines += [f"%d{i} = mul i64 %ds, {i}", f"%q{i} = getelementptr {dst}, ptr %dst, i64 %d{i}",
                      f"store <{n} x {dst}> {rows[i]}, ptr %q{i}, align {BYTES[self.dst_dtype]}"]
        body = "\n".join(lines)
        return f"define void @{self.name}(ptr %dst, i64 %ds, ptr %src, i64 %ss) alwaysinline {{\n{body}\nret void\n}}\n"

    def emit(self, dst, dst_stride, src, src_stride) -> None:
        """`dst`, `src`: buffer elements at the tiles' corners; strides in elements between rows."""
        T.evaluate(T.call_extern("void", self.name, T.address_of(dst), _long(dst_stride), T.address_of(src),
                                 _long(src_stride)))


def _shuffle_round(rows: list[str], distance: int, element: str, lines: list[str]) -> list[str]:
    """One butterfly round: rows `i` and `i + distance` exchange their off-diagonal blocks."""
    n, result = len(rows), [""] * len(rows)
    low = [k if not k & distance else n + (k ^ distance) for k in range(n)]
    high = [(k | distance) if not k & distance else n + k for k in range(n)]
    for i in range(n):
        if i & distance:
            continue
        for tag, order, row in (("a", low, i), ("b", high, i | distance)):
            name = f"%r{distance}_{row}{tag}"
            mask = ", ".join(f"i32 {k}" for k in order)
            lines.append(f"{name} = shufflevector <{n} x {element}> {rows[i]}, <{n} x {element}> "
                         f"{rows[i | distance]}, <{n} x i32> <{mask}>")
            result[row] = name
    return result


class DotPair:
    """<16 x float> acc + x[2 i] * w[2 i] + x[2 i + 1] * w[2 i + 1], pairs as words: AVX512_BF16's VDPBF16PS.

    The operands come in registers: a load in imported IR lacks TVM's alias information, and LLVM then stores the
    accumulators in every step.
    """

    name = "treadle_dot_pair"

    def llvm(self) -> str:
        acc, word, half = "<16 x float>", "<16 x i32>", "<32 x bfloat>"
        return f"""declare {acc} @llvm.x86.avx512bf16.dpbf16ps.512({acc}, {half}, {half})
define {acc} @{self.name}({acc} %acc, {word} %x, {word} %w) alwaysinline {{
%a = bitcast {word} %x to {half}
%b = bitcast {word} %w to {half}
%sum = call {acc} @llvm.x86.avx512bf16.dpbf16ps.512({acc} %acc, {half} %a, {half} %b)
ret {acc} %sum
}}
"""


def import_llvm(*functions: Transpose | DotPair):
    """The frame that brings the LLVM functions into the kernel's module."""
    text = "".join(f.llvm() for f in dict.fromkeys(functions))
    return T.attr(0, "pragma_import_llvm", text)


@dataclass(frozen=True)
class WeightPack:
    """Weights W[groups * outer, inner, taps] packed to P[groups, blocks, taps, reduction, tile].

    `tile` lanes run over the kernel's output channels: the outer axis of W forward, the inner one (`swap`) for the
    input gradient; the reduction runs over the other.  Lanes past the last channel are zero.

    For the input gradient the taps stand in reverse order (see `input_grad_phases`).

    With `fold` > 1, `groups` counts folds of so many groups of W, which share a tile: their weights stand on the
    diagonal of an otherwise zero block, so that groups of few channels fill a vector. `compact`: only the diagonal is
    kept, so that the reduction has the length of one group's.
    """

    groups: int
    outer: int
    inner: int
    taps: int
    tile: int
    lanes: int
    swap: bool
    dtype: str
    packed_dtype: str
    fold: int = 1
    compact: bool = False

    @property
    def out(self) -> int:
        return self.fold * (self.inner if self.swap else self.outer)

    @property
    def red(self) -> int:
        return (1 if self.compact else self.fold) * (self.outer if self.swap else self.inner)

    @property
    def blocks(self) -> int:
        return -(-self.out // self.tile)

    @property
    def size(self) -> int:
        return self.groups * self.blocks * self.taps * self.red * self.tile

    @property
    def transpose(self) -> Transpose:
        return Transpose(self.lanes, self.dtype, self.packed_dtype)

    def at(self, group, block, tap, red):
        """Index of lane 0 of a tap of W."""
        tap = self.taps - 1 - tap if self.swap else tap
        return (((group * self.blocks + block) * self.taps + tap) * self.red + red) * self.tile

    def array(self, w: np.ndarray) -> np.ndarray:
        """What `emit` writes, of weights known while compiling."""
        dense = w.reshape(self.groups, self.fold, self.outer, self.inner, self.taps)
        out, red = (self.inner, self.outer) if self.swap else (self.outer, self.inner)
        packed = np.zeros((self.groups, self.blocks * self.tile, self.taps, self.red), self.packed_dtype)
        for f in range(self.fold):
            at = 0 if self.compact else f * red
            part = np.transpose(dense[:, f], (0, 2, 3, 1) if self.swap else (0, 1, 3, 2))  # group, out, tap, red
            part = part[:, :, ::-1] if self.swap else part
            packed[:, f * out:(f + 1) * out, :, at:at + red] = part
        tiled = packed.reshape(self.groups, self.blocks, self.tile, self.taps, self.red)
        return np.ascontiguousarray(np.transpose(tiled, (0, 1, 3, 4, 2))).reshape(-1)

    def emit(self, w, packed) -> None:
        """Pack flat buffer `w` into flat buffer `packed`, in parallel over blocks of lanes and slices of W."""
        vectors = self.blocks * self.tile // self.lanes
        if self.fold > 1:
            self._folded(w, packed)
        elif self.swap:
            with parallel(self.groups * vectors * self.red) as t:
                self._columns(w, packed, t // self.red // vectors, t // self.red % vectors, t % self.red)
        else:
            columns = self.red * self.taps
            slices = -(-columns // 256)
            with parallel(self.groups * vectors * slices) as t:
                with serial(16) as s:
                    start = (t % slices) * 256 + s * 16
                    with when(start < columns):
                        self._rows(w, packed, t // slices // vectors, t // slices % vectors, start)

    def _folded(self, w, packed) -> None:
        """Element by element: grouped weights are few."""
        with parallel(self.groups * self.taps) as t, serial(self.red) as r, serial(self.blocks * self.tile) as lane:
            group, tap = t // self.taps, t % self.taps
            if self.compact:
                r = lane * self.fold // self.out * self.red + r  # of the group that the lane belongs to
            o, i = (r, lane) if self.swap else (lane, r)
            inside = T.And(o // self.outer == i // self.inner, lane < self.out)
            src = ((group * self.fold * self.outer + o) * self.inner + i % self.inner) * self.taps + tap
            dst = self.at(group, lane // self.tile, tap, r % self.red) + lane % self.tile
            self._element(packed, dst, inside, w, src)

    def _rows(self, w, packed, group, vector, start) -> None:
        """Forward: 16 consecutive (reduction, tap) columns of `lanes` rows of W."""
        n, columns = self.lanes, self.red * self.taps
        tile = T.alloc_buffer((n * n,), self.packed_dtype, scope="local")
        for part in range(0, 16, n):
            first = start + part
            base = (group * self.outer + vector * n) * columns + first
            full = T.And(vector * n + n <= self.outer, first + n <= columns)
            with T.If(full):
                with T.Then():
                    self.transpose.emit(tile[0], n, w[base], columns)
                    with unroll(n) as j:
                        dst = self._lane(group, vector, (first + j) % self.taps, (first + j) // self.taps)
                        T.buffer_store(packed, tile[T.ramp(j * n, 1, n)], [T.ramp(dst, 1, n)])
                with T.Else(), serial(n) as j, when(first + j < columns):
                    dst = self._lane(group, vector, (first + j) % self.taps, (first + j) // self.taps)
                    with serial(n) as i:
                        inside = vector * n + i < self.outer
                        self._element(packed, dst + i, inside, w, base + i * columns + j)

    def _columns(self, w, packed, group, vector, red) -> None:
        """Input gradient: all taps of `lanes` consecutive inner channels of one outer channel."""
        n = self.lanes
        if self.taps == 1:
            return self._column(w, packed, group, vector, red)
        tile = T.alloc_buffer((n * n,), self.packed_dtype, scope="local")
        total = self.groups * self.outer * self.inner * self.taps
        base = ((group * self.outer + red) * self.inner + vector * n) * self.taps
        with serial(-(-self.taps // n)) as part:
            last = base + (n - 1) * self.taps + part * n + n
            with T.If(T.And(vector * n + n <= self.inner, last <= total)):
                with T.Then():
                    self.transpose.emit(tile[0], n, w[base + part * n], self.taps)
                    with serial(T.min(self.taps - part * n, n)) as j:
                        dst = self._lane(group, vector, part * n + j, red)
                        T.buffer_store(packed, tile[T.ramp(j * n, 1, n)], [T.ramp(dst, 1, n)])
                with T.Else(), serial(T.min(self.taps - part * n, n)) as j:
                    dst = self._lane(group, vector, part * n + j, red)
                    with serial(n) as i:
                        inside = vector * n + i < self.inner
                        self._element(packed, dst + i, inside, w, base + i * self.taps + part * n + j)

    def _column(self, w, packed, group, vector, red) -> None:
        """The same for a single tap: the lanes are contiguous already."""
        n = self.lanes
        src, dst = (group * self.outer + red) * self.inner + vector * n, self._lane(group, vector, 0, red)
        if self.inner >= n:
            with when(vector * n + n <= self.inner), vectorized(n) as i:
                T.buffer_store(packed, T.cast(w[src + i], self.packed_dtype), [dst + i])
        if self.inner % self.tile:
            with when(vector * n + n > self.inner), serial(n) as i:
                self._element(packed, dst + i, vector * n + i < self.inner, w, src + i)

    def _lane(self, group, vector, tap, red):
        per_block = self.tile // self.lanes
        return self.at(group, vector // per_block, tap, red) + vector % per_block * self.lanes

    def _element(self, packed, dst, inside, w, src) -> None:
        value = T.cast(w[src], self.packed_dtype)
        T.buffer_store(packed, T.if_then_else(inside, value, tirx.const(0.0, self.packed_dtype)), [dst])


def widen(source, dtype: str, chunk: int = 4096):
    """`source` (flat) cast to `dtype` in scratch, in parallel; `source` itself if it has that dtype."""
    if source.dtype == dtype:
        return source
    size = source.shape[0]
    if not isinstance(size, (int, tirx.IntImm)):
        result = T.alloc_buffer((size,), dtype)
        with parallel(tirx.truncdiv(size + (chunk - 1), tirx.const(chunk, "int64"))) as part:
            with serial(T.min(chunk, size - part * chunk)) as i:
                T.buffer_store(result, T.cast(source[part * chunk + i], dtype), [part * chunk + i])
        return result
    size = int(size)
    result = T.alloc_buffer((size,), dtype)
    with parallel(-(-size // chunk)) as part, serial(T.min(chunk, size - part * chunk) // 16) as i:
        with vectorized(16) as lane:
            at = part * chunk + i * 16 + lane
            T.buffer_store(result, T.cast(source[at], dtype), [at])
    if size % 16:
        with serial(size % 16) as i:
            at = size - size % 16 + i
            T.buffer_store(result, T.cast(source[at], dtype), [at])
    return result


@dataclass(frozen=True)
class ChannelsLastPack:
    """Activations of any layout to [batch, pixels, groups, padded] in scratch; channels past `channels` are zero.

    For kernels whose vectors run over the channels of each group, where memory does not allow that as it is.  bfloat16
    is kept in scratch as uint16: TVM makes float32 of a bfloat16 buffer that it allocates.
    """

    batch: Any
    pixels: Any
    groups: int
    channels: int
    padded: int
    layout: str
    lanes: int
    dtype: str
    packed_dtype: str

    @property
    def transpose(self) -> Transpose:
        return Transpose(self.lanes, self.dtype, self.packed_dtype)

    def emit(self, source):
        size = expression(self.batch * self.pixels * self.groups * self.padded)
        result = T.alloc_buffer((size,), self.packed_dtype)
        emit = self._from_channels_first if self.layout == "NCHW" else self._from_channels_last
        emit(source, result)
        return result

    def _convert(self, value):
        if self.packed_dtype == "uint16":
            return T.reinterpret("uint16", value)
        return T.cast(value, self.packed_dtype)

    @property
    def _zero(self):
        return tirx.const(0 if self.packed_dtype == "uint16" else 0.0, self.packed_dtype)

    def _from_channels_last(self, source, result) -> None:
        wide = self.lanes
        with parallel(self.batch * self.pixels) as p, serial(self.groups) as g:
            src, dst = (p * self.groups + g) * self.channels, (p * self.groups + g) * self.padded
            with serial(self.channels // wide) as v, vectorized(wide) as lane:
                T.buffer_store(result, self._convert(source[src + v * wide + lane]),
                               [dst + v * wide + lane])
            done = self.channels // wide * wide
            with serial(self.padded - done) as c:
                value = T.if_then_else(c + done < self.channels, self._convert(source[src + done + c]), self._zero)
                T.buffer_store(result, value, [dst + done + c])

    def _from_channels_first(self, source, result) -> None:
        wide, blocks = self.lanes, -(-self.pixels // self.lanes)
        with parallel(self.batch * blocks) as t, serial(self.groups) as g, serial(self.padded // wide) as v:
            n, p = t // blocks, t % blocks * wide
            src = ((n * self.groups + g) * self.channels + v * wide) * self.pixels + p
            dst = ((n * self.pixels + p) * self.groups + g) * self.padded + v * wide
            row = self.groups * self.padded
            with T.If(T.And(p + wide <= self.pixels, v * wide + wide <= self.channels)):
                with T.Then():
                    self.transpose.emit(result[dst], row, source[src], self.pixels)
                with T.Else(), serial(T.min(self.pixels - p, wide)) as i, serial(wide) as c:
                    value = self._convert(source[src + c * self.pixels + i])
                    T.buffer_store(result, T.if_then_else(v * wide + c < self.channels, value, self._zero),
                                   [dst + i * row + c])
