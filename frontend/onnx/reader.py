"""From a file or bytes to a model that can be relied on.

A model is somebody else's data, so everything that running it takes for granted is looked at first: that the bytes are
a model, that names are computed once and before they are used, that every domain is imported at a version we know,
that weights have the size their shape says, and that external data stays in the model's folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from ...ir.errors import OnnxError
from .rules import CONTRIB, TRAINING

OLDEST, NEWEST = 1, onnx.defs.onnx_opset_version()
MAX_ELEMENTS = 1 << 31
MAX_BYTES = 1 << 31
"""What a protobuf message can hold."""
DEPTH = 100
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", TRAINING, CONTRIB)


def read(source: Any, max_elements: int = MAX_ELEMENTS) -> tuple[onnx.ModelProto, Path | None]:
    """A checked model from a path, bytes or a ModelProto, and the folder that its external data is in.

    Raises:
        OnnxError: the file is missing or damaged, or the model is not valid.
    """
    folder: Path | None = None
    if isinstance(source, onnx.ModelProto):
        model = source
    else:
        data, folder = _bytes_of(source)
        model = parse(data)
    _check_model(model)
    check_graph(model.graph, max_elements)
    for function in model.functions:
        _check_order(function.node, set(function.input), f"the function {function.name!r}")
    for tensor in tensors_of(model):
        _check_tensor(tensor, folder, max_elements)
    return model, folder


def _bytes_of(source: Any) -> tuple[bytes, Path | None]:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source), None
    if not isinstance(source, (str, Path)) and not hasattr(source, "__fspath__"):
        raise OnnxError(f"load takes a path, bytes or a ModelProto, not {type(source).__name__}")
    path = Path(source)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise OnnxError(f"{path} has more than {MAX_BYTES:,} bytes, the limit of a protobuf file; weights beyond "
                            "that belong into external data")
        return path.read_bytes(), path.resolve().parent
    except OSError as error:
        raise OnnxError(f"cannot read {path}: {error.strerror or error}") from error


def parse(data: bytes) -> onnx.ModelProto:
    """A ModelProto from its bytes.

    Raises:
        OnnxError: they are none.
    """
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError, of whichever implementation is installed
        raise OnnxError(f"these {len(data):,} bytes are no ONNX model, or a damaged one: {error}") from error
    if not model.HasField("graph"):
        raise OnnxError(f"these {len(data):,} bytes are no ONNX model: there is no graph in them")
    return model


def _check_model(model: onnx.ModelProto) -> None:
    seen: dict[str, int] = {}
    for entry in model.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        seen[domain] = entry.version
        if domain == "" and not OLDEST <= entry.version <= NEWEST:
            raise OnnxError(f"the model imports opset {entry.version} of the standard ops; known are {OLDEST} to "
                            f"{NEWEST}. Export it for opset {NEWEST}, or install a newer `onnx`")
    if model.ir_version > onnx.IR_VERSION:
        raise OnnxError(f"the model is of IR version {model.ir_version}; the installed `onnx` knows up to "
                        f"{onnx.IR_VERSION}")
    defined = {(f.domain, f.name) for f in model.functions}
    for node in nodes_of(model.graph):
        domain = "" if node.domain == "ai.onnx" else node.domain
        if domain not in seen and (node.domain, node.op_type) not in defined:
            known = ", ".join(repr(d) for d in seen) or "none"
            raise OnnxError(f"{describe(node)}: the model does not import the domain {domain!r} (it imports {known})")


def opsets_of(model: onnx.ModelProto) -> dict[str, int]:
    """The version of each domain."""
    return {"" if e.domain == "ai.onnx" else e.domain: e.version for e in model.opset_import}


def describe(node: onnx.NodeProto) -> str:
    """A node as messages name it."""
    domain = f"{node.domain}." if node.domain not in ("", "ai.onnx") else ""
    return f"{domain}{node.op_type} node {node.name or next((o for o in node.output if o), '')!r}"


def nodes_of(graph: onnx.GraphProto, depth: int = 0) -> Iterator[onnx.NodeProto]:
    """Every node of a graph and of the graphs inside it.

    Raises:
        OnnxError: graphs are nested deeper than any model needs.
    """
    if depth > DEPTH:
        raise OnnxError(f"graphs are nested more than {DEPTH} deep in {graph.name!r}")
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from nodes_of(inner, depth + 1)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs among a node's attributes."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def tensors_of(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that the model stores."""
    yield from model.graph.initializer
    for sparse in model.graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in [*nodes_of(model.graph), *(n for f in model.functions for n in f.node)]:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for inner in subgraphs(node):
            yield from inner.initializer


def check_graph(graph: onnx.GraphProto, max_elements: int, outer: frozenset[str] = frozenset()) -> None:
    """Names: computed once, before they are used, by something.

    Raises:
        OnnxError: naming the node.
    """
    stored = [t.name for t in graph.initializer] + [s.values.name for s in graph.sparse_initializer]
    inputs = [v.name for v in graph.input]
    for name in inputs:
        if not name:
            raise OnnxError(f"the graph {graph.name!r} has an input without a name")
    if len(set(inputs)) < len(inputs):
        raise OnnxError(f"the graph {graph.name!r} has two inputs of one name")
    for value in graph.input:
        _check_declared(value, max_elements)
    known = _check_order(graph.node, {*outer, *stored, *inputs}, f"the graph {graph.name!r}")
    for output in graph.output:
        if output.name not in known:
            raise OnnxError(f"nothing computes the output {output.name!r} of the graph {graph.name!r}")


