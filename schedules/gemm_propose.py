"""Which schedule a product gets: tiles that fit the registers and waste least, blocks that fit the caches.

The choice is the cheapest of a few hundred combinations under a model of one core's cycles. Its constants are
in the unit "cycles of a core that starts two vector FMAs and two vector loads in each"; only their ratios matter.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .gemm import GemmConfig, GemmProblem, GemmTarget, dtype_bits

SMALL_ROWS = 16  # up to here B is streamed once, not packed
SERIAL_FLOPS = 1 << 19  # below this, waking another thread costs more than it brings
UNBLOCKED = 1 << 30
PACK_ROWS = 64  # of a transposed A, copied at once: whole cache lines, and few pages of memory at a time
WIDE_VECTORS = 32  # columns of B, in vectors, that one packed tile of A is multiplied with


@dataclass(frozen=True)
class Machine:
    """The target's numbers that decide a schedule, hashable whatever the target is."""

    lanes: int  # of the accumulators' type
    registers: int
    threads: int
    l2_bytes: int
    l3_bytes: int
    dot_bf16: bool


def machine(problem: GemmProblem, target: GemmTarget) -> Machine:
    both_bf16 = problem.dtype_a == problem.dtype_b == "bfloat16" and problem.acc_dtype == "float32"
    return Machine(target.vector_bits // dtype_bits(problem.acc_dtype), 32 if wide_file(target) else 16,
                   max(1, target.threads), getattr(target, "l2_bytes", 1 << 20), getattr(target, "l3_bytes", 8 << 20),
                   both_bf16 and target.has("avx512bf16"))


def wide_file(target: GemmTarget) -> bool:
    """Whether there are 32 vector registers (AVX-512, also at half width, and ARM) and not 16."""
    return target.vector_bits >= 512 or target.has("avx512vl") or target.has("neon")


def propose(problem: GemmProblem, target: GemmTarget, plain_a: bool = True, plain_b: bool = True) -> GemmConfig:
    """The schedule to take without measurements. `plain_a`, `plain_b`: the operand is a buffer, not a load hook."""
    return _propose(problem, machine(problem, target), plain_a, plain_b)


@functools.lru_cache(maxsize=4096)
def _propose(problem: GemmProblem, m: Machine, plain_a: bool, plain_b: bool) -> GemmConfig:
    if problem.folds:
        problem = problem.folded()
    parallel = problem.flops > SERIAL_FLOPS
    if not math.prod(problem.shape_c) or not problem.k:
        return GemmConfig(tile_cols=m.lanes, parallel=False)
    if problem.n < m.lanes <= problem.m:
        return replace(_propose(problem.swapped(), m, plain_b, plain_a), swap=True)
    if problem.m <= SMALL_ROWS and problem.n >= m.lanes:
        config = few_rows(problem, m, plain_b)
        if config:
            return replace(config, parallel=parallel)
    best = min(tile_configs(problem, m, plain_a), key=lambda c: cycles(problem, c, m))
    return replace(best, parallel=parallel)


