"""Which schedule a product gets: tiles that fit the registers and waste least, blocks that fit the caches."""
from __future__ import annotations
from collections.abc import Iterator
from .gemm import GemmConfig, GemmProblem, GemmTarget, dtype_bits

def propose(problem, target, plain_a=True, plain_b=True):
    lanes = target.vector_bits // dtype_bits(problem.acc_dtype)
    rows = 12 if target.vector_bits == 512 else 6
    cols = lanes * 2
    while cols > lanes and problem.n < cols:
        cols -= lanes
    return GemmConfig(tile_rows=min(rows, max(problem.m, 1)), tile_cols=cols, k_block=2048, parallel=problem.flops > 1e6)


def candidates(problem, target):
    yield propose(problem, target)
