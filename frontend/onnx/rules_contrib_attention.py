"""The attention ops of the domain com.microsoft.

Their masks add `mask_filter_value` (-10000 by default) to the scores of what is hidden, instead of taking it out.
"""

from __future__ import annotations

import math
from typing import Any

from ...ir.dtypes import int64
from .. import functions as F
from ..dispatch import apply, cast, constant
from ..tensor import Tensor
from .node import OnnxNode
from .rules import CONTRIB, onnx_rule
from .rules_attention import (
    both_masks,
    heads_apart,
    heads_together,
    repeated_heads,
    rotate_heads,
    visible,
)
from .rules_index import tensor_scatter
from .rules_shape import number_of
from .values import tensor


def key_mask(node: OnnxNode, mask: Any, batch: Any, keys: Any, dtype: Any) -> Tensor | None:
    """A mask as numbers to add, (batch, 1, queries or 1, keys): lengths (batch,), or 0 and 1 for each key."""
    if mask is None:
        return None
    mask = tensor(mask)
    if mask.ndim == 1:
        if mask.shape[0] != batch:
            raise node.fail(f"a mask {mask.type} with first and last places is not supported; give a length for each "
                            "sequence, or 0 and 1 for each key")
        seen = F.arange(keys) < F.reshape(cast(mask, int64), (-1, 1))
    else:
        seen = mask if mask.dtype.is_bool else mask > 0
    seen = F.reshape(seen, (seen.shape[0], *(1,) * (4 - seen.ndim), *seen.shape[1:]))
    if seen.shape[-1] != keys or (seen.ndim == 4 and mask.ndim == 4):
        seen = seen[..., :keys]
    return F.where(seen, constant(0, dtype), constant(node.attr("mask_filter_value", -10000.0), dtype))


