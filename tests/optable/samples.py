"""Seeded arguments for ops: what a row of the table is made of.

A generator of samples is a function of a `Maker`, which makes arrays of the dtype under test with values from the
row's domain. Every generator covers, as far as the op allows: 0-size, scalar, broadcasting, odd and large shapes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from treadle.ir.builder import build, emit
from treadle.ir.dtypes import as_dtype
from treadle.ir.graph import Graph
from treadle.ir.types import TensorType


@dataclass(frozen=True)
class Sample:
    """Arguments of one call.

    Attributes:
        args: operands; attrs: attributes.
        label: what is special about it, for messages.
        smooth: gradients may be checked here: no kink, tie or infinity.
        regions: makes the regions of an op with control flow.
    """

    args: tuple[np.ndarray, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    smooth: bool = True
    regions: Callable[[], tuple[Graph, ...]] | None = None

    def graph(self, op: str) -> Graph:
        """The graph of this one call."""
        regions = self.regions() if self.regions else ()
        return build(op, lambda *xs: emit(op, *xs, regions=regions, **self.attrs), *types_of(self.args))

    def __str__(self) -> str:
        attrs = ", ".join(f"{k}={v if np.size(v) < 20 else '...'}" for k, v in self.attrs.items())
        return f"{self.label} ({', '.join(map(str, types_of(self.args)))}; {attrs})"


def types_of(arrays: Any) -> list[TensorType]:
    return [TensorType(a.shape, as_dtype(a.dtype)) for a in arrays]


Generator = Callable[["Maker"], Iterator[Sample]]

# Values of a floating dtype by domain, as functions of (rng, shape). Each keeps clear of the kinks it is named for.
FLOAT_DOMAINS: dict[str, Callable[[np.random.Generator, Any], Any]] = {
    "real": lambda rng, shape: rng.normal(0, 2, shape),
    "small": lambda rng, shape: rng.uniform(-0.5, 0.5, shape),
    "positive": lambda rng, shape: rng.uniform(0.1, 4, shape),
    "unit": lambda rng, shape: rng.uniform(-0.95, 0.95, shape),
    "above_one": lambda rng, shape: rng.uniform(1.1, 5, shape),
    "nonzero": lambda rng, shape: rng.uniform(0.3, 3, shape) * rng.choice([-1, 1], shape),
    "off_integer": lambda rng, shape: rng.integers(-4, 4, shape) + rng.uniform(0.1, 0.4, shape),
    "coarse": lambda rng, shape: rng.integers(-3, 4, shape).astype(float),
    "distinct": lambda rng, shape: rng.permutation(math.prod(shape)).reshape(shape) / 8 - math.prod(shape) / 16,
}
INT_DOMAINS = {"positive": (1, 10), "nonzero": (1, 10), "coarse": (-3, 4), "small": (-3, 4), "exponent": (-3, 6),
               "shift": (-2, 70)}


@dataclass
class Maker:
    """Makes arrays of one dtype from one random stream."""

    rng: np.random.Generator
    dtype: Any
    domain: str | tuple[str, ...] = "real"

    def __call__(self, shape: Any, operand: int = 0, domain: str | None = None) -> np.ndarray:
        """An array for an operand of the op; `shape` an int or a tuple."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        name = domain or (self.domain if isinstance(self.domain, str) else self.domain[operand])
        if self.dtype.is_bool:
            return self.bools(shape)
        if self.dtype.is_float:
            return np.asarray(FLOAT_DOMAINS[name](self.rng, shape)).astype(self.dtype.np)
        return self._integers(name, shape)

    def _integers(self, domain: str, shape: Any) -> np.ndarray:
        low, high = INT_DOMAINS.get(domain, (-10, 11))
        if domain == "distinct":
            return np.asarray(self.rng.permutation(math.prod(shape)).reshape(shape)).astype(self.dtype.np)
        if self.dtype.is_unsigned:
            low = max(low, 0)
        values = np.asarray(self.rng.integers(low, high, shape))
        if domain == "nonzero" and not self.dtype.is_unsigned:
            values = values * self.rng.choice([-1, 1], shape)
        return values.astype(self.dtype.np)

    def bools(self, shape: Any) -> np.ndarray:
        return np.asarray(self.rng.random(shape) < 0.5)

    def index(self, shape: Any, size: int, dtype: str = "int64", outside: bool = False) -> np.ndarray:
        """Indices into an axis; some of them outside of it on request."""
        low, high = (-2, size + 2) if outside else (0, max(size, 1))
        return np.asarray(self.rng.integers(low, high, shape)).astype(dtype)

    def extremes(self) -> np.ndarray:
        """The values at which an elementwise rule goes wrong first."""
        if self.dtype.is_float:
            return np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 0.5]).astype(self.dtype.np)
        if self.dtype.is_bool:
            return np.array([False, True])
        info = np.iinfo(self.dtype.np)
        return np.array([info.min, info.max, 0, 1, info.max - 1, info.min + 1], self.dtype.np)


