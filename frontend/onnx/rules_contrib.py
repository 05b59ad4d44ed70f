"""Ops of the domain com.microsoft that ONNX Runtime's exporters and optimizers put into models, attention aside.

Definitions: docs/ContribOperators.md of ONNX Runtime.
"""

from __future__ import annotations

from typing import Any

from ...ir.dtypes import as_dtype, float32, int64
from .. import functions as F
from ..dispatch import apply, cast
from ..nn import functional as N
from ..tensor import Tensor
from .node import OnnxNode
from .rules import CONTRIB, onnx_rule
from .rules_math import scaled_silu
from .rules_nn import convolved, gemm, scaled
from .rules_norm import layer_normalized, moments, rms_normalized
from .rules_recurrent import ACTIVATIONS
from .rules_shape import axis_of, trilu
from .values import tensor

# Activations -----------------------------------------------------------------------------------------------------


@onnx_rule("Gelu", domain=CONTRIB)
def gelu(node: OnnxNode, x: Any) -> Tensor:
    return N.gelu(tensor(x))


@onnx_rule("BiasGelu", domain=CONTRIB, weights=(1,))
def bias_gelu(node: OnnxNode, x: Any, bias: Any) -> Tensor:
    return N.gelu(tensor(x) + tensor(bias))


@onnx_rule("FastGelu", domain=CONTRIB, weights=(1,))
def fast_gelu(node: OnnxNode, x: Any, bias: Any = None) -> Tensor:
    return N.gelu(tensor(x) if bias is None else tensor(x) + tensor(bias), approximate="tanh")


@onnx_rule("QuickGelu", domain=CONTRIB)
def quick_gelu(node: OnnxNode, x: Any) -> Tensor:
    return scaled_silu(tensor(x), node.attr("alpha", 1.702))


@onnx_rule("BiasSplitGelu", domain=CONTRIB, weights=(1,))
def bias_split_gelu(node: OnnxNode, x: Any, bias: Any) -> Tensor:
    """The first half of the features times gelu of the second."""
    value, gate = F.split(tensor(x) + tensor(bias), 2, axis=-1)
    return value * N.gelu(gate)


@onnx_rule("BiasAdd", domain=CONTRIB, weights=(1,))
def bias_add(node: OnnxNode, x: Any, bias: Any, skip: Any) -> Tensor:
    return tensor(x) + tensor(bias) + tensor(skip)


@onnx_rule("BiasSoftmax", domain=CONTRIB)
def bias_softmax(node: OnnxNode, x: Any, bias: Any) -> Tensor:
    """softmax(x + bias) over the axes from `axis` on; the bias broadcasts over inner or over outer batch axes."""
    x, bias = tensor(x), tensor(bias)
    axis = axis_of(node, int(node.attr("axis", 1)), x.ndim)
    if not node.attr("is_inner_broadcast", 1) and bias.ndim < x.ndim:
        bias = F.reshape(bias, (*bias.shape[:axis], *(1,) * (x.ndim - bias.ndim), *bias.shape[axis:]))
    y = x + bias
    flat = F.reshape(y, (*y.shape[:axis], -1))
    return F.reshape(F.softmax(flat, axis=-1), y.shape)


def activated(node: OnnxNode, x: Tensor, prefix: str = "activation") -> Tensor:
    """x after the function that a fused node names."""
    name = str(node.attr(prefix, "") or "").lower()
    given = [float(v) for v in node.attr("activation_params", None) or ()]
    if not given:
        given = [node.attr(f"activation_{p}", None) for p in ("alpha", "beta", "gamma")]
        given = [v for v in given if v is not None]
    if not name:
        return x
    if name == "clip":
        return F.clip(x, *(given or [-3.4e38, 3.4e38])[:2])
    if name not in ACTIVATIONS:
        raise node.fail(f"the activation {name!r} is unknown; known are {', '.join(sorted(ACTIVATIONS))}")
    first, second = (*given, *([0.01, 0.0] if name == "leakyrelu" else [0.2, 0.5])[len(given):])[:2]
    return ACTIVATIONS[name](x, first, second)


