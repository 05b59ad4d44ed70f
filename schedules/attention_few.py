"""Attention of a few queries, or of few keys, whose numbers are known only when it runs.

Packing keys and values does not pay here (`attention.takes`), so both are read where they lie: a score is a dot product
along the features, and values are added up row by row, both by vectors. The rest is that of attention_tir, one query at
a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ..ir.graph import Value
from .attention import FEWEST_QUERIES, AttentionConfig, AttentionProblem
from .attention_sized import KEY_BLOCK, SizedAttention, SizedValueTiles
from .attention_tir import STREAMS
from .gemm import GemmHooks
from .gemm_propose import SERIAL_FLOPS
from .gemm_tir import Index, broadcast_index, convert
from .lower_anchors import Epilogue
from .sizes import expression

MOST_VECTORS = 4  # of values that are summed together


class FewAttention(SizedAttention):
    """`alone`: on one thread."""

    def __init__(self, problem: AttentionProblem, config: AttentionConfig, target: Any, epilogue: Epilogue,
                 operands: Sequence[Value], cols: int, alone: bool):
        lanes = target.vector_bits // (64 if problem.acc_dtype == "float64" else 32)
        one = replace(config, tile_rows=1, tiles=1, score_vectors=1, key_panels=KEY_BLOCK // lanes, dot_bf16=False,
                      value_vectors=max(1, min(MOST_VECTORS, problem.values // lanes)), parallel=not alone)
        self.fewest_keys, self.alone = cols, alone
        super().__init__(problem, one, target, epilogue, operands, True)
        self.q, self.k, self.v = (epilogue.buffer(x) for x in operands[:3])
        self.pad = 0  # no panel of scores is moved back
        product, tiles = self.value_product()
        hooks = GemmHooks((), load_a=self.load_score, load_b=self.load_value, store=self.store)
        self.pv = SizedValueTiles(product, replace(tiles, pack_b=False), hooks, self.lanes,
                                  problem.values < tiles.tile_cols)
        self.pv.owned = self.owned
        self.serial, self.vector = self.pv.serial, self.pv.vector

    def fits(self) -> Any:
        p = self.p
        few: Any = False
        for size, least in ((p.queries, FEWEST_QUERIES), (p.keys, self.fewest_keys)):
            condition = size < least if isinstance(size, int) else expression(size) < least
            few = condition if few is False else few if condition is False else \
                True if few is True or condition is True else tirx.Or(few, condition)
        if few is False or not self.alone:
            return few
        work = p.flops
        small = work < SERIAL_FLOPS if isinstance(work, int) else expression(work) < int(SERIAL_FLOPS)
        return small if few is True else few if small is True else False if small is False else tirx.And(few, small)

    def load_value(self, batch: Sequence[Index], k: Index, j: Index) -> Any:
        index = (*batch, self.k0 + k, T.min(j, self.p.values - 1) if self.pv.narrow else j)
        value = self.v[index]
        return T.if_then_else(j < self.p.values, value, tirx.const(0, value.ty.dtype)) if self.pv.narrow else value

    def allocate(self) -> None:
        super().allocate()
        self.dots = [self.pv.buffer((self.lanes,), self.dtype, "local") for _ in range(STREAMS)]

    def allocate_panels(self) -> None:
        """None: all is read where it lies."""

    def pack(self, block: Index, length: Index) -> None:
        """Nothing."""

    def emit_scores(self, panel: Index) -> None:
        whole = self.visible // STREAMS
        with self.serial(whole) as s:
            self.emit_dots(s * STREAMS, STREAMS)
        with self.serial(self.visible - whole * STREAMS) as key:
            self.emit_dots(whole * STREAMS + key, 1)

    def emit_dots(self, key: Index, count: int) -> None:
        """The scores of `count` keys from `key` of the block on."""
        dots, lanes, features = self.dots[:count], self.lanes, self.p.features
        whole = features // lanes

        def products(f: Index) -> list[Any]:
            q = self.element(self.q, self.p.lead_q, self.q0, f)
            return [q * self.element(self.k, self.p.lead_k, self.k0 + key + r, f) for r in range(count)]

        for dot in dots:
            with self.vector() as lane:
                T.buffer_store(dot, self.const(0), [lane])
        with self.serial(whole) as v, self.vector() as lane:
            for dot, product in zip(dots, products(v * lanes + lane)):
                T.buffer_store(dot, dot[lane] + product, [lane])
        with self.serial(features - whole * lanes) as f:
            for dot, product in zip(dots, products(whole * lanes + f)):
                T.buffer_store(dot, dot[0] + product, [0])
        self.fold(dots, lambda x, y: x + y)
        for r, dot in enumerate(dots):
            T.buffer_store(self.scores, dot[0] * self.const(self.p.scale), [0, key + r])

    def element(self, buffer: Any, lead: Sequence[Any], row: Index, column: Index) -> Any:
        index = (*broadcast_index(self.batch, lead), row, column)
        return convert(buffer[index], self.dtype)