def maker(op: str, dtype: Any, domain: Any = "real") -> Maker:
    """The same stream for the same op and dtype, in every run."""
    return Maker(np.random.default_rng(zlib.crc32(f"{op}/{dtype}".encode())), as_dtype(dtype), domain)


# Elementwise -----------------------------------------------------------------------------------------------------

SHAPES = [(), (1,), (7,), (0,), (3, 0, 2), (3, 5), (2, 1, 4, 3), (67, 129)]
PAIRS = [((), ()), ((7,), ()), ((), (3, 2)), ((3, 1), (1, 4)), ((2, 3, 4), (3, 1)), ((0,), (1,)), ((2, 0, 3), (1, 3)),
         ((5, 7), (5, 7)), ((129, 67), (67,))]


def unary(make: Maker) -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample((make(shape),))
    yield Sample((make.extremes(),), label="extremes", smooth=False)


def unary_tame(make: Maker) -> Iterator[Sample]:
    """Without extremes."""
    for shape in SHAPES:
        yield Sample((make(shape),))


def binary(make: Maker) -> Iterator[Sample]:
    yield from binary_tame(make)
    values = make.extremes()
    yield Sample((values[:, None].copy(), values), label="extremes", smooth=False)


def binary_tame(make: Maker) -> Iterator[Sample]:
    for x, y in PAIRS:
        yield Sample((make(x, 0), make(y, 1)))


def where(make: Maker) -> Iterator[Sample]:
    for c, x, y in [((), (), ()), ((3, 1), (1, 4), ()), ((5,), (2, 5), (5,)), ((0,), (1,), ()), ((33, 65),) * 3]:
        yield Sample((make.bools(c), make(x), make(y)))


def clip(make: Maker) -> Iterator[Sample]:
    bounds = [(1, 3), (None, 2), (2, None), (None, None), (3, 1)] if make.dtype.is_unsigned else \
        [(-1, 1), (None, 2), (-1, None), (None, None), (1, -1)]
    for shape, (lo, hi) in zip([(), (7,), (0, 2), (3, 5), (33, 65)], bounds):
        if make.dtype.is_float:
            lo, hi = (None if b is None else b + 0.125 for b in (lo, hi))
        yield Sample((make(shape),), {"lo": lo, "hi": hi})
    yield Sample((make.extremes(),), {"lo": 0, "hi": 1}, "extremes", smooth=False)


def cast_to(*targets: str) -> Generator:
    """To each of the dtypes, with values that every one of them holds."""
    def cast(make: Maker) -> Iterator[Sample]:
        for target in targets:
            for shape in [(), (0, 3), (3, 5), (33, 65)]:
                yield Sample((make(shape),), {"dtype": as_dtype(target)}, target,
                             smooth=as_dtype(target).is_float and as_dtype(target).bits == 64)
    return cast


def bitcast(make: Maker) -> Iterator[Sample]:
    """To every dtype of the same width."""
    for target in ("float64 float32 float16 bfloat16 int64 int32 int16 int8 uint64 uint32 uint16 uint8").split():
        if as_dtype(target).bits == make.dtype.bits:
            for shape in [(), (0, 3), (33, 65)]:
                x = make(shape)
                if as_dtype(target).is_float:  # only bits that are finite numbers have one reading
                    x = make(shape).astype(target).view(make.dtype.np) if make.dtype.bits > 8 else x
                yield Sample((x,), {"dtype": as_dtype(target)}, target)


# Reductions ------------------------------------------------------------------------------------------------------

REDUCED = [((), ()), ((7,), (0,)), ((7,), ()), ((3, 5), (0,)), ((3, 5), (1,)), ((3, 5), (0, 1)), ((2, 3, 4, 5), (1, 3)),
           ((2, 3, 4), (0, 2)), ((0,), (0,)), ((3, 0), (1,)), ((0, 3), (1,)), ((1, 1), (0, 1)), ((33, 65), (0,)),
           ((65, 131), (1,))]


def reduce(make: Maker) -> Iterator[Sample]:
    for shape, axes in REDUCED:
        for keepdims in (False, True):
            empty = any(shape[a] == 0 for a in axes)
            yield Sample((make(shape),), {"axes": axes, "keepdims": keepdims}, smooth=not empty)


