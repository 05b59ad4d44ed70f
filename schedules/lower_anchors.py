"""Matrix products and convolutions with what is fused behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from ..ir import ops as _ops  # noqa: F401  (declares the ops whose slots are filled here)
from ..ir.graph import Node, Value
from ..ir.opdef import fill
from .conv import conv_input_grad_primfunc, conv_primfunc, conv_weight_grad_primfunc, packed_weights
from .conv_plain import needs_plain, plain_kernel
from .conv_problem import FORWARD, INPUT_GRAD, ConvProblem, can_flatten
from .gemm import GemmHooks, GemmProblem, gemm_primfunc
from .gemm_pack import panels_of
from .gemm_tir import propose_for
from .group import anchor_axes
from .loops import Signature
from .loops_eval import Evaluator, Idx, InMemory, count_uses
from .loops_index import Axis, Merged, flatten, unflatten
from .lower_slots import Anchor, cast, compute_dtype, let, read, storage_dtype, written
from .rows_domain import EXPENSIVE, cost_of
from .sizes import expression, expressions, is_dynamic


@dataclass
class Shaped:
    """A parameter addressed by its own index."""

    value: Value
    buffer: Any

    def at(self, idx: Idx) -> list[Any]:
        return [i.expr() for i in idx] or [0]

    def load(self, idx: Idx) -> Any:
        return read(self.buffer[tuple(self.at(idx))], self.value.dtype)

    def store(self, idx: Idx, value: Any) -> None:
        T.buffer_store(self.buffer, written(value, self.value.dtype), self.at(idx))


@dataclass
class Given:
    """The element that the anchor has just finished."""

    element: Any = None

    def load(self, idx: Idx) -> Any:
        return self.element


def _declared(v: Value, anchor: Node) -> str:
    """The dtype of a parameter: contractions read bfloat16 operands as such, all else as bits."""
    return "bfloat16" if v.dtype == "bfloat16" and v in anchor.operands else storage_dtype(v.dtype)


def _constants(anchor: Node, nodes: Sequence[Node]) -> dict[Value, np.ndarray]:
    """The constant operands of an anchor that nothing else in its kernel reads."""
    found = {}
    for v in anchor.operands:
        if v.producer is not None and v.producer.op.name == "constant" and anchor.operands.count(v) == 1 \
                and not any(v in n.operands for n in nodes if n is not anchor):
            found[v] = v.producer.attrs["value"]
    return found


class Epilogue:
    """The parameters of an anchor's kernel, and what happens to each element of its result."""

    def __init__(self, anchor: Node, nodes: Sequence[Node], signature: Signature):
        self.signature = signature
        self.is_dynamic = is_dynamic(*(v.type.size for v in signature.params))
        self.places: dict[Value, Any] = {
            v: Shaped(v, tirx.decl_buffer(expressions(v.shape) or (1,), _declared(v, anchor), f"p{i}",
                                          data_alignment=v.dtype.itemsize)) for i, v in enumerate(signature.params)}
        for output, source in signature.inplace.items():
            self.places[output] = Shaped(output, self.places[source].buffer)
        self.result = anchor.result
        self.packed: dict[Value, np.ndarray] = {}  # constant operands, as the kernel reads them
        self.constants = _constants(anchor, nodes)
        self.axes = anchor_axes(self.result)
        self.given = Given()
        self.outputs = signature.outputs
        self.shared = {v for v in anchor.operands if any(v in n.operands for n in nodes if n is not anchor)}
        rest = [n for n in nodes if n is not anchor]
        self.is_heavy = sum(map(cost_of, rest)) >= EXPENSIVE
        loads = {v: p for v, p in self.places.items() if v not in self.outputs}
        self.evaluator = Evaluator(frozenset(rest), {**loads, self.result: self.given},
                                   count_uses(rest, self.outputs))
        self.buffers = {v: self.places[v].buffer for v in signature.params}
        self.params = list(self.buffers.values())

    def buffer(self, v: Value) -> Any:
        return self.buffers[v]

    def store(self, idx: Sequence[Any], element: Any) -> None:
        """Computes and stores every output for one element of the anchor's result."""
        for axis, expr in zip(self.axes, idx):
            for atom in axis.terms:
                atom.bind(expr)  # type: ignore[attr-defined]
        self._store(element)

    def repack(self, v: Value, array: np.ndarray) -> Any:
        """Gives a constant operand to the kernel in another layout; its buffer."""
        self.packed[v] = array
        self.buffers[v] = tirx.decl_buffer(array.shape, str(array.dtype), self.buffers[v].name)
        self.params = list(self.buffers.values())
        return self.buffers[v]

    def by_row(self) -> Any:
        """The same with all axes but the last as one: its position is not taken apart where nothing depends on the
        parts. Declares buffers: call it at the head of the kernel."""
        parts = [atom for axis in self.axes[:-1] for atom in axis.terms if isinstance(atom, Axis)]
        joined = Merged(parts) if len(parts) != 1 else parts[0]
        flat = [(buffer, T.decl_buffer((expression(v.type.size),), buffer.dtype, data=buffer.data,
                                       align=v.dtype.itemsize)) for v, buffer in self.buffers.items()]
        for v, place in self.places.items():
            self.places[v] = InMemory(v, next(f for b, f in flat if b is place.buffer), wide=True)
            if v in self.evaluator.places and v is not self.result:
                self.evaluator.places[v] = self.places[v]

        def store(_batch: Any, row: Any, column: Any, element: Any) -> None:
            joined.bind(row)
            for atom in self.axes[-1].terms:
                atom.bind(column)  # type: ignore[attr-defined]
            self._store(element)

        return store

    def _store(self, element: Any) -> None:
        self.evaluator.fresh()
        self.given.element = let(cast(element, compute_dtype(self.result.dtype)))
        position = flatten(self.axes, self.result.shape)
        indices = [unflatten(position, v.shape) for v in self.outputs]
        values = [let(self.evaluator.value(v, at)) for v, at in zip(self.outputs, indices)]
        for v, at, value in zip(self.outputs, indices, values):
            self.places[v].store(at, value)


