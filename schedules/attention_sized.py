"""Attention whose numbers of queries, keys and batch elements are known only when it runs.

The loops are those of attention_tir. A kernel holds several of them and takes the first that fits: for sequences of a
tile's size at least, whose keys are one block or several, for shorter ones, and for few queries or few keys
(attention_few.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ..ir.graph import Value
from .attention import GROUP_ROWS, AttentionConfig, AttentionProblem
from .attention_tir import AttentionEmitter, ValueTiles
from .gemm import GemmConfig, GemmHooks
from .gemm_sized import SizedTiles, bound, imports
from .lower_anchors import Epilogue
from .sizes import expression, hint

KEY_BLOCK = 512  # keys of a block, at least


class SizedValueTiles(ValueTiles, SizedTiles):
    """P V of one block of queries."""


class SizedAttention(AttentionEmitter):
    """One of the versions. `many`: keys may be several blocks."""

    def __init__(self, problem: AttentionProblem, config: AttentionConfig, target: Any, epilogue: Epilogue,
                 operands: Sequence[Value], many: bool):
        q, k, v = self.take(problem, config, target, epilogue, operands)
        self.many = many
        cols = config.score_vectors * self.lanes
        scores = GemmConfig(tile_rows=config.tile_rows, tile_cols=cols, col_panels=config.key_panels,
                            pack_a=problem.dtype != self.dtype, dot_bf16=config.dot_bf16)
        self.qk: Any = SizedTiles(problem.scores(), scores, GemmHooks((), a=q, b=k), self.lanes, False)
        self.qk.col_panels = config.key_panels
        self.keys = self.qk.col_panels * cols
        self.key_blocks: Any = (problem.keys + (self.keys - 1)) // self.keys if many else 1
        self.pad = cols if many else 0
        product, tiles = self.value_product()
        hooks = GemmHooks((), b=v, load_a=self.load_score, store=self.store)
        self.pv: Any = SizedValueTiles(product, tiles, hooks, self.lanes, problem.values < tiles.tile_cols)
        self.pv.owned = self.owned
        self.blocks: Any = (problem.queries + (self.rows - 1)) // self.rows
        self.group = max(1, min(GROUP_ROWS // self.rows, hint(self.blocks)))
        self.groups: Any = (self.blocks + (self.group - 1)) // self.group
        self.serial, self.vector = self.pv.serial, self.pv.vector

    def fits(self) -> Any:
        """The condition under which this version may run; True or False where it is known."""
        cols, p = self.qk.cols, self.p
        conditions = [expression(p.queries) >= self.rows] if self.rows > 1 else []
        conditions.append(expression(p.keys) >= cols)
        if not self.many:
            conditions.append(expression(p.keys) <= self.keys)
        if any(c is False for c in conditions):
            return False
        conditions = [c for c in conditions if c is not True]
        return True if not conditions else conditions[0] if len(conditions) == 1 else tirx.all(*conditions)

    def run(self) -> None:
        for part in (self.qk, self.pv):
            part.settle()
        self.blocks, self.groups, self.key_blocks = bound(self.blocks), bound(self.groups), bound(self.key_blocks)
        tasks: Any = self.groups
        for n in self.p.lead:
            tasks = tasks * n
        self.emit_tasks((T.parallel if self.c.parallel else T.serial)(self.qk.extent(tasks)))


def emit_sized(problem: AttentionProblem, config: AttentionConfig, target: Any, epilogue: Epilogue,
               operands: Sequence[Value]) -> None:
    """Emit the kernel's body. `config` was proposed for the expected sizes."""
    from .attention_few import FewAttention  # it is made of the classes above
    lanes = target.vector_bits // (64 if problem.acc_dtype == "float64" else 32)
    cols = config.score_vectors * lanes
    panels = max(config.key_panels, -(-KEY_BLOCK // cols))
    large = replace(config, tiles=1, key_panels=panels, parallel=True)
    few = replace(large, tile_rows=min(4, large.tile_rows), score_vectors=1, key_panels=max(1, KEY_BLOCK // lanes))

    def version(c: AttentionConfig, many: bool) -> SizedAttention:
        return SizedAttention(problem, c, target, epilogue, operands, many)

    in_place = [FewAttention(problem, config, target, epilogue, operands, lanes, alone) for alone in (True, False)]
    versions = [*in_place, version(large, False), version(large, True), version(few, True)]
    with T.attr(0, "pragma_import_llvm", imports([v.qk for v in versions])), ExitStack() as nest:
        for chosen in versions:
            condition = chosen is versions[-1] or chosen.fits()  # the last takes what is left
            if condition is True:
                chosen.run()
                return
            if condition is False:
                continue
            nest.enter_context(T.If(condition))
            with T.Then():
                chosen.run()
            nest.enter_context(T.Else())
