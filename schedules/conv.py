"""Convolution kernels for CPUs: `conv_primfunc`, `conv_input_grad_primfunc`, `conv_weight_grad_primfunc`.

Each returns one TIR PrimFunc in destination-passing style that packs the weights it needs, computes, and hands every
finished element to an epilogue.  The idea of the loops is in `conv_direct`, of the index arithmetic in
`conv_problem`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from .conv_depthwise import DepthwiseConv, DepthwiseWeightGrad
from .conv_direct import DirectConv
from .conv_dot import DotConv, supports_dot
from .conv_problem import FORWARD, INPUT_GRAD, WEIGHT_GRAD, ConvConfig, ConvProblem, propose
from .conv_tir import flat, import_llvm
from .conv_weight_grad import WeightGrad
from .sizes import expressions

Store = Callable[[Any, Any, tuple, Any], None]


def conv_primfunc(problem: ConvProblem, config: ConvConfig | None, target, name: str, store: Store | None = None,
                  extra_buffers: Sequence[Any] = (), packed: np.ndarray | None = None, again: bool = False,
                  operands: Sequence[Any] = (None, None)):
    """`y = conv(x, w)` as a PrimFunc with parameters (x, w, *extra_buffers), and y last if `store` is None.

    Shapes are `problem.x_shape`, `problem.w_shape`, `problem.y_shape`; dtype `problem.dtype`.  `config` None means
    `propose(problem, target)`.

    `store(n, c, spatial, acc)` is the epilogue: called while the kernel is built, under whatever loops are needed,
    with scalar index expressions (`spatial` a tuple of the problem's rank) and the finished sum in
    `problem.acc_dtype`; it must emit the BufferStore(s), casts included, into tirx Buffers of `extra_buffers`
    (bias, residual, and all outputs).  The innermost loop around it is vectorised, over `c` when `out_layout` is
    "NHWC" and over the last spatial axis when it is "NCHW"; each output element is stored exactly once.

    Buffers must be aligned to the vector size.  No two of them may overlap.

    `packed` is what `packed_weights` made of constant weights: w is then that array. `again`: an element may be
    stored twice (no store reads what it wrote); rows of unknown length are then cut into whole tiles. `operands`: the
    buffers of x and w where the epilogue reads them as well.
    """
    return _gather_primfunc(problem, config, target, name, store, extra_buffers, FORWARD, packed, again, operands)


def packed_weights(problem: ConvProblem, config: ConvConfig | None, target, weights: np.ndarray,
                   op: str = FORWARD) -> np.ndarray | None:
    """Weights known while compiling as the kernel reads them; None if it packs them at run time all the same."""
    return _gather(problem, config or propose(problem, target, op), target, op).packed_weights(weights)


def conv_input_grad_primfunc(problem: ConvProblem, config: ConvConfig | None, target, name: str,
                             store: Store | None = None, extra_buffers: Sequence[Any] = (),
                             packed: np.ndarray | None = None, again: bool = False,
                             operands: Sequence[Any] = (None, None)):
    """`dx`, the gradient of `conv(x, w)` to x; also transposed convolution.

    Parameters (dy, w, *extra_buffers), and dx last if `store` is None: dy as `problem.y_shape`, dx as
    `problem.x_shape`.  `store` as in `conv_primfunc`, with `c` an input channel and `spatial` an input position
    (lanes follow `problem.layout`).
    """
    return _gather_primfunc(problem, config, target, name, store, extra_buffers, INPUT_GRAD, packed, again, operands)


def conv_weight_grad_primfunc(problem: ConvProblem, config: ConvConfig | None, target, name: str,
                              store: Store | None = None, extra_buffers: Sequence[Any] = (),
                              operands: Sequence[Any] = (None, None)):
    """`dw`, the gradient of `conv(x, w)` to w.

    Parameters (x, dy, *extra_buffers), and dw last if `store` is None; dw as `problem.w_shape`.  The epilogue is
    `store(o, i, kernel_position, acc)`, `i` within the group; lanes run over the flattened (i, *kernel_position).
    """
    config = config or propose(problem, target, WEIGHT_GRAD)
    grad = (DepthwiseWeightGrad if config.algorithm == "depthwise" else WeightGrad)(problem, config, target)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        shapes = {"x": problem.x_shape, "dy": problem.y_shape}
        x, dy = _parameters(name, shapes, problem.dtype, extra_buffers, operands)
        if store is None:
            store = plain_store(T.arg("dw", tirx.decl_buffer(problem.w_shape, problem.dtype)), "NCHW")
        with import_llvm(*grad.transposes()):
            grad.emit(flat(x), flat(dy), store)
    return builder.get()


def _parameters(name: str, shapes: dict[str, tuple[int, ...]], dtype: str, extra_buffers: Sequence[Any],
                operands: Sequence[Any], **dtypes: str) -> list:
    """Open the function: its name, the op's own inputs (of `dtype`, or of another by label), the caller's buffers."""
    T.func_name(name)
    T.func_attr({"global_symbol": name, "tirx.noalias": True})
    inputs = [T.arg(label, tirx.decl_buffer(expressions(shape), dtypes.get(label, dtype)) if given is None else given)
              for (label, shape), given in zip(shapes.items(), operands)]
    for i, buffer in enumerate(extra_buffers):
        T.arg(f"extra{i}", buffer)
    return inputs


def _gather(problem, config, target, op):
    kind = DepthwiseConv if config.algorithm == "depthwise" else DirectConv
    if config.algorithm == "direct" and not problem.is_dynamic and supports_dot(problem, target, op):
        kind = DotConv
    return kind(problem, config, target, op)


def _gather_primfunc(problem, config, target, name, store, extra_buffers, op, packed=None, again=False,
                     operands=(None, None)):
    config = config or propose(problem, target, op)
    forward = op == FORWARD
    source_shape, out_shape = ((problem.x_shape, problem.y_shape) if forward else (problem.y_shape, problem.x_shape))
    conv = _gather(problem, config, target, op)
    conv.packed, conv.again = packed is not None, again
    layout = problem.out_layout if forward else problem.layout
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        label, result = ("x", "y") if forward else ("dy", "dx")
        shapes = {label: source_shape, "w": problem.w_shape if packed is None else packed.shape}
        w_dtype = problem.dtype if packed is None else str(packed.dtype)
        source, weights = _parameters(name, shapes, problem.dtype, extra_buffers, operands, w=w_dtype)
        if store is None:
            store = plain_store(T.arg(result, tirx.decl_buffer(out_shape, problem.dtype)), layout)
        with import_llvm(*conv.transposes()):
            conv.emit(flat(source), flat(weights), store)
    return builder.get()


def plain_store(buffer, layout: str) -> Store:
    """The epilogue that only casts and writes."""

    def store(n, c, spatial, acc):
        index = (n, c, *spatial) if layout == "NCHW" else (n, *spatial, c)
        T.buffer_store(buffer, T.cast(acc, buffer.dtype), list(index))

    return store
