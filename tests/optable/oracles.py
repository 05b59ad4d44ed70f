"""Second answers, computed another way than the references compute them.

An oracle receives floats widened to f64 and everything else as it is, and answers in any dtype; the test rounds
the answer to the op's. Integers are Python's, wrapped at the end; windows, gathers and scatters are plain loops.
"""

from __future__ import annotations

import itertools
import math
import operator
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

Oracle = Callable[..., Any]
ORACLES: dict[str, Oracle] = {}


def oracle(name: str) -> Callable[[Oracle], Oracle]:
    def put(fn: Oracle) -> Oracle:
        ORACLES[name] = fn
        return fn
    return put


# Elementwise -----------------------------------------------------------------------------------------------------

def wrap(value: int, dtype: Any) -> int:
    info = np.iinfo(dtype)
    return (value - info.min) % (info.max - info.min + 1) + info.min


def by_element(fn: Callable[..., Any], *arrays: Any, dtype: Any) -> np.ndarray:
    """`fn` on Python numbers, element by element."""
    shape = np.broadcast_shapes(*(a.shape for a in arrays))
    columns = [np.broadcast_to(a, shape).ravel().tolist() for a in arrays]
    values = [fn(*row) for row in zip(*columns)]
    if np.dtype(dtype).kind in "iu":
        values = [wrap(v, dtype) for v in values]
    return np.array(values, dtype).reshape(shape)


def elementwise(name: str, of_floats: Any, of_integers: Any = None, result: Any = None) -> None:
    def run(*xs: Any) -> Any:
        if xs[0].dtype.kind == "f" or of_integers is None:
            return of_floats(*xs)
        return by_element(of_integers, *xs, dtype=result or xs[0].dtype)
    ORACLES[name] = run


def vectorized(fn: Callable[[float], float]) -> Oracle:
    return lambda x: by_element(fn, x, dtype=np.float64)


def finite(fn: Callable[[float], float], otherwise: float = math.nan) -> Oracle:
    """math's functions raise where NumPy gives NaN."""
    def safe(x: float) -> float:
        try:
            return fn(x)
        except (ValueError, OverflowError):
            return otherwise
    return vectorized(safe)


def quotient(x: int, y: int) -> int:
    return x // y if y else 0


def modulo(x: int, y: int) -> int:
    return x % y if y else 0


def c_modulo(x: int, y: int) -> int:
    return int(math.copysign(1, x)) * (abs(x) % abs(y)) if y else 0


def power(x: int, y: int) -> int:
    if y >= 0:
        return x**y
    return {1: 1, -1: -1 if y % 2 else 1}.get(x, 0)


def shifts(bits: int) -> tuple[Any, Any]:
    return (lambda x, y: x << y if 0 <= y < bits else 0,
            lambda x, y: x >> y if 0 <= y < bits else -(x < 0))


elementwise("neg", lambda x: 0.0 - x, operator.neg)
elementwise("abs", lambda x: np.where(x < 0, -x, x), abs)
elementwise("sign", lambda x: np.where(np.isnan(x), x, (x > 0) * 1.0 - (x < 0)), lambda x: (x > 0) - (x < 0))
elementwise("relu", lambda x: np.where(x < 0, 0, x), lambda x: x * (x > 0))
elementwise("square", lambda x: x**2, lambda x: x * x)
for same in ("identity", "stop_gradient"):
    elementwise(same, lambda x: x)
elementwise("exp", lambda x: np.power(math.e, x))
elementwise("exp2", lambda x: np.power(2.0, x))
elementwise("expm1", finite(math.expm1, math.inf))
for name in ("log", "log2", "log10"):
    elementwise(name, getattr(np, name))
elementwise("log1p", lambda x: np.log1p(x))
elementwise("cbrt", lambda x: np.sign(x) * np.abs(x) ** (1 / 3))
elementwise("sin", finite(math.sin))
elementwise("cos", finite(math.cos))
elementwise("tan", finite(math.tan))
elementwise("asin", finite(math.asin))
elementwise("acos", finite(math.acos))
elementwise("atan", vectorized(math.atan))
elementwise("sinh", lambda x: np.exp(x) / 2 - np.exp(-x) / 2)
elementwise("cosh", lambda x: np.exp(x) / 2 + np.exp(-x) / 2)
elementwise("tanh", vectorized(math.tanh))
elementwise("asinh", vectorized(math.asinh))
elementwise("acosh", finite(math.acosh))
elementwise("atanh", lambda x: (np.log1p(x) - np.log1p(-x)) / 2)
elementwise("erf", vectorized(math.erf))
elementwise("erfc", vectorized(math.erfc))
elementwise("sigmoid", lambda x: (1 + np.tanh(x / 2)) / 2)
elementwise("softplus", lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))))
elementwise("sqrt", finite(math.sqrt))
elementwise("rsqrt", lambda x: 1 / np.sqrt(x))
elementwise("reciprocal", lambda x: np.float64(1) / x)
elementwise("floor", lambda x: x - np.mod(x, 1.0) if np.isfinite(x).all() else np.floor(x))
elementwise("ceil", lambda x: -np.floor(-x))
elementwise("round", vectorized(lambda x: round(x) if math.isfinite(x) else x))
elementwise("trunc", lambda x: np.copysign(np.floor(np.abs(x)), x))
elementwise("logical_not", None, lambda x: not x)
elementwise("bitwise_not", None, lambda x: not x if isinstance(x, bool) else ~x)
elementwise("isnan", lambda x: x != x)
elementwise("isinf", lambda x: np.abs(x) == np.inf)
elementwise("isfinite", lambda x: np.abs(x) < np.inf)

