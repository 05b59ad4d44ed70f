"""What the op declarations share: registration, checks with messages for the user, rounding of narrow floats.

Conventions of every op:

* Arithmetic happens in the *compute dtypes* (f64 f32 f16 bf16, the 8- to 64-bit integers, bool). The 4- and 8-bit
  formats are storage: they can be moved, cast, and multiplied by `matmul` and `conv` with a wider `out_dtype`.
* 16-bit floats are computed in f32 and rounded once, at the end of the op.
* Nothing is undefined that a program can reach: integer overflow wraps, integer division by zero gives 0, a gather
  clamps its index into range, a scatter drops an update that lies outside. (Python's negative indices are the
  frontend's business; here they lie outside.) The one exception is a cast from float to an integer type that does
  not hold the value, which C leaves open too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .dims import Size
from .dtypes import DType, as_dtype
from .errors import AttributeValueError, DTypeError, ShapeError
from .opdef import REQUIRED, OpDef, register
from .types import Shape, TensorType, as_shape, broadcast_shapes, shape_text

__all__ = [
    "REQUIRED", "DType", "Shape", "Size", "TensorType", "as_dtype", "broadcast_shapes", "broadcasts_to",
    "check_axes", "check_axis", "check_compute", "check_dtype_attr", "check_flag", "check_float",
    "check_index", "check_ints", "check_rank", "check_same_dtype", "check_shape_attr", "contiguous", "define",
    "f32", "fail_attr", "fail_dtype", "fail_shape", "in_f32", "is_narrow", "listing", "per_element",
    "same_size", "shape_text",
]

f32 = np.float32
NARROW = frozenset(as_dtype(d).np for d in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"))
STORAGE = frozenset({"int4", "uint4", "float8_e4m3fn", "float8_e5m2"})


def define(name: str, operands: str, infer: Callable[..., Any], reference: Callable[..., Any], doc: str,
           attrs: dict[str, Any] | None = None, traits: Iterable[str] = (), **more: Any) -> OpDef:
    """Registers an op; `operands` are names separated by blanks.

    The reference runs with NumPy's floating-point warnings off, and always gives arrays (NumPy's reductions give
    scalars).
    """
    return register(OpDef(name, tuple(operands.split()), infer, _quiet(reference), attrs or {}, frozenset(traits),
                          doc=doc, **more))


def _quiet(reference: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(reference)
    def run(*arrays: Any, **attrs: Any) -> Any:
        with np.errstate(all="ignore"):
            result = reference(*arrays, **attrs)
        return tuple(map(np.asarray, result)) if isinstance(result, tuple) else np.asarray(result)
    return run


def is_narrow(dtype: np.dtype) -> bool:
    """A float of fewer than 32 bits."""
    return dtype in NARROW


def contiguous(x: np.ndarray) -> np.ndarray:
    """Row-major in memory; unlike np.ascontiguousarray it leaves a scalar a scalar."""
    return np.asarray(x, order="C")


def in_f32(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` on arrays, narrow floats widened to f32 before and results rounded to the first array's dtype after."""
    @functools.wraps(fn)
    def run(*arrays: Any, **attrs: Any) -> Any:
        dtype = arrays[0].dtype
        if not is_narrow(dtype):
            return fn(*arrays, **attrs)
        wide = (a.astype(f32) if is_narrow(a.dtype) else a for a in arrays)
        return np.asarray(fn(*wide, **attrs)).astype(dtype)
    return run


# Costs ---------------------------------------------------------------------------------------------------------


def per_element(operations: int = 1) -> Callable[[Any], Any]:
    """The cost of an op that does so many operations for each element of its first result."""
    return lambda node: operations * node.results[0].type.size


# Checks: each raises an error that says what came, and what to do --------------------------------------------------


def listing(*types: TensorType) -> str:
    return " and ".join(map(str, types))


def fail_shape(message: str) -> None:
    raise ShapeError(message)


def fail_dtype(message: str) -> None:
    raise DTypeError(message)


def fail_attr(message: str) -> None:
    raise AttributeValueError(message)


def check_compute(*types: TensorType) -> None:
    """Dtypes that arithmetic is done in."""
    for t in types:
        if t.dtype in STORAGE:
            fail_dtype(f"{t.dtype} holds data but is not computed in, got {t}; cast first, "
                       f"e.g. to {'float32' if t.dtype.is_float else 'int32'}")


def check_float(*types: TensorType) -> None:
    for t in types:
        check_compute(t)
        if not t.dtype.is_float:
            fail_dtype(f"needs a floating-point dtype, got {t.dtype} ({t}); cast first, e.g. to float32")


def check_index(*types: TensorType) -> None:
    for t in types:
        if not t.dtype.is_integer or t.dtype in STORAGE:
            fail_dtype(f"indices need an integer dtype, got {t.dtype} ({t}); cast first, e.g. to int64")


def check_same_dtype(*types: TensorType) -> None:
    if len({t.dtype for t in types}) > 1:
        fail_dtype(f"the operands have different dtypes, {listing(*types)}; cast one to the dtype of the other")


def same_size(x: Size, y: Size) -> bool:
    """Equal for certain. A symbolic size equals only itself."""
    return bool(x == y)


def broadcasts_to(shape: Shape, target: Shape) -> bool:
    """Whether NumPy's rules repeat `shape` to `target`."""
    return len(shape) <= len(target) and all(
        s == 1 or same_size(s, wanted) for s, wanted in zip(shape, target[len(target) - len(shape):]))


def check_rank(t: TensorType, least: int, what: str) -> None:
    if t.rank < least:
        fail_shape(f"{what} needs at least {least} dimensions, got {t}")


def check_axis(axis: Any, rank: int, what: str = "axis") -> int:
    if isinstance(axis, bool) or not isinstance(axis, int) or not 0 <= axis < rank:
        fail_attr(f"{what} is {axis!r}; expected an int in [0, {rank}), as the operand has rank {rank}")
    return axis


def check_axes(axes: Any, rank: int, what: str = "axes") -> tuple[int, ...]:
    """Distinct axes in increasing order."""
    if not isinstance(axes, tuple):
        fail_attr(f"{what} is {axes!r}; expected a tuple of ints")
    for axis in axes:
        check_axis(axis, rank, f"an axis of {what}={axes}")
    if list(axes) != sorted(set(axes)):
        fail_attr(f"{what} is {axes}; expected distinct axes in increasing order")
    return axes


def check_flag(**flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            fail_attr(f"{name} is {value!r}; expected True or False")


def check_ints(what: str, values: Any, count: int, least: int | None = None) -> tuple[int, ...]:
    """A tuple of `count` ints, each at least `least`."""
    good = isinstance(values, tuple) and len(values) == count and all(
        isinstance(v, int) and not isinstance(v, bool) and (least is None or v >= least) for v in values)
    if not good:
        bound = "" if least is None else f", each at least {least}"
        fail_attr(f"{what} is {values!r}; expected a tuple of {count} ints{bound}")
    return values


def check_shape_attr(shape: Any, what: str = "shape") -> Shape:
    """A tuple of sizes, non-negative ints or symbolic."""
    if not isinstance(shape, tuple):
        fail_attr(f"{what} is {shape!r}; expected a tuple of sizes")
    return as_shape(shape)


def check_dtype_attr(dtype: Any, what: str = "dtype") -> DType:
    """A `DType`: a plain string would print, compare and hash as another attribute."""
    if not isinstance(dtype, DType):
        fail_attr(f"{what} is {dtype!r}; expected a DType, as in {what}=as_dtype({str(as_dtype(dtype))!r})")
    return dtype
