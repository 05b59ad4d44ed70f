"""What the simplification rules recognise and build: constants, broadcasts, results of a given op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .builder import emit
from .graph import Node, Value

Rule = Callable[[Node], "Value | Sequence[Value] | None"]

SCALARS_THROUGH = frozenset({"broadcast_to", "reshape", "transpose"})


def made_by(value: Value, name: str) -> bool:
    return value.producer is not None and value.producer.op.name == name


def constant_of(value: Value) -> np.ndarray | None:
    """The array of a constant."""
    return value.producer.attrs["value"] if value.producer and made_by(value, "constant") else None


def uniform(value: Value) -> Any:
    """The Python number that every element of the value is known to be, or None."""
    while value.producer and value.producer.op.name in SCALARS_THROUGH:
        (value,) = value.producer.operands
    array = constant_of(value)
    if array is None or array.size == 0:
        return None
    first = array.reshape(-1)[0]
    if array.size > 1 and not (array == first).all():
        return None
    return first.item() if hasattr(first, "item") and array.dtype.kind in "biuf" else float(first)


def spread(value: Value, shape: tuple[Any, ...]) -> Value:
    return value if value.shape == shape else emit("broadcast_to", value, shape=shape)


def like(value: Value, node: Node) -> Value:
    """The value in the shape of the node's result, which it broadcasts to."""
    return spread(value, node.result.shape)


def scalar_like(number: Any, value: Value) -> Value:
    """A scalar constant of the value's dtype."""
    return emit("constant", value=np.asarray(number).astype(value.dtype.np))


def fill_like(number: Any, node: Node) -> Value:
    """A tensor of the type of the node's result, every element the number."""
    return spread(scalar_like(number, node.result), node.result.shape)