STORED_ONLY = frozenset({"float8_e4m3fn", "float8_e5m2", "int4", "uint4"})


def matmul(node: Node, epilogue: Epilogue, target: Any, name: str) -> Any:
    x, y = node.operands
    transpose_x, transpose_y = node.attrs["transpose_x"], node.attrs["transpose_y"]
    m, k = x.shape[-2:][::-1] if transpose_x else x.shape[-2:]
    n = y.shape[-2] if transpose_y else y.shape[-1]
    dtypes = [compute_dtype(v.dtype) if v.dtype in STORED_ONLY else str(v.dtype) for v in (x, y)]
    problem = GemmProblem(m, n, k, transpose_x, transpose_y, x.shape[:-2], y.shape[:-2], dtypes[0], dtypes[1],
                          str(node.result.dtype))
    hooks = GemmHooks(epilogue.params, a=epilogue.buffer(x), b=epilogue.buffer(y),
                      load_a=_decoded(x, epilogue, transpose_x), load_b=_decoded(y, epilogue, transpose_y),
                      store=lambda batch, i, j, value: epilogue.store((*batch, i, j), value),
                      apart=epilogue.is_heavy, again=not epilogue.signature.inplace,
                      by_row=epilogue.by_row if epilogue.is_dynamic else None)
    config = None
    if y in epilogue.constants and y.rank == 2 and str(y.dtype) == problem.acc_dtype and not epilogue.is_dynamic:
        config = propose_for(problem, target, hooks)
        if config.pack_b and config.kind == "tile" and not config.swap:
            b = epilogue.constants[y]
            panels = epilogue.repack(y, panels_of(b.T if transpose_y else b, config.tile_cols))
            hooks = replace(hooks, b=None, packed=panels, params=epilogue.params)
    return gemm_primfunc(problem, config, target, name, hooks)


def _decoded(v: Value, epilogue: Epilogue, transposed: bool) -> Any:
    """How to load an operand of a dtype that is only stored (None for the others: they are read where they lie)."""
    if v.dtype not in STORED_ONLY:
        return None

    def load(batch: Sequence[Any], row: Any, column: Any) -> Any:
        at = (*batch, column, row) if transposed else (*batch, row, column)
        return read(epilogue.buffer(v)[at], v.dtype)

    return load


def conv_problem(node: Node, x: Sequence[int], w: Sequence[int]) -> ConvProblem:
    """The problem of activations x (as they lie) and weights w."""
    attrs = node.attrs
    last = attrs["channels_last"]
    channels, spatial = (x[-1], x[1:-1]) if last else (x[1], x[2:])
    kept = _long_axes(node, spatial, w[2:])

    def of(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[i] for i in kept)

    return ConvProblem(x[0], channels, w[0], of(spatial), of(w[2:]), of(attrs["stride"]), of(attrs["padding"]),
                       of(attrs["dilation"]), attrs["groups"], str(node.operands[0].dtype), "NHWC" if last else "NCHW")


def _long_axes(node: Node, spatial: Sequence[int], kernel: Sequence[int]) -> list[int]:
    """The spatial axes that are more than one position: a register tile runs along the last of them."""
    padding = node.attrs["padding"]
    kept = [i for i, (n, k) in enumerate(zip(spatial, kernel)) if (n, k, *padding[i]) != (1, 1, 0, 0)]
    return kept or [0]


