"""Models of one node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

import treadle as td

CONTRIB = "com.microsoft"


def model(op: str, inputs: Sequence[Any], outputs: int | Sequence[str] = 1, opset: int = 22, domain: str = "",
          known: Sequence[int] = (), **attrs: Any) -> onnx.ModelProto:
    """A model of one node; None stands for an absent operand, operands in `known` are initializers."""
    names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
    results = [f"y{i}" for i in range(outputs)] if isinstance(outputs, int) else list(outputs)
    node = helper.make_node(op, names, results, domain=domain, **attrs)
    types = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
             for i, (n, x) in enumerate(zip(names, inputs)) if n and i not in known]
    stored = [onnx.numpy_helper.from_array(inputs[i], names[i]) for i in known]
    graph = helper.make_graph([node], op, types, [helper.make_empty_tensor_value_info(r) for r in results if r], stored)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def module(op: str, inputs: Sequence[Any], *args: Any, **more: Any) -> Any:
    """The imported model."""
    return td.onnx.load(model(op, inputs, *args, **more).SerializeToString())


def run(op: str, inputs: Sequence[Any], *args: Any, **more: Any) -> Any:
    """The results of a node, at once: an array, or a list of several."""
    known = more.get("known", ())
    results = module(op, inputs, *args, **more)(*(x for i, x in enumerate(inputs) if x is not None and i not in known))
    return [r.numpy() for r in results] if isinstance(results, tuple) else results.numpy()


def floats(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    """Normal numbers."""
    return np.asarray(np.random.default_rng((seed, *shape)).standard_normal(shape), dtype)


def directional(fn: Any, arrays: Sequence[np.ndarray], step: float = 1e-6) -> tuple[float, float]:
    """The derivative of sum(fn * weights) along a random direction: by gradients, and by differences. For f64."""
    rng = np.random.default_rng(7)
    results = fn(*arrays)
    several = isinstance(results, tuple)
    weights = [rng.standard_normal(r.shape) for r in (results if several else (results,))]

    def total(*tensors: Any) -> Any:
        got = fn(*tensors)
        got = got if isinstance(got, tuple) else (got,)
        parts = [td.sum(r * td.asarray(w)) for r, w in zip(got, weights) if r.dtype.is_float]
        return sum(parts, td.asarray(0.0, "float64"))

    directions = [rng.standard_normal(a.shape) for a in arrays]
    grads = td.grad(total, argnums=tuple(range(len(arrays))))(*(td.tensor(a) for a in arrays))
    along = sum(float((g.numpy() * d).sum()) for g, d in zip(grads, directions))
    ahead, behind = (float(total(*(td.tensor(a + s * d) for a, d in zip(arrays, directions))).numpy())
                     for s in (step, -step))
    return along, (ahead - behind) / (2 * step)
