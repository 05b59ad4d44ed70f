"""Collectives: what the ranks of one mesh axis do together. They appear when `distributed` partitions a graph.

A partitioned graph is the program of every rank alike; `axis` names the mesh axis whose ranks take part, `size` says
how many they are. Their meaning needs all ranks: `distributed.lockstep` interprets them together, a compiled program
calls MPI. The references here are those of a group of one.

Several tensors may go in one call (a bucket): they are sent as one message.

The gradients are those of the sum of all ranks' losses, which is what "the gradient" means when each rank
differentiates its own program: an all_gather's is a reduce_scatter, an all_reduce's an all_reduce. (Graphs are
partitioned after they are differentiated, so nothing of ours needs them; they are for programs written per rank.)

`annotate` is no collective but the wish that a value be sharded in a given way; it computes nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .dtypes import int64
from .errors import ArgumentsError
from .graph import Node, Value
from .opdef import fill
from .ops_common import (
    REQUIRED,
    TensorType,
    check_axis,
    check_compute,
    check_ints,
    check_shape_attr,
    define,
    fail_attr,
    fail_shape,
)

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
REDUCTIONS = ("sum", "max", "min")
STARTED = ("all_reduce", "reduce_scatter", "all_gather")
COMMUNICATION = (*COLLECTIVES, "axis_index", "send", "recv", "start", "wait")
"""Ops that need other processes."""
OPS = (*COMMUNICATION, "annotate")
"""All ops of this module. Their tests need several ranks: tests/distributed."""


def _check_group(axis: Any, size: Any) -> None:
    if not isinstance(axis, str) or not axis.isidentifier():
        fail_attr(f"axis is {axis!r}; expected the name of a mesh axis")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        fail_attr(f"size is {size!r}; expected the number of ranks along {axis!r}, at least 1")


def _with_dim(t: TensorType, dim: int, extent: Any) -> TensorType:
    return t.with_shape((*t.shape[:dim], extent, *t.shape[dim + 1:]))


def _divided(t: TensorType, dim: int, size: int) -> TensorType:
    check_axis(dim, t.rank, "dim")
    if t.shape[dim] % size:
        fail_shape(f"dimension {dim} of {t} does not divide into {size} equal parts")
    return _with_dim(t, dim, t.shape[dim] // size)


def all_reduce_infer(*xs: TensorType, axis: str, size: int, reduce: str) -> tuple[TensorType, ...]:
    _check_group(axis, size)
    if reduce not in REDUCTIONS:
        fail_attr(f"reduce is {reduce!r}; expected one of {', '.join(REDUCTIONS)}")
    check_compute(*xs)
    return xs


def all_gather_infer(*xs: TensorType, axis: str, size: int, dims: tuple[int, ...]) -> tuple[TensorType, ...]:
    _check_group(axis, size)
    check_ints("dims", dims, len(xs), 0)
    return tuple(_with_dim(t, check_axis(d, t.rank, "dim"), t.shape[d] * size) for t, d in zip(xs, dims))


def reduce_scatter_infer(*xs: TensorType, axis: str, size: int, dims: tuple[int, ...]) -> tuple[TensorType, ...]:
    _check_group(axis, size)
    check_compute(*xs)
    check_ints("dims", dims, len(xs), 0)
    return tuple(_divided(t, d, size) for t, d in zip(xs, dims))


def all_to_all_infer(x: TensorType, axis: str, size: int, split: int, concat: int) -> TensorType:
    _check_group(axis, size)
    check_axis(concat, x.rank, "concat")
    if split == concat:
        fail_attr(f"split and concat are both {split}: that would leave the tensor as it is")
    made = _divided(x, split, size)
    return _with_dim(made, concat, made.shape[concat] * size)


def _alone(*xs: np.ndarray, size: int = 1, **attrs: Any) -> tuple[np.ndarray, ...]:
    if size != 1:
        raise ArgumentsError(f"this graph is the program of one of {size} ranks along {attrs.get('axis')!r}: one rank "
                             "alone has no result. Interpret all of them (distributed.lockstep), or run it under MPI")
    return tuple(xs)


def _define(name: str, operands: str, infer: Any, doc: str, **attrs: Any) -> None:
    reference = _alone if operands.startswith("*") else lambda *xs, **given: _alone(*xs, **given)[0]
    define(name, operands, infer, reference, doc, attrs={"axis": REQUIRED, "size": REQUIRED, **attrs},
           traits=["effect"])


_define("all_reduce", "*xs", all_reduce_infer, "Each tensor reduced over the ranks; all ranks get it.", reduce="sum")
_define("all_gather", "*xs", all_gather_infer, "The ranks' tensors one after the other along a dimension, everywhere.",
        dims=REQUIRED)
_define("reduce_scatter", "*xs", reduce_scatter_infer,
        "Each tensor summed over the ranks and cut along a dimension; each rank gets its part.", dims=REQUIRED)
_define("all_to_all", "x", all_to_all_infer,
        "Cut along `split`, part i sent to rank i, what arrives joined along `concat`.", split=REQUIRED,
        concat=REQUIRED)


def axis_index_infer(axis: str, size: int) -> TensorType:
    _check_group(axis, size)
    return TensorType((), int64)


define("axis_index", "", axis_index_infer, lambda axis, size: _alone(np.zeros((), np.int64), size=size, axis=axis)[0],
       "The rank's coordinate along a mesh axis.", attrs={"axis": REQUIRED, "size": REQUIRED}, traits=["effect"],
       undifferentiable="integer result")


def _nobody(*xs: Any, **attrs: Any) -> Any:
    raise ArgumentsError("messages need another rank: interpret all ranks (distributed.lockstep), or use MPI")


# While something else is computed ----------------------------------------------------------------------------------


def start_infer(*xs: TensorType, kind: str, axis: str, size: int, dims: tuple[int, ...], tag: int) -> TensorType:
    if kind not in STARTED:
        fail_attr(f"kind is {kind!r}; expected one of {', '.join(STARTED)}")
    started_types(xs, kind, axis, size, dims)
    return TensorType((), int64)


def started_types(xs: tuple[TensorType, ...], kind: str, axis: str, size: int,
                  dims: tuple[int, ...]) -> tuple[TensorType, ...]:
    """The types of what a `start` brings."""
    if kind == "all_reduce":
        return all_reduce_infer(*xs, axis=axis, size=size, reduce="sum")
    if kind == "all_gather":
        return all_gather_infer(*xs, axis=axis, size=size, dims=dims)
    return reduce_scatter_infer(*xs, axis=axis, size=size, dims=dims)


def wait_infer(token: TensorType, axis: str, size: int, tag: int, shapes: tuple[tuple[int, ...], ...],
               dtype: Any) -> tuple[TensorType, ...]:
    _check_group(axis, size)
    return tuple(TensorType(shape, dtype) for shape in shapes)


define("start", "*xs", start_infer, lambda *xs, **attrs: _nobody(),
       "Starts a collective (`kind`: a sum, a gather) on a copy of its operands; gives a token, 0. `wait` with the "
       "same tag gives its results.",
       attrs={"kind": REQUIRED, "axis": REQUIRED, "size": REQUIRED, "dims": (), "tag": REQUIRED},
       traits=["effect"], undifferentiable="its result is a token; differentiate before collectives are started early")
define("wait", "token", wait_infer, lambda token, **attrs: _nobody(), "The results of what `start` started.",
       attrs={"axis": REQUIRED, "size": REQUIRED, "tag": REQUIRED, "shapes": REQUIRED, "dtype": REQUIRED},
       traits=["effect"], undifferentiable="its operand is a token; differentiate before collectives are started early")


# From one rank to another ------------------------------------------------------------------------------------------


def send_infer(x: TensorType, axis: str, size: int, shift: int, tag: int) -> TensorType:
    _check_group(axis, size)
    return TensorType((), int64)


def recv_infer(axis: str, size: int, shift: int, tag: int, shape: tuple[int, ...], dtype: Any) -> TensorType:
    _check_group(axis, size)
    return TensorType(check_shape_attr(shape), dtype)


define("send", "x", send_infer, _nobody, "Hands a tensor to the rank `shift` further along the axis; gives a token, 0.",
       attrs={"axis": REQUIRED, "size": REQUIRED, "shift": REQUIRED, "tag": 0}, traits=["effect"],
       undifferentiable="its result is a token; write the recv of the cotangent on the way back")
define("recv", "", recv_infer, _nobody, "What the rank `shift` further along the axis sends here.",
       attrs={"axis": REQUIRED, "size": REQUIRED, "shift": REQUIRED, "tag": 0, "shape": REQUIRED, "dtype": REQUIRED},
       traits=["effect"], undifferentiable="it has no operand here; write the send of the cotangent on the way back")


# Wishes ------------------------------------------------------------------------------------------------------------


def annotate_infer(x: TensorType, dims: tuple[str, ...], whole: tuple[str, ...]) -> TensorType:
    if not isinstance(dims, tuple) or len(dims) != x.rank or not all(isinstance(d, str) for d in dims):
        fail_attr(f"dims is {dims!r}; expected the name of a mesh axis, or '', for each dimension of {x}")
    if not isinstance(whole, tuple) or not all(isinstance(axis, str) for axis in whole):
        fail_attr(f"whole is {whole!r}; expected a tuple of names of mesh axes")
    return x


define("annotate", "x", annotate_infer, lambda x, dims, whole: x,
       "The operand; when the graph is partitioned its dimensions are split over these mesh axes ('': as it comes); "
       "along the axes `whole` every rank has all of it.", attrs={"dims": REQUIRED, "whole": ()}, traits=["barrier"])


def annotate_decompose(x: Value, dims: tuple[str, ...], whole: tuple[str, ...]) -> Value:
    return x


fill("decompose", "annotate", annotate_decompose)


def host_name(node: Node) -> str:
    """The name of the host function that runs a collective: its op and attributes, which a call cannot carry.

    `all_gather;axis=data;size=2;dims=0,1`; `host_attrs` reads it back.
    """
    parts = [node.op.name]
    for name, value in node.attrs.items():
        if name not in ("shape", "shapes", "dtype"):
            parts.append(f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
    return ";".join(parts)


def host_attrs(name: str) -> tuple[str, dict[str, Any]]:
    """The op and attributes that `host_name` wrote."""
    op, *parts = name.split(";")
    attrs: dict[str, Any] = {}
    for part in parts:
        key, _, text = part.partition("=")
        if key == "dims":
            attrs[key] = tuple(int(n) for n in text.split(",") if n)
        else:
            attrs[key] = int(text) if text.lstrip("-").isdigit() else text
    return op, attrs
