"""Attention, rotary positions, and what the standard builds on them.

The IR's `attention` runs whenever nobody asks for the scores: a bool mask says what is visible, numbers are added. A
query that sees nothing gives zeros, as the standard wants it.
"""

from __future__ import annotations

import math
from typing import Any

from ...ir.dtypes import bool_, int64
from .. import functions as F
from ..dispatch import apply, cast, constant
from ..tensor import Tensor
from .dtypes import dtype_of
from .node import OnnxNode
from .rules import onnx_rule
from .values import tensor


def heads_apart(x: Tensor, heads: int) -> Tensor:
    """(batch, length, heads * size) as (batch, heads, length, size)."""
    batch, length, width = x.shape
    return F.transpose(F.reshape(x, (batch, length, heads, width // heads)), (0, 2, 1, 3))


def heads_together(x: Tensor) -> Tensor:
    """(batch, heads, length, size) as (batch, length, heads * size)."""
    batch, heads, length, size = x.shape
    return F.reshape(F.transpose(x, (0, 2, 1, 3)), (batch, length, heads * size))


def repeated_heads(x: Tensor, heads: int) -> Tensor:
    """Each head as often as groups of queries share it."""
    return x if x.shape[1] == heads else F.repeat(x, heads // x.shape[1], axis=1)


def both_masks(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """Two masks as one: bools are joined by "and", numbers added, and bools among numbers become 0 and -inf."""
    if x is None or y is None:
        return y if x is None else x
    if x.dtype.is_bool and y.dtype.is_bool:
        return F.logical_and(x, y)
    return as_bias(x, y.dtype) + as_bias(y, x.dtype)


def as_bias(mask: Tensor, dtype: Any) -> Tensor:
    """A mask as numbers to add."""
    if not mask.dtype.is_bool:
        return mask
    return F.where(mask, constant(0, dtype), constant(-math.inf, dtype))


def visible(queries: int, keys: int, offset: Any, left: int = -1, right: int = 0) -> Tensor:
    """Which keys j each query i sees: i + offset - left <= j <= i + offset + right; -1: no bound.

    Args:
        offset: a number, or one for each element of the batch (batch,): then the result is (batch, 1, queries, keys).
    """
    i, j = F.reshape(F.arange(queries), (queries, 1)), F.reshape(F.arange(keys), (1, keys))
    i = i + (F.reshape(offset, (-1, 1, 1, 1)) if isinstance(offset, Tensor) else offset)
    seen = None
    if right >= 0:
        seen = j <= i + right
    if left >= 0:
        near = j >= i - left
        seen = near if seen is None else F.logical_and(seen, near)
    return F.ones((queries, keys), bool_) if seen is None else seen


def _mask(node: OnnxNode, mask: Any, queries: int, keys: int, past: int, lengths: Any) -> tuple[Tensor | None, bool]:
    """The mask of a node, and whether the op's own causal flag says the rest."""
    total = None
    if mask is not None:
        total = tensor(mask)
        missing = keys - total.shape[-1]
        if missing:  # what the mask does not speak of is hidden
            total = apply("pad", total, low=(0,) * total.ndim, high=(*(0,) * (total.ndim - 1), missing),
                          interior=(0,) * total.ndim, value=False if total.dtype.is_bool else -math.inf)
    offset: Any = past
    if lengths is not None:
        lengths = cast(tensor(lengths), int64)
        offset = lengths - queries
    causal = bool(node.attr("is_causal", 0))
    left, right = (int(node.attr(f"{side}_window_size", -1)) for side in ("left", "right"))
    plain = causal and lengths is None and past == 0 and left < 0 and right < 0
    if not plain and (causal or left >= 0 or right >= 0):
        right = 0 if causal else right
        total = both_masks(total, visible(queries, keys, offset, left, right))
    if lengths is not None:
        total = both_masks(total, F.reshape(F.arange(keys), (1, 1, 1, keys)) < F.reshape(lengths, (-1, 1, 1, 1)))
    return total, plain


@onnx_rule("Attention", since=23)
def attention(node: OnnxNode, q: Any, k: Any, v: Any, mask: Any = None, past_key: Any = None, past_value: Any = None,
              lengths: Any = None) -> Any:
    """(y, present key, present value, scores) on (batch, heads, length, size) or (batch, length, heads * size)."""
    q, k, v = tensor(q), tensor(k), tensor(v)
    flat = q.ndim == 3
    if flat:
        q, k, v = (heads_apart(x, int(node.require(name))) for x, name in (
            (q, "q_num_heads"), (k, "kv_num_heads"), (v, "kv_num_heads")))
    past = 0
    if past_key is not None:
        past = tensor(past_key).shape[2]
        k, v = F.concatenate([tensor(past_key), k], 2), F.concatenate([tensor(past_value), v], 2)
    present = (k, v)
    heads = q.shape[1]
    k, v = repeated_heads(k, heads), repeated_heads(v, heads)
    total, causal = _mask(node, mask, q.shape[2], k.shape[2], past, lengths)
    scale = node.attr("scale", None)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if node.attr("softcap", 0.0) or node.wants(3):
        y, scores = _step_by_step(node, q, k, v, total, causal, scale)
    else:
        if total is not None and not total.dtype.is_bool and total.dtype != q.dtype:
            total = cast(total, q.dtype)
        y, scores = F.attention(q, k, v, total, causal=causal, scale=scale), None
    return (heads_together(y) if flat else y, *present, scores)


def _step_by_step(node: OnnxNode, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool,
                  scale: float) -> tuple[Tensor, Tensor]:
    """(y, what `qk_matmul_output_mode` asks for), rounded where the standard's function body rounds."""
    root = math.sqrt(scale)
    scores = F.matmul(q * root, k * root, transpose_y=True)
    mode = int(node.attr("qk_matmul_output_mode", 0))
    asked = scores
    cap = node.attr("softcap", 0.0)
    if cap:
        scores = F.tanh(scores / cap) * cap
        asked = scores if mode == 1 else asked
    if causal:
        mask = both_masks(mask, visible(q.shape[2], k.shape[2], 0))
    bias = None if mask is None else cast(as_bias(mask, q.dtype), q.dtype)
    scores = scores if bias is None else scores + bias
    asked = scores if mode == 2 or (mode == 1 and not cap) else asked
    precision = node.attr("softmax_precision", 0)
    inner = dtype_of(node, precision) if precision else scores.dtype
    weights = F.softmax(cast(scores, inner), -1)
    if bias is not None:
        blind = F.max(bias, -1, keepdims=True) == -math.inf
        weights = F.where(blind, constant(0, inner), weights)
    weights = cast(weights, q.dtype)
    return F.matmul(weights, v), weights if mode == 3 else asked


# Rotary positions ------------------------------------------------------------------------------------------------

def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Pairs of the last axis turned by an angle: neighbours if interleaved, else halves (Su et al., 2021)."""
    if interleaved:
        pairs = F.reshape(x, (*x.shape[:-1], x.shape[-1] // 2, 2))
        a, b = pairs[..., 0], pairs[..., 1]
        return F.reshape(F.stack([a * cos - b * sin, a * sin + b * cos], -1), x.shape)
    a, b = F.split(x, 2, axis=-1)
    return F.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor, positions: Any, size: int, interleaved: bool) -> Tensor:
    """The first `size` features (0: all) of every head of x (batch, length, heads, features) turned.

    Args:
        cos, sin: (positions, size / 2), looked up by `positions` (batch, length); or (batch, length, size / 2).
    """
    size = size or x.shape[-1]
    if positions is not None:
        index = tensor(positions)
        cos, sin = (apply("take", table, index, axis=0) for table in (cos, sin))
    cos, sin = (F.expand_dims(table[..., :size // 2], 2) for table in (cos, sin))
    if size == x.shape[-1]:
        return rotated(x, cos, sin, interleaved)
    return F.concatenate([rotated(x[..., :size], cos, sin, interleaved), x[..., size:]], -1)


@onnx_rule("RotaryEmbedding", since=23)
def rotary_embedding(node: OnnxNode, x: Any, cos: Any, sin: Any, positions: Any = None) -> Tensor:
    """x (batch, heads, length, features), or (batch, length, heads * features)."""
    x = tensor(x)
    shape = x.shape
    if x.ndim == 4:
        rows = F.transpose(x, (0, 2, 1, 3))
    else:
        heads = int(node.require("num_heads"))
        rows = F.reshape(x, (*shape[:2], heads, shape[2] // heads))
    y = rotate_heads(rows, tensor(cos), tensor(sin), positions, int(node.attr("rotary_embedding_dim", 0)),
                     bool(node.attr("interleaved", 0)))
    return F.transpose(y, (0, 2, 1, 3)) if x.ndim == 4 else F.reshape(y, shape)
