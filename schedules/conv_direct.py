"""Direct convolution on CPU: one register tile of output pixels x output channels, reduced without leaving registers.

Weights are packed [groups, blocks, taps, reduction, tile] so that a step of the reduction loads `vectors` registers of
weights, broadcasts one input element per pixel and issues `pixels * vectors` FMAs.  The loops over rows, columns and
phases are in `conv_gather`.

Several groups of few channels that fill a vector together are reduced by the vector: step j multiplies every output
channel with the j-th input channel of its own group, which a shuffle of the pixel's channels brings there.
"""

from __future__ import annotations

import math
from contextlib import ExitStack

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from .conv_gather import ChannelsLast, GatherConv, Row
from .conv_problem import FORWARD, AxisTaps, ConvConfig, ConvProblem, reduces_by_vector
from .conv_tir import Transpose, WeightPack, accumulators, each_task, serial, unroll, when, widen, within

UNROLLED_TAPS = 5  # longer kernel rows are a loop, except at the borders


class DirectConv(GatherConv):
    """Forward convolution or input gradient with a reduction over the channels of a group."""

    shuffles = True  # whether groups may be reduced by the vector

    def __init__(self, problem: ConvProblem, config: ConvConfig, target, op: str):
        super().__init__(problem, config, target, op)
        self.red = self.channels_in // self.groups
        self.group_channels = self.red  # in memory
        self.steps, self.step = self.red, 1  # of the reduction, and the channels that one covers
        outer, inner, taps = problem.w_shape[0] // problem.groups, problem.w_shape[1], math.prod(self.kernel)
        self.by_vector = (self.shuffles and self.tile == self.wide
                          and reduces_by_vector(problem, config.fold, self.wide, op))
        if self.by_vector:
            self.steps = inner
        self.pack = WeightPack(self.groups, outer, inner, taps, self.tile, self.wide, op != FORWARD, problem.dtype,
                               self.acc_dtype, config.fold, self.by_vector)
        if config.flatten:
            self._flatten()

    def _flatten(self) -> None:
        """See all pixels of the batch as one row; `indices` undoes it for `store`."""
        self.pixel_shape = self.out_shape
        count = self.batch * self.out_shape[0] * self.out_shape[1] * self.out_shape[2]
        self.batch, self.in_shape, self.out_shape = 1, (1, 1, count), (1, 1, count)
        row = AxisTaps(0, 1, count, count, 1, 1, 0, 1, 0, 1)
        unit = AxisTaps(0, 1, 1, 1, 1, 1, 0, 1, 0, 1)
        self.phases = [[unit], [unit], [row]]

    def transposes(self) -> list[Transpose]:
        return [self.pack.transpose, *super().transposes()]

    def emit(self, source, weights, store) -> None:
        packed = weights if self.packed else self.prepare_weights(weights)
        source = self.prepare_source(source)
        if self.config.flatten:
            self._emit_flat(source, packed, store, self.groups * self.blocks)
        else:
            self.emit_rows(source, packed, store)

    def prepare_source(self, source):
        return widen(source, self.acc_dtype)

    def packed_weights(self, array):
        """Weights known while compiling, as the kernel reads them."""
        return self.pack.array(array)

    def prepare_weights(self, weights):
        packed = T.alloc_buffer((self.pack.size,), self.pack.packed_dtype)
        self.pack.emit(weights, packed)
        return packed

    def _emit_flat(self, source, packed, store, blocks: int) -> None:
        """One endless row: even tiles are the tasks. The last one is moved back until it fits, or is smaller."""
        depth, height, width = (axis[0] for axis in self.phases)
        tiles = -(-width.count // self.config.pixels)
        size = -(-width.count // tiles)
        tiles, rest = -(-width.count // size), width.count % size
        with each_task(blocks * tiles, self.threads) as task:
            outer = self.config.channels_outer
            block, tile = (task // tiles, task % tiles) if outer else (task % blocks, task // blocks)
            place = Row(depth, height, 0, 0, 0, block // self.blocks, block % self.blocks)
            sink = ChannelsLast(self, store, place)
            if not rest or self.again:
                start = T.min(tile * size, width.count - size) if rest else tile * size
                self.emit_tile(source, packed, sink, place, width, start, size, None)
                return
            with when(tile < tiles - 1):
                self.emit_tile(source, packed, sink, place, width, tile * size, size, None)
            with when(tile == tiles - 1):
                self.emit_tile(source, packed, sink, place, width, (tiles - 1) * size, rest, None)

    def emit_tile(self, source, packed, sink, place: Row, width: AxisTaps, start, size: int, taps) -> None:
        acc = accumulators(size, self.config.vectors, self.wide, self.acc_dtype)
        block = max(1, min(self.config.block // self.step, self.steps))
        with ExitStack() as nest:
            outer = nest.enter_context(serial(-(-self.steps // block)))
            extent = block if self.steps % block == 0 else T.min(self.steps - outer * block, block)
            channel = place.group * self.group_channels + outer * block * self.step
            start_of_block = place.n * self.strides[0] + channel * self.strides[4]
            base, tap_base = self.enter_tap_rows(nest, place, start_of_block)
            merged = taps is None and self._merges(width)
            if merged:
                extent = width.taps * self.steps
            reduction = _VectorReduction if self.by_vector else _Reduction
            reduce = reduction(self, source, packed, acc, place, width, extent, outer * block, size)
            if merged:
                reduce.emit(base, tap_base * self.kernel[2], start, width.offset(0), (0, size), False)
            elif taps == "mask" or (taps is None and width.taps > UNROLLED_TAPS):
                with serial(width.taps) as j:
                    reduce.emit(base, tap_base * self.kernel[2] + width.k0 + j * width.k_step, start,
                                width.offset(0) + j * width.offset_step, (0, size), taps == "mask")
            else:
                for j, (low, high) in taps or [(j, (0, size)) for j in range(width.taps)]:
                    if low < high:
                        reduce.emit(base, tap_base * self.kernel[2] + width.k0 + j * width.k_step, start,
                                    width.offset(j), (low, high), False)
        sink.put(acc, width, start, size)

    def _merges(self, width: AxisTaps) -> bool:
        """Whether taps of a kernel row and input channels are one contiguous run, in x and in the packed weights."""
        contiguous = (self.in_layout == "NHWC" and self.groups == 1 and self.red <= self.config.block
                      and not self.by_vector and self.group_channels == self.steps * self.step)
        return contiguous and width.offset_step == width.k_step == 1 and width.k0 == 0

    def weight_at(self, group, block, tap, step):
        """Index of the first lane of the packed weights of one step."""
        return (((group * self.blocks + block) * self.pack.taps + tap) * self.steps + step) * self.tile

    def multiply_add(self, acc, source, at, weights):
        """acc + source[at] * weights, of one vector of output channels."""
        return acc + T.broadcast(T.cast(source[at], self.acc_dtype), self.wide) * weights

    def indices(self, place: Row, width: AxisTaps, q):
        if not self.config.flatten:
            return super().indices(place, width, q)
        d, h, w = self.pixel_shape
        index = (q // (h * w) % d, q // w % h, q % w)
        return q // (d * h * w), index[3 - len(self.problem.spatial):]


class _Reduction:
    """The innermost loop: over a block of input channels for one tap."""

    def __init__(self, conv: DirectConv, source, packed, acc, place: Row, width: AxisTaps, extent, first, size: int):
        self.conv, self.source, self.packed, self.acc, self.place = conv, source, packed, acc, place
        self.width, self.extent, self.first, self.size = width, extent, first, size

    def emit(self, base, tap, start, offset, pixels: tuple[int, int], masked: bool) -> None:
        conv = self.conv
        wide, vectors, sw = conv.wide, conv.config.vectors, conv.strides[3]
        with serial(self.extent) as c:
            weights = conv.weight_at(self.place.group, self.place.block, tap, self.first + c)
            for i in range(*pixels):
                column = (start + i) * self.width.in_stride + offset
                at = base + column * sw + c * conv.step * conv.strides[4]
                with when(within(column, self.width.in_extent) if masked else None), unroll(vectors) as v:
                    weight = self.packed[T.ramp(weights + v * wide, 1, wide)]
                    self.acc[i].set(v, conv.multiply_add(self.acc[i].get(v), self.source, at, weight))


class _VectorReduction(_Reduction):
    """One tap for all channels of several groups that share a vector."""

    def emit(self, base, tap, start, offset, pixels: tuple[int, int], masked: bool) -> None:
        conv, channels = self.conv, self.conv.steps
        wide = conv.wide
        for i in range(*pixels):
            column = (start + i) * self.width.in_stride + offset
            with when(within(column, self.width.in_extent) if masked else None):
                for j in range(channels):
                    own = [lane // channels * channels + j for lane in range(wide)]
                    at = T.ramp(base + column * conv.strides[3], 1, wide)
                    x = tirx.Shuffle([T.cast(self.source[at], f"{conv.acc_dtype}x{wide}")], own)
                    weights = T.ramp(conv.weight_at(self.place.group, self.place.block, tap, j), 1, wide)
                    self.acc[i].set(0, self.acc[i].get(0) + x * self.packed[weights])
