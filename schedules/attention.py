"""Attention in one kernel: softmax(Q K^T * scale + mask) V without the matrix of scores.

Memory holds the scores of one block of queries against one block of keys, which stays in the L2 cache
(Dao et al., "FlashAttention", 2022; the running softmax is Milakov and Gimelshein's, 2018).

    task = (batch, group of query blocks)                               one iteration of the parallel loop
      for each block of keys that the group sees
        pack K^T and V into panels, once for all queries of the group
        for each block of queries that sees some of these keys
          S = Q K^T * scale, mask                                       a register-tiled product (gemm_tir)
          peak, P = exp(S - peak), sum of P                             a pass each
          O = O * exp(old peak - new peak) + P V                        a register-tiled product
      store O / sum

Most often all keys are one block; then nothing is carried and O / sum goes from the registers to the epilogue.
Causality shortens every loop over keys to what a block of queries sees: half of the work is not done.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

from ..ir import ops as _ops  # noqa: F401  (declares the op whose slot is filled here)
from ..ir.graph import Node
from ..ir.opdef import fill
from .gemm import GemmProblem
from .gemm_propose import SERIAL_FLOPS, Machine, machine
from .lower_anchors import Epilogue
from .lower_slots import Anchor, compute_dtype
from .sizes import hint, hinted, is_dynamic

FLOATS = ("float64", "float32", "float16", "bfloat16")
GROUP_ROWS = 512    # queries that share packed keys: packing them is then below 2 % of the work
MOST_TILES = 4      # register tiles along the queries of a block
FEWEST_ROWS = 48    # queries from which a task may pack keys for itself
FEWEST_QUERIES = 4  # of each head
FEWEST_ALONE = 128  # queries, where there is one head only
LONG = 1024         # keys


@dataclass(frozen=True)
class AttentionProblem:
    """The sizes of one attention; `lead_*` are the leading axes of each operand, `lead` of the result."""

    lead: tuple[int, ...]
    lead_q: tuple[int, ...]
    lead_k: tuple[int, ...]
    lead_v: tuple[int, ...]
    queries: int
    keys: int
    features: int
    values: int
    dtype: str
    scale: float
    causal: bool

    @staticmethod
    def of(node: Node) -> AttentionProblem:
        q, k, v = node.operands[:3]
        scale = node.attrs["scale"]
        return AttentionProblem(
            node.result.shape[:-2], q.shape[:-2], k.shape[:-2], v.shape[:-2], q.shape[-2], k.shape[-2], q.shape[-1],
            v.shape[-1], str(q.dtype), 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale),
            node.attrs["causal"])

    @property
    def acc_dtype(self) -> str:
        return compute_dtype(self.dtype)

    @property
    def flops(self) -> int:
        return 2 * math.prod(self.lead) * self.queries * self.keys * (self.features + self.values)

    def expected(self) -> AttentionProblem:
        """The same with the sizes that are expected."""
        return replace(self, lead=hinted(self.lead), lead_q=hinted(self.lead_q), lead_k=hinted(self.lead_k),
                       lead_v=hinted(self.lead_v), queries=hint(self.queries), keys=hint(self.keys))

    def scores(self) -> GemmProblem:
        return GemmProblem(self.queries, self.keys, self.features, False, True, self.lead_q, self.lead_k, self.dtype,
                           self.dtype, self.acc_dtype)


@dataclass(frozen=True)
class AttentionConfig:
    """tile_rows, tiles:      rows of a register tile, tiles along a block of queries
    score_vectors, value_vectors: columns of the register tiles of the two products, in vectors
    key_panels:           panels of the first product's columns in a block of keys
    groups:               tasks that the queries of one batch element are shared among
    dot_bf16:             take the products of bfloat16 queries and keys by pairs
    """

    tile_rows: int
    tiles: int
    score_vectors: int
    value_vectors: int
    key_panels: int
    groups: int
    dot_bf16: bool
    parallel: bool

    @property
    def rows(self) -> int:
        """Queries of a block."""
        return self.tile_rows * self.tiles


def propose(p: AttentionProblem, target: Any) -> AttentionConfig:
    """The cheapest register tiles by the model of `gemm_propose.cycles`, and blocks of keys that fit the L2 cache."""
    if is_dynamic(p.queries, p.keys, *p.lead):
        return propose(p.expected(), target)
    m = machine(p.scores(), target)
    shapes = [(rows, tiles, vs, vv) for vs, vv in itertools.product((1, 2, 3), repeat=2)
              for rows in range(1, min((m.registers - max(vs, vv) - 1) // max(vs, vv), p.queries) + 1)
              for tiles in range(1, MOST_TILES + 1) if rows * tiles <= p.queries]
    rows, tiles, vs, vv = min(shapes, key=lambda shape: cycles(p, m, *shape))
    size = 8 if p.acc_dtype == "float64" else 4
    panels = -(-p.keys // (vs * m.lanes))
    fit = m.l2_bytes // 2 // (vs * m.lanes * size * (p.features + p.values + rows * tiles))
    key_panels = panels if panels <= fit * 3 // 2 else max(fit, 128 // (vs * m.lanes), 1)
    blocks, batch = -(-p.queries // (rows * tiles)), math.prod(p.lead)
    shares = -(-2 * m.threads // batch) if m.threads > 1 else 1
    groups = max(-(-p.queries // GROUP_ROWS), min(shares, p.queries // FEWEST_ROWS), 1)
    return AttentionConfig(rows, tiles, vs, vv, key_panels, min(groups, blocks), m.dot_bf16, p.flops > SERIAL_FLOPS)


def cycles(p: AttentionProblem, m: Machine, rows: int, tiles: int, vs: int, vv: int) -> float:
    """Modelled cycles of one batch element, without what does not depend on the tiles."""
    def product(columns: int, depth: int, v: int) -> float:
        tile = depth * (max(rows * v, rows + v) / 2 + 0.3) + rows * v * 2 + 30
        return -(-columns // (v * m.lanes)) * (tiles * tile + depth * v)  # a panel comes from the L2 cache once
    block = product(p.keys, p.features, vs) + product(p.values, p.keys, vv) + 200
    block += rows * tiles * -(-p.keys // m.lanes) * 20  # softmax
    waste = 1 + rows * tiles / min(p.queries, p.keys) if p.causal else 1.0
    return -(-p.queries // (rows * tiles)) * block * waste


def takes(node: Node) -> bool:
    """Whether the fused kernel is the better one.

    It packs keys and values, which a few queries do not pay for: decomposed products read K and V where they lie, and
    the scores are few. One head of few queries is too little to share among threads besides. Decomposed takes, in f32
    with 64 features on two cores of a Zen 4 (processor time): 0.5 to 0.7 of the fused kernel's time for 1 query of
    64 heads and 512 keys (1.06 for 4, 1.5 for 8); 0.5 for 8 and for 100 queries of one head with 8192 and 1500 keys,
    1.08 for 128 queries with 128 keys.
    """
    q, k, v = (o.type for o in node.operands[:3])
    if is_dynamic(q.shape[-1], v.shape[-1]) or str(q.dtype) not in FLOATS:
        return False
    if node.result.type.size == 0 or k.size == 0 or q.size == 0:
        return False
    heads, queries = hint(math.prod(node.result.shape[:-2])), hint(q.shape[-2])
    few = heads * queries < FEWEST_ROWS and hint(k.shape[-2]) > LONG
    return queries >= (FEWEST_ALONE if heads == 1 else FEWEST_QUERIES) and not few


def attention(node: Node, epilogue: Epilogue, target: Any, name: str) -> Any:
    """The PrimFunc of an attention with what is fused behind it."""
    from .attention_tir import build_primfunc
    problem = AttentionProblem.of(node)
    return build_primfunc(problem, propose(problem, target), target, name, epilogue, node.operands)


fill("lower", "attention", Anchor(attention, takes))