def _all_axes(kept: Sequence[int], rank: int, spatial: Sequence[Any]) -> tuple[Any, ...]:
    """A position with the axes of one element as well."""
    found = dict(zip(kept, spatial))
    return tuple(found.get(i, tirx.const(0, "int64")) for i in range(rank))


def _extra(node: Node, epilogue: Epilogue) -> list[Any]:
    return [epilogue.buffer(v) for v in epilogue.signature.params if v not in node.operands]


def _operands(node: Node, epilogue: Epilogue) -> list[Any]:
    """The buffers of the operands that the epilogue reads as well; None for the others, which the kernel declares."""
    return [epilogue.buffer(v) if v in epilogue.shared else None for v in node.operands]


def _activation_store(node: Node, epilogue: Epilogue) -> Any:
    last = node.attrs["channels_last"]
    image = (node.result if node.op.name == "conv_input_grad" else node.operands[0]).shape
    spatial = image[1:-1] if last else image[2:]
    kept, rank = _long_axes(node, spatial, node.operands[1].shape[2:]), len(spatial)

    def store(n: Any, c: Any, position: Sequence[Any], acc: Any) -> None:
        at = _all_axes(kept, rank, position)
        epilogue.store((n, *at, c) if last else (n, c, *at), acc)

    return store


def conv(node: Node, epilogue: Epilogue, target: Any, name: str) -> Any:
    if needs_plain(node):
        return plain_kernel(node, epilogue, name)
    x, w = node.operands
    problem = conv_problem(node, x.shape, w.shape)
    if problem.is_dynamic and can_flatten(problem) and problem.groups == 1:
        return _pixels_product(node, epilogue, target, name, problem.out_channels, transpose=True)
    return conv_primfunc(problem, None, target, name, _activation_store(node, epilogue), _extra(node, epilogue),
                         _packed(problem, w, epilogue, target, FORWARD), not epilogue.signature.inplace,
                         _operands(node, epilogue))


def _pixels_product(node: Node, epilogue: Epilogue, target: Any, name: str, n: int, transpose: bool) -> Any:
    """A convolution of single pixels as a product of a matrix of pixels with the weights."""
    x, w = node.operands
    problem = GemmProblem(x.shape[-2], n, x.shape[-1], False, transpose, x.shape[:-2], (), str(x.dtype), str(w.dtype),
                          str(node.result.dtype))
    hooks = GemmHooks(epilogue.params, a=epilogue.buffer(x), b=epilogue.buffer(w), store=epilogue.store,
                      apart=epilogue.is_heavy, again=not epilogue.signature.inplace, by_row=epilogue.by_row)
    return gemm_primfunc(problem, None, target, name, hooks)


def _packed(problem: ConvProblem, w: Value, epilogue: Epilogue, target: Any, op: str) -> np.ndarray | None:
    """Constant weights as the kernel reads them."""
    if w not in epilogue.constants:
        return None
    array = packed_weights(problem, None, target, epilogue.constants[w], op)
    if array is not None:
        epilogue.packed[w] = array
    return array


def conv_input_grad(node: Node, epilogue: Epilogue, target: Any, name: str) -> Any:
    if needs_plain(node):
        return plain_kernel(node, epilogue, name)
    w = node.operands[1]
    problem = conv_problem(node, node.result.shape, w.shape)
    if problem.is_dynamic and can_flatten(problem) and problem.groups == 1:
        return _pixels_product(node, epilogue, target, name, problem.in_channels, transpose=False)
    return conv_input_grad_primfunc(problem, None, target, name, _activation_store(node, epilogue),
                                    _extra(node, epilogue), _packed(problem, w, epilogue, target, INPUT_GRAD),
                                    not epilogue.signature.inplace, _operands(node, epilogue))


def conv_weight_grad(node: Node, epilogue: Epilogue, target: Any, name: str) -> Any:
    if needs_plain(node):
        return plain_kernel(node, epilogue, name)
    x, w = node.operands[0].shape, node.result.shape
    kept = _long_axes(node, x[1:-1] if node.attrs["channels_last"] else x[2:], w[2:])

    def store(o: Any, i: Any, at: Sequence[Any], acc: Any) -> None:
        epilogue.store((o, i, *_all_axes(kept, len(w) - 2, at)), acc)

    return conv_weight_grad_primfunc(conv_problem(node, x, w), None, target, name, store, _extra(node, epilogue),
                                     _operands(node, epilogue))


fill("lower", "matmul", Anchor(matmul))
fill("lower", "conv", Anchor(conv))
fill("lower", "conv_input_grad", Anchor(conv_input_grad))
fill("lower", "conv_weight_grad", Anchor(conv_weight_grad))
