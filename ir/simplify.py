"""Algebraic simplification and constant folding.

A rule is a function of a node that returns what to use instead of its result, or None. Rules are tried in the order
of their declaration, when the node is made, with operands that are simple already; what a rule emits is simplified
in turn. So one walk settles most graphs, and a second confirms it.

What a rule must keep: every finite result up to rounding of the last place, NaN and infinities (so `x - x` and
`0 * x` stay), dtypes and shapes. What it need not keep is the sign of a zero, as in `x + 0`.

simplify_views.py holds the rules of ops that move elements, loops.py those of loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import interp
from . import ops as _declared  # noqa: F401  (the ops that rules speak of)
from .builder import copy_into, emit
from .dce import sweep
from .dtypes import DType
from .graph import Graph, Node, Value
from .loops import LOOP_RULES
from .pipeline import Pass, PassResult
from .rewrite import Rewriter, rewrite
from .simplify_match import Rule, constant_of, fill_like, like, made_by, scalar_like, spread, uniform
from .simplify_views import VIEW_RULES
from .types import broadcast_shapes

FOLD_ELEMENTS = 1024  # constants are folded up to this size; larger ones would only bloat the program
ROUNDS = 4


class Simplifier(Rewriter):
    """Applies the rules to each node as it is made."""

    def replace(self, node: Node) -> Sequence[Value] | None:
        for rule in (*ANY_OP, *RULES.get(node.op.name, ())):
            found = rule(node)
            if found is not None:
                self.stats[rule.__name__] += 1
                return (found,) if isinstance(found, Value) else found
        return None


def simplify(graph: Graph) -> PassResult:
    """Simplifies until nothing changes (at most ROUNDS walks), dead nodes removed. `stats` counts rules by name."""
    simplifier, current = Simplifier(graph.name), graph
    for _ in range(ROUNDS):
        after = rewrite(current, simplifier.fresh(graph.name))
        if after is current:
            break
        current = sweep(after).graph
    return PassResult(current, current is not graph, dict(simplifier.stats))


# --- any op ----------------------------------------------------------------------------------------------


def fold_constants(node: Node) -> Sequence[Value] | None:
    """Computes a node whose operands are constants, if its results are small. A broadcast stays: it costs nothing."""
    if (not node.operands or node.op.name == "broadcast_to" or node.regions
            or node.op.has("effect") or node.op.has("barrier") or node.op.has("random")):
        return None
    arrays = [constant_of(v) for v in node.operands]
    small = all(isinstance(v.type.size, int) and v.type.size <= FOLD_ELEMENTS for v in node.results)
    if not small or any(a is None for a in arrays):
        return None
    return tuple(emit("constant", value=r) for r in interp.run_node(node, arrays))  # type: ignore[arg-type]


def drop_broadcasts(node: Node) -> Value | None:
    """Elementwise ops broadcast by themselves: an explicit broadcast of an operand is dropped where another operand
    has the full shape, else done after the op, on fewer elements."""
    if not node.op.has("elementwise") or not any(made_by(v, "broadcast_to") for v in node.operands):
        return None
    sources = [v.producer.operands[0] if v.producer and made_by(v, "broadcast_to") else v for v in node.operands]
    shape = broadcast_shapes(*(v.shape for v in sources))
    small = emit(node.op.name, *sources, **node.attrs)
    return small if shape == node.result.shape else spread(small, node.result.shape)


def order_operands(node: Node) -> Value | None:
    """The constant of a commutative op stands second."""
    if not node.op.has("commutative"):
        return None
    x, y = node.operands
    if uniform(x) is None or uniform(y) is not None:
        return None
    return emit(node.op.name, y, x, **node.attrs)


ANY_OP: tuple[Rule, ...] = (fold_constants, drop_broadcasts, order_operands)

# --- arithmetic ------------------------------------------------------------------------------------------


def add_zero(node: Node) -> Value | None:
    x, y = node.operands
    return like(x, node) if uniform(y) == 0 else None


def add_negative(node: Node) -> Value | None:
    """x + (-y) = x - y."""
    x, y = node.operands
    if negated := negation(y):
        return emit("sub", x, negated)
    negated = negation(x)
    return emit("sub", y, negated) if negated else None


def negation(value: Value) -> Value | None:
    """x, if the value is -x."""
    return value.producer.operands[0] if value.producer and made_by(value, "neg") else None


def sub_zero(node: Node) -> Value | None:
    x, y = node.operands
    if uniform(y) == 0:
        return like(x, node)
    return spread(emit("neg", y), node.result.shape) if uniform(x) == 0 else None


def sub_negative(node: Node) -> Value | None:
    x, y = node.operands
    negated = negation(y)
    return emit("add", x, negated) if negated else None


def mul_one(node: Node) -> Value | None:
    x, y = node.operands
    factor = uniform(y)
    if factor == 1:
        return like(x, node)
    if factor == -1 and not x.dtype.is_unsigned:
        return spread(emit("neg", x), node.result.shape)
    if factor == 0 and x.dtype.is_integer:  # of floats, 0 * inf and 0 * NaN are NaN
        return fill_like(0, node)
    return None


def mul_negatives(node: Node) -> Value | None:
    """(-x)(-y) = xy; (-x)c = x(-c)."""
    x, y = node.operands
    nx, ny, factor = negation(x), negation(y), uniform(y)
    if nx and ny:
        return emit("mul", nx, ny)
    if nx and factor is not None and y.dtype.is_float:
        return emit("mul", nx, spread(scalar_like(-factor, y), y.shape))
    return None


def div_power_of_two(node: Node) -> Value | None:
    """x / c = x * (1 / c), which is exact for a power of two; c = 1 among them."""
    x, y = node.operands
    divisor = uniform(y)
    if not divisor or not math.isfinite(divisor) or abs(math.frexp(divisor)[0]) != 0.5:
        return None
    inverse = scalar_like(1.0 / divisor, y)
    value = uniform(inverse)
    tiny = float(np.finfo(np.float32).tiny)
    if not value or not math.isfinite(value) or min(abs(value), abs(divisor)) < tiny:
        return None
    return emit("mul", x, spread(inverse, y.shape))


def pow_constant(node: Node) -> Value | None:
    x, y = node.operands
    exponent, shape = uniform(y), node.result.shape
    if exponent == 0:
        return fill_like(1, node)  # of NaN too, by IEEE 754
    if exponent == 1:
        return like(x, node)
    if exponent == 2:
        return spread(emit("square", x), shape)
    if exponent == 3:
        return spread(emit("square", x) * x, shape)
    if exponent == -1 and x.dtype.is_float:
        return spread(emit("reciprocal", x), shape)
    return None


def twice_negated(node: Node) -> Value | None:
    return negation(node.operands[0])


def of_negative(node: Node) -> Value | None:
    """|-x| = |x|; (-x)² = x²."""
    negated = negation(node.operands[0])
    return emit(node.op.name, negated) if negated else None


def same_twice(node: Node) -> Value | None:
    """max(x, x) = x."""
    x, y = node.operands
    return x if x is y else None


def operand(node: Node) -> Value | None:
    return node.operands[0]


def not_twice(node: Node) -> Value | None:
    (x,) = node.operands
    return x.producer.operands[0] if x.producer and made_by(x, "logical_not") else None


def and_constant(node: Node) -> Value | None:
    x, y = node.operands
    known = uniform(y)
    return None if known is None else like(x, node) if known else fill_like(False, node)


def or_constant(node: Node) -> Value | None:
    x, y = node.operands
    known = uniform(y)
    return None if known is None else fill_like(True, node) if known else like(x, node)


def where_known(node: Node) -> Value | None:
    c, x, y = node.operands
    known = uniform(c)
    if known is not None:
        return like(x if known else y, node)
    if x is y:
        return like(x, node)
    if c.producer and made_by(c, "logical_not"):
        return emit("where", c.producer.operands[0], y, x)
    return None


def clip_nothing(node: Node) -> Value | None:
    return node.operands[0] if node.attrs["lo"] is None and node.attrs["hi"] is None else None


# --- casts -----------------------------------------------------------------------------------------------


def holds(wide: DType, narrow: DType) -> bool:
    """Whether every value of `narrow` is one of `wide` (NaN payloads aside)."""
    if wide == narrow or narrow.is_bool:
        return True
    if wide.is_float and narrow.is_float:
        return (narrow.bits, wide.bits) in ((16, 32), (16, 64), (32, 64), (8, 16), (8, 32), (8, 64))
    if wide.is_float and narrow.is_integer:
        digits = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}.get(str(wide), 0)
        return narrow.bits - (not narrow.is_unsigned) <= digits and not (wide == "float16" and narrow.bits > 8)
    if wide.is_integer and narrow.is_integer:
        if wide.is_unsigned == narrow.is_unsigned:
            return wide.bits >= narrow.bits
        return not wide.is_unsigned and wide.bits > narrow.bits
    return False


def cast_chain(node: Node) -> Value | None:
    """A cast to the same dtype is nothing; one by way of a dtype that holds all values of the first is direct."""
    (x,), dtype = node.operands, node.attrs["dtype"]
    if x.dtype == dtype:
        return x
    if x.producer and made_by(x, "cast"):
        (source,) = x.producer.operands
        if holds(x.dtype, source.dtype):
            return source if source.dtype == dtype else emit("cast", source, dtype=dtype)
    return None


# --- reductions ------------------------------------------------------------------------------------------


def reduce_nothing(node: Node) -> Value | None:
    """Over no axes, or over axes of size 1 only: the operand, reshaped."""
    (x,) = node.operands
    if any(x.shape[a] != 1 for a in node.attrs["axes"]):
        return None
    return emit("reshape", x, shape=node.result.shape)


def reduce_twice(node: Node) -> Value | None:
    (x,) = node.operands
    inner = x.producer
    if inner is None or inner.op is not node.op or inner.attrs["keepdims"] != node.attrs["keepdims"]:
        return None
    (source,), first = inner.operands, inner.attrs["axes"]
    left = range(source.rank) if node.attrs["keepdims"] else [a for a in range(source.rank) if a not in first]
    axes = sorted({*first, *(left[a] for a in node.attrs["axes"])})
    return emit(node.op.name, source, axes=tuple(axes), keepdims=node.attrs["keepdims"])


def reduce_uniform(node: Node) -> Value | None:
    """Of equal elements: their multiple, or the element itself."""
    (x,) = node.operands
    value, count = uniform(x), math.prod(x.shape[a] for a in node.attrs["axes"])
    if value is None or not isinstance(count, int) or count == 0:
        return None
    if node.op.name == "reduce_sum":
        if not x.dtype.is_float:
            return None
        value *= count
    return fill_like(value, node)


# --- control flow ----------------------------------------------------------------------------------------


def known_branch(node: Node) -> Sequence[Value] | None:
    pred = uniform(node.operands[0])
    return None if pred is None else copy_into(node.regions[0 if pred else 1], node.operands[1:])


IDEMPOTENT = ("maximum", "minimum", "logical_and", "logical_or", "bitwise_and", "bitwise_or")
REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_any", "reduce_all", "reduce_mean")


def _table(*groups: dict[str, tuple[Callable[..., Any], ...]]) -> dict[str, tuple[Rule, ...]]:
    merged: dict[str, tuple[Rule, ...]] = {}
    for group in groups:
        for name, rules in group.items():
            merged[name] = (*merged.get(name, ()), *rules)
    return merged


RULES = _table(
    {
        "add": (add_zero, add_negative),
        "sub": (sub_zero, sub_negative),
        "mul": (mul_one, mul_negatives),
        "div": (div_power_of_two,),
        "pow": (pow_constant,),
        "neg": (twice_negated,),
        "abs": (of_negative,),
        "square": (of_negative,),
        "identity": (operand,),
        "logical_not": (not_twice,),
        "logical_and": (and_constant,),
        "logical_or": (or_constant,),
        "where": (where_known,),
        "clip": (clip_nothing,),
        "cast": (cast_chain,),
        "logsumexp": (reduce_nothing,),
        "cond": (known_branch,),
    },
    dict.fromkeys(IDEMPOTENT, (same_twice,)),
    {name: (reduce_nothing, reduce_uniform) for name in REDUCTIONS if name != "reduce_prod"},
    {name: (reduce_twice,) for name in REDUCTIONS if name != "reduce_mean"},
    {"reduce_prod": (reduce_nothing,)},
    VIEW_RULES,
    LOOP_RULES,
)

SIMPLIFY = Pass("simplify", simplify)
