"""Direct convolution on CPU: one register tile of output pixels x output channels, reduced without leaving registers.

Serves the forward convolution and the input gradient (see `conv_problem`): both gather, for every output pixel,
weighted input pixels.  Weights are packed [groups, blocks, taps, reduction, tile] so that a step of the reduction
loads `vectors` registers of weights, broadcasts one input element per pixel and issues `pixels * vectors` FMAs.

Padding costs nothing: which taps fall outside the image is known per column tile when the kernel is generated, so
the first and last tiles of a row simply omit those FMAs, and rows outside are skipped by one branch per tap row.
A row with many partial tiles (large dilations) would make too much code; there the tap masks pixel by pixel.

Channels-first outputs collect a row of accumulators in L1 and transpose it tile by tile on the way to `store`.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property

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
from .conv_tir import Transpose, WeightPack, when, within

MAX_EDGE_TILES = 6  # beyond these, code size matters more than the few masked pixels


class DirectConv:
    """Emits the loop nests of one direct convolution into the current PrimFunc.

    `source` is the flat input (x, or dy for the input gradient), `packed` the packed weights, `store(n, c, idx, acc)`
    writes one output element; `idx` has the problem's spatial rank.
    """

    def __init__(self, problem: ConvProblem, config: ConvConfig, target, op: str):
        self.problem, self.config, self.op = problem, config, op
        forward = op == FORWARD
        self.wide = lanes(problem.dtype, target.vector_bits)
        self.acc_dtype = problem.acc_dtype
        self.phases = forward_phases(problem) if forward else input_grad_phases(problem)
        cin, cout = problem.in_channels, problem.out_channels
        self.channels_in, self.channels_out = (cin, cout) if forward else (cout, cin)
        self.red, self.out = self.channels_in // problem.groups, self.channels_out // problem.groups
        self.in_layout, self.out_layout = ((problem.layout, problem.out_layout) if forward
                                           else (problem.out_layout, problem.layout))
        shape = problem.spatial if forward else problem.out_spatial
        self.in_shape = (1,) * (3 - len(shape)) + tuple(shape)
        shape = problem.out_spatial if forward else problem.spatial
        self.out_shape = (1,) * (3 - len(shape)) + tuple(shape)
        self.batch = problem.batch
        kernel = (1,) * (3 - len(problem.kernel)) + tuple(problem.kernel)
        self.kernel = kernel
        self.pack = WeightPack(problem.groups, problem.out_channels // problem.groups, cin // problem.groups,
                               kernel[0] * kernel[1] * kernel[2], config.vectors * self.wide, self.wide, not forward,
                               problem.dtype, self.acc_dtype)
        if config.flatten:
            self._flatten()

    def _flatten(self) -> None:
        """See all pixels of the batch as one row; `_indices` undoes it for `store`."""
        self.pixel_shape = self.out_shape
        count = self.batch * self.out_shape[0] * self.out_shape[1] * self.out_shape[2]
        self.batch, self.in_shape, self.out_shape = 1, (1, 1, count), (1, 1, count)
        row = AxisTaps(0, 1, count, count, 1, 1, 0, 1, 0, 1)
        unit = AxisTaps(0, 1, 1, 1, 1, 1, 0, 1, 0, 1)
        self.phases = [[unit], [unit], [row]]

    @cached_property
    def strides(self) -> tuple[int, int, int, int, int]:
        """Element strides (n, d, h, w, c) of the input."""
        d, h, w = self.in_shape
        c = self.channels_in
        if self.in_layout == "NHWC":
            return d * h * w * c, h * w * c, w * c, c, 1
        return c * d * h * w, h * w, w, 1, d * h * w

    def transposes(self) -> list[Transpose]:
        needed = [self.pack.transpose]
        if self.out_layout == "NCHW":
            needed.append(self.untile)
        return needed

    @property
    def untile(self) -> Transpose:
        return Transpose(self.wide, self.acc_dtype, self.acc_dtype)

    # -- loops over rows ------------------------------------------------------------------------------------------

    def emit(self, source, packed, store) -> None:
        """One parallel nest for every phase of depth and height; the phases of the width share a row."""
        for depth in self.phases[0]:
            for height in self.phases[1]:
                self._emit_rows(source, packed, store, depth, height)

    def _emit_rows(self, source, packed, store, depth: AxisTaps, height: AxisTaps) -> None:
        blocks = self.problem.groups * self.pack.blocks
        if self.config.flatten:
            return self._emit_flat(source, packed, store, blocks)
        rows = self.batch * depth.count * height.count
        with T.parallel(blocks * rows) as task:
            if self.config.channels_outer:
                block, row = task // rows, task % rows
            else:
                block, row = task % blocks, task // blocks
            n, qd, qh = row // (depth.count * height.count), row // height.count % depth.count, row % height.count
            place = Row(depth, height, n, qd, qh, block // self.pack.blocks, block % self.pack.blocks)
            sink = self._sink(store, place)
            for width in self.phases[2]:
                self._emit_columns(source, packed, sink, place, width)
            sink.finish()

    def _emit_flat(self, source, packed, store, blocks: int) -> None:
        """One endless row: tiles are the tasks."""
        depth, height, width = (axis[0] for axis in self.phases)
        full, rest = divmod(width.count, self.config.pixels)
        with T.parallel(blocks * (full + bool(rest))) as task:
            tiles = full + bool(rest)
            block, tile = (task // tiles, task % tiles) if self.config.channels_outer else (task % blocks, task // blocks)
            place = Row(depth, height, 0, 0, 0, block // self.pack.blocks, block % self.pack.blocks)
            sink = ChannelsLast(self, store, place)
            start = tile * self.config.pixels
            with when(tile < full if rest else None):
                if full:
                    self._emit_tile(source, packed, sink, place, width, start, self.config.pixels, None)
            if rest:
                with when(tile >= full):
                    self._emit_tile(source, packed, sink, place, width, start, rest, None)

    def _sink(self, store, place: Row):
        return (ChannelsLast if self.out_layout == "NHWC" else ChannelsFirst)(self, store, place)

    def _emit_columns(self, source, packed, sink, place: Row, width: AxisTaps) -> None:
        """All column tiles of a row: partial ones unrolled with their own taps, runs of full ones as a loop."""
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
                with T.serial(run - i) as tile:
                    self._emit_tile(source, packed, sink, place, width, start + tile * size, size, None)
                i = run
            else:
                taps = None if whole[i] else list(enumerate(clip[i]))
                self._emit_tile(source, packed, sink, place, width, start, size, taps)
                i += 1
        return None

    def _emit_masked_columns(self, source, packed, sink, place: Row, width: AxisTaps, tiles) -> None:
        size = tiles[0][1]
        full = sum(1 for _, s in tiles if s == size)
        with T.serial(full) as tile:
            self._emit_tile(source, packed, sink, place, width, tile * size, size, "mask")
        if full < len(tiles):
            self._emit_tile(source, packed, sink, place, width, *tiles[-1], "mask")

    # -- one register tile ----------------------------------------------------------------------------------------

    def _emit_tile(self, source, packed, sink, place: Row, width: AxisTaps, start, size: int, taps) -> None:
        """Accumulate pixels `start .. start + size` of a row and hand them to `sink`.

        `taps`: None (every tap is whole), a list of (tap, (low, high)) of the pixels that tap may touch, or "mask".
        """
        wide, vectors = self.wide, self.config.vectors
        acc = T.alloc_buffer((size * vectors * wide,), self.acc_dtype, scope="local")
        with T.unroll(size * vectors) as i:
            T.buffer_store(acc, T.broadcast(tirx.const(0.0, self.acc_dtype), wide), [T.ramp(i * wide, 1, wide)])
        block = min(self.config.block, self.red)
        sn, sd, sh, sw, sc = self.strides
        with ExitStack() as nest:
            outer = nest.enter_context(T.serial(-(-self.red // block)))
            extent = block if self.red % block == 0 else T.min(self.red - outer * block, block)
            base, tap_base = place.n * sn + (place.group * self.red + outer * block) * sc, 0
            for axis, q, stride, kernel in ((place.depth, place.qd, sd, 1), (place.height, place.qh, sh, self.kernel[1])):
                j = nest.enter_context(T.serial(axis.taps)) if axis.taps != 1 else 0
                position = q * axis.in_stride + axis.offset(0) + j * axis.offset_step
                if not axis.bounded:
                    nest.enter_context(when(within(position, axis.in_extent)))
                base = base + position * stride
                tap_base = tap_base * kernel + axis.k0 + j * axis.k_step
            reduce = _Reduction(self, source, packed, acc, place, width, extent, outer * block, size)
            if taps is None or taps == "mask":
                with T.serial(width.taps) as j:
                    reduce.emit(base, tap_base * self.kernel[2] + width.k0 + j * width.k_step, start,
                                width.offset(0) + j * width.offset_step, (0, size), taps == "mask")
            else:
                for j, (low, high) in taps:
                    if low < high:
                        reduce.emit(base, tap_base * self.kernel[2] + width.k0 + j * width.k_step, start,
                                    width.offset(j), (low, high), False)
        sink.put(acc, width, start, size)

    def indices(self, place: Row, width: AxisTaps, q):
        """(n, spatial index) of pixel `q` of a row, in the problem's own rank."""
        if self.config.flatten:
            d, h, w = self.pixel_shape
            n, index = q // (d * h * w), (q // (h * w) % d, q // w % h, q % w)
        else:
            n = place.n
            index = (place.depth.first + place.depth.step * place.qd,
                     place.height.first + place.height.step * place.qh, width.first + width.step * q)
        return n, index[3 - len(self.problem.spatial):]


