"""The element types that ONNX and the IR share."""

from __future__ import annotations

from typing import Any

from onnx import TensorProto

from ...ir.dtypes import DType, as_dtype
from .node import OnnxNode

BY_NUMBER: dict[int, DType] = {
    TensorProto.FLOAT: as_dtype("float32"), TensorProto.DOUBLE: as_dtype("float64"),
    TensorProto.FLOAT16: as_dtype("float16"), TensorProto.BFLOAT16: as_dtype("bfloat16"),
    TensorProto.FLOAT8E4M3FN: as_dtype("float8_e4m3fn"), TensorProto.FLOAT8E5M2: as_dtype("float8_e5m2"),
    TensorProto.INT8: as_dtype("int8"), TensorProto.INT16: as_dtype("int16"), TensorProto.INT32: as_dtype("int32"),
    TensorProto.INT64: as_dtype("int64"), TensorProto.UINT8: as_dtype("uint8"),
    TensorProto.UINT16: as_dtype("uint16"), TensorProto.UINT32: as_dtype("uint32"),
    TensorProto.UINT64: as_dtype("uint64"), TensorProto.BOOL: as_dtype("bool"), TensorProto.INT4: as_dtype("int4"),
    TensorProto.UINT4: as_dtype("uint4"),
}


def number_of(dtype: DType) -> int:
    """The ONNX number of a dtype."""
    return next(number for number, known in BY_NUMBER.items() if known == dtype)


def dtype_of(node: OnnxNode, number: int) -> DType:
    """The dtype of an ONNX element type.

    Raises:
        OnnxError: strings, complex numbers and the formats that no kernel computes in.
    """
    found = BY_NUMBER.get(int(number))
    if found is None:
        names = {v: k for k, v in TensorProto.DataType.items()}
        raise node.fail(f"the element type {names.get(int(number), number)} is not supported; supported are "
                        + ", ".join(str(d) for d in BY_NUMBER.values()))
    return found


def attribute_dtype(node: OnnxNode, name: str, default: Any = None) -> DType:
    """The dtype that an attribute of the node names."""
    number = node.attr(name, None)
    return dtype_of(node, number) if number is not None else default