elementwise("add", operator.add, operator.add)
elementwise("sub", operator.sub, operator.sub)
elementwise("mul", operator.mul, operator.mul)
elementwise("div", operator.truediv)
elementwise("floor_divide", np.floor_divide, quotient)
elementwise("remainder", lambda x, y: x - np.floor(x / y) * y, modulo)
elementwise("fmod", lambda x, y: x - np.trunc(x / y) * y, c_modulo)
elementwise("pow", lambda x, y: np.exp(y * np.log(x)), power)
elementwise("maximum", lambda x, y: np.where(np.isnan(x) | (x > y), x, y), max)
elementwise("minimum", lambda x, y: np.where(np.isnan(x) | (x < y), x, y), min)
elementwise("atan2", lambda x, y: np.angle(y + 1j * x))
elementwise("hypot", lambda x, y: np.abs(x + 1j * y))
for name, fn in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
    elementwise(f"bitwise_{name}", None, fn)
    elementwise(f"logical_{name}", None, fn)
for side, name in enumerate(("left_shift", "right_shift")):
    ORACLES[name] = lambda x, y, side=side: by_element(shifts(x.dtype.itemsize * 8)[side], x, y, dtype=x.dtype)
for fn in (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge):
    ORACLES[fn.__name__] = lambda x, y, fn=fn: by_element(fn, x, y, dtype=bool)
ORACLES["where"] = lambda c, x, y: by_element(lambda c, x, y: x if c else y, c, x, y, dtype=x.dtype)


@oracle("clip")
def clip(x: Any, lo: Any, hi: Any) -> Any:
    def limit(v: Any) -> Any:
        v = lo if lo is not None and v < lo else v
        return hi if hi is not None and v > hi else v
    return by_element(limit, x, dtype=x.dtype)


@oracle("cast")
def cast(x: Any, dtype: Any) -> Any:
    if dtype == "bool":
        return by_element(lambda v: v != 0, x, dtype=bool)
    if dtype.is_integer and x.dtype.kind == "f":
        return by_element(int, x, dtype=np.int64)
    return x.astype(np.float64) if dtype.is_float else x.astype(np.int64)


@oracle("bitcast")
def bitcast(x: Any, dtype: Any) -> Any:
    code = {64: "d", 32: "f", 16: "e"}.get(dtype.bits) if x.dtype.kind == "f" else {64: "q", 32: "i", 16: "h", 8: "b"}[
        dtype.bits]
    words = [struct.pack(code, v if x.dtype.kind == "f" else wrapped(v, dtype.bits)) for v in x.reshape(-1).tolist()]
    return np.frombuffer(b"".join(words), dtype.np).reshape(x.shape)


def wrapped(v: int, bits: int) -> int:
    """A number as the signed one of so many bits."""
    v = int(v) % 2**bits
    return v - 2**bits if v >= 2 ** (bits - 1) else v


# Reductions ------------------------------------------------------------------------------------------------------

def by_row(fn: Callable[[list[Any]], Any], x: Any, axes: Any, keepdims: bool, dtype: Any = None) -> Any:
    """`fn` on the list of elements that meet in each element of the result."""
    kept = [i for i in range(x.ndim) if i not in axes]
    shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape)) if keepdims \
        else tuple(x.shape[i] for i in kept)
    values = []
    for where in np.ndindex(*(x.shape[i] for i in kept)):
        index: list[Any] = [slice(None)] * x.ndim
        for axis, position in zip(kept, where):
            index[axis] = position
        values.append(fn(x[tuple(index)].ravel().tolist()))
    dtype = dtype or x.dtype
    if np.dtype(dtype).kind in "iu":
        values = [wrap(v, dtype) for v in values]
    return np.array(values, dtype).reshape(shape)


