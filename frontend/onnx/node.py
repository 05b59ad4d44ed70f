"""One node of an ONNX graph, as a rule sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto

from ...ir.errors import OnnxError
from .. import eager
from ..data_sizes import data_size
from ..tensor import Tensor

MISSING: Any = object()
KIND = AttributeProto


class NeedsValue(OnnxError):
    """A shape depends on the elements of `value`, which exist at run time only.

    `compile` cuts the program there; who traces otherwise sees the error.
    """

    value: Tensor


class OnnxNode:
    """A node while it is run.

    Attributes:
        op_type, domain, name: as in the file; a node without a name is called by its first output.
        opset: the version of its domain that the model imports.
        outputs: names of the results, "" for those that nobody wants.
        inputs: names of the operands, "" for absent ones.
        frame: the graph run that it belongs to (see `run`).
    """

    def __init__(self, proto: onnx.NodeProto, opset: int, frame: Any = None,
                 attributes: Mapping[str, AttributeProto] | None = None):
        self.proto = proto
        self.op_type: str = proto.op_type
        self.domain: str = proto.domain if proto.domain != "ai.onnx" else ""
        self.opset = opset
        self.frame = frame
        self.inputs: list[str] = list(proto.input)
        self.outputs: list[str] = list(proto.output)
        self.name: str = proto.name or next((o for o in proto.output if o), proto.op_type)
        self._attributes = {a.name: a for a in proto.attribute} if attributes is None else dict(attributes)

    def __str__(self) -> str:
        domain = f"{self.domain}." if self.domain else ""
        return f"{domain}{self.op_type} node {self.name!r}"

    def has(self, name: str) -> bool:
        """Whether the attribute is given."""
        return name in self._attributes

    def attr(self, name: str, default: Any = MISSING) -> Any:
        """An attribute: int, float, str, a list of these, a NumPy array, or a `Subgraph`.

        Args:
            name: of the attribute.
            default: what is returned if it is not given; without one, the default of the op's schema, or None.
        """
        if name in self._attributes:
            return self.decode(self._attributes[name])
        if default is not MISSING:
            return default
        declared = _schema_defaults(self.op_type, self.domain, self.opset).get(name)
        return None if declared is None else self.decode(declared)

    def defaults(self) -> Mapping[str, AttributeProto]:
        """The attributes that the op's schema has defaults for."""
        return _schema_defaults(self.op_type, self.domain, self.opset)

    def require(self, name: str) -> Any:
        """An attribute that must be given."""
        if name not in self._attributes:
            raise self.fail(f"the attribute {name!r} is missing")
        return self.attr(name)

    def wants(self, index: int) -> bool:
        """Whether somebody reads the output of this number."""
        return index < len(self.outputs) and self.outputs[index] != ""

    def decode(self, attribute: AttributeProto) -> Any:
        """The Python value of an attribute."""
        kind = attribute.type
        if kind == KIND.GRAPH:
            return self._subgraph(attribute.g)
        if kind == KIND.GRAPHS:
            return [self._subgraph(g) for g in attribute.graphs]
        decoder = _DECODERS.get(kind)
        if decoder is None:
            raise self.fail(f"the attribute {attribute.name!r} has the unsupported type {kind}")
        return decoder(attribute)

    def _subgraph(self, graph: onnx.GraphProto) -> Any:
        if self.frame is None:
            raise self.fail("subgraphs can be used only while a model is run")
        return self.frame.subgraph(graph, self)

    def need(self, value: Tensor, what: str) -> np.ndarray:
        """The elements of a tensor; see `values.require_known`."""
        if self.frame is not None:
            answer = self.frame.context.answer(value)
            if answer is not None:
                return answer
        if value._trace is None and eager.builder() is eager.eager_builder():
            return value.numpy()
        error = NeedsValue(f"{self}: the operand {what!r} decides a shape, but its elements depend on the model's "
                           "inputs. Compile the model itself, td.compile(module): it is cut there into parts; or give "
                           "the input that decides the shape as a Python list of ints")
        error.value = value
        raise error

    def size(self, value: Tensor, what: str, most: Any = None) -> Any:
        """A size from an integer scalar: an int, or in a trace a symbolic size that is counted at run time.

        Args:
            value: at least 0.
            what: what is counted, for messages.
            most: an upper bound, checked at run time; by default the most elements that a tensor may have.

        Raises:
            OnnxError: inside a loop or branch, or where the compiler asks for programs of fixed sizes (`run.Context`).
        """
        context = self.frame.context
        if value.is_tracer and context.open_sizes:
            context.counted[str(self)] = None
            return data_size(value, f"{self}: {what}", context.max_elements if most is None else most)
        return int(self.need(value, what).reshape(()))

    def fail(self, message: str) -> OnnxError:
        """An error that names this node; raise it."""
        return OnnxError(f"{self}: {message}")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


_DECODERS: dict[int, Callable[[AttributeProto], Any]] = {
    KIND.FLOAT: lambda a: a.f,
    KIND.INT: lambda a: a.i,
    KIND.STRING: lambda a: _text(a.s),
    KIND.TENSOR: lambda a: array_of(a.t),
    KIND.FLOATS: lambda a: list(a.floats),
    KIND.INTS: lambda a: list(a.ints),
    KIND.STRINGS: lambda a: [_text(s) for s in a.strings],
    KIND.TENSORS: lambda a: [array_of(t) for t in a.tensors],
    KIND.SPARSE_TENSOR: lambda a: dense_of(a.sparse_tensor),
    KIND.TYPE_PROTO: lambda a: a.tp,
}


def array_of(proto: onnx.TensorProto) -> np.ndarray:
    """The elements of a TensorProto, strings as an object array of str.

    Raises:
        OnnxError: the tensor is damaged.
    """
    try:
        array = onnx.numpy_helper.to_array(proto)
    except Exception as error:
        raise OnnxError(f"the tensor {proto.name!r} is damaged: {error}") from error
    if array.dtype == object:
        return np.array([_text(x) if isinstance(x, bytes) else x for x in array.reshape(-1)],
                        object).reshape(array.shape)
    return np.array(array)


def dense_of(proto: onnx.SparseTensorProto) -> np.ndarray:
    """A sparse tensor with its zeros.

    Raises:
        OnnxError: indices outside its shape.
    """
    values, indices = array_of(proto.values), array_of(proto.indices)
    dense = np.zeros(tuple(proto.dims), values.dtype)
    try:
        if indices.ndim == 1:
            dense.reshape(-1)[indices] = values
        else:
            dense[tuple(indices.T)] = values
    except (IndexError, ValueError) as error:
        raise OnnxError(f"the sparse tensor {proto.values.name!r} is damaged: {error}") from error
    return dense


_defaults: dict[tuple[str, str, int], Mapping[str, AttributeProto]] = {}


def _schema_defaults(op_type: str, domain: str, opset: int) -> Mapping[str, AttributeProto]:
    key = (op_type, domain, opset)
    if key not in _defaults:
        schema = schema_of(op_type, domain, opset)
        found = {} if schema is None else {
            name: a.default_value for name, a in schema.attributes.items() if a.default_value.name}
        _defaults[key] = found
    return _defaults[key]


def schema_of(op_type: str, domain: str, opset: int) -> Any:
    """The schema of an op at an opset, or None if the `onnx` package knows none."""
    try:
        return onnx.defs.get_schema(op_type, opset, domain)
    except Exception:  # the C++ side has an exception class of its own
        return None


def names(sequence: Sequence[str]) -> str:
    """Names for a message."""
    return ", ".join(repr(s) for s in sequence) or "none"
