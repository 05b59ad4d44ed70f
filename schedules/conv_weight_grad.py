"""The weight gradient of a convolution on CPU: a register tile of (tap, input channel) x output channels.

`dw[o, i, k] = sum over pixels of dy[pixel, o] * x[pixel * stride + k * dilation - pad, i]` is a matrix product whose
long dimension is the pixels.  Vectors run over output channels of a channel-last dy, x is broadcast element by
element, and the tile stays in registers over a band of output rows; then it is put back into the partial gradient
[chunk, group, block, tap, input channel, tile] while the band, still in cache, serves the next tap.

A tap visits exactly the pixels for which it reads inside the image, so padding costs nothing and needs no mask.
Tasks are blocks of output channels; when these are too few for the threads, the rows are split into chunks whose
partial sums the last stage adds, transposes to OI* and hands to the epilogue.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from .conv_problem import ConvConfig, ConvProblem, forward_phases, lanes, split_row
from .conv_tir import (
    ChannelsLastPack,
    Transpose,
    accumulators,
    opaque,
    parallel,
    row_parts,
    serial,
    unroll,
    vectorized,
    when,
    widen,
    within,
)
from .sizes import expression, is_dynamic


class WeightGrad:
    """Emits the weight gradient of one convolution into the current PrimFunc."""

    def __init__(self, problem: ConvProblem, config: ConvConfig, target):
        self.problem, self.config = problem, config
        self.wide = lanes(problem.dtype, target.vector_bits)
        self.tile = self.wide * config.vectors
        self.acc_dtype = problem.acc_dtype
        self.depth, self.height, self.width = (axis[0] for axis in forward_phases(problem))
        self.taps = self.depth.taps * self.height.taps * self.width.taps
        self.groups = problem.groups
        self.red, self.out = problem.in_channels // self.groups, problem.out_channels // self.groups
        self.blocks = -(-self.out // self.tile)
        self.rows = problem.batch * self.depth.count * self.height.count
        self.chunks = config.chunks if is_dynamic(self.rows) else min(config.chunks, self.rows)
        self.size = self.groups * self.blocks * self.taps * self.red * self.tile
        needs_pack = problem.out_layout == "NCHW" or problem.dtype != self.acc_dtype or self.out % self.tile
        self.pack = ChannelsLastPack(
            problem.batch, math.prod(problem.out_spatial), self.groups, self.out, self.blocks * self.tile,
            problem.out_layout, self.wide, problem.dtype, self.acc_dtype) if needs_pack else None
        self.back = Transpose(self.wide, self.acc_dtype, self.acc_dtype)

    def transposes(self) -> list[Transpose]:
        return [self.back] + ([self.pack.transpose] if self.pack and self.problem.out_layout == "NCHW" else [])

    def emit(self, x, dy, store) -> None:
        """`x`, `dy`: flat buffers; `store(o, i, k, acc)` with `k` the kernel position in the problem's rank."""
        self.partial = T.alloc_buffer((self.chunks * self.size,), self.acc_dtype)
        self.x = widen(x, self.acc_dtype)
        self.dy = self.pack.emit(dy) if self.pack else dy
        band = self.config.block if is_dynamic(self.rows) else min(self.config.block, -(-self.rows // self.chunks))
        every = self.groups * self.blocks
        tasks = -(-every // self.config.blocks)
        with parallel(self.chunks * tasks) as task:
            chunk, part = task // tasks, task % tasks
            first, last = chunk * self.rows // self.chunks, (chunk + 1) * self.rows // self.chunks
            block, end = part * every // tasks, (part + 1) * every // tasks
            area = self.taps * self.red * self.tile
            home = (chunk * every + block) * area
            with serial((end - block) * (area // self.wide)) as i:
                T.buffer_store(self.partial, T.broadcast(tirx.const(0.0, self.acc_dtype), self.wide),
                               [T.ramp(home + i * self.wide, 1, self.wide)])
            with serial((last - first + band - 1) // band) as b, serial(end - block) as i:
                start = first + b * band
                self._emit_band(start, T.min(start + band, last), home + i * area, block + i)
        self._emit_result(store)

    def _emit_band(self, start, stop, home, block) -> None:
        """All register tiles of one block of output channels over output rows `start .. stop`."""
        tiles = split_row(self.red, min(self.config.pixels, self.red))
        size = tiles[0][1]
        full = sum(1 for _, s in tiles if s == size)
        with serial(full) as tile:
            self._emit_taps(start, stop, home, block, tile * size, size)
        if full < len(tiles):
            self._emit_taps(start, stop, home, block, *tiles[-1])

    def _emit_taps(self, start, stop, home, block, channel, size: int) -> None:
        together = self.columns_together(size)
        with serial(self.depth.taps) as jd, serial(self.height.taps) as jh:
            if together == 1:
                with serial(self.width.taps) as jw:
                    self._emit_tile(start, stop, home, block, channel, size, jd, jh, jw, 1)
            else:
                for jw in range(0, self.width.taps, together):
                    self._emit_tile(start, stop, home, block, channel, size, jd, jh, jw,
                                    min(together, self.width.taps - jw))

    def columns_together(self, size: int) -> int:
        """How many taps of a kernel row share a tile: several only where input channels are too few to fill it."""
        if size != self.red or size * 2 > self.config.pixels or self.red >= 8:
            return 1
        width = self.width.expected
        edges = sum(width.count - (high - low) for low, high in map(width.valid, range(width.taps)))
        return max(1, min(self.config.pixels // size, self.width.taps)) if edges <= 16 else 1

    def _emit_tile(self, start, stop, home, block, channel, size: int, jd, jh, jw, count: int) -> None:
        """Add rows `start .. stop` to the tile of `size` input channels and taps `jw .. jw + count`."""
        wide, vectors = self.wide, self.config.vectors
        acc = accumulators(count * size, vectors, wide, self.acc_dtype)

        def place(k, i, v):
            tap = (jd * self.height.taps + jh) * self.width.taps + jw + k
            return T.ramp(home + (tap * self.red + channel + i) * self.tile + v * wide, 1, wide)

        def each(body):
            for k, i in itertools.product(range(count), range(size)):
                with unroll(vectors) as v:
                    body(acc[k * size + i], v, place(k, i, v))

        each(lambda row, v, at: row.set(v, self.partial[at]))
        with serial(stop - start) as r:
            row = start + r
            n = row // (self.depth.count * self.height.count)
            d = row // self.height.count % self.depth.count * self.depth.in_stride + self.depth.offset(0)
            h = row % self.height.count * self.height.in_stride + self.height.offset(0)
            d, h = d + jd * self.depth.offset_step, h + jh * self.height.offset_step
            inside = None if self.depth.bounded else within(d, self.depth.in_extent)
            with when(inside), when(None if self.height.bounded else within(h, self.height.in_extent)):
                x_row, x_pixel, x_channel = self._x_strides(n, d, h, block, channel)
                self._emit_row(acc, row, x_row, x_pixel, x_channel, size, jw, count, block)
        each(lambda row, v, at: T.buffer_store(self.partial, row.get(v), [at]))

    def _x_strides(self, n, d, h, block, channel):
        """(index of the row's first element, stride of a pixel, stride of a channel) in x."""
        depth, height, width = self.depth.in_extent, self.height.in_extent, self.width.in_extent
        c = self.problem.in_channels
        first = block // self.blocks * self.red + channel
        if self.problem.layout == "NHWC":
            return ((n * depth + d) * height + h) * width * c + first, c, 1
        plane = depth * height * width
        return (n * c + first) * plane + (d * height + h) * width, 1, plane

    def _emit_row(self, acc, row, x_row, x_pixel, x_channel, size: int, jw, count: int, block) -> None:
        """All pixels of one output row; with several taps, pixels at the ends go tap by tap."""
        width = self.width
        dy_row = (row * width.count * self.groups * self.blocks + block) * self.tile
        if not self.pack:
            group, b = block // self.blocks, block % self.blocks
            dy_row = row * width.count * self.problem.out_channels + group * self.out + b * self.tile
        pixel = _Pixel(self, acc, opaque(dy_row), opaque(x_row), x_pixel, x_channel, size)
        if count == 1:
            offset = width.offset(0) + jw * width.offset_step
            low = T.max(0, (width.in_stride - 1 - offset) // width.in_stride)
            high = T.min(expression(width.count), (width.in_extent - 1 - offset) // width.in_stride + 1)
            with serial(T.max(high - low, 0)) as q:
                pixel.emit(low + q, [(0, offset)])
            return
        for first, length, taps in row_parts(width, jw, count):
            with serial(length) as q:
                pixel.emit(first + q, [(k, width.offset(jw + k)) for k in taps])

    def _emit_result(self, store) -> None:
        """Add the chunks, transpose [tap, channel, lanes of o] to [o, channel, tap] and call the epilogue."""
        wide, columns = self.wide, self.red * self.taps
        vectors = self.blocks * self.config.vectors
        steps = -(-columns // wide)
        kernel = self.problem.kernel
        with parallel(self.groups * vectors * steps) as t:
            first, v, group = t % steps * wide, t // steps % vectors, t // steps // vectors
            tile = T.alloc_buffer((wide * wide,), self.acc_dtype, scope="local")
            turned = T.alloc_buffer((wide * wide,), self.acc_dtype, scope="local")
            with serial(T.min(wide, columns - first)) as j:
                tap, channel = (first + j) % self.taps, (first + j) // self.taps
                block = group * self.blocks + v // self.config.vectors
                at = ((block * self.taps + tap) * self.red + channel) * self.tile + v % self.config.vectors * wide
                total = self.partial[T.ramp(at, 1, wide)]
                for chunk in range(1, self.chunks):
                    total = total + self.partial[T.ramp(at + chunk * self.size, 1, wide)]
                T.buffer_store(tile, total, [T.ramp(j * wide, 1, wide)])
            self.back.emit(turned[0], wide, tile[0], wide)
            with serial(T.max(0, T.min(wide, self.out - v * wide))) as o:

                def put(lane, o=o, first=first, group=group, v=v, turned=turned):
                    e, index = first + lane, []
                    for extent in reversed(kernel):
                        index.append(e % extent)
                        e = e // extent
                    store(group * self.out + v * wide + o, e, tuple(reversed(index)), turned[o * wide + lane])

                with when(first + wide <= columns if columns % wide else None):
                    if columns >= wide:
                        with vectorized(wide) as lane:
                            put(lane)
                if columns % wide:
                    with when(first + wide > columns), vectorized(columns % wide) as lane:
                        put(lane)


class _Pixel:
    """One step of the reduction: an output pixel's gradients times the input channels under some taps."""

    def __init__(self, grad: WeightGrad, acc, dy_row, x_row, x_pixel, x_channel, size: int):
        self.grad, self.acc, self.dy_row, self.x_row = grad, acc, dy_row, x_row
        self.x_pixel, self.x_channel, self.size = x_pixel, x_channel, size

    def emit(self, q, taps: Sequence[tuple[int, Any]]) -> None:
        grad, wide = self.grad, self.grad.wide
        dy_pixel = grad.groups * grad.blocks * grad.tile if grad.pack else grad.problem.out_channels
        for k, offset in taps:
            column = q * grad.width.in_stride + offset
            for i in range(self.size):
                value = T.broadcast(grad.x[self.x_row + column * self.x_pixel + i * self.x_channel], wide)
                with unroll(grad.config.vectors) as v:
                    row = self.acc[k * self.size + i]
                    gradient = grad.dy[T.ramp(self.dy_row + q * dy_pixel + v * wide, 1, wide)]
                    row.set(v, row.get(v) + value * gradient)