class Row:
    """Where a task stands: phase and position in depth and height, image, group and block of channels."""

    def __init__(self, depth: AxisTaps, height: AxisTaps, n, qd, qh, group, block):
        self.depth, self.height, self.n, self.qd, self.qh = depth, height, n, qd, qh
        self.group, self.block = group, block


def _clip(valid: tuple[int, int], start: int, size: int) -> tuple[int, int]:
    low, high = max(valid[0], start) - start, min(valid[1], start + size) - start
    return (low, high) if low < high else (0, 0)


class _Reduction:
    """The innermost loop: over a block of input channels for one tap."""

    def __init__(self, conv: DirectConv, source, packed, acc, place: Row, width: AxisTaps, extent, first, size: int):
        self.conv, self.source, self.packed, self.acc, self.place = conv, source, packed, acc, place
        self.width, self.extent, self.first, self.size = width, extent, first, size

    def emit(self, base, tap, start, offset, pixels: tuple[int, int], masked: bool) -> None:
        conv = self.conv
        wide, vectors, sw = conv.wide, conv.config.vectors, conv.strides[3]
        tile = vectors * wide
        with T.serial(self.extent) as c:
            weights = conv.pack.at(self.place.group, self.place.block, tap, self.first + c)
            with T.unroll(pixels[0], pixels[1]) as i:
                column = (start + i) * self.width.in_stride + offset
                at = base + column * sw + c * conv.strides[4]
                if masked:
                    inside = within(column, self.width.in_extent)
                    value = T.if_then_else(inside, self.source[T.if_then_else(inside, at, 0)],
                                           tirx.const(0.0, self.source.dtype))
                else:
                    value = self.source[at]
                value = T.broadcast(T.cast(value, conv.acc_dtype), wide)
                with T.unroll(vectors) as v:
                    lane = T.ramp(i * tile + v * wide, 1, wide)
                    product = value * self.packed[T.ramp(weights + v * wide, 1, wide)]
                    T.buffer_store(self.acc, self.acc[lane] + product, [lane])