def few_rows(p: GemmProblem, m: Machine, plain_b: bool) -> GemmConfig | None:
    """Every element of B is used so few times that copying it first would cost more."""
    if p.transpose_b:
        if (p.transpose_a and p.m > 1) or (p.m > 4 and not plain_b):
            return None
        return GemmConfig(kind="dot", tile_rows=-(-p.m // -(-p.m // 4)), tile_cols=m.lanes)
    vectors = range(1, min(16, max(1, m.registers * 3 // 4 // p.m), p.n // m.lanes) + 1)

    def share(v: int) -> tuple[float, int]:
        """Columns of the busiest thread, and then: long runs of memory are better."""
        tasks = -(-p.n // (v * m.lanes)) * math.prod(p.batch)
        return -(-tasks // m.threads) * v * (1 + 0.5 / v), -v
    return GemmConfig(tile_rows=p.m, tile_cols=min(vectors, key=share) * m.lanes, pack_b=False, dot_bf16=m.dot_bf16)


def tile_configs(p: GemmProblem, m: Machine, plain_a: bool) -> Iterator[GemmConfig]:
    """The combinations among which the model chooses."""
    converts = p.dtype_a != p.acc_dtype and not m.dot_bf16
    one_tile = p.m <= SMALL_ROWS
    halves = m.dot_bf16 and p.k % 2 == 1  # rows of A do not start on whole pairs
    pack_a = not plain_a or converts or halves or (p.transpose_a and not (one_tile and not m.dot_bf16))
    size = 2 if m.dot_bf16 else dtype_bits(p.acc_dtype) // 8
    for rows, v in register_tiles(p, m):
        panels, tiles = -(-p.n // (v * m.lanes)), -(-p.m // rows)
        a_bytes = p.m * p.k * size
        wide = pack_a or a_bytes > m.l3_bytes
        most = max(1, WIDE_VECTORS // v)
        shares = {-(-panels // (m.threads * i)) for i in (1, 2, 3, 4)}
        for col_panels in sorted({min(c, panels, most) for c in ({most // 2, most, *shares} if wide else {1})}):
            k_block = k_blocks(p, m, col_panels * v * m.lanes * size, rows)
            for blocks in sorted({1, m.threads, 2 * m.threads, 4 * m.threads}):
                if blocks > tiles:
                    break
                yield GemmConfig(tile_rows=rows, tile_cols=v * m.lanes, k_block=k_block, row_tiles=-(-tiles // blocks),
                                 col_panels=col_panels, order="panels" if wide else "rows", pack_a=pack_a,
                                 pack_tiles=-(-PACK_ROWS // rows) if pack_a and p.transpose_a else 1,
                                 dot_bf16=m.dot_bf16)


def register_tiles(p: GemmProblem, m: Machine) -> Iterator[tuple[int, int]]:
    """(rows, vectors of columns) whose accumulators leave room for a row of B and an element of A."""
    for v in (2, 3, 4, 1) if p.m <= 6 else (2, 3, 1):
        most = min((m.registers - v - 1) // v, p.m)
        if v > 1 and v * m.lanes > p.n:
            continue
        for rows in range(most, max(0, min(most, 16 // v) - 1), -1):
            yield rows, v


def k_blocks(p: GemmProblem, m: Machine, bytes_per_k: int, rows: int) -> int:
    """Steps along K per block: what is packed stays in half of the L2 cache; blocks are even."""
    step = 2 * m.lanes
    limit = max(256, min(512, m.l2_bytes // 2 // bytes_per_k))
    if p.k <= limit * 3 // 2:
        return UNBLOCKED
    blocks = -(-p.k // limit)
    return -(-p.k // blocks // step) * step


def cycles(p: GemmProblem, c: GemmConfig, m: Machine) -> float:
    """Modelled cycles of the busiest thread."""
    v, k = c.tile_cols // m.lanes, p.k / 2 if c.dot_bf16 else p.k
    panels, tiles = -(-p.n // c.tile_cols), -(-p.m // c.tile_rows)
    tasks = math.prod(p.batch) * -(-panels // c.col_panels) * -(-tiles // c.row_tiles)
    blocks = max(1, -(-p.k // c.k_block))
    per_k = max(c.tile_rows * v, c.tile_rows + v) / 2 + 0.3
    if not c.pack_a and c.tile_rows > 10 and p.k * dtype_bits(p.dtype_a) // 8 % 4096 == 0:
        per_k *= 1.04  # rows of A that share their sets of the L1 cache
    tile = per_k * k + c.tile_rows * v * (2 + 3 * (blocks - 1)) + 30
    pack_b = v * k * ((3.0 if p.transpose_b else 1.0) + (1.0 if c.dot_bf16 else 0.0))
    copy_a = 3.0 + 2.0 * (c.tile_rows % 4 > 0) if p.transpose_a else c.tile_rows * 1.5 / m.lanes
    pack_a = k * copy_a if c.pack_a else 0.0
    task = c.row_tiles * (c.col_panels * tile + pack_a) + c.col_panels * pack_b + 300
    return -(-tasks // m.threads) * task


def candidates(problem: GemmProblem, target: GemmTarget) -> Iterator[GemmConfig]:
    """See gemm.candidates: the neighbourhood of the proposal, for a tuner to measure."""
    first = propose(problem, target)
    seen = {first}
    yield first
    if first.kind == "dot" or not first.pack_b:
        return
    rows = sorted({min(r, problem.m) for r in (first.tile_rows, first.tile_rows - 2, first.tile_rows + 1, 8)} - {0, -1})
    for r, k_block, panels, order in itertools.product(
            rows, (UNBLOCKED, 256, 512, 1024), (1, 4, first.col_panels, 16), ("rows", "panels")):
        config = replace(first, tile_rows=r, k_block=k_block, col_panels=panels, order=order)
        if config not in seen and r * first.tile_cols <= first.tile_cols * 28:
            seen.add(config)
            yield config
