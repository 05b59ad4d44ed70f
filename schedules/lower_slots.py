"""What the `lower` slot of an op holds, and how elements are kept in memory.

* `Pointwise(fn)`: each result element is a scalar expression of operand elements. Elementwise, shape and
  gather ops, counters and random bits are all of this kind, and any chain of them fuses into one loop nest.
* `Reduce(...)`: a fold over axes with an associative operation.
* `Anchor(fn)`: a kernel of its own that hands each element to the ops fused behind it.
* `Kernel(fn)`: the op writes a kernel of its own.
* `Host(name)`: the program calls a Python function.

Expressions are computed in the *compute dtype* of a value: f32 for the narrower floats (rounded when stored,
and by an explicit cast), the dtype itself for the rest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import ir, tirx
from tvm.ir import _ffi_api as op_api
from tvm.script.ir_builder import tirx as T
from tvm.tirx import op as tirx_op

from ..ir.graph import Node

NARROW_FLOATS = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
FLOAT8 = {"float8_e4m3fn": (4, 3), "float8_e5m2": (5, 2)}


@dataclass(frozen=True)
class Pointwise:
    """`fn(node, idx, load) -> PrimExpr`: the result element at `idx` (a tuple of `Index`), in the compute dtype;
    `load(k, idx)` gives an element of operand k. `cost`: rough operations per element, to weigh recomputation.
    With `elementwise`, `fn(node, *operand elements)` instead: indices follow from broadcasting. `exposes`: the value
    depends on the index itself (counters), so that axes are better not collapsed."""

    fn: Callable[..., Any]
    cost: float = 1.0
    elementwise: bool = False
    exposes: bool = False


@dataclass(frozen=True)
class Reduce:
    """`identity(node)`, `combine(node, a, b)`, `finish(node, total, count)`: expressions in the compute dtype."""

    identity: Callable[[Node], Any]
    combine: Callable[[Node, Any, Any], Any]
    finish: Callable[[Node, Any, int], Any] = lambda node, total, count: total


@dataclass(frozen=True)
class Kernel:
    """`fn(node, target, name) -> PrimFunc` whose parameters are the operands, then the results.

    `inplace`: (operand, result) positions that share one parameter; lowering copies the operand there first,
    unless it dies.
    """

    fn: Callable[..., Any]
    inplace: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Host:
    """`name(node)`: the host function (host.py) that is called with the operands, then the results to write.

    `fn(node, target, name)`: a kernel that does it, or some of it, without leaving the program where the function was
    registered with a record; its parameters are the operands, the results and the record's address. Or None.
    """

    name: Callable[[Node], str]
    fn: Callable[..., Any] = lambda node, target, name: None


@dataclass(frozen=True)
class Anchor:
    """A contraction that takes in the elementwise ops that follow it.

    `fn(node, epilogue, target, name) -> PrimFunc` with the parameters `epilogue.params`; it calls
    `epilogue.store(idx, value)` once for each element of the result, which computes and stores every output.
    A node that `takes` refuses is decomposed.
    """

    fn: Callable[..., Any]
    takes: Callable[[Node], bool] = lambda node: True


def compute_dtype(dtype: str) -> str:
    """The dtype expressions over such a value are computed in."""
    if dtype in NARROW_FLOATS:
        return "float32"
    return {"int4": "int8", "uint4": "uint8"}.get(dtype, str(dtype))


def storage_dtype(dtype: str) -> str:
    """The dtype a kernel's parameter is declared with: bytes for what TVM does not compute with rightly."""
    if dtype in FLOAT8:
        return "uint8"
    return {"int4": "int8", "uint4": "uint8", "bfloat16": "uint16"}.get(dtype, str(dtype))


def dtype_of(expr: Any) -> str:
    """The dtype of an expression."""
    ty = getattr(expr, "ty", None)  # `x == y` is not an expression yet
    return "bool" if ty is None else str(ty.dtype)


class _Recording(threading.local):
    on = False


_recording = _Recording()


@contextmanager
def recording() -> Iterator[None]:
    """Rules run to see what they read, not to write code: `let` binds nothing."""
    before, _recording.on = _recording.on, True
    try:
        yield
    finally:
        _recording.on = before


