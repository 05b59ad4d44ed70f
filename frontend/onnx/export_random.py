"""Export of random bits: the ten rounds of Philox4x32 in 64-bit integer arithmetic.

The numbers are those that Treadle draws, bit by bit, so a training step with dropout gives the same result elsewhere.
It takes bitwise operations, which ONNX has since opset 18.
"""

from __future__ import annotations

import math

import numpy as np

from ...ir.graph import Node
from ...ir.ops_create import PHILOX_MULTIPLIERS, PHILOX_ROUNDS, PHILOX_WEYL
from .export_rules import exports
from .export_shape import counting, filled, reshape, take_slice
from .export_writer import Ref, Writer

LOW = 0xFFFFFFFF


def number(out: Writer, value: int) -> Ref:
    """A constant of u64."""
    return out.const(np.uint64(value % 2**64))


def low(out: Writer, x: Ref) -> Ref:
    """The lower 32 bits."""
    return out.op("BitwiseAnd", x, number(out, LOW))


def high(out: Writer, x: Ref) -> Ref:
    """The upper 32 bits."""
    return out.op("BitShift", x, number(out, 32), direction="RIGHT")


def mixed(out: Writer, product: Ref, word: Ref, key: Ref) -> Ref:
    """A word of the next counter: the upper half of a product, with a word of this one and of the key."""
    return out.op("BitwiseXor", out.op("BitwiseXor", high(out, product), word), key)


def philox(out: Writer, words: list[Ref], key: list[Ref]) -> list[Ref]:
    """`ir.ops_create.philox4x32`, node by node."""
    c0, c1, c2, c3 = words
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        p0 = out.op("Mul", c0, number(out, PHILOX_MULTIPLIERS[0]))
        p1 = out.op("Mul", c2, number(out, PHILOX_MULTIPLIERS[1]))
        c0, c1, c2, c3 = mixed(out, p1, c1, k0), low(out, p1), mixed(out, p0, c3, k1), low(out, p0)
        k0, k1 = (low(out, out.op("Add", k, number(out, w))) for k, w in zip((k0, k1), PHILOX_WEYL))
    return [c0, c1, c2, c3]


@exports("random_bits")
def random_bits(out: Writer, node: Node, state: Ref) -> Ref:
    out.needs(18, "drawing random numbers (dropout in training, td.random) takes bitwise operations, which")
    shape, offset = node.attrs["shape"], node.attrs["offset"]
    size = math.prod(shape)
    if isinstance(size, int) and size == 0:
        return filled(out, 0, shape, "uint32")
    blocks = (size + 3) // 4
    seed, position = (take_slice(out, state, [0], out.ints(i), out.ints(i + 1)) for i in (0, 1))
    start = out.op("Add", position, out.const(np.array([offset], np.uint64)))
    block = out.op("Add", counting(out, blocks, "uint64"), start)
    nothing = out.const(np.zeros(1, np.uint64))
    words = philox(out, [low(out, block), high(out, block), nothing, nothing], [low(out, seed), high(out, seed)])
    column = out.op("Concat", *(reshape(out, w, (blocks,), (blocks, 1)) for w in words), axis=1)
    flat = out.op("Reshape", column, out.ints(-1))
    drawn = take_slice(out, flat, [0], out.ints(0), out.size(size))
    return reshape(out, out.cast(drawn, "uint32"), (size,), shape)