class ChannelsLast:
    """Hands a tile to `store` pixel by pixel, lanes over channels."""

    def __init__(self, conv: DirectConv, store, place: Row):
        self.conv, self.store, self.place = conv, store, place

    def put(self, acc, width: AxisTaps, start, size: int) -> None:
        conv, wide, vectors = self.conv, self.conv.wide, self.conv.config.vectors
        tile = wide * vectors
        tail = conv.out - (conv.pack.blocks - 1) * tile
        with T.unroll(size) as i:
            n, index = conv.indices(self.place, width, start + i)
            for v in range(vectors):
                channel = self.place.group * conv.out + self.place.block * tile + v * wide
                whole = tail >= (v + 1) * wide
                with when(None if whole else self.place.block < conv.pack.blocks - 1):
                    if whole or conv.pack.blocks > 1:
                        with T.vectorized(wide) as lane:
                            self.store(n, channel + lane, index, acc[i * tile + v * wide + lane])
                if not whole and tail > v * wide:
                    with when(self.place.block == conv.pack.blocks - 1 if conv.pack.blocks > 1 else None):
                        with T.serial(tail - v * wide) as lane:
                            self.store(n, channel + lane, index, acc[i * tile + v * wide + lane])

    def finish(self) -> None:
        """Nothing is held back."""


class ChannelsFirst:
    """Collects the tiles of a row in L1; `finish` transposes the row and calls `store` with lanes over pixels."""

    def __init__(self, conv: DirectConv, store, place: Row):
        self.conv, self.store, self.place = conv, store, place
        self.tile = conv.wide * conv.config.vectors
        self.length = conv.out_shape[2]
        padded = -(-self.length // conv.wide) * conv.wide
        self.row = T.alloc_buffer((padded * self.tile,), conv.acc_dtype, scope="local")

    def put(self, acc, width: AxisTaps, start, size: int) -> None:
        wide = self.conv.wide
        with T.unroll(size) as i:
            pixel = width.first + (start + i) * width.step
            with T.unroll(self.conv.config.vectors) as v:
                T.buffer_store(self.row, acc[T.ramp(i * self.tile + v * wide, 1, wide)],
                               [T.ramp(pixel * self.tile + v * wide, 1, wide)])

    def finish(self) -> None:
        wide = self.conv.wide
        turned = T.alloc_buffer((wide * wide,), self.conv.acc_dtype, scope="local")
        full, rest = divmod(self.length, wide)
        if full:
            with T.serial(full) as block:
                self._turn(turned, block * wide, wide)
        if rest:
            self._turn(turned, full * wide, rest)

    def _turn(self, turned, start, count: int) -> None:
        """`count` pixels from `start`, all channels of the block."""
        conv, wide, place = self.conv, self.conv.wide, self.place
        unit = AxisTaps(0, 1, self.length, 1, 1, 1, 0, 1, 0, 1)
        with T.serial(conv.config.vectors) as v:
            conv.untile.emit(turned[0], wide, self.row[start * self.tile + v * wide], self.tile)
            first = place.block * self.tile + v * wide
            limit = wide if conv.out % wide == 0 else T.min(conv.out - first, wide)
            if conv.out % self.tile and conv.out % wide == 0:
                limit = T.if_then_else(first < conv.out, wide, 0)
            with T.serial(T.max(limit, 0) if not isinstance(limit, int) else limit) as j:
                with T.vectorized(count) as lane:
                    n, index = conv.indices(place, unit, start + lane)
                    self.store(n, place.group * conv.out + first + j, index, turned[j * wide + lane])