def _check_declared(value: onnx.ValueInfoProto, max_elements: int) -> None:
    if not value.type.HasField("tensor_type"):
        return
    sizes = [d.dim_value for d in value.type.tensor_type.shape.dim if d.HasField("dim_value")]
    if any(s < -1 for s in sizes):
        raise OnnxError(f"the input {value.name!r} has a negative size in its shape {sizes}")
    if math.prod(max(s, 1) for s in sizes) > max_elements:
        raise OnnxError(f"the input {value.name!r} of shape {sizes} has more than {max_elements:,} elements; if that "
                        "is meant, load the model with a higher max_elements")


def _check_order(nodes: Any, known: set[str], where: str) -> set[str]:
    """Follows the nodes in their order; gives all names that are computed in the end."""
    known = set(known)
    made: dict[str, onnx.NodeProto] = {}
    later = {name for node in nodes for name in node.output}
    for node in nodes:
        needed = [*node.input, *(n for g in subgraphs(node) for n in free_names(g))]
        for name in needed:
            if name and name not in known:
                raise OnnxError(_missing(node, name, name in later, where))
        for name in node.output:
            if name and name in made:
                raise OnnxError(f"{describe(node)}: {name!r} is computed already, by {describe(made[name])}")
            made[name] = node
            known.add(name)
    return known


def _missing(node: onnx.NodeProto, name: str, later: bool, where: str) -> str:
    if later:
        return (f"{describe(node)}: its operand {name!r} is computed by a later node of {where}: the graph has a "
                "cycle, or its nodes are not in order")
    return (f"{describe(node)}: its operand {name!r} is neither an input, nor an initializer, nor computed by a node "
            f"of {where}")


def free_names(graph: onnx.GraphProto, depth: int = 0) -> list[str]:
    """The names that a graph takes from around it.

    Raises:
        OnnxError: graphs are nested too deep, or a name inside is used before it is computed.
    """
    if depth > DEPTH:
        raise OnnxError(f"graphs are nested more than {DEPTH} deep in {graph.name!r}")
    known = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    known |= {s.values.name for s in graph.sparse_initializer}
    free: dict[str, None] = {}
    for node in graph.node:
        for name in [*node.input, *(n for g in subgraphs(node) for n in free_names(g, depth + 1))]:
            if name and name not in known:
                free[name] = None
        known.update(node.output)
    free.update({o.name: None for o in graph.output if o.name not in known})
    return list(free)


def _check_tensor(tensor: onnx.TensorProto, folder: Path | None, max_elements: int) -> None:
    """That a stored tensor is of its declared size; loads external data.

    Raises:
        OnnxError: it is not, or its data lies outside the folder.
    """
    name = repr(tensor.name)
    if any(d < 0 for d in tensor.dims):
        raise OnnxError(f"the tensor {name} has a negative size in its shape {list(tensor.dims)}")
    count = math.prod(tensor.dims)
    if count > max_elements:
        raise OnnxError(f"the tensor {name} of shape {list(tensor.dims)} has more than {max_elements:,} elements; if "
                        "that is meant, load the model with a higher max_elements")
    if tensor.data_type not in TensorProto.DataType.values() or tensor.data_type == TensorProto.UNDEFINED:
        raise OnnxError(f"the tensor {name} has the unknown element type {tensor.data_type}")
    if tensor.HasField("segment"):
        raise OnnxError(f"the tensor {name} is stored in segments, which no version of the format defines")
    if tensor.data_location == TensorProto.EXTERNAL:
        _load_external(tensor, folder, count)
    elif tensor.HasField("raw_data"):
        needed = _bytes_needed(tensor, count)
        if needed is not None and len(tensor.raw_data) != needed:
            raise OnnxError(f"the tensor {name} of shape {list(tensor.dims)} needs {needed:,} bytes, but the file "
                            f"holds {len(tensor.raw_data):,}")


def _bytes_needed(tensor: onnx.TensorProto, count: int) -> int | None:
    if tensor.data_type == TensorProto.STRING:
        return None
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4, getattr(TensorProto, "FLOAT4E2M1", -1)):
        return -(-count // 2)
    try:
        return count * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except (KeyError, TypeError):
        return None


def _load_external(tensor: onnx.TensorProto, folder: Path | None, count: int) -> None:
    name = repr(tensor.name)
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    if folder is None:
        raise OnnxError(f"the tensor {name} is external data ({location!r}): load the model from its path, not bytes")
    path = (folder / location).resolve()
    if not location or Path(location).is_absolute() or not path.is_relative_to(folder.resolve()):
        raise OnnxError(f"the tensor {name} names external data outside the model's folder: {location!r}. This is "
                        "refused; move the data next to the model")
    needed = _bytes_needed(tensor, count)
    try:
        offset, size = int(entries.get("offset", "0")), path.stat().st_size
        length = int(entries.get("length", needed if needed is not None else size - offset))
    except ValueError as error:
        raise OnnxError(f"the tensor {name} has a damaged entry for its external data: {error}") from error
    except OSError as error:
        raise OnnxError(f"cannot read the external data of the tensor {name}: {error.strerror}: {path}") from error
    if not path.is_file() or offset < 0 or length < 0 or offset + length > size or needed not in (None, length):
        raise OnnxError(f"the tensor {name} of shape {list(tensor.dims)} needs {needed} bytes of {location!r} from "
                        f"{offset} on and declares {length}; the file has {size:,}")
    with path.open("rb") as file:
        file.seek(offset)
        tensor.raw_data = file.read(length)
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]