def let(expr: Any) -> Any:
    """The expression bound to a variable at this place of the kernel, so that it is computed once."""
    if _recording.on or isinstance(expr, (tirx.Var, tirx.IntImm, tirx.FloatImm)) or dtype_of(expr) == "bool":
        return expr  # TVM cannot bind a vector of bool; LLVM finds the common expression
    return T.bind(hide(expr))


HIDE = "tirx.treadle_hide"


def hide(expr: Any) -> Any:
    """The same number, opaque to TVM until code is emitted.

    TVM's simplifier takes floats for reals ((x + y) - y for x, x != x for False), and follows variables to what they
    are bound to, so that a chain of bindings costs exponential time. It stops at what may read memory, as this
    operator of ours says it does.
    """
    dtype = dtype_of(expr)
    return expr if dtype == "bool" else tirx.call_intrin(dtype, HIDE, expr)


def _register_hide() -> None:
    if HIDE in ir.Op.list_op_names():
        return
    op_api.RegisterOp(HIDE, "identity that no simplifier sees through")
    ir.register_op_attr(HIDE, "TScriptPrinterName", "treadle_hide")
    ir.register_op_attr(HIDE, "TVectorizable", True)
    ir.register_op_attr(HIDE, "TCallEffectKind", 2)  # reads state
    tirx_op.register_intrin_lowering(HIDE, target="default", f=_unhide)


def _unhide(call: Any) -> Any:
    """x * 1 + -0, or x shifted by nothing, as an LLVM intrinsic: TVM cannot see through it, LLVM folds it away."""
    dtype = call.ty.dtype
    whole = not str(dtype).startswith("float")
    fills = (tirx.const(0, dtype), tirx.const(0, dtype)) if whole else (tirx.const(1, dtype), tirx.const(-0.0, dtype))
    return tirx.call_llvm_intrin(dtype, "llvm.fshl" if whole else "llvm.fma", call.args[0], *fills)


_register_hide()


def is_nan(x: Any) -> Any:
    """Whether x is not a number, by its bits: TVM takes x != x for False, and its != is LLVM's ordered one."""
    wide = dtype_of(x) == "float64"
    bits = "uint64" if wide else "uint32"
    magnitude = tirx.reinterpret(bits, x) & const((1 << 63) - 1 if wide else (1 << 31) - 1, bits)
    return magnitude > const(0x7FF << 52 if wide else 0x7F800000, bits)


def const(value: Any, dtype: str) -> Any:
    """An immediate of a dtype; Python numbers and NumPy scalars, infinities and NaN too."""
    if dtype == "bool":
        return tirx.const(bool(value), "bool")
    if dtype.startswith(("int", "uint")):
        value = int(value)
        if dtype == "uint64" and value >= 1 << 63:
            low, high = (tirx.const(part, "uint64") for part in (value & 0xFFFFFFFF, value >> 32))
            return (high << tirx.const(32, "uint64")) | low
        return tirx.const(value, dtype)
    return tirx.const(float(value), dtype)


def cast(expr: Any, dtype: str) -> Any:
    return expr if dtype_of(expr) == dtype else tirx.Cast(dtype, expr)


def read(raw: Any, dtype: str) -> Any:
    """The compute-dtype value of an element as stored."""
    if dtype in FLOAT8:
        return decode_float8(raw, dtype)
    if dtype == "bfloat16":  # the upper half of an f32; TVM's own cast reads the bits as a number in some places
        half = raw if dtype_of(raw) == "uint16" else tirx.reinterpret("uint16", raw)
        return tirx.reinterpret("float32", cast(half, "uint32") << const(16, "uint32"))
    if dtype == "int4":
        return (raw << const(4, "int8")) >> const(4, "int8")
    if dtype == "uint4":
        return raw & const(15, "uint8")
    return cast(raw, compute_dtype(dtype))


