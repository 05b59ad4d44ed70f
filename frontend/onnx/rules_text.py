"""Features of token sequences: TfIdfVectorizer."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...ir.dtypes import float32
from .. import functions as F
from ..dispatch import as_tensor, cast, constant
from ..tensor import Tensor
from .node import OnnxNode
from .rules import onnx_rule
from .values import is_text, tensor

# N-grams ---------------------------------------------------------------------------------------------------------

def pool_of(node: OnnxNode) -> list[tuple[int, np.ndarray]]:
    """(n, the n-grams of that length as rows), for each length from 1 on."""
    starts = [int(s) for s in node.require("ngram_counts")]
    pool = np.array(node.attr("pool_int64s", None) or node.attr("pool_strings", None) or [])
    ends = [*starts[1:], len(pool)]
    return [(n, pool[start:end].reshape(-1, n)) for n, (start, end) in enumerate(zip(starts, ends), 1)]


def occurrences(rows: Tensor, grams: np.ndarray, skip: int) -> Tensor:
    """How often each n-gram (grams, n) comes in each row (batch, tokens), its tokens `skip` + 1 apart."""
    n = grams.shape[1]
    places = rows.shape[1] - (n - 1) * (skip + 1)
    if places <= 0:
        return F.zeros((rows.shape[0], len(grams)), float32)
    hit = None
    for i in range(n):
        window = rows[:, i * (skip + 1):i * (skip + 1) + places]
        same = F.expand_dims(window, 2) == as_tensor(grams[:, i].astype(rows.dtype.np))
        hit = same if hit is None else F.logical_and(hit, same)
    assert hit is not None
    return F.sum(cast(hit, float32), 1)


@onnx_rule("TfIdfVectorizer", since=9)
def tf_idf(node: OnnxNode, x: Any) -> Tensor:
    """Counts of n-grams in each sequence, weighed or replaced by a weight each."""
    pool = pool_of(node)
    if is_text(x):
        codes = {word: i for i, word in enumerate(dict.fromkeys(w for _, g in pool for w in g.reshape(-1).tolist()))}
        x = np.vectorize(lambda word: codes.get(word, -1), otypes=[np.int64])(x)
        pool = [(n, np.vectorize(codes.__getitem__, otypes=[np.int64])(g) if g.size else g) for n, g in pool]
    x = tensor(x)
    rows = F.reshape(x, (1, x.shape[0])) if x.ndim == 1 else x
    least, most = int(node.require("min_gram_length")), int(node.require("max_gram_length"))
    skips = int(node.attr("max_skip_count", 0))
    parts = []
    for n, grams in pool:
        total = F.zeros((rows.shape[0], len(grams)), float32)
        if least <= n <= most and len(grams):
            for skip in range(skips + 1 if n > 1 else 1):
                total = total + occurrences(rows, grams, skip)
        parts.append(total)
    counts = F.concatenate(parts, 1)
    indexes = np.asarray(node.require("ngram_indexes"), np.int64)
    order = np.full(int(indexes.max()) + 1, len(indexes))
    order[indexes] = np.arange(len(indexes))
    weights = node.attr("weights", None)
    mode = node.attr("mode", "TF")
    if mode != "TF":
        weight = as_tensor(np.asarray([1.0] * len(indexes) if weights is None else list(weights), np.float32))
        counts = counts * weight if mode == "TFIDF" else F.where(counts > 0, weight, constant(0, float32))
    counts = F.concatenate([counts, F.zeros((rows.shape[0], 1), float32)], 1)
    y = F.take(counts, as_tensor(order), axis=1)
    return F.reshape(y, (y.shape[1],)) if x.ndim == 1 else y
