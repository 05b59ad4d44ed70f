"""How contractions are split: by batch, by column, by row (a partial sum), by channel, by group."""

from __future__ import annotations

from typing import Any

from ..ir.graph import Node, Value
from ..ir.opdef import fill
from .rules import Factors, Labels, Local, Shard

LINEAR = (frozenset({0}), frozenset({1}))


def _linear(node: Node) -> tuple[frozenset[int], ...]:
    return LINEAR if node.result.dtype.is_float else ()


def _batch(value: Value, shape: tuple[Any, ...]) -> Labels:
    """Labels of the batch dimensions, which broadcast to those of the result."""
    lead, shift = value.rank - 2, len(shape) - value.rank
    return tuple(i + shift if value.shape[i] == shape[i + shift] else None for i in range(lead))


def matmul_factors(node: Node) -> Factors:
    (x, y), shape = node.operands, node.result.shape
    left = ("k", "m") if node.attrs["transpose_x"] else ("m", "k")
    right = ("n", "k") if node.attrs["transpose_y"] else ("k", "n")
    return Factors(((*_batch(x, shape), *left), (*_batch(y, shape), *right)), ((*range(len(shape) - 2), "m", "n"),),
                   summed=frozenset({"k"}), linear=_linear(node))


# Convolutions: (N, C, *spatial) or, channels last, (N, *spatial, C) ------------------------------------------------


def _activation(value: Value, channel: Any, last: bool) -> Labels:
    spatial = (None,) * (value.rank - 2)
    return ("n", *spatial, channel) if last else ("n", channel, *spatial)


def _weight(value: Value, first: Any, second: Any) -> Labels:
    return (first, second, *(None,) * (value.rank - 2))


def _channels(node: Node, out_channels: int) -> tuple[Any, Any, Any, dict[Any, int]]:
    """Labels of (output channels, input channels of x, those of the weight), and limits.

    With several groups the channels are split group by group, so output and input channels go together.
    """
    groups = node.attrs["groups"]
    return ("o", "i", "i", {}) if groups == 1 else ("g", "g", None, {"g": groups})


def conv_factors(node: Node) -> Factors:
    (x, w), last = node.operands, node.attrs["channels_last"]
    o, i, wi, limits = _channels(node, w.shape[0])
    return Factors((_activation(x, i, last), _weight(w, o, wi)), (_activation(node.result, o, last),),
                   summed=frozenset({"i"} if i == "i" else ()), linear=_linear(node), limits=limits)


def conv_input_grad_factors(node: Node) -> Factors:
    (dy, w), last = node.operands, node.attrs["channels_last"]
    o, i, wi, limits = _channels(node, w.shape[0])
    return Factors((_activation(dy, o, last), _weight(w, o, wi)), (_activation(node.result, i, last),),
                   summed=frozenset({"o"} if o == "o" else ()), linear=_linear(node), limits=limits)


def conv_weight_grad_factors(node: Node) -> Factors:
    (x, dy), last = node.operands, node.attrs["channels_last"]
    o, i, wi, limits = _channels(node, node.result.shape[0])
    return Factors((_activation(x, i, last), _activation(dy, o, last)), (_weight(node.result, o, wi),),
                   summed=frozenset({"n"}), linear=_linear(node), limits=limits)


def conv_local(ctx: Local, x: Value, w: Value) -> Any:
    return ctx.emit(x, w, groups=ctx.node.attrs["groups"] // ctx.ranks("g"))


fill("shard", "matmul", Shard(matmul_factors))
fill("shard", "conv", Shard(conv_factors, conv_local))
fill("shard", "conv_input_grad", Shard(conv_input_grad_factors, conv_local))
fill("shard", "conv_weight_grad", Shard(conv_weight_grad_factors, conv_local))