def written(value: Any, dtype: str) -> Any:
    """The stored form of a compute-dtype value."""
    if dtype in FLOAT8:
        return encode_float8(value, dtype)
    if dtype == "int4":
        return read(value, dtype)
    if dtype == "uint4":
        return value & const(15, "uint8")
    if dtype == "bfloat16" and dtype_of(value) == "float32":
        bits = let(tirx.reinterpret("uint32", round_to_bfloat16(value)))
        return cast(bits >> const(16, "uint32"), "uint16")
    return cast(value, dtype)


def rounded(value: Any, dtype: str) -> Any:
    """A compute-dtype value rounded to what `dtype` holds, still in the compute dtype."""
    if dtype not in NARROW_FLOATS:
        return value
    if dtype == "bfloat16":
        return round_to_bfloat16(value)
    if dtype == "float16":
        return cast(cast(value, "float16"), "float32")
    return decode_float8(let(encode_float8(value, dtype)), dtype)


def round_to_bfloat16(x: Any) -> Any:
    """f32 rounded to 8 significant bits, halves to even; NaN stays NaN."""
    x = let(x)
    u = lambda v: const(v, "uint32")  # noqa: E731
    bits = let(tirx.reinterpret("uint32", x))
    up = let((bits + u(0x7FFF) + ((bits >> u(16)) & u(1))) & u(0xFFFF0000))
    quiet = tirx.reinterpret("float32", (bits | u(0x400000)) & u(0xFFFF0000))
    return let(tirx.Select(is_nan(x), quiet, tirx.reinterpret("float32", up)))


def decode_float8(raw: Any, dtype: str) -> Any:
    """f32 of an 8-bit float, subnormals, infinities and NaN included (TVM's own cast is wrong there)."""
    exponent, mantissa = FLOAT8[dtype]
    u = lambda v: const(v, "uint32")  # noqa: E731
    wide = let(cast(raw, "uint32"))
    # Shifted into f32's fields, the value is off by a power of two: one exact multiplication makes it right,
    # also for subnormals.
    body = let((wide & u(0x7F)) << u(23 - mantissa))
    bias = 127 - ((1 << (exponent - 1)) - 1)
    value = tirx.reinterpret("float32", body) * const(2.0 ** bias, "float32")
    magnitude = let(wide & u(0x7F))
    if dtype == "float8_e5m2":
        special = tirx.Select(magnitude == u(0x7C), const(float("inf"), "float32"), const(float("nan"), "float32"))
        value = tirx.Select(magnitude >= u(0x7C), special, value)
    else:
        value = tirx.Select(magnitude == u(0x7F), const(float("nan"), "float32"), value)
    signed = tirx.reinterpret("uint32", let(value)) | ((wide & u(0x80)) << u(24))
    return tirx.reinterpret("float32", signed)


def encode_float8(x: Any, dtype: str) -> Any:
    """The 8-bit float nearest to an f32, halves to even, as its byte. Overflow gives infinity (e5m2) or NaN (e4m3)."""
    exponent, mantissa = FLOAT8[dtype]
    bias = (1 << (exponent - 1)) - 1
    u = lambda v: const(v, "uint32")  # noqa: E731
    bits = let(tirx.reinterpret("uint32", let(x)))
    sign = let((bits >> u(24)) & u(0x80))
    magnitude = let(bits & u(0x7FFFFFFF))
    drop = 23 - mantissa
    normal = (magnitude - u((127 - bias) << 23) + u((1 << (drop - 1)) - 1) + ((magnitude >> u(drop)) & u(1))) >> u(drop)
    # Below the smallest normal: adding a power of two rounds at the last place of a subnormal.
    anchor = 2.0 ** (1 - bias - mantissa + 23)
    lifted = tirx.reinterpret("uint32", let(tirx.reinterpret("float32", magnitude) + const(anchor, "float32")))
    subnormal = lifted - u((int(1 - bias - mantissa + 23) + 127) << 23)
    code = let(tirx.Select(magnitude < u((128 - bias) << 23), subnormal, normal))
    if dtype == "float8_e5m2":
        code = tirx.Select(code > u(0x7C), u(0x7C), code)
        code = tirx.Select(magnitude > u(0x7F800000), u(0x7E), code)
    else:
        code = tirx.Select(tirx.Or(code > u(0x7E), magnitude >= u(0x7F800000)), u(0x7F), code)
    return cast(code | sign, "uint8")
