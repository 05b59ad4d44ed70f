"""Lowering of reductions: identity, combination, last step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx

from ..ir import ops as _ops  # noqa: F401  (declares the ops whose slots are filled here)
from ..ir.dims import Dim, Size
from ..ir.graph import Node
from ..ir.opdef import fill
from ..ir.ops_reduce import highest, lowest
from .lower_elementwise import add, maximum, minimum, mul
from .lower_slots import Reduce, compute_dtype, const
from .sizes import expression


def reduction(name: str, identity: Callable[[Any], Any], combine: Callable[[Any, Any], Any],
              finish: Callable[[Node, Any, int], Any] = lambda node, total, count: total) -> None:
    def start(node: Node) -> Any:
        dtype = compute_dtype(node.result.dtype)
        return const(identity(np.dtype(dtype)), dtype)
    fill("lower", name, Reduce(start, lambda node, a, b: combine(a, b), finish))


def mean(node: Node, total: Any, count: Size) -> Any:
    dtype = str(total.ty.dtype)
    if isinstance(count, Dim):
        return total / tirx.Cast(dtype, expression(count))
    return total / const(float(count) if count else float("nan"), dtype)


reduction("reduce_sum", lambda d: 0, add)
reduction("reduce_mean", lambda d: 0, add, mean)
reduction("reduce_prod", lambda d: 1, mul)
reduction("reduce_max", lowest, maximum)
reduction("reduce_min", highest, minimum)
reduction("reduce_any", lambda d: False, tirx.Or)
reduction("reduce_all", lambda d: True, tirx.And)
