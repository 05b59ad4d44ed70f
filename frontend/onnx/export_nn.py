"""Export of products, softmax, normalisations, attention and cross-entropy.

Each is the ONNX op of its name where the opset has one, else what it is made of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ...ir.dims import Size
from ...ir.graph import Node
from .export_index import inside as clamped_index
from .export_math import both
from .export_rules import decomposed, exports, in_f32
from .export_shape import counting, filled, reshape, squeeze, swap_last, transpose, unsqueeze
from .export_writer import BOOL, F32, Ref, Writer

ACCUMULATES = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


@exports("matmul")
def matmul(out: Writer, node: Node, x: Ref, y: Ref) -> Ref:
    """MatMul; Gemm for a flagged product of two matrices; MatMulInteger for bytes that accumulate in i32."""
    wanted = node.result.dtype
    if node.operands[0].shape[-2 if node.attrs["transpose_x"] else -1] == 0:  # runtimes leave memory as it is
        return filled(out, 0, node.result.shape, wanted)
    ranks = [v.rank for v in node.operands]
    flags = node.attrs["transpose_x"], node.attrs["transpose_y"]
    if x.dtype in ("int8", "uint8") and wanted == "int32":
        return out.op("MatMulInteger", *turned(out, x, y, ranks, flags), dtype="int32")
    inner = wanted if not x.dtype.is_float or x.dtype not in ACCUMULATES or wanted.bits > 16 else x.dtype
    x, y = out.cast(x, inner), out.cast(y, inner)
    if ranks == [2, 2] and any(flags) and inner.is_float:
        made = gemm(out, x, y, None, *flags)
    else:
        made = out.op("MatMul", *turned(out, x, y, ranks, flags))
    return out.cast(made, wanted)


def gemm(out: Writer, x: Ref, y: Ref, bias: Ref | None, transpose_x: bool, transpose_y: bool) -> Ref:
    """A product of two matrices, plus a row."""
    return out.op("Gemm", x, y, bias, transA=int(transpose_x) or None, transB=int(transpose_y) or None)


def turned(out: Writer, x: Ref, y: Ref, ranks: list[int], flags: tuple[bool, bool]) -> tuple[Ref, ...]:
    """Both operands, transposed where flagged."""
    return tuple(swap_last(out, r, rank) if flag else r for r, rank, flag in zip((x, y), ranks, flags))


def softmax_of(out: Writer, kind: str, x: Ref, axis: int, rank: int) -> Ref:
    """Softmax or LogSoftmax along an axis; before opset 13 these take all axes from one on together."""
    if out.opset >= 13 or axis == rank - 1:
        return out.op(kind, x, axis=axis if out.opset < 13 else axis - rank)
    perm = [i for i in range(rank) if i != axis] + [axis]
    made = out.op(kind, transpose(out, x, perm), axis=rank - 1)
    return transpose(out, made, [perm.index(i) for i in range(rank)])


@exports("softmax")
def softmax(out: Writer, node: Node, x: Ref) -> Ref:
    return softmax_of(out, "Softmax", x, node.attrs["axis"], node.result.rank)


@exports("log_softmax")
def log_softmax(out: Writer, node: Node, x: Ref) -> Ref:
    return softmax_of(out, "LogSoftmax", x, node.attrs["axis"], node.result.rank)


# Normalisation ---------------------------------------------------------------------------------------------------

@exports("layer_norm")
def layer_norm(out: Writer, node: Node, x: Ref, scale: Ref, bias: Ref) -> Ref:
    """LayerNormalization, which computes its statistics in f32: f64 is written out."""
    if out.opset < 17 or x.dtype == "float64":
        return decomposed(out, node, [x, scale, bias])[0]
    return out.op("LayerNormalization", x, scale, bias, axis=-node.attrs["axes"], epsilon=float(node.attrs["eps"]))


@exports("rms_norm")
def rms_norm(out: Writer, node: Node, x: Ref, scale: Ref) -> Ref:
    if out.opset < 23 or x.dtype == "float64":
        return decomposed(out, node, [x, scale])[0]
    return out.op("RMSNormalization", x, scale, axis=-1, epsilon=float(node.attrs["eps"]))


@exports("group_norm")
def group_norm(out: Writer, node: Node, x: Ref, scale: Ref, bias: Ref) -> Ref:
    """InstanceNormalization for groups of one channel; GroupNormalization, which scales channels since opset 21."""
    shape, groups = node.result.shape, node.attrs["groups"]
    if x.dtype == "float64" or node.result.rank < 3 or 0 in shape:
        return decomposed(out, node, [x, scale, bias])[0]
    eps = float(node.attrs["eps"])
    if groups == shape[1]:
        return out.op("InstanceNormalization", x, scale, bias, epsilon=eps)
    if out.opset < 21:
        return decomposed(out, node, [x, scale, bias])[0]
    made = out.op("GroupNormalization", x, scale, bias, num_groups=groups, epsilon=eps)
    return made


# Attention -------------------------------------------------------------------------------------------------------

def is_plain(out: Writer, node: Node) -> bool:
    """Whether the op Attention (since opset 23) says it: heads of the same lead, and a triangle only of a square."""
    q, k, v = (value.type for value in node.operands[:3])
    lengths = q.shape[-2], k.shape[-2]
    return (out.opset >= 23 and len(node.operands) == 3 and q.rank == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2]
            and q.dtype in ("float32", "float16") and (not node.attrs["causal"] or lengths[0] == lengths[1])
            and 0 not in (*q.shape, *k.shape))


def scale_of(node: Node) -> float:
    """What the scores are multiplied by."""
    scale = node.attrs["scale"]
    return 1 / math.sqrt(int(node.operands[0].shape[-1])) if scale is None else float(scale)


@exports("attention")
def attention(out: Writer, node: Node, q: Ref, k: Ref, v: Ref, *mask: Ref) -> Ref:
    if is_plain(out, node):
        return out.op("Attention", q, k, v, scale=scale_of(node), is_causal=1 if node.attrs["causal"] else None)
    return attention_in_steps(out, node, q, k, v, *mask)


@in_f32
def attention_in_steps(out: Writer, node: Node, q: Ref, k: Ref, v: Ref, *mask: Ref) -> Ref:
    """softmax(q k^T * scale + mask) v. What is not visible gets a weight of exactly 0, also where nothing is."""
    types = [value.type for value in node.operands]
    scores = both(out, "Mul", out.op("MatMul", q, swap_last(out, k, types[1].rank)), scale_of(node))
    conditions: list[tuple[Ref, bool]] = []  # and whether what they hold for is visible
    for m in mask:
        if m.dtype != BOOL:
            scores = out.op("Add", scores, m)
        conditions.append((m if m.dtype == BOOL else out.op("Less", out.like(-np.inf, scores), scores), True))
    if node.attrs["causal"]:
        conditions.append((later_keys(out, types[0].shape[-2], types[1].shape[-2]), False))
    scores = covered(out, scores, conditions, np.finfo(scores.dtype.np).min)
    rank = node.result.rank
    weights = softmax_of(out, "Softmax", scores, rank - 1, rank)
    return out.op("MatMul", covered(out, weights, conditions, 0), v)


def covered(out: Writer, x: Ref, conditions: Sequence[tuple[Ref, bool]], number: float) -> Ref:
    """x with a number where it is not visible."""
    instead = out.like(number, x)
    for condition, visible in conditions:
        x = out.op("Where", condition, *((x, instead) if visible else (instead, x)))
    return x


def later_keys(out: Writer, queries: Size, keys: Size) -> Ref:
    """True where the key comes after the query."""
    rows, columns = unsqueeze(out, counting(out, queries), [1]), unsqueeze(out, counting(out, keys), [0])
    return out.op("Less", rows, columns)


# Cross-entropy ---------------------------------------------------------------------------------------------------

@exports("cross_entropy")
@in_f32
def cross_entropy(out: Writer, node: Node, logits: Ref, labels: Ref) -> Ref:
    types = [v.type for v in node.operands]
    rank, classes = types[0].rank, types[0].shape[-1]
    smoothing, ignored = node.attrs["label_smoothing"], node.attrs["ignore_index"]
    log_p = softmax_of(out, "LogSoftmax", logits, rank - 1, rank)
    wide = out.cast(labels, "int64")
    index = unsqueeze(out, clamped_index(out, wide, classes), [rank - 1])
    picked = out.op("GatherElements", log_p, index, axis=rank - 1)
    loss = out.op("Neg", reshape(out, picked, (*types[1].shape, 1), types[1].shape) if rank > 1
                  else squeeze(out, picked, [0]))
    if smoothing:
        from .export_reduce import reduce
        mean = reduce(out, "ReduceMean", log_p, [rank - 1], False)
        loss = out.op("Sub", both(out, "Mul", loss, 1 - smoothing), both(out, "Mul", mean, smoothing))
    if ignored is not None:
        loss = out.op("Where", both(out, "Equal", wide, ignored), out.like(0, loss), loss)
    return loss


__all__ = ["F32", "matmul", "softmax_of"]
