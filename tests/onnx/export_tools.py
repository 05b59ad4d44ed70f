"""Running exported models: onnxruntime, or the evaluator of the `onnx` package where that has no kernel."""

import numpy as np
import onnxruntime
from onnx.reference import ReferenceEvaluator

from treadle.ir.builder import GraphBuilder, copy_into, emit
from treadle.ir.dtypes import as_dtype

onnxruntime.set_default_logger_severity(4)


def runtime(model, arrays):
    """The outputs of a ModelProto in onnxruntime; inputs in the order of the graph."""
    session = onnxruntime.InferenceSession(model.SerializeToString())
    feeds = {i.name: np.asarray(a) for i, a in zip(model.graph.input, arrays)}
    return [np.asarray(y) for y in session.run(None, feeds)]


def evaluator(model, arrays):
    """The outputs in the reference evaluator."""
    feeds = {i.name: np.asarray(a) for i, a in zip(model.graph.input, arrays)}
    with np.errstate(all="ignore"):
        return [np.asarray(y) for y in ReferenceEvaluator(model).run(None, feeds)]


def answers(model, arrays):
    """The outputs in onnxruntime, or where that has no kernel in the evaluator."""
    try:
        return runtime(model, arrays)
    except Exception as error:
        if "NOT_IMPLEMENTED" not in str(error):
            raise
        return evaluator(model, arrays)


def wide(dtype):
    """A dtype that NumPy and onnxruntime exchange, and that holds every value of the given one."""
    dtype = as_dtype(dtype)
    if dtype.is_float and dtype.bits <= 16 and dtype != "float16":
        return as_dtype("float32")
    return as_dtype("int32") if dtype in ("int4", "uint4") else dtype


def between_wide(graph):
    """The graph with inputs and outputs of exchangeable dtypes, cast inside."""
    with GraphBuilder(graph.name) as builder:
        inputs = []
        for value in graph.inputs:
            given = builder.input(value.type.with_dtype(wide(value.dtype)), value.name)
            inputs.append(given if given.dtype == value.dtype else emit("cast", given, dtype=value.dtype))
        for value in copy_into(graph, inputs):
            target = wide(value.dtype)
            builder.output(value if target == value.dtype else emit("cast", value, dtype=target))
    return builder.graph
