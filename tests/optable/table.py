"""The op table. One row tests an op in four ways (tests/ir/test_ops_table.py and its neighbours):

* its reference against an oracle that computes another way;
* its decomposition against the reference;
* its gradient along a random direction, in f64, to the order of the row;
* compiled against the reference.

A new op needs one row here, and an oracle in oracles.py under the op's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from treadle.ir import ops as _declared  # noqa: F401
from treadle.ir.dtypes import as_dtype

from . import oracles_big as _filled  # noqa: F401
from . import samples as s
from . import samples_big as b
from .oracles import ORACLES, Oracle

FLOATS = ("float64", "float32", "float16", "bfloat16")
WIDE = ("float64", "float32")
INTS = ("int64", "int32", "int8", "uint8")
MORE_INTS = ("int16", "uint16", "uint32", "uint64")
BOOL = ("bool",)
STORAGE = ("float8_e4m3fn", "float8_e5m2", "int4", "uint4")
EVERYTHING = (*FLOATS, *INTS, *MORE_INTS, *BOOL)
MOVED = ("float64", "float32", "bfloat16", "int64", "int8", "bool")
# Relative error allowed to a result of each dtype; absolute error: the same times the size of typical values.
TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


@dataclass(frozen=True)
class Row:
    """How to test one op.

    Attributes:
        domain: where the values lie (samples.FLOAT_DOMAINS); for each operand, if a tuple.
        tol: factor on TOLERANCE.
        grad: the highest order of derivative that is checked; 0: none.
        variant: told apart in the names of tests, when an op has several rows.
    """

    op: str
    generate: s.Generator
    dtypes: tuple[str, ...]
    domain: Any = "real"
    tol: float = 1.0
    grad: int = 0
    variant: str = ""
    oracle: Oracle | None = field(default=None)

    @property
    def name(self) -> str:
        return f"{self.op}-{self.variant}" if self.variant else self.op

    def samples(self, dtype: Any) -> Iterator[s.Sample]:
        """The same samples in every run."""
        return self.generate(s.maker(self.name, dtype, self.domain))

    def few(self, dtype: Any) -> list[s.Sample]:
        """For tests that cost much per sample: all in f32 (or the row's first dtype), else those that differ most."""
        every = list(self.samples(dtype))
        if str(dtype) == "float32" or "float32" not in self.dtypes and str(dtype) == self.dtypes[0]:
            return every
        sizes = [sum(a.size for a in sample.args) for sample in every]
        chosen = {0, sizes.index(max(sizes)), *(i for i, sample in enumerate(every) if sample.label)}
        return [every[i] for i in sorted(chosen)]

    def answer(self) -> Oracle:
        return self.oracle or ORACLES[self.op]

    def tolerance(self, dtype: Any) -> float:
        return self.tol * TOLERANCE.get(str(dtype), 0.0)


def rows_of(names: str, *args: Any, **kwargs: Any) -> list[Row]:
    return [Row(name, *args, **kwargs) for name in names.split()]


ELEMENTWISE = [
    *rows_of("neg abs sign square", s.unary, (*FLOATS, *INTS), "nonzero", grad=2),
    Row("relu", s.unary, (*FLOATS, *INTS), "nonzero", grad=2),
    Row("identity", s.unary, EVERYTHING, grad=2),
    Row("stop_gradient", s.unary, EVERYTHING),
    *rows_of("exp exp2 expm1 sin cos atan sinh cosh tanh asinh erf erfc sigmoid softplus", s.unary, FLOATS, tol=4,
             grad=2),
    *rows_of("log log2 log10 log1p sqrt rsqrt", s.unary, FLOATS, "positive", tol=2, grad=2),
    *rows_of("cbrt reciprocal", s.unary, FLOATS, "nonzero", tol=2, grad=2),
    *rows_of("asin acos atanh tan", s.unary, FLOATS, "unit", tol=4, grad=2),
    Row("acosh", s.unary, FLOATS, "above_one", tol=4, grad=2),
    *rows_of("floor ceil round trunc", s.unary, FLOATS, "off_integer", grad=1),
    *rows_of("isnan isinf isfinite", s.unary, FLOATS),
    Row("logical_not", s.unary, BOOL),
    Row("bitwise_not", s.unary, (*INTS, *MORE_INTS, *BOOL)),
    *rows_of("add sub mul", s.binary, (*FLOATS, *INTS, *MORE_INTS), grad=2),
    Row("div", s.binary, FLOATS, ("real", "nonzero"), grad=2),
    *rows_of("maximum minimum", s.binary, EVERYTHING, grad=2),
    *rows_of("floor_divide remainder fmod", s.binary, INTS, ("real", "coarse")),
    Row("floor_divide", s.binary_tame, FLOATS, ("real", "nonzero"), grad=1, variant="float"),
    *rows_of("remainder fmod", s.binary_tame, WIDE, ("real", "above_one"), tol=4, grad=2, variant="float"),
    Row("pow", s.binary_tame, ("int64", "int32", "int8"), ("coarse", "exponent")),
    Row("pow", s.binary_tame, FLOATS, ("positive", "real"), tol=8, grad=2, variant="float"),
    Row("atan2", s.binary_tame, FLOATS, "nonzero", tol=2, grad=2),
    Row("hypot", s.binary_tame, FLOATS, "nonzero", tol=2, grad=2),
    *rows_of("bitwise_and bitwise_or bitwise_xor", s.binary, (*INTS, *BOOL)),
    *rows_of("logical_and logical_or logical_xor", s.binary, BOOL),
    *rows_of("left_shift right_shift", s.binary_tame, (*INTS, *MORE_INTS), ("real", "shift")),
    *rows_of("eq ne lt le gt ge", s.binary, EVERYTHING, "coarse"),
    Row("where", s.where, MOVED, grad=2),
    Row("clip", s.clip, (*FLOATS, *INTS), grad=2),
    Row("cast", s.cast_to(*FLOATS, "int64", "int32", "int8", "bool"), (*FLOATS, "int64", "int8"), grad=2),
    Row("cast", s.cast_to(*STORAGE, *FLOATS, "uint8", "bool"), (*FLOATS, "uint8", "bool", *STORAGE), "positive",
        variant="storage"),
    Row("bitcast", s.bitcast, ("float64", "float32", "float16", *INTS, *MORE_INTS, "bool")),
]

REDUCTIONS = [
    Row("reduce_sum", s.reduce_extremes, (*FLOATS, *INTS), tol=4, grad=2),
    Row("reduce_mean", s.reduce_extremes, FLOATS, tol=4, grad=2),
    *rows_of("reduce_max reduce_min", s.reduce_extremes, (*FLOATS, *INTS), grad=2),
    Row("reduce_prod", s.reduce_extremes, (*FLOATS, *INTS), "unit", tol=20, grad=2),
    *rows_of("reduce_any reduce_all", s.reduce, BOOL),
    Row("logsumexp", s.reduce_extremes, FLOATS, tol=4, grad=2),
    *rows_of("argmax argmin", s.along(with_keepdims=True), EVERYTHING, "distinct"),
    *rows_of("cumsum", s.cumulative, (*FLOATS, *INTS), tol=20, grad=2),
    *rows_of("cumprod", s.cumulative, (*WIDE, *INTS), "nonzero", tol=20, grad=2),
    Row("sort", s.sort, MOVED, "distinct", grad=2),
    Row("top_k", s.top_k, MOVED, "distinct", grad=2),
]

SHAPES = [
    Row("reshape", s.with_attrs(((), {"shape": (1, 1)}), ((6,), {"shape": (2, 3)}), ((2, 3, 4), {"shape": (4, 6)}),
                                ((0, 3), {"shape": (2, 0)}), ((33, 65), {"shape": (65, 33)})),
        (*MOVED, *STORAGE), grad=2),
    Row("transpose", s.with_attrs(((), {"perm": ()}), ((5,), {"perm": (0,)}), ((3, 5), {"perm": (1, 0)}),
                                  ((2, 3, 4), {"perm": (2, 0, 1)}), ((0, 3), {"perm": (1, 0)}),
                                  ((2, 3, 4, 5), {"perm": (0, 2, 1, 3)}), ((65, 131), {"perm": (1, 0)})),
        (*MOVED, *STORAGE), grad=2),
    Row("broadcast_to", s.with_attrs(((), {"shape": ()}), ((), {"shape": (2, 3)}), ((3, 1), {"shape": (3, 4)}),
                                     ((3,), {"shape": (2, 3)}), ((1, 3), {"shape": (0, 3)}),
                                     ((1, 65), {"shape": (33, 65)})), MOVED, grad=2),
    Row("concat", s.concat, MOVED, grad=2),
    Row("slice", s.with_attrs(*s.SLICES), MOVED, grad=2),
    Row("pad", s.with_attrs(*s.PADS), MOVED, grad=2),
    Row("reverse", s.with_attrs(((), {"axes": ()}), ((5,), {"axes": (0,)}), ((3, 5), {"axes": (0, 1)}),
                                ((2, 3, 4), {"axes": (1,)}), ((0, 3), {"axes": (0,)}), ((33, 65), {"axes": (1,)})),
        MOVED, grad=2),
]

CONTRACTIONS = [
    Row("matmul", b.matmul_out(None), (*FLOATS, "int32", "int8"), tol=8, grad=2),
    Row("matmul", b.matmul_out("float32"), ("float16", "bfloat16", "float8_e4m3fn"), tol=1, variant="out_f32"),
    Row("matmul", b.matmul_out("int32"), ("int8", "uint8", "int4"), variant="out_i32"),
    *[Row(name, getattr(b, name), FLOATS, tol=16, grad=2) for name in ("conv", "conv_input_grad", "conv_weight_grad")],
    Row("max_pool", b.max_pool, (*FLOATS, "int32", "int8"), grad=2),
    Row("max_pool_grad", b.max_pool_grad, FLOATS, tol=4, grad=2),
    *[Row(name, getattr(b, name), FLOATS, tol=4, grad=2) for name in ("avg_pool", "avg_pool_grad")],
]

INDEXING = [
    *[Row(name, getattr(b, name), MOVED, grad=2) for name in ("take", "take_along_axis", "gather_nd")],
    *[Row(name, getattr(b, name), (*FLOATS, "int64", "int8"), tol=8, grad=2)
      for name in ("scatter_add", "scatter_add_along_axis", "scatter_add_nd")],
    *[Row(name, getattr(b, name), MOVED, grad=2)
      for name in ("scatter_nd", "dynamic_slice", "dynamic_update_slice")],
    Row("one_hot", b.one_hot, ("int64", "int32", "uint8")),
    Row("true_places", b.true_places, ("bool",)),
]

NETWORKS = [
    *[Row(name, b.softmax, FLOATS, tol=4, grad=2) for name in ("softmax", "log_softmax")],
    *[Row(name, getattr(b, name), FLOATS, tol=16, grad=2)
      for name in ("layer_norm", "rms_norm", "group_norm", "batch_norm")],
    Row("attention", b.attention, FLOATS, tol=8, grad=2),
    Row("cross_entropy", b.cross_entropy, FLOATS, tol=8, grad=2),
]

CREATION = [
    Row("constant", b.constant, (*MOVED, *STORAGE)),
    Row("iota", b.iota, (*FLOATS, "int64", "int32", "uint8")),
    Row("random_bits", b.random_bits, ("uint32",)),
    Row("size", b.size, ("int64",)),
]

CONTROL = [
    Row("cond", b.cond, WIDE, tol=4, grad=2),
    Row("remat", b.remat, WIDE, tol=4, grad=2),
    Row("barrier", b.barrier, MOVED, grad=2),
    Row("while_loop", b.while_loop, WIDE, tol=4),
    Row("scan", b.scan, WIDE, tol=8, grad=2),
]

TABLE = [*ELEMENTWISE, *REDUCTIONS, *SHAPES, *CONTRACTIONS, *INDEXING, *NETWORKS, *CREATION, *CONTROL]


def samples(op: str, dtype: Any = "float32") -> list[s.Sample]:
    """Every sample of an op in one dtype, from all of its rows that have the dtype."""
    return [sample for row in TABLE if row.op == op and str(dtype) in row.dtypes
            for sample in row.samples(as_dtype(dtype))]


def cases() -> list[tuple[Row, str]]:
    """Every row with each of its dtypes: the parameters of a test."""
    return [(row, dtype) for row in TABLE for dtype in row.dtypes]


def case_id(case: Any) -> str:
    return case.name if isinstance(case, Row) else str(case)
