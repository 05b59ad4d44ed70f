"""Direct convolution in bfloat16 by VDPBF16PS: every step of the reduction takes two channels, sums in float32.

Pairs of channels must be neighbours in memory, so channels-first or odd-channel input is first turned channel-last
with an even number of channels; weights are packed as 32-bit words [groups, blocks, taps, pairs, tile].
"""

from __future__ import annotations

import math

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from .conv_direct import DirectConv
from .conv_problem import FORWARD, ConvConfig, ConvProblem
from .conv_tir import ChannelsLastPack, DotPair, parallel, serial


def supports_dot(problem: ConvProblem, target, op: str) -> bool:
    """Whether the machine has the instruction and there are channels enough to pair."""
    channels = problem.in_channels if op == FORWARD else problem.out_channels
    machine = target.vector_bits == 512 and target.has("avx512bf16")
    return problem.dtype == "bfloat16" and machine and channels // problem.groups >= 8


class DotConv(DirectConv):
    """Forward convolution or input gradient over pairs of channels."""

    shuffles = False

    def __init__(self, problem: ConvProblem, config: ConvConfig, target, op: str):
        super().__init__(problem, config, target, op)
        self.steps, self.step = -(-self.red // 2), 2
        self.source_pack = None
        if self.in_layout == "NCHW" or self.red % 2:
            padded = -(-self.red // self.wide) * self.wide
            pixels = math.prod(problem.spatial if op == FORWARD else problem.out_spatial)
            self.source_pack = ChannelsLastPack(problem.batch, pixels, self.groups, self.red, padded, self.in_layout,
                                                self.wide, problem.dtype, "uint16")
            self.group_channels, self.channels_in, self.in_layout = padded, self.groups * padded, "NHWC"

    def transposes(self) -> list:
        own = [self.source_pack.transpose] if self.source_pack and self.source_pack.layout == "NCHW" else []
        return [DOT, *own, *super().transposes()]

    def prepare_source(self, source):
        """The input as 32-bit words; a step's pair is then a plain load."""
        source = self.source_pack.emit(source) if self.source_pack else source
        return T.decl_buffer((int(source.shape[0]) // 2,), "uint32", data=source.data)

    def packed_weights(self, array):
        """They are packed at run time: pairs of a constant take no less memory."""
        return None

    def prepare_weights(self, weights):
        """Pairs of bfloat16, each exactly the upper half of a packed float32, as one word."""
        single = super().prepare_weights(weights)
        rows = self.groups * self.blocks * self.pack.taps
        packed = T.alloc_buffer((rows * self.steps * self.tile,), "uint32")
        with parallel(rows) as row, serial(self.steps) as pair, serial(self.config.vectors) as v:
            first = (row * self.red + pair * 2) * self.tile + v * self.wide

            def bits(at):
                return T.reinterpret(f"uint32x{self.wide}", single[T.ramp(at, 1, self.wide)])

            def word(value):
                return T.broadcast(tirx.const(value, "uint32"), self.wide)

            low = T.shift_right(bits(first), word(16))
            at = T.ramp((row * self.steps + pair) * self.tile + v * self.wide, 1, self.wide)
            if self.red % 2 == 0:
                T.buffer_store(packed, T.bitwise_or(low, bits(first + self.tile)), [at])
            else:
                with T.If(pair * 2 + 1 < self.red):
                    with T.Then():
                        T.buffer_store(packed, T.bitwise_or(low, bits(first + self.tile)), [at])
                    with T.Else():
                        T.buffer_store(packed, low, [at])
        return packed

    def multiply_add(self, acc, source, at, weights):
        return T.call_extern(f"float32x{self.wide}", DOT.name, acc, T.broadcast(source[at // 2], self.wide), weights)


DOT = DotPair()
