"""Element types.

A `DType` is a string, the NumPy name ("float32", "bfloat16", "bool"), with the facts that the
compiler asks of it. ml_dtypes supplies the NumPy dtypes that NumPy itself lacks.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy
import numpy as np

from .errors import DTypeError


class DType(str):
    """An element type. Compares equal to its NumPy name: `t.dtype == "float32"`."""

    short: str
    kind: str  # "f" float, "i" signed, "u" unsigned, "b" bool
    bits: int
    np: numpy.dtype

    @property
    def is_float(self) -> bool:
        return self.kind == "f"

    @property
    def is_integer(self) -> bool:
        return self.kind in "iu"

    @property
    def is_unsigned(self) -> bool:
        return self.kind == "u"

    @property
    def is_bool(self) -> bool:
        return self.kind == "b"

    @property
    def itemsize(self) -> int:
        """Bytes of one element in memory (4-bit types are stored one to a byte)."""
        return max(self.bits // 8, 1)

    @property
    def dtype(self) -> numpy.dtype:
        """NumPy's own protocol: `np.dtype(td.float32)` works, bfloat16 included."""
        return self.np


def _dtype(name: str, short: str, kind: str, bits: int, scalar: Any) -> DType:
    dtype = DType(name)
    dtype.short, dtype.kind, dtype.bits, dtype.np = short, kind, bits, np.dtype(scalar)
    return dtype


float64 = _dtype("float64", "f64", "f", 64, np.float64)
float32 = _dtype("float32", "f32", "f", 32, np.float32)
float16 = _dtype("float16", "f16", "f", 16, np.float16)
bfloat16 = _dtype("bfloat16", "bf16", "f", 16, ml_dtypes.bfloat16)
float8_e4m3fn = _dtype("float8_e4m3fn", "f8e4m3", "f", 8, ml_dtypes.float8_e4m3fn)
float8_e5m2 = _dtype("float8_e5m2", "f8e5m2", "f", 8, ml_dtypes.float8_e5m2)
int64 = _dtype("int64", "i64", "i", 64, np.int64)
int32 = _dtype("int32", "i32", "i", 32, np.int32)
int16 = _dtype("int16", "i16", "i", 16, np.int16)
int8 = _dtype("int8", "i8", "i", 8, np.int8)
int4 = _dtype("int4", "i4", "i", 4, ml_dtypes.int4)
uint64 = _dtype("uint64", "u64", "u", 64, np.uint64)
uint32 = _dtype("uint32", "u32", "u", 32, np.uint32)
uint16 = _dtype("uint16", "u16", "u", 16, np.uint16)
uint8 = _dtype("uint8", "u8", "u", 8, np.uint8)
uint4 = _dtype("uint4", "u4", "u", 4, ml_dtypes.uint4)
bool_ = _dtype("bool", "bool", "b", 8, np.bool_)

ALL = (float64, float32, float16, bfloat16, float8_e4m3fn, float8_e5m2,
       int64, int32, int16, int8, int4, uint64, uint32, uint16, uint8, uint4, bool_)
_BY_NAME = {d: d for d in ALL} | {d.short: d for d in ALL} | {"f8e4m3fn": float8_e4m3fn}
_BY_NP = {d.np: d for d in ALL}


def as_dtype(spec: Any) -> DType:
    """The `DType` of a name ("float32", "f32"), a NumPy dtype or scalar type, or Python's float, int, bool.

    Python's `float` means float32 and `int` means int64.

    Raises:
        DTypeError: there is no such element type (complex, object, string...).
    """
    if isinstance(spec, DType):
        return spec
    if isinstance(spec, str) and spec in _BY_NAME:
        return _BY_NAME[spec]
    if spec is float:
        return float32
    try:
        return _BY_NP[np.dtype(spec).newbyteorder("=")]
    except (KeyError, TypeError):
        raise DTypeError(f"{spec!r} is not a supported dtype; supported: {', '.join(ALL)}") from None


_FLOAT_RANK = {float8_e4m3fn: 0, float8_e5m2: 0, float16: 1, bfloat16: 1, float32: 2, float64: 3}


def promote(x: DType, y: DType) -> DType:
    """The common dtype of two tensors, by the array API standard, with integer + float = that float.

    bfloat16 with float16 gives float32, as the two hold different ranges.
    """
    if x == y:
        return x
    if x.is_bool:
        return y
    if y.is_bool:
        return x
    if x.is_float and y.is_float:
        if _FLOAT_RANK[x] == _FLOAT_RANK[y]:
            return float32 if _FLOAT_RANK[x] == 1 else float16
        return x if _FLOAT_RANK[x] > _FLOAT_RANK[y] else y
    if x.is_float or y.is_float:
        return x if x.is_float else y
    if x.is_unsigned == y.is_unsigned:
        return x if x.bits >= y.bits else y
    signed, unsigned = (y, x) if x.is_unsigned else (x, y)
    if signed.bits > unsigned.bits:
        return signed
    if unsigned.bits == 64:
        return float64  # NumPy's answer: no integer holds both
    return {4: int8, 8: int16, 16: int32, 32: int64}[unsigned.bits]