# Products and convolutions ---------------------------------------------------------------------------------------

@onnx_rule(("FusedMatMul", "TransposeMatMul"), domain=CONTRIB, weights=(0, 1))
def fused_matmul(node: OnnxNode, x: Any, y: Any) -> Tensor:
    """alpha * x' y'; transBatchA and B move the first axis behind the other batch axes."""
    x, y = (_batch_last(tensor(v)) if node.attr(f"transBatch{side}", 0) else tensor(v)
            for v, side in ((x, "A"), (y, "B")))
    product = F.matmul(x, y, transpose_x=bool(node.attr("transA", 0)), transpose_y=bool(node.attr("transB", 0)))
    return scaled(product, node.attr("alpha", 1.0))


def _batch_last(x: Tensor) -> Tensor:
    return F.moveaxis(x, 0, x.ndim - 2)


@onnx_rule("FusedGemm", domain=CONTRIB, weights=(0, 1, 2))
def fused_gemm(node: OnnxNode, a: Any, b: Any, c: Any = None) -> Tensor:
    return activated(node, gemm(node, a, b, c))


@onnx_rule("FusedConv", domain=CONTRIB, weights=(1, 2))
def fused_conv(node: OnnxNode, x: Any, w: Any, b: Any = None, z: Any = None) -> Tensor:
    """A convolution, plus z, activated."""
    y = convolved(node, tensor(x), tensor(w), b)
    return activated(node, y if z is None else y + tensor(z))


@onnx_rule(("NhwcConv", "NhwcFusedConv"), domain=CONTRIB, weights=(1, 2))
def nhwc_conv(node: OnnxNode, x: Any, w: Any, b: Any = None, z: Any = None) -> Tensor:
    """x and the result have the channels last."""
    y = F.moveaxis(convolved(node, F.moveaxis(tensor(x), -1, 1), tensor(w), b), 1, -1)
    return activated(node, y if z is None else y + tensor(z))


