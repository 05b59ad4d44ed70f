"""An imported model as the file it came from, with its present weights.

Some models cannot be traced with open sizes: a shape that depends on data, or sizes that agree only for some inputs (an
image's side that must be a multiple of 32). Their graph is written as it was read, and what is trained replaced.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper

from ...ir.errors import OnnxError
from .export_proto import Storage, initializer
from .export_sources import merged
from .module import OnnxModule


def can_keep(model: Any, opset: int | None) -> bool:
    """Whether the file's graph still says what the module does, at the opset that is asked for."""
    return isinstance(model, OnnxModule) and not model._wrappers and not any(model._hooks.values()) \
        and opset in (None, model.opsets.get(""))


def weights(model: OnnxModule, merge: bool) -> dict[str, np.ndarray]:
    """Parameters and buffers by name.

    Raises:
        OnnxError: a weight is read through an adapter, which the file's graph does not have.
    """
    read = sorted({name for name, *_ in model.parametrized()})
    if read and not merge:
        raise OnnxError(f"{model.label}: its graph is written as it was read, in which {read[0]!r} has no adapter: "
                        "save with merge=True")
    tables = (model._buffers, model._parameters)
    if merge:
        with merged(model):
            return {n: t.numpy() for table in tables for n, t in table.items() if t is not None}
    return {n: t.numpy(copy=False) for table in tables for n, t in table.items() if t is not None}


def _without(node: onnx.NodeProto, hoisted: frozenset[str]) -> onnx.NodeProto:
    """The node without what its subgraphs store of the module's weights: they stand in the main graph."""
    if not hoisted or not any(a.HasField("g") for a in node.attribute):
        return node
    clean = onnx.NodeProto()
    clean.CopyFrom(node)
    for attr in clean.attribute:
        if attr.HasField("g"):
            graph = attr.g
            stored = [t for t in graph.initializer if t.name not in hoisted]
            inner = [_without(n, hoisted) for n in graph.node if not hoisted & set(n.output)]
            del graph.initializer[:]
            del graph.node[:]
            graph.initializer.extend(stored)
            graph.node.extend(inner)
    return clean


def kept(model: OnnxModule, merge: bool, storage: Storage | None) -> onnx.ModelProto:
    """The ModelProto with the present weights."""
    arrays = weights(model, merge)
    source = model.model
    graph = source.graph
    nodes = [_without(n, model.hoisted) for n in model.nodes]
    made = {o for n in nodes for o in n.output}
    inputs = [v for v in graph.input if v.name in model.input_names or v.name in model._overridable]
    infos = {v.name: v for v in (*graph.output, *graph.value_info)}
    outputs = [infos.get(n, helper.make_empty_tensor_value_info(n)) for n in model.output_names]
    stored = [t for t in graph.initializer if t.name not in arrays]
    fresh = [initializer(n, a, storage) for n, a in arrays.items() if n not in made]
    result = onnx.ModelProto()
    result.CopyFrom(onnx.ModelProto(ir_version=source.ir_version, producer_name="treadle", domain=source.domain,
                                    model_version=source.model_version, doc_string=source.doc_string,
                                    opset_import=source.opset_import, functions=source.functions,
                                    metadata_props=source.metadata_props))
    result.graph.CopyFrom(helper.make_graph(nodes, graph.name, inputs, outputs, initializer=[*fresh, *stored],
                                            sparse_initializer=list(graph.sparse_initializer)))
    return result
