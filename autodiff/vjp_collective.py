"""Derivatives of collectives: those of the sum of all ranks' losses (see ir/ops_collective.py)."""

from __future__ import annotations

from typing import Any

from ..ir.context import emit
from ..ir.errors import GradientError
from ..ir.graph import Node, Value
from ..ir.opdef import fill
from .reverse import Cotangents, vjp, zeros_like

Gradients = list["Value | None"]


def _filled(node: Node, cotangents: Cotangents) -> list[Value]:
    """All cotangents: a bucket is sent as a whole, zeros too."""
    return [zeros_like(v) if ct is None else ct for ct, v in zip(cotangents, node.results)]


def _bucket(node: Node, name: str, cotangents: Cotangents, **attrs: Any) -> Gradients:
    group: dict[str, Any] = {"axis": node.attrs["axis"], "size": node.attrs["size"]}
    found = emit(name, *_filled(node, cotangents), **group, **attrs)
    return list(found) if isinstance(found, tuple) else [found]


def _all_reduce(node: Node, cotangents: Cotangents, needed: tuple[bool, ...]) -> Gradients:
    if node.attrs["reduce"] != "sum":
        raise GradientError(f"all_reduce with reduce={node.attrs['reduce']!r} has no gradient: only a sum has one. "
                            "Gather the tensor and take its maximum", node.loc)
    return _bucket(node, "all_reduce", cotangents, reduce="sum")


def _all_gather(node: Node, cotangents: Cotangents, needed: tuple[bool, ...]) -> Gradients:
    return _bucket(node, "reduce_scatter", cotangents, dims=node.attrs["dims"])


def _reduce_scatter(node: Node, cotangents: Cotangents, needed: tuple[bool, ...]) -> Gradients:
    return _bucket(node, "all_gather", cotangents, dims=node.attrs["dims"])


def _all_to_all(ct: Value, out: Value, x: Value, axis: str, size: int, split: int, concat: int) -> Value:
    return emit("all_to_all", ct, axis=axis, size=size, split=concat, concat=split)


fill("vjp", "all_reduce", _all_reduce)
fill("vjp", "all_gather", _all_gather)
fill("vjp", "reduce_scatter", _reduce_scatter)
vjp("all_to_all", _all_to_all)
vjp("annotate", lambda ct, out, x, dims, whole: emit("annotate", ct, dims=dims, whole=whole))
