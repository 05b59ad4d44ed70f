"""Ops that are functions of other ops: the standard gives many a body, which stands in where there is no rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from ..tensor import Tensor
from .node import OnnxNode, schema_of
from .values import is_known


@dataclass(frozen=True)
class FunctionBody:
    """A function with the opsets that its nodes are of (None: as the function says)."""

    proto: onnx.FunctionProto
    opsets: Mapping[str, int] | None = None


def standard_body(node: OnnxNode, operands: Sequence[Any]) -> FunctionBody | None:
    """The body that the standard defines for an op, for operands of these types; None if it has none."""
    schema = schema_of(node.op_type, node.domain, node.opset)
    if schema is None:
        return None
    for versions, get in ((schema.function_opset_versions, schema.get_function_with_opset_version),
                          (schema.context_dependent_function_opset_versions,
                           lambda v: schema.get_context_dependent_function_with_opset_version(
                               v, _with_attributes(node), _types(operands)))):
        best = max((v for v in versions if v <= max(node.opset, schema.since_version)), default=None)
        if best is None:
            continue
        try:
            found = onnx.FunctionProto.FromString(get(best))
        except Exception:  # a body that this choice of operands does not have
            continue
        if found.node:
            return FunctionBody(found, {"": max(best, node.opset)} if node.domain == "" else None)
    return None


def has_standard_body(op_type: str, domain: str, opset: int) -> bool:
    """Whether the standard defines an op by others."""
    schema = schema_of(op_type, domain, opset)
    return schema is not None and (schema.has_function or schema.has_context_dependent_function)


def _with_attributes(node: OnnxNode) -> bytes:
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    del proto.attribute[:]
    proto.attribute.extend(node._attributes.values())
    return proto.SerializeToString()


def _types(operands: Sequence[Any]) -> list[bytes]:
    """TypeProtos of operands."""
    return [type_of(x).SerializeToString() for x in operands]


def type_of(value: Any) -> onnx.TypeProto:
    """The ONNX type of a value; symbolic sizes are left open."""
    if value is None:
        return onnx.TypeProto()
    if isinstance(value, list):
        return onnx.helper.make_sequence_type_proto(type_of(value[0]) if value else onnx.TypeProto())
    shape = [s if isinstance(s, int) else None for s in value.shape]
    if is_known(value) and value.dtype == object:
        kind = onnx.TensorProto.STRING if value.size and isinstance(value.flat[0], str) else onnx.TensorProto.INT64
    else:
        dtype = value.dtype.np if isinstance(value, Tensor) else np.asarray(value).dtype
        kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
    return onnx.helper.make_tensor_type_proto(kind, shape)
