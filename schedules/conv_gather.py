"""The loops around a register tile that forward convolution and input gradient share, whatever the tile computes.

A task is one output row of one block of channels.  Padding costs nothing: which taps fall outside the image is known
per column tile when the kernel is generated, so the first and last tiles of a row simply omit those multiplications,
and rows outside the image are left out by the bounds of the loops over tap rows.  A row with many partial tiles
(large dilations) would make too much code; there the taps mask pixel by pixel.

Channels-first outputs collect a row of accumulators in L1 and transpose it tile by tile on the way to `store`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from .conv_problem import (
    FORWARD,
    AxisTaps,
    ConvConfig,
    ConvProblem,
    forward_phases,
    input_grad_phases,
    lanes,
    split_row,
)
from .conv_tir import Registers, Transpose, each_task, opaque, serial, tap_range, unroll, vectorized, when
from .sizes import expression, hint, is_dynamic

SERIAL_FLOPS = 1 << 18  # below this, waking another thread costs more than it brings
LOOPED_STORES = 4  # vectors of a tile from which a loop stores them: an epilogue is compiled once, not for each
MAX_EDGE_TILES = 6  # beyond these, code size matters more than the few masked pixels


class GatherConv(ABC):
    """The loop nest of one convolution; a subclass supplies packing and `emit_tile`.

    `source` is the flat input (x, or dy for the input gradient), `packed` the packed weights, `store(n, c, idx, acc)`
    writes one output element; `idx` has the problem's spatial rank.  Tasks cover `groups` x `blocks` blocks of
    `tile` channels, of the `out` channels in each group.
    """

    def __init__(self, problem: ConvProblem, config: ConvConfig, target, op: str):
        self.problem, self.config = problem, config
        self.threads = target.threads if hint(problem.flops) > SERIAL_FLOPS else 1
        self.again = False  # whether an element may be stored twice
        forward = op == FORWARD
        self.wide = lanes(problem.dtype, target.vector_bits)
        self.tile = self.wide * config.vectors
        self.acc_dtype = problem.acc_dtype
        self.phases = forward_phases(problem) if forward else input_grad_phases(problem)
        self.batch, self.groups = problem.batch, problem.groups // config.fold
        channels = (problem.in_channels, problem.out_channels)
        self.channels_in, self.channels_out = channels if forward else channels[::-1]
        layouts = (problem.layout, problem.out_layout)
        self.in_layout, self.out_layout = layouts if forward else layouts[::-1]
        shapes = [(1,) * (3 - len(s)) + tuple(s) for s in (problem.spatial, problem.out_spatial)]
        self.in_shape, self.out_shape = shapes if forward else shapes[::-1]
        self.kernel = (1,) * (3 - len(problem.kernel)) + tuple(problem.kernel)
        self.out = self.channels_out // self.groups
        self.blocks = -(-self.out // self.tile)
        self.moved = 0  # lanes by which the last vector of channels is moved back
        self.packed = False  # whether the weights come as `packed_weights` has them

    @property
    def strides(self) -> tuple[int, int, int, int, int]:
        """Element strides (n, d, h, w, c) of the input."""
        d, h, w = self.in_shape
        c = self.channels_in
        if self.in_layout == "NHWC":
            return d * h * w * c, h * w * c, w * c, c, 1
        return c * d * h * w, h * w, w, 1, d * h * w

    @property
    def untile(self) -> Transpose:
        return Transpose(self.wide, self.acc_dtype, self.acc_dtype)

    def transposes(self) -> list[Transpose]:
        """The LLVM functions that the kernel calls."""
        return [self.untile] if self.out_layout == "NCHW" else []

    @abstractmethod
    def emit_tile(self, source, packed, sink, place: Row, width: AxisTaps, start, size: int, taps) -> None:
        """Accumulate pixels `start .. start + size` of a row and hand them to `sink`.

        `taps`: None (every tap is whole), a list of (tap, (low, high)) of the pixels that tap may touch, or "mask".
        """

    def enter_tap_rows(self, nest: ExitStack, place: Row, base):
        """Open the loops over tap rows that lie in the image: (their input's start, index of (depth, height) tap)."""
        _, sd, sh, _, _ = self.strides
        tap = 0
        for axis, q, stride, kernel in ((place.depth, place.qd, sd, 1), (place.height, place.qh, sh, self.kernel[1])):
            first, count = tap_range(axis, q)
            j = 0 if (first, axis.taps) == (0, 1) else first + nest.enter_context(serial(count))
            base = base + (q * axis.in_stride + axis.offset(0) + j * axis.offset_step) * stride
            tap = tap * kernel + axis.k0 + j * axis.k_step
        return opaque(base), tap

    def emit_rows(self, source, packed, store) -> None:
        """One parallel nest for every phase of depth and height; the phases of the width share a row."""
        for depth in self.phases[0]:
            for height in self.phases[1]:
                self._emit_row_tasks(source, packed, store, depth, height)

    def _emit_row_tasks(self, source, packed, store, depth: AxisTaps, height: AxisTaps) -> None:
        blocks = self.groups * self.blocks
        rows = self.batch * depth.count * height.count
        with each_task(blocks * rows, self.threads) as task:
            if self.config.channels_outer:
                block, row = task // rows, task % rows
            else:
                block, row = task % blocks, task // blocks
            n, qd, qh = row // (depth.count * height.count), row // height.count % depth.count, row % height.count
            place = Row(depth, height, n, qd, qh, block // self.blocks, block % self.blocks)
            sink = (ChannelsLast if self.out_layout == "NHWC" else ChannelsFirst)(self, store, place)
            for width in self.phases[2]:
                self._emit_columns(source, packed, sink, place, width)
            sink.finish()

    def _emit_columns(self, source, packed, sink, place: Row, width: AxisTaps) -> None:
        """All column tiles of a row: partial ones unrolled with their own taps, runs of full ones as a loop."""
        if is_dynamic(width.count, width.in_extent):
            return self._emit_unknown_columns(source, packed, sink, place, width)
        tiles = split_row(width.count, self.config.pixels)
        clip = [[_clip(width.valid(j), start, size) for j in range(width.taps)] for start, size in tiles]
        whole = [all(c == (0, size) for c in taps) for (_, size), taps in zip(tiles, clip)]
        if whole.count(False) > MAX_EDGE_TILES:
            return self._emit_masked_columns(source, packed, sink, place, width, tiles)
        i = 0
        while i < len(tiles):
            run = i
            while run < len(tiles) and whole[run] and tiles[run][1] == tiles[i][1]:
                run += 1
            start, size = tiles[i]
            if run - i > 1:
                with serial(run - i) as tile:
                    self.emit_tile(source, packed, sink, place, width, start + tile * size, size, None)
                i = run
            else:
                taps = None if whole[i] else list(enumerate(clip[i]))
                self.emit_tile(source, packed, sink, place, width, start, size, taps)
                i += 1
        return None

    def _emit_unknown_columns(self, source, packed, sink, place: Row, width: AxisTaps) -> None:
        """A row of a length that is not known: tiles, of which the last is moved back until it fits, or else is pixels
        by themselves. Which taps fall outside is asked tile by tile."""
        size = min(self.config.pixels, width.count) if isinstance(width.count, int) else self.config.pixels
        count = expression(width.count)
        if isinstance(width.count, int):
            count = tirx.const(width.count, "int64")
        low, high = width.reach
        small = max(size // 3, 1)

        def tile(start, size: int) -> None:
            if width.bounded or size <= small:  # for short rows and rests: less code, not the fastest
                self.emit_tile(source, packed, sink, place, width, start, size, None if width.bounded else "mask")
                return
            first = start * width.in_stride + low
            last = (start + (size - 1)) * width.in_stride + high
            with T.If(T.And(first >= 0, last < expression(width.in_extent))):
                with T.Then():
                    self.emit_tile(source, packed, sink, place, width, start, size, None)
                with T.Else():
                    self.emit_tile(source, packed, sink, place, width, start, size, "mask")

        def tiles(size: int, first, left) -> None:
            """`left` pixels from `first` on, of which a tile of `size` holds not more than there are in the row."""
            with serial(tirx.truncdiv(left + (size - 1), tirx.const(size, "int64"))) as i:
                tile(T.bind(first + T.min(i * size, left - size)), size)

        if self.again and size > 1:
            with T.If(count >= size):
                with T.Then():
                    tiles(size, 0, count)
                with T.Else():
                    with T.If(count >= small):
                        with T.Then():
                            tiles(small, 0, count)
                        with T.Else():
                            tiles(1, 0, count)
            return
        full = T.bind(tirx.truncdiv(count, tirx.const(size, "int64")))
        with serial(full) as i:
            tile(i * size, size)
        if size > 1:
            with serial(count - full * size) as i:
                tile(full * size + i, 1)

    def _emit_masked_columns(self, source, packed, sink, place: Row, width: AxisTaps, tiles) -> None:
        size = tiles[0][1]
        full = sum(1 for _, s in tiles if s == size)
        with serial(full) as tile:
            self.emit_tile(source, packed, sink, place, width, tile * size, size, "mask")
        if full < len(tiles):
            self.emit_tile(source, packed, sink, place, width, tiles[-1][0], tiles[-1][1], "mask")

    def indices(self, place: Row, width: AxisTaps, q):
        """(n, spatial index) of pixel `q` of a row, in the problem's own rank."""
        index = (place.depth.first + place.depth.step * place.qd,
                 place.height.first + place.height.step * place.qh, width.first + width.step * q)
        return place.n, index[3 - len(self.problem.spatial):]


class Row:
    """Where a task stands: phase and position in depth and height, image, group and block of channels."""

    def __init__(self, depth: AxisTaps, height: AxisTaps, n, qd, qh, group, block):
        self.depth, self.height, self.n, self.qd, self.qh = depth, height, n, qd, qh
        self.group, self.block = group, block


def _clip(valid: tuple[int, int], start: int, size: int) -> tuple[int, int]:
    low, high = max(valid[0], start) - start, min(valid[1], start + size) - start
    return (low, high) if low < high else (0, 0)


class ChannelsLast:
    """Hands a tile to `store` pixel by pixel, lanes over channels."""

    def __init__(self, conv: GatherConv, store, place: Row):
        self.conv, self.store, self.place = conv, store, place

    def put(self, acc, width: AxisTaps, start, size: int) -> None:
        if size * self.conv.config.vectors < LOOPED_STORES:
            for i in range(size):
                self._put_pixel(acc[i], width, start + i)
            return
        tile = self.conv.wide * self.conv.config.vectors
        stack = T.alloc_buffer((size * tile,), self.conv.acc_dtype, scope="local")
        for i in range(size):
            with unroll(self.conv.config.vectors) as v:
                at = T.ramp(i * tile + v * self.conv.wide, 1, self.conv.wide)
                T.buffer_store(stack, acc[i].get(v), [at])
        with serial(size) as i:
            self._put_pixel(Registers(stack, i * tile, self.conv.wide), width, start + i)

    def _put_pixel(self, acc, width: AxisTaps, pixel) -> None:
        conv, wide, vectors = self.conv, self.conv.wide, self.conv.config.vectors
        tile = wide * vectors
        tail = conv.out - (conv.blocks - 1) * tile
        n, index = conv.indices(self.place, width, pixel)
        for v in range(vectors):
            channel = self.place.group * conv.out + self.place.block * tile + v * wide
            whole = tail >= (v + 1) * wide
            with when(None if whole else self.place.block < conv.blocks - 1):
                if whole or conv.blocks > 1:
                    with vectorized(wide) as lane:
                        self.store(n, channel + lane, index, acc[v * wide + lane])
            if not whole and tail > v * wide:
                with when(self.place.block == conv.blocks - 1 if conv.blocks > 1 else None):
                    with vectorized(tail - v * wide) as lane:
                        self.store(n, channel + lane, index, acc[v * wide + lane + conv.moved])

    def finish(self) -> None:
        """Nothing is held back."""


class ChannelsFirst:
    """Collects the tiles of a row in L1; `finish` transposes the row and calls `store` with lanes over pixels."""

    def __init__(self, conv: GatherConv, store, place: Row):
        self.conv, self.store, self.place = conv, store, place
        self.tile = conv.tile
        self.length = conv.out_shape[2]
        padded = -(-self.length // conv.wide) * conv.wide
        self.row = T.alloc_buffer((expression(padded * self.tile),), conv.acc_dtype, scope="local")

    def put(self, acc, width: AxisTaps, start, size: int) -> None:
        wide = self.conv.wide
        for i in range(size):
            pixel = width.first + (start + i) * width.step
            with unroll(self.conv.config.vectors) as v:
                T.buffer_store(self.row, acc[i].get(v),
                               [T.ramp(pixel * self.tile + v * wide, 1, wide)])

    def finish(self) -> None:
        wide = self.conv.wide
        turned = T.alloc_buffer((wide * wide,), self.conv.acc_dtype, scope="local")
        full, rest = self.length // wide, self.length % wide
        if full:
            with serial(full) as block:
                self._turn(turned, block * wide, wide)
        if rest:
            self._turn(turned, full * wide, rest)

    def _turn(self, turned, start, count) -> None:
        """`count` pixels from `start`, all channels of the block."""
        conv, wide, place = self.conv, self.conv.wide, self.place
        unit = AxisTaps(0, 1, self.length, 1, 1, 1, 0, 1, 0, 1)
        with serial(conv.config.vectors) as v:
            conv.untile.emit(turned[0], wide, self.row[start * self.tile + v * wide], self.tile)
            first = place.block * self.tile + v * wide
            limit = wide if conv.out % wide == 0 else T.min(conv.out - first, wide)
            if conv.out % self.tile and conv.out % wide == 0:
                limit = T.if_then_else(first < conv.out, wide, 0)
            with serial(T.max(limit, 0) if not isinstance(limit, int) else limit) as j:
                with (vectorized if isinstance(count, int) else serial)(count) as lane:
                    n, index = conv.indices(place, unit, start + lane)
                    self.store(n, place.group * conv.out + first + j, index, turned[j * wide + lane])

