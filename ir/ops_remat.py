"""Recomputation: a region whose inner values are not kept, and the barrier that keeps a recomputation apart.

`remat` calls its region. What is special is its gradient, which computes the region again from the operands instead
of keeping what it made on the way. The operands of that second computation go through a `barrier`: without it the
passes would find the two computations equal and merge them, and everything would be kept after all.
"""

from __future__ import annotations

from typing import Any

from .builder import copy_into
from .graph import Value
from .opdef import fill
from .ops_common import TensorType, define
from .ops_control import check_region, check_regions, region_bytes, region_flops


def remat_infer(*operands: TensorType, regions: Any) -> tuple[TensorType, ...]:
    check_regions(regions, "body")
    check_region("body", "takes", regions[0].input_types, operands)
    return regions[0].output_types


define("remat", "*operands", remat_infer, lambda *operands, regions: tuple(regions[0](*operands)),
       "The results of its region; the gradient computes the region again instead of keeping its inner values.",
       traits=["regions"], flops=lambda node: region_flops(node.regions[0]),
       nbytes=lambda node: region_bytes(node.regions[0]))


def remat_decompose(*operands: Value, regions: Any) -> tuple[Value, ...]:
    return tuple(copy_into(regions[0], operands))


fill("decompose", "remat", remat_decompose)

define("barrier", "*xs", lambda *xs: tuple(xs), lambda *xs: tuple(xs),
       "Its operands, unchanged. Equal barriers are not merged, so neither is what is computed from their results.",
       traits=["barrier"], nbytes=lambda node: 0, unlowered="the pass `erase` removes it (ir/decompose.py)")