def total(row: list[Any]) -> Any:
    if not row or isinstance(row[0], int) or not all(map(math.isfinite, row)):
        return sum(row)
    return math.fsum(row)


def extreme(best: Any, identity: float) -> Any:
    def pick(row: list[Any], dtype: Any) -> Any:
        if any(v != v for v in row):
            return math.nan
        return best(row, default=identity if dtype.kind == "f" else getattr(np.iinfo(dtype), "min" if best is max
                                                                              else "max"))
    return pick


def _logsumexp(row: list[float]) -> float:
    peak = max(row, default=-math.inf)
    if not math.isfinite(peak) or any(v != v for v in row):
        return math.nan if any(v != v for v in row) else peak
    return peak + math.log(math.fsum(math.exp(v - peak) for v in row))


ORACLES["reduce_sum"] = lambda x, axes, keepdims: by_row(total, x, axes, keepdims)
ORACLES["reduce_mean"] = lambda x, axes, keepdims: by_row(
    lambda row: total(row) / len(row) if row else math.nan, x, axes, keepdims)
ORACLES["reduce_prod"] = lambda x, axes, keepdims: by_row(math.prod, x, axes, keepdims)
ORACLES["reduce_max"] = lambda x, axes, keepdims: by_row(
    lambda row: extreme(max, -math.inf)(row, x.dtype), x, axes, keepdims)
ORACLES["reduce_min"] = lambda x, axes, keepdims: by_row(
    lambda row: extreme(min, math.inf)(row, x.dtype), x, axes, keepdims)
ORACLES["reduce_any"] = lambda x, axes, keepdims: by_row(any, x, axes, keepdims)
ORACLES["reduce_all"] = lambda x, axes, keepdims: by_row(all, x, axes, keepdims)
ORACLES["logsumexp"] = lambda x, axes, keepdims: by_row(_logsumexp, x, axes, keepdims)


def arg_extreme(sign: int) -> Oracle:
    def first(row: list[Any]) -> int:
        best = 0
        for i, v in enumerate(row):
            if row[best] == row[best] and (v != v or sign * v > sign * row[best]):
                best = i
        return best
    return lambda x, axis, keepdims: by_row(first, x, (axis,), keepdims, np.int64)


ORACLES["argmax"], ORACLES["argmin"] = arg_extreme(1), arg_extreme(-1)


def along(x: Any, axis: int, fn: Callable[[list[Any]], list[Any]], dtype: Any = None) -> Any:
    """`fn` on each row along an axis, as a list; gives rows of any length."""
    rows = np.moveaxis(x, axis, -1)
    lists = [fn(row.tolist()) for row in rows.reshape(math.prod(rows.shape[:-1]), x.shape[axis])]
    width = len(lists[0]) if lists else len(fn(np.zeros(x.shape[axis], x.dtype).tolist()))
    return np.moveaxis(np.array(lists, dtype or x.dtype).reshape(*rows.shape[:-1], width), -1, axis)


def cumulative(fn: Any, identity: int) -> Oracle:
    def run(x: Any, axis: int, exclusive: bool, reverse: bool) -> Any:
        def row(values: list[Any]) -> list[Any]:
            values = values[::-1] if reverse else values
            sums = list(itertools.accumulate(values, fn, initial=identity))
            sums = sums[:-1] if exclusive else sums[1:]
            sums = [wrap(int(s), x.dtype) for s in sums] if x.dtype.kind in "iu" else sums
            return sums[::-1] if reverse else sums
        return along(x, axis, row)
    return run


ORACLES["cumsum"], ORACLES["cumprod"] = cumulative(operator.add, 0), cumulative(operator.mul, 1)


def sorted_indices(descending: bool) -> Callable[[list[Any]], list[int]]:
    """Stable; NaN is the largest."""
    def order(row: list[Any]) -> list[int]:
        key = [(v != v, 0 if v != v else v) for v in row]
        return sorted(range(len(row)), key=key.__getitem__) if not descending else \
            sorted(range(len(row)), key=lambda i: (-key[i][0], -key[i][1], i))
    return order


@oracle("sort")
def sort(x: Any, axis: int, descending: bool) -> Any:
    order = sorted_indices(descending)
    return along(x, axis, lambda row: [row[i] for i in order(row)]), along(x, axis, order, np.int64)


@oracle("top_k")
def top_k(x: Any, k: int, axis: int, largest: bool) -> Any:
    order = sorted_indices(largest)
    return (along(x, axis, lambda row: [row[i] for i in order(row)[:k]]),
            along(x, axis, lambda row: order(row)[:k], np.int64))