def attended(node: OnnxNode, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    """softmax(q k' * scale + bias) v on (batch, heads, length, size); causal: counted from the last key."""
    scale = node.attr("scale", 0.0) or 1 / math.sqrt(q.shape[-1])
    queries, keys = q.shape[2], k.shape[2]
    if causal and queries != keys:
        bias = both_masks(bias, visible(queries, keys, keys - queries))
        causal = False
    return F.attention(q, k, v, bias, causal=causal, scale=scale)


@onnx_rule("Attention", domain=CONTRIB, weights=(1, 2))
def attention(node: OnnxNode, x: Any, w: Any, b: Any = None, mask: Any = None, past: Any = None,
              bias: Any = None, past_length: Any = None) -> Any:
    """(y, present): the projections of x to queries, keys and values are part of it."""
    x, w = tensor(x), tensor(w)
    heads = int(node.require("num_heads"))
    sizes = [int(s) for s in node.attr("qkv_hidden_sizes", None) or (w.shape[1] // 3,) * 3]
    projected = F.matmul(x, w)
    projected = projected if b is None else projected + tensor(b)
    q, k, v = (heads_apart(part, heads) for part in F.split(projected, [sizes[0], sizes[0] + sizes[1]], axis=-1))
    if past is not None:
        before = tensor(past)
        k, v = F.concatenate([before[0], k], 2), F.concatenate([before[1], v], 2)
    total = key_mask(node, mask, x.shape[0], k.shape[2], x.dtype)
    total = both_masks(total, None if bias is None else tensor(bias))
    y = heads_together(attended(node, q, k, v, total, bool(node.attr("unidirectional", 0))))
    return (y, F.stack([k, v], 0)) if node.wants(1) else y


def _in_heads(x: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    """(batch, heads, length, size) of whatever form a key or value has; the bias belongs to flat ones."""
    if x.ndim == 4:
        return x
    return heads_apart(x if bias is None else x + bias, heads)


@onnx_rule("MultiHeadAttention", domain=CONTRIB, weights=(3,))
def multi_head_attention(node: OnnxNode, query: Any, key: Any = None, value: Any = None, b: Any = None,
                         mask: Any = None, bias: Any = None, past_key: Any = None, past_value: Any = None,
                         *rest: Any) -> Any:
    """(y, present key, present value); query alone, or query and keys, may hold what the others are cut from."""
    heads, q = int(node.require("num_heads")), tensor(query)
    if q.ndim == 5:                                         # (batch, length, heads, 3, size)
        q, k, v = (F.transpose(q[:, :, :, i], (0, 2, 1, 3)) for i in range(3))
    else:
        parts: list[Any] = [None] * 3
        if b is not None:
            whole, width = tensor(b), q.shape[-1]
            parts = [whole[:width], whole[width:2 * width], whole[2 * width:]]
        q = heads_apart(q if parts[0] is None else q + parts[0], heads)
        if key is None:
            raise node.fail("it needs keys, or queries that hold them")
        k = tensor(key)
        if k.ndim == 5:                                     # (batch, length, heads, 2, size)
            k, v = (F.transpose(k[:, :, :, i], (0, 2, 1, 3)) for i in range(2))
        else:
            k, v = _in_heads(k, heads, parts[1]), _in_heads(tensor(value), heads, parts[2])
    if past_key is not None:
        k, v = F.concatenate([tensor(past_key), k], 2), F.concatenate([tensor(past_value), v], 2)
    total = key_mask(node, mask, q.shape[0], k.shape[2], q.dtype)
    total = both_masks(total, None if bias is None else tensor(bias))
    return heads_together(attended(node, q, k, v, total, bool(node.attr("unidirectional", 0)))), k, v


@onnx_rule("RotaryEmbedding", domain=CONTRIB)
def rotary_embedding(node: OnnxNode, x: Any, positions: Any, cos: Any, sin: Any) -> Tensor:
    """x (batch, length, heads * size) or (batch, heads, length, size); one position stands for the first of a row."""
    x, cos, sin, positions = map(tensor, (x, cos, sin, positions))
    rows = F.transpose(x, (0, 2, 1, 3)) if x.ndim == 4 else x
    size = int(node.attr("rotary_embedding_dim", 0))
    if x.ndim == 3:
        heads = int(node.attr("num_heads", 0)) or x.shape[2] // (2 * cos.shape[-1])
        rows = F.reshape(x, (*x.shape[:2], heads, x.shape[2] // heads))
    if positions.ndim == 1:
        positions = F.reshape(positions, (1, 1)) + F.arange(rows.shape[1])
        positions = F.broadcast_to(positions, rows.shape[:2])
    y = rotate_heads(rows, cos, sin, positions, size, bool(node.attr("interleaved", 0)))
    y = y * node.attr("scale", 1.0) if node.attr("scale", 1.0) != 1.0 else y
    return F.transpose(y, (0, 2, 1, 3)) if x.ndim == 4 else F.reshape(y, x.shape)


@onnx_rule("GroupQueryAttention", domain=CONTRIB, static=(6,))
def group_query_attention(node: OnnxNode, query: Any, key: Any = None, value: Any = None, past_key: Any = None,
                          past_value: Any = None, lengths: Any = None, total: Any = None, cos: Any = None,
                          sin: Any = None, positions: Any = None, bias: Any = None, *rest: Any) -> Any:
    """(y, present key, present value): causal, with a cache whose rows are filled to lengths of their own.

    `lengths` is the number of keys of each row after this step, less one; new keys go behind those of the cache.
    """
    heads, shared = int(node.require("num_heads")), int(node.require("kv_num_heads"))
    q = tensor(query)
    if key is None:
        size = q.shape[-1] // (heads + 2 * shared)
        q, k, v = F.split(q, [heads * size, (heads + shared) * size], axis=-1)
    else:
        k, v = tensor(key), tensor(value)
    batch, steps = q.shape[:2]
    q, k, v = (F.reshape(x, (batch, steps, n, x.shape[2] // n)) for x, n in ((q, heads), (k, shared), (v, shared)))
    whole = number_of(node, total, "total_sequence_length")
    filled = cast(tensor(lengths), int64)
    filled = F.reshape(filled, (batch,)) + 1
    before = F.zeros((batch,), int64) if whole == steps else filled - steps
    if node.attr("do_rotary", 0):
        place = F.reshape(before, (batch, 1)) + F.arange(steps) if positions is None else tensor(positions)
        interleaved = bool(node.attr("rotary_interleaved", 0))
        q, k = (rotate_heads(x, tensor(cos), tensor(sin), place, 2 * tensor(cos).shape[-1], interleaved)
                for x in (q, k))
    q, k, v = (F.transpose(x, (0, 2, 1, 3)) for x in (q, k, v))
    k, v = (_cached(node, past, x, before, whole) for past, x in ((past_key, k), (past_value, v)))
    window = int(node.attr("local_window_size", -1))
    seen = visible(steps, k.shape[2], before, window - 1 if window > 0 else -1, 0)
    mask = both_masks(None if bias is None else tensor(bias), seen)
    if node.attr("softcap", 0.0) or node.attr("smooth_softmax", 0):
        raise node.fail("softcap and smooth_softmax are not supported")
    y = attended(node, q, repeated_heads(k, heads), repeated_heads(v, heads), mask, False)
    return heads_together(y), k, v


def _cached(node: OnnxNode, past: Any, new: Tensor, before: Tensor, whole: Any) -> Tensor:
    """The cache (batch, heads, at least `whole`, size) with the new rows behind the filled ones."""
    if past is None:
        return new
    cache = tensor(past)
    missing = whole - cache.shape[2]
    if not isinstance(missing, int) or missing > 0:
        cache = apply("pad", cache, low=(0, 0, 0, 0), high=(0, 0, missing, 0), interior=(0, 0, 0, 0), value=0)
    return tensor_scatter(node, cache, new, before)