def reduce_extremes(make: Maker) -> Iterator[Sample]:
    yield from reduce(make)
    if make.dtype.is_float:
        x = np.array([[1, np.nan, 2], [np.inf, 1, 2], [-np.inf] * 3, [np.inf, -np.inf, 0]]).astype(make.dtype.np)
        yield Sample((x,), {"axes": (1,)}, "extremes", smooth=False)


def along(*, with_keepdims: bool) -> Generator:
    """argmax and the like: one axis."""
    def generate(make: Maker) -> Iterator[Sample]:
        for shape, axis in [((7,), 0), ((3, 5), 0), ((3, 5), 1), ((2, 3, 4), 1), ((0, 3), 1), ((33, 130), 1)]:
            extra = {"keepdims": bool(axis)} if with_keepdims else {}
            yield Sample((make(shape),), {"axis": axis, **extra})
        yield Sample((make((4, 6), domain="coarse"),), {"axis": 1}, "ties", smooth=False)
        if make.dtype.is_float:
            x = np.array([[1, np.nan, 2, np.nan], [-np.inf, 0, np.inf, 1]]).astype(make.dtype.np)
            yield Sample((x,), {"axis": 1}, "extremes", smooth=False)
    return generate


def cumulative(make: Maker) -> Iterator[Sample]:
    for shape, axis in [((7,), 0), ((3, 5), 0), ((3, 5), 1), ((2, 3, 4), 1), ((0,), 0), ((2, 0), 0), ((9, 67), 1)]:
        for exclusive, reverse in [(False, False), (True, False), (False, True), (True, True)]:
            yield Sample((make(shape),), {"axis": axis, "exclusive": exclusive, "reverse": reverse})


def sort(make: Maker) -> Iterator[Sample]:
    for sample in along(with_keepdims=False)(make):
        for descending in (False, True):
            yield Sample(sample.args, {**sample.attrs, "descending": descending}, sample.label, sample.smooth)
    yield Sample((make((2, 0)),), {"axis": 1}, "empty")


def top_k(make: Maker) -> Iterator[Sample]:
    for sample in along(with_keepdims=False)(make):
        for k, largest in [(1, True), (3, False), (0, True)]:
            yield Sample(sample.args, {**sample.attrs, "k": k, "largest": largest}, sample.label, sample.smooth)


# Shape -----------------------------------------------------------------------------------------------------------

def with_attrs(*cases: tuple[Any, dict[str, Any]]) -> Generator:
    """One operand of each shape with its attributes."""
    def generate(make: Maker) -> Iterator[Sample]:
        for shape, attrs in cases:
            yield Sample((make(shape),), attrs)
    return generate


def concat(make: Maker) -> Iterator[Sample]:
    for axis, shapes in [(0, [(3,)]), (0, [(3,), (0,), (2,)]), (1, [(2, 3), (2, 1)]), (0, [(2, 3), (5, 3), (1, 3)]),
                         (2, [(2, 0, 3), (2, 0, 1)]), (1, [(17, 33, 2), (17, 31, 2)])]:
        yield Sample(tuple(make(s) for s in shapes), {"axis": axis})


def bounds(*triples: tuple[int, int, int]) -> dict[str, Any]:
    starts, limits, strides = zip(*triples) if triples else ((), (), ())
    return {"starts": starts, "limits": limits, "strides": strides}


def pads(*quads: tuple[int, int, int], value: Any = 0) -> dict[str, Any]:
    low, high, interior = zip(*quads) if quads else ((), (), ())
    return {"low": low, "high": high, "interior": interior, "value": value}


SLICES = [((), bounds()), ((7,), bounds((1, 6, 2))), ((7,), bounds((6, -1, -1))), ((7,), bounds((5, 0, -2))),
          ((7,), bounds((3, 3, 1))), ((4, 5), bounds((1, 3, 1), (4, -1, -2))), ((0, 3), bounds((0, 0, 1), (0, 3, 2))),
          ((2, 3, 4), bounds((0, 2, 1), (2, -1, -1), (1, 4, 3))), ((65, 33), bounds((3, 64, 3), (1, 33, 1)))]
PADS = [((), pads()), ((5,), pads((1, 2, 0), value=2)), ((5,), pads((0, 0, 2))), ((5,), pads((-1, -2, 0))),
        ((5,), pads((-1, 2, 1), value=1)), ((3, 4), pads((1, 0, 0), (0, 2, 1))), ((0, 2), pads((2, 1, 1), (0, 0, 0))),
        ((1, 2), pads((0, 0, 3), (-1, 3, 0))), ((33, 31), pads((1, 1, 0), (2, 3, 1)))]
