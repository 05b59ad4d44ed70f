"""Derivatives of convolution and pooling.

Convolution is bilinear, and its three ops are each other's transposes: the gradient of any of them is made of the
other two, with the same window. So the family is closed: it can be differentiated any number of times. The same
holds for average pooling and its transpose; max pooling gathers and scatters at the indices that it found.
"""

from __future__ import annotations

import math
from typing import Any

from ..ir.context import emit
from ..ir.graph import Node, Value
from ..ir.opdef import fill
from ..ir.ops_layout import spatial_sizes
from .reverse import Cotangents, vjp
from .vjp_elementwise import compare, where
from .vjp_matmul import contract


def spatial(x: Value, channels_last: bool) -> tuple[Any, ...]:
    return spatial_sizes(x.shape, channels_last)


def _forward(x: Value, w: Value, like: Value, window: dict[str, Any]) -> Value:
    return contract("conv", x, w, like, **window)


def _to_input(dy: Value, w: Value, x: Value, window: dict[str, Any]) -> Value:
    return contract("conv_input_grad", dy, w, x, input_spatial=spatial(x, window["channels_last"]), **window)


def _to_weight(x: Value, dy: Value, w: Value, window: dict[str, Any]) -> Value:
    return contract("conv_weight_grad", x, dy, w, kernel_spatial=w.shape[2:], **window)


vjp("conv",
    lambda ct, out, x, w, out_dtype, **window: _to_input(ct, w, x, window),
    lambda ct, out, x, w, out_dtype, **window: _to_weight(x, ct, w, window))
vjp("conv_input_grad",
    lambda ct, out, dy, w, input_spatial, out_dtype, **window: _forward(ct, w, dy, window),
    lambda ct, out, dy, w, input_spatial, out_dtype, **window: _to_weight(ct, dy, w, window))
vjp("conv_weight_grad",
    lambda ct, out, x, dy, kernel_spatial, out_dtype, **window: _to_input(dy, ct, x, window),
    lambda ct, out, x, dy, kernel_spatial, out_dtype, **window: _forward(x, ct, dy, window))


def _max_pool(node: Node, cotangents: Cotangents, needed: tuple[bool, ...]) -> list[Value | None]:
    (x,), (_, indices), (ct, _), last = node.operands, node.results, cotangents, node.attrs["channels_last"]
    if ct is None:
        return [None]
    return [emit("max_pool_grad", ct, indices, input_spatial=spatial(x, last), channels_last=last)]


def _max_pool_grad(ct: Value, out: Value, dy: Value, indices: Value, input_spatial: Any, channels_last: bool) -> Value:
    """The elements at the indices, in planes flattened as the indices count them."""
    axis = 1 if channels_last else 2
    flat, places = (emit("reshape", v, shape=_flat_plane(v, channels_last)) for v in (ct, indices))
    found = emit("reshape", emit("take_along_axis", flat, places, axis=axis), shape=dy.shape)
    return where(compare("ge", indices, 0), found, 0.0)  # index -1: a window of padding alone


def _flat_plane(x: Value, channels_last: bool) -> tuple[Any, ...]:
    size = math.prod(spatial(x, channels_last))
    return (x.shape[0], size, x.shape[-1]) if channels_last else (*x.shape[:2], size)


fill("vjp", "max_pool", _max_pool)
vjp("max_pool_grad", _max_pool_grad, None)
vjp("avg_pool", lambda ct, out, x, **window: emit(
    "avg_pool_grad", ct, input_spatial=spatial(x, window["channels_last"]), **window))
vjp("avg_pool_grad", lambda ct, out, dy, input_spatial, **window: emit("avg_pool", ct, **window))