@onnx_rule("MatMulNBits", domain=CONTRIB)
def matmul_nbits(node: OnnxNode, a: Any, b: Any, scales: Any, zeros: Any = None, groups: Any = None,
                 bias: Any = None) -> Tensor:
    """A product with weights in blocks of 4 or 8 bits, each block with a scale and a zero point."""
    a, b, scales = tensor(a), tensor(b), tensor(scales)
    k, n, bits, block = (int(node.require(name)) if name in ("K", "N") else int(node.attr(name, 4))
                         for name in ("K", "N", "bits", "block_size"))
    if bits not in (4, 8) or groups is not None:
        raise node.fail("only 4 and 8 bits are supported, without g_idx")
    blocks = -(-k // block)
    values = unpacked(F.reshape(b, (n, blocks, block * bits // 8)), bits)
    if zeros is None:
        offset: Any = float(1 << (bits - 1))
    else:
        offset = tensor(zeros)
        if offset.dtype == "uint8":
            offset = unpacked(F.reshape(offset, (n, offset.size // n)), bits)[:, :blocks]
        offset = F.reshape(cast(offset, a.dtype), (n, blocks, 1))
    weight = (cast(values, a.dtype) - offset) * F.reshape(scales, (n, blocks, 1))
    y = F.matmul(a, F.reshape(weight, (n, blocks * block))[:, :k], transpose_y=True)
    return y if bias is None else y + tensor(bias)


def unpacked(x: Tensor, bits: int) -> Tensor:
    """Bytes as numbers of so many bits, the low ones first, along the last axis."""
    if bits == 8:
        return x
    halves = F.stack([F.bitwise_and(x, 15), F.right_shift(x, 4)], -1)
    return F.reshape(halves, (*x.shape[:-1], 2 * x.shape[-1]))


# Normalisations --------------------------------------------------------------------------------------------------

def _summed(x: Tensor, skip: Any, bias: Any) -> Tensor:
    total = x + tensor(skip)
    return total if bias is None else total + tensor(bias)


@onnx_rule("SkipLayerNormalization", domain=CONTRIB, weights=(2, 3, 4))
def skip_layer_norm(node: OnnxNode, x: Any, skip: Any, gamma: Any, beta: Any = None, bias: Any = None) -> Any:
    """(y, mean, 1 / deviation, x + skip + bias): layer normalisation of the sum."""
    total, eps = _summed(tensor(x), skip, bias), node.attr("epsilon", 1e-12)
    y = layer_normalized(total, tensor(gamma), None if beta is None else tensor(beta), total.ndim - 1, eps)
    found = moments(total, total.ndim - 1, eps) if node.wants(1) or node.wants(2) else (None, None)
    return (y, *found, total)


@onnx_rule("SkipSimplifiedLayerNormalization", domain=CONTRIB, weights=(2, 3))
def skip_rms_norm(node: OnnxNode, x: Any, skip: Any, gamma: Any, bias: Any = None) -> Any:
    total, eps = _summed(tensor(x), skip, bias), node.attr("epsilon", 1e-12)
    return rms_normalized(total, tensor(gamma), total.ndim - 1, eps), None, None, total


@onnx_rule("SimplifiedLayerNormalization", weights=(1,))
def rms_norm(node: OnnxNode, x: Any, scale: Any) -> Any:
    """(y, 1 / root mean square); ONNX Runtime has it in the standard's domain."""
    x, eps = tensor(x), node.attr("epsilon", 1e-5)
    axis = axis_of(node, int(node.attr("axis", -1)), x.ndim)
    y = rms_normalized(x, tensor(scale), axis, eps)
    if not node.wants(1):
        return y
    wide = cast(x, float32) if x.dtype.bits < 32 else x
    return y, F.rsqrt(F.mean(F.square(wide), tuple(range(axis, x.ndim)), keepdims=True) + eps)


@onnx_rule("EmbedLayerNormalization", domain=CONTRIB, weights=(2, 3, 4, 5, 6))
def embed_layer_norm(node: OnnxNode, ids: Any, segments: Any, words: Any, positions: Any, kinds: Any, gamma: Any,
                     beta: Any, mask: Any = None, position_ids: Any = None) -> Any:
    """(y, visible tokens of each sequence, sum): the embeddings of words, places and segments, added and normalised."""
    ids, table = tensor(ids), tensor(positions)
    total = apply("take", tensor(words), ids, axis=0)
    if position_ids is None:
        total = total + table[:ids.shape[1]]
    else:
        total = total + apply("take", table, tensor(position_ids), axis=0)
    if segments is not None and kinds is not None:
        total = total + apply("take", tensor(kinds), tensor(segments), axis=0)
    y = layer_normalized(total, tensor(gamma), tensor(beta), 2, node.attr("epsilon", 1e-12))
    count = F.zeros((ids.shape[0],), int64) if mask is None else F.sum(cast(tensor(mask), int64), 1)
    return y, cast(count, as_dtype("int32")), total


@onnx_rule(("GroupNorm", "SkipGroupNorm"), domain=CONTRIB, weights=(1, 2))
def nhwc_group_norm(node: OnnxNode, x: Any, gamma: Any, beta: Any, skip: Any = None, bias: Any = None) -> Any:
    """(y, sum): group normalisation with the channels last, perhaps of a sum, perhaps with swish after it."""
    total = tensor(x)
    for more in (skip, bias):
        if more is not None:
            extra = tensor(more)
            total = total + (F.reshape(extra, (extra.shape[0], 1, 1, -1)) if extra.ndim == 2 else extra)
    last = bool(node.attr("channels_last", 1))
    planes = F.moveaxis(total, -1, 1) if last else total
    scale, shift = (cast(tensor(p), planes.dtype) for p in (gamma, beta))
    y = F.group_norm(planes, scale, shift, groups=int(node.require("groups")), eps=node.attr("epsilon", 1e-5))
    y = scaled_silu(y, 1.0) if node.attr("activation", 0) else y
    return F.moveaxis(y, 1, -1) if last else y, total


onnx_rule("Trilu", domain=CONTRIB, static=(1,))(trilu)
