"""Depthwise convolution on CPU (one input and one output channel in each group), with both gradients.

There is no reduction over channels to keep a register tile busy, so vectors run over channels instead: a tile of
neighbouring output pixels of one vector of channels multiplies channel-last input pixels with the weights of a tap.
Weights are repacked [tap, channels]; a channels-first tensor is turned channel-last in scratch first.  Where the
channels are no multiple of a vector, the last vector is moved back until it fits, and stores only what no other does.
The weight gradient keeps one accumulator per tap of a kernel row and walks the pixels.
"""

from __future__ import annotations

import math
from contextlib import ExitStack

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from .conv_gather import GatherConv, Row
from .conv_problem import FORWARD, AxisTaps, ConvConfig, ConvProblem, forward_phases, lanes, split_row
from .conv_tir import (
    ChannelsLastPack,
    Transpose,
    accumulators,
    opaque,
    parallel,
    row_parts,
    serial,
    vectorized,
    when,
    within,
)
from .sizes import is_dynamic


def channels_last(problem: ConvProblem, layout: str, spatial: tuple[int, ...], wide: int) -> ChannelsLastPack | None:
    """The repacking that a tensor of this problem needs before vectors can run over its channels."""
    channels = problem.in_channels
    if layout == "NHWC" and problem.dtype == problem.acc_dtype and channels % wide == 0:
        return None
    return ChannelsLastPack(problem.batch, math.prod(spatial), 1, channels, -(-channels // wide) * wide, layout, wide,
                            problem.dtype, problem.acc_dtype)


class DepthwiseConv(GatherConv):
    """Forward and input gradient: the rows, columns and phases of `GatherConv` with another tile inside."""

    def __init__(self, problem: ConvProblem, config: ConvConfig, target, op: str):
        super().__init__(problem, config, target, op)
        spatial, channels = problem.spatial if op == FORWARD else problem.out_spatial, problem.in_channels
        self.pack: ChannelsLastPack | None = None
        self.flipped = op != FORWARD  # see `input_grad_phases`
        if self.in_layout == self.out_layout == "NHWC" and problem.dtype == problem.acc_dtype:
            self.wide = self.tile = min(self.wide, channels)
            self.moved = -channels % self.wide
        else:
            self.pack = channels_last(problem, self.in_layout, spatial, self.wide)
        self.groups, self.out, self.blocks = 1, channels, -(-channels // self.wide)
        self.channels_in, self.in_layout = self.blocks * self.wide if self.pack else channels, "NHWC"

    def transposes(self) -> list[Transpose]:
        return super().transposes() + _transposes(self.pack)

    def emit(self, source, weights, store) -> None:
        packed = weights
        if not self.packed:
            packed = T.alloc_buffer((math.prod(self.kernel) * self.channels_in,), self.acc_dtype)
            self._pack_weights(weights, packed)
        self.emit_rows(self.pack.emit(source) if self.pack else source, packed, store)

    def packed_weights(self, array):
        """Weights known while compiling, as the kernel reads them."""
        padded = np.zeros((math.prod(self.kernel), self.channels_in), self.acc_dtype)
        padded[:, :self.out] = array.reshape(self.out, -1).T[::-1 if self.flipped else 1]
        return padded.reshape(-1)

    def _pack_weights(self, weights, packed) -> None:
        """W[channels, taps] to P[taps, padded channels]: small, so element by element."""
        taps = math.prod(self.kernel)
        with parallel(taps) as k, serial(self.channels_in) as c:
            tap = taps - 1 - k if self.flipped else k
            value = T.if_then_else(c < self.out, weights[c * taps + tap], tirx.const(0.0, weights.dtype))
            T.buffer_store(packed, T.cast(value, self.acc_dtype), [k * self.channels_in + c])

    def emit_tile(self, source, packed, sink, place: Row, width: AxisTaps, start, size: int, taps) -> None:
        wide = self.wide
        acc = accumulators(size, 1, wide, self.acc_dtype)
        channel = place.block * wide
        if self.moved:
            channel = T.min(channel, self.out - wide)
        with ExitStack() as nest:
            first = place.n * self.strides[0] + channel
            base, tap = self.enter_tap_rows(nest, place, first)
            columns = taps if isinstance(taps, list) else [(j, (0, size)) for j in range(width.taps)]
            for j, (low, high) in columns:
                if low == high:
                    continue
                at = (tap * self.kernel[2] + width.k0 + j * width.k_step) * self.channels_in + channel
                for i in range(low, high):
                    column = (start + i) * width.in_stride + width.offset(j)
                    with when(within(column, width.in_extent) if taps == "mask" else None):
                        value = source[T.ramp(base + column * self.channels_in, 1, wide)]
                        acc[i].set(0, acc[i].get(0) + value * packed[T.ramp(at, 1, wide)])
        sink.put(acc, width, start, size)


def _transposes(*packs: ChannelsLastPack | None) -> list[Transpose]:
    return [pack.transpose for pack in packs if pack and pack.layout == "NCHW"]


class DepthwiseWeightGrad:
    """dw[c, k] = sum over pixels of dy[pixel, c] * x[pixel * stride + k * dilation - pad, c]."""

    def __init__(self, problem: ConvProblem, config: ConvConfig, target):
        self.problem = problem
        self.wide, self.acc_dtype = lanes(problem.dtype, target.vector_bits), problem.acc_dtype
        self.depth, self.height, self.width = (axis[0] for axis in forward_phases(problem))
        self.padded = -(-problem.in_channels // self.wide) * self.wide
        self.x_pack = channels_last(problem, problem.layout, problem.spatial, self.wide)
        self.dy_pack = channels_last(problem, problem.out_layout, problem.out_spatial, self.wide)
        self.chunks = config.chunks if is_dynamic(problem.batch) else min(problem.batch, config.chunks)

    def transposes(self) -> list[Transpose]:
        return _transposes(self.x_pack, self.dy_pack)

    def emit(self, x, dy, store) -> None:
        wide, width = self.wide, self.width
        self.x = self.x_pack.emit(x) if self.x_pack else x
        self.dy = self.dy_pack.emit(dy) if self.dy_pack else dy
        rows_of_taps = self.depth.taps * self.height.taps
        taps = rows_of_taps * width.taps
        partial = T.alloc_buffer((self.chunks * taps * self.padded,), self.acc_dtype)
        vectors = self.padded // wide
        with parallel(self.chunks * vectors * rows_of_taps) as task:
            row, vector, chunk = task % rows_of_taps, task // rows_of_taps % vectors, task // rows_of_taps // vectors
            for j0, count in split_row(width.taps, 8):
                acc = accumulators(count, 1, wide, self.acc_dtype)
                self._emit_rows(acc, row, vector * wide, chunk, j0, count)
                for j in range(count):
                    at = ((chunk * rows_of_taps + row) * width.taps + j0 + j) * self.padded + vector * wide
                    T.buffer_store(partial, acc[j].get(0), [T.ramp(at, 1, wide)])
        self._emit_result(partial, taps, store)

    def _emit_rows(self, acc, row, channel, chunk, j0: int, count: int) -> None:
        """Add every output row of a chunk of the batch for taps `j0 .. j0 + count` of one kernel row."""
        depth, height, width = self.depth, self.height, self.width
        jd, jh = row // height.taps, row % height.taps
        first, last = chunk * self.problem.batch // self.chunks, (chunk + 1) * self.problem.batch // self.chunks
        with ExitStack() as nest:
            n = first + nest.enter_context(serial(last - first))
            base, out = n, n
            for axis, j in ((depth, jd), (height, jh)):
                q = nest.enter_context(serial(axis.count))
                position = q * axis.in_stride + axis.offset(0) + j * axis.offset_step
                nest.enter_context(when(None if axis.bounded else within(position, axis.in_extent)))
                base, out = base * axis.in_extent + position, out * axis.count + q
            base = opaque(base * width.in_extent * self.padded + channel)
            out = opaque(out * width.count * self.padded + channel)
            for start, length, inside in row_parts(width, j0, count):
                with serial(length) as q:
                    self._emit_pixel(acc, base, out, start + q, inside, j0)

    def _emit_pixel(self, acc, base, out, q, taps, j0: int) -> None:
        wide = self.wide
        for j in taps:
            column = q * self.width.in_stride + self.width.offset(j0 + j)
            gradient = self.dy[T.ramp(out + q * self.padded, 1, wide)]
            value = self.x[T.ramp(base + column * self.padded, 1, wide)]
            acc[j].set(0, acc[j].get(0) + gradient * value)

    def _emit_result(self, partial, taps: int, store) -> None:
        kernel = self.problem.kernel
        with parallel(self.problem.in_channels) as c, vectorized(taps) as k:
            total = partial[k * self.padded + c]
            for chunk in range(1, self.chunks):
                total = total + partial[(chunk * taps + k) * self.padded + c]
            index, rest = [], k
            for extent in reversed(kernel):
                index.append(rest % extent)
                rest = rest // extent
            store(c, tirx.const(0, "int64"), tuple(reversed(index)), total)

