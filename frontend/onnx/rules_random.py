"""Random numbers, from the default generator: `td.random.seed` starts its stream; the attribute `seed` does not."""

from __future__ import annotations

from typing import Any

from ...ir.dtypes import float32
from .. import functions as F
from .. import random
from ..dispatch import cast
from ..tensor import Tensor
from .dtypes import attribute_dtype
from .node import OnnxNode
from .rules import onnx_rule
from .values import shape_of, tensor


def drawn(node: OnnxNode, shape: Any, dtype: Any, normal: bool) -> Tensor:
    """Normal or uniform numbers with the parameters that the node's attributes give."""
    wide = dtype if dtype.is_float else float32
    if normal:
        return cast(random.normal(shape, node.attr("mean", 0.0), node.attr("scale", 1.0), wide), dtype)
    return cast(random.uniform(shape, node.attr("low", 0.0), node.attr("high", 1.0), wide), dtype)


def random_rules(op_type: str, normal: bool) -> None:
    """An op that takes its shape from an attribute, and its namesake that takes it from an operand."""
    @onnx_rule(op_type, fold=False)
    def shaped(node: OnnxNode) -> Tensor:
        shape = tuple(int(s) for s in node.require("shape"))
        return drawn(node, shape, attribute_dtype(node, "dtype", float32), normal)

    @onnx_rule(f"{op_type}Like", fold=False)
    def like(node: OnnxNode, x: Any) -> Tensor:
        return drawn(node, shape_of(x), attribute_dtype(node, "dtype", tensor(x).dtype), normal)


random_rules("RandomNormal", True)
random_rules("RandomUniform", False)


@onnx_rule("Bernoulli", since=15, fold=False)
def bernoulli(node: OnnxNode, x: Any) -> Tensor:
    """1 with the probability that x gives, else 0."""
    x = tensor(x)
    return cast(random.bernoulli(cast(x, float32)), attribute_dtype(node, "dtype", x.dtype))


@onnx_rule("Multinomial", since=7, fold=False)
def multinomial(node: OnnxNode, x: Any) -> Tensor:
    """Class numbers drawn with replacement; x (batch, classes) are unnormalised log probabilities."""
    x, count = cast(tensor(x), float32), int(node.attr("sample_size", 1))
    total = F.cumsum(F.softmax(x, axis=1), axis=1)
    u = random.uniform((x.shape[0], count)) * total[:, -1:]
    below = F.expand_dims(u, 2) >= F.expand_dims(total, 1)
    index = F.minimum(F.count_nonzero(below, axis=2), x.shape[1] - 1)
    return cast(index, attribute_dtype(node, "dtype", F.asarray(0, "int32").dtype))
