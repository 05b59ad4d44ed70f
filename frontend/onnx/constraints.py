"""What the schema of an op says of the types of its operands: those that share a type variable have one dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..tensor import Tensor
from .node import OnnxNode, schema_of

_variables: dict[tuple[str, str, int], tuple[list[str], bool]] = {}


def check_types(node: OnnxNode, operands: Sequence[Any]) -> None:
    """Compares the dtypes of operands, and their number, with the schema.

    Raises:
        OnnxError: two operands that have to be of one dtype are not, or there are too many.
    """
    key = (node.op_type, node.domain, node.opset)
    if key not in _variables:
        _variables[key] = _read(*key)
    variables, variadic = _variables[key]
    if not variables:
        return
    if len(operands) > len(variables) and not variadic:
        raise node.fail(f"it has {len(operands)} operands; the op takes at most {len(variables)}")
    bound: dict[str, tuple[int, str]] = {}
    for number, value in enumerate(operands):
        variable = variables[min(number, len(variables) - 1)]
        dtype = _dtype(value)
        if not variable or dtype is None:
            continue
        first, wanted = bound.setdefault(variable, (number, dtype))
        if dtype != wanted:
            raise node.fail(f"the operands {node.inputs[first]!r} and {node.inputs[number]!r} have to be of one dtype; "
                            f"they are {wanted} and {dtype}")


def _read(op_type: str, domain: str, opset: int) -> tuple[list[str], bool]:
    """The type variable of each operand ("" for what is free), and whether there can be more like the last."""
    schema = schema_of(op_type, domain, opset)
    if schema is None or not schema.inputs:
        return [], False
    constrained = {c.type_param_str for c in schema.type_constraints}
    last = schema.inputs[-1]
    variadic = str(last.option).endswith("Variadic")
    names = [i.type_str if i.type_str in constrained else "" for i in schema.inputs]
    if variadic and not last.is_homogeneous:
        names[-1] = ""
    return names, variadic


def _dtype(value: Any) -> str | None:
    if isinstance(value, Tensor):
        return str(value.dtype)
    if value is None or isinstance(value, list) or value.dtype == object:  # sizes are integers of any width
        return None
    return str(value.dtype)
