"""`OnnxModule`: an ONNX model as a module that runs eagerly, traces, compiles, differentiates and trains.

Its `forward` walks the ONNX graph and calls the rules, which emit our ops. Float initializers (and `Constant` weights)
are parameters under the names they have in the file; statistics and other large arrays are buffers; the rest, such as
shapes, axes and scalars, is known while tracing and part of the program.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from ...ir.dims import Dim
from ...ir.dtypes import as_dtype
from ...ir.errors import ArgumentsError, DTypeError, OnnxError
from ...ir.types import TensorType
from ..dispatch import as_tensor
from ..nn.module import Module
from ..nn.parameter import Parameter
from ..tensor import Tensor
from ..trace import Spec, leaf_type
from .node import array_of, dense_of
from .reader import MAX_ELEMENTS, opsets_of, read
from .run import DATA_ERRORS, Context, Frame, concrete, eager_limit
from .staged import Fixed, OnnxCompiled
from .uses import Uses, inner_tensors, names_used

SMALL = 64
"""Integer arrays of up to so many elements are known while tracing, wherever they are used."""


class OnnxModule(Module):
    """An imported model. Called with its inputs in order (or by name), gives its output, or a tuple of several.

    Attributes:
        model: the ModelProto it was made from; weights in it are not kept up to date.
        input_names, output_names: as in the file.
        inputs: a `Spec` for each input, with symbolic sizes; None where the file says nothing of it.
        text: the outputs that hold strings.
        static_inputs: the inputs that decide shapes: their elements are part of a compiled program.
        constants: known arrays by name.
        nodes: the nodes that are run.
        hoisted: parameters that the file stores in branches and loop bodies.
        opsets: the version of each domain.
        counted: the nodes, as messages name them, where traces met sizes that data decide.
    """

    compiled_as = OnnxCompiled

    def __init__(self, model: onnx.ModelProto, label: str = "model", max_elements: int = MAX_ELEMENTS):
        super().__init__()
        self.model = model
        self.label = label
        self.max_elements = max_elements
        self.opsets = opsets_of(model)
        self.functions = {(f.domain, f.name, f.overload): f for f in model.functions}
        graph = model.graph
        stored = {t.name for t in graph.initializer} | {s.values.name for s in graph.sparse_initializer}
        self.input_names = [v.name for v in graph.input if v.name not in stored]
        self.output_names = [v.name for v in graph.output]
        self.text = {v.name for v in graph.output if v.type.tensor_type.elem_type == onnx.TensorProto.STRING}
        self.inputs = [_spec(v) for v in graph.input if v.name not in stored]
        self._sequences = {v.name for v in graph.input if _is_sequence(v.type)}
        self.constants: dict[str, np.ndarray] = {}
        self._uses = Uses(graph, self.opsets, self.functions)
        self._overridable = {v.name for v in graph.input} & stored
        for name, array in _stored(graph):
            self._take(name, array)
        self.nodes = [n for n in graph.node if not self._is_weight(n)]
        self.hoisted = frozenset(self._inner_weights(graph))
        self._wrappers: dict[str, list[Module]] = {}
        self.counted: dict[str, None] = {}
        self.stored_names = {*self.constants, *self._parameters, *self._buffers}
        self.static_inputs = {n for n in (*self.input_names, *self._overridable) if n in self._uses.static}

    # What is stored ---------------------------------------------------------------------------------------------

    def _take(self, name: str, array: np.ndarray) -> None:
        """Files an initializer as parameter, buffer or constant."""
        kind = self._uses.kind(name, array)
        try:
            if kind == "parameter":
                self.register_parameter(name, Parameter(array, name=name))
                return
            if kind == "buffer" or (array.size > SMALL and array.dtype != object
                                    and name not in self._uses.static):
                self.register_buffer(name, Tensor(array, name=name))
                return
        except DTypeError:
            pass  # a dtype that only shapes are computed in, or that nothing uses
        self.constants[name] = array

    def _is_weight(self, node: onnx.NodeProto) -> bool:
        """Takes a `Constant` node that holds weights as an initializer of its output's name."""
        if node.op_type != "Constant" or node.domain not in ("", "ai.onnx") or len(node.output) != 1:
            return False
        value = next((a for a in node.attribute if a.name == "value" and a.HasField("t")), None)
        if value is None or value.ref_attr_name:
            return False
        array = array_of(value.t)
        if self._uses.kind(node.output[0], array) == "known" and array.size <= SMALL:
            return False
        self._take(node.output[0], array)
        return True

    def _inner_weights(self, graph: onnx.GraphProto) -> Iterable[str]:
        """Takes the weights that branches and loop bodies hold as those of the module, under their names."""
        for name, proto in inner_tensors(graph).items():
            if len(proto.dims) and self._uses.kind(name, array := array_of(proto)) == "parameter":
                self._take(name, array)
                yield name

    # Running ----------------------------------------------------------------------------------------------------

    @property
    def forward(self) -> Forward:
        """Runs the model; see `Forward`. A property, as each model has parameters of its own names."""
        return Forward(self)

    def run(self, given: dict[str, Any]) -> list[Any]:
        """The outputs, from the inputs by name."""
        frame = self.frame(given)
        with eager_limit(self.max_elements):
            frame.run(self.nodes)
            return [concrete(frame.lookup(name)) for name in self.output_names]

    def frame(self, given: dict[str, Any]) -> Frame:
        """A frame with everything stored and the given inputs."""
        frame = Frame(Context(self.label, self.functions, self.max_elements, self._wrappers, self.counted),
                      self.opsets)
        frame.env.update(self.constants)
        frame.env.update({name: t for name, t in self._buffers.items() if t is not None})
        frame.env.update({name: self.read(name) for name, p in self._parameters.items() if p is not None})
        frame.env.update(given)
        frame.nodes = self.nodes
        frame.hoisted = self.hoisted
        return frame

    # Changing it ------------------------------------------------------------------------------------------------

    def select_outputs(self, names: Sequence[str]) -> None:
        """Makes other values of the graph its outputs; nodes, parameters and buffers that none of them needs go.

        Raises:
            OnnxError: the graph has no such value.
        """
        made = {o for n in self.nodes for o in n.output} | {*self.input_names, *self._parameters, *self._buffers}
        if unknown := [n for n in names if n not in made]:
            raise OnnxError(f"{self.label}: the graph has no value {unknown[0]!r} that could be an output")
        needed, kept = set(names), []
        for node in reversed(self.nodes):
            if needed & set(node.output):
                kept.append(node)
                needed.update(names_used([node]))
        self.nodes = kept[::-1]
        self.output_names = list(names)
        for name in [n for table in (self._parameters, self._buffers) for n in table if n not in needed]:
            delattr(self, name)
        self._edited()

    def wrap(self, value: str, kind: str, wrapper: Module) -> None:
        """From now on the node that makes `value` is run by `wrapper(run, operands)`, which gives the list of its
        results; `run()` gives those of the node itself (or of the wrapper before).

        The parameters of `wrapper` are those of this module under `value.kind`.

        Raises:
            OnnxError: no node of the graph makes the value.
        """
        maker = next((n for n in self.nodes if value in n.output), None)
        if maker is None:
            raise OnnxError(f"{self.label}: no node of the graph makes a value {value!r}")
        self._wrappers.setdefault(maker.output[0], []).append(wrapper)
        self.add_module(f"{value}.{kind}", wrapper)

    def parameter_aliases(self) -> dict[str, tuple[str, ...]]:
        """The paths of the nodes that use a parameter: exporters drop names of weights, but seldom those of nodes."""
        found: dict[str, list[str]] = {}
        for node in self.nodes:
            for name in names_used([node]):
                if name in self._parameters and node.name:
                    found.setdefault(name, []).append(node.name)
        return {name: tuple(nodes) for name, nodes in found.items()}

    def product_weights(self) -> dict[str, bool]:
        """Second operands of products that are parameters."""
        return {node.input[1]: inputs_first for node in self.nodes if len(node.input) > 1
                and node.input[1] in self._parameters and (inputs_first := _inputs_first(node)) is not None}

    # Arguments --------------------------------------------------------------------------------------------------

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call as values by the names of the inputs; see `forward`."""
        if len(args) > len(self.input_names):
            raise ArgumentsError(f"{self.label} takes {len(self.input_names)} inputs ({self._signature()}), got "
                                 f"{len(args)}")
        given = dict(zip(self.input_names, args))
        for name, value in kwargs.items():
            if name in given:
                raise ArgumentsError(f"{self.label}: the input {name!r} is given twice")
            if name not in self.input_names and name not in self._overridable:
                raise ArgumentsError(f"{self.label} has no input {name!r}; it takes {self._signature()}")
            given[name] = value
        missing = [n for n in self.input_names if n not in given]
        if missing:
            raise ArgumentsError(f"{self.label}: the inputs {', '.join(missing)} are missing; it takes "
                                 f"{self._signature()}")
        specs = dict(zip(self.input_names, self.inputs))
        return {name: self._argument(name, value, specs.get(name)) for name, value in given.items()}

    def _argument(self, name: str, value: Any, declared: Spec | None) -> Any:
        """An argument as a value of the graph; checked against what the model declares of it."""
        if value is None:
            return None
        if isinstance(value, Fixed):
            return value.array
        if isinstance(value, np.ndarray) and value.dtype.kind in "OUS":
            return value.astype(object)
        if isinstance(value, (list, tuple)) and (
                name in self._sequences or any(isinstance(x, (Tensor, np.ndarray, list)) for x in value)):
            return [self._argument("", x, None) for x in value]
        if not isinstance(value, Tensor):
            dtype = declared.dtype.np if declared is not None else None
            known = np.array(value, dtype)
            if isinstance(value, np.ndarray) or known.dtype.kind == "f":
                value = as_tensor(known)
            else:
                value = known
        if declared is None:
            return value
        fits = len(declared.shape) == len(value.shape) and all(
            isinstance(d, Dim) or isinstance(s, Dim) or d == s for d, s in zip(declared.shape, value.shape))
        if not fits or (isinstance(value, Tensor) and value.dtype != declared.dtype):
            found = value.type if isinstance(value, Tensor) else f"{value.dtype}{list(value.shape)}"
            raise ArgumentsError(f"{self.label}: the input {name!r} is {declared.type}, got {found}")
        return value

    def dynamic_specs(self, args: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with a `Spec` for each tensor that the file declares with symbolic sizes; `compile`
        makes one program for all of them."""
        declared = dict(zip(self.input_names, self.inputs))

        def opened(name: str, value: Any) -> Any:
            spec, kind = declared.get(name), leaf_type(value)
            fits = spec is not None and kind is not None and kind.rank == spec.type.rank and kind.dtype == spec.dtype
            return spec if fits else value

        return (tuple(opened(name, value) for name, value in zip(self.input_names, args)) + tuple(
            args[len(self.input_names):]), {name: opened(name, value) for name, value in keywords.items()})

    def input_dtype(self, name: str) -> Any:
        """The NumPy dtype that an input is declared with, or None."""
        declared = dict(zip(self.input_names, self.inputs)).get(name)
        return None if declared is None else declared.dtype.np

    def _signature(self) -> str:
        return ", ".join(f"{n}: {s}" if s is not None else n for n, s in zip(self.input_names, self.inputs))

    def extra_repr(self) -> str:
        """The inputs with their types, and the outputs."""
        return f"{self._signature()} -> {', '.join(self.output_names)}"


class Forward:
    """The computation of a model: `module(*inputs)` calls it.

    Args:
        *args: the inputs in order: tensors or arrays; lists or tuples of ints for inputs that decide shapes; lists of
            tensors for sequences; None for optionals.
        **kwargs: inputs by name, also those that have a default in the file.

    Returns:
        The output, or a tuple of several.

    Raises:
        ArgumentsError: another number of inputs, or one of another type than the model declares.
        OnnxError: a node cannot be run; it is named.
    """

    def __init__(self, module: OnnxModule):
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model."""
        results = self.module.run(self.module.bind(args, kwargs))
        return results[0] if len(results) == 1 else tuple(results)

    @property
    def __signature__(self) -> inspect.Signature:
        """Parameters under the names of the inputs, as far as Python allows; `compile` and `trace` use them."""
        names = dict.fromkeys(identifier(name) for name in self.module.input_names)
        if len(names) < len(self.module.input_names):  # two that differ in what no identifier holds
            names = dict.fromkeys(f"input{i}" for i in range(len(self.module.input_names)))
        parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for n in names]
        return inspect.Signature([*parameters, inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)])


def _stored(graph: onnx.GraphProto) -> Iterable[tuple[str, np.ndarray]]:
    for tensor in graph.initializer:
        yield tensor.name, array_of(tensor)
    for sparse in graph.sparse_initializer:
        yield sparse.values.name, dense_of(sparse)


def _is_sequence(kind: onnx.TypeProto) -> bool:
    if kind.HasField("optional_type"):
        return _is_sequence(kind.optional_type.elem_type)
    return kind.HasField("sequence_type")


def _inputs_first(node: onnx.NodeProto) -> bool | None:
    """Whether the second operand of a product has the inputs' axis first; None for what is no product."""
    if node.op_type in ("MatMul", "FusedMatMul", "Gemm", "FusedGemm"):
        return not any(a.name == "transB" and a.i for a in node.attribute)
    return False if node.op_type in ("Conv", "FusedConv") else None


def _spec(value: onnx.ValueInfoProto) -> Spec | None:
    """What the file says of an input; None if that is not a tensor's rank and dtype."""
    kind = value.type
    if not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return None
    sizes: list[Any] = []
    for axis, dim in enumerate(kind.tensor_type.shape.dim):
        if dim.HasField("dim_value") and dim.dim_value >= 0:
            sizes.append(dim.dim_value)
        else:  # exporters write "?", or -1, where they know no name
            named = any(c.isalnum() for c in dim.dim_param)
            sizes.append(Dim(identifier(dim.dim_param if named else f"{value.name}_{axis}")))
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type)
        return Spec(TensorType(tuple(sizes), as_dtype(dtype)), value.name)
    except (DTypeError, KeyError, TypeError):
        return None


def identifier(name: str) -> str:
    """A name as a Python identifier: symbolic sizes need one."""
    clean = re.sub(r"\W", "_", name)
    return clean if clean and not clean[0].isdigit() else f"d_{clean}"


def load(source: Any, *, max_elements: int = MAX_ELEMENTS) -> OnnxModule:
    """Reads an ONNX model.

    Args:
        source: a path, the bytes of a file, or a ModelProto.
        max_elements: a model that makes a tensor with more is refused before it is allocated.

    Returns:
        A module in inference mode: its parameters carry the names of the file.

    Raises:
        OnnxError: the file is missing or damaged, or the model is not valid; the message names the node.
    """
    label = str(source) if isinstance(source, str) or hasattr(source, "__fspath__") else "the model"
    try:
        model, _ = read(source, max_elements)
        module = OnnxModule(model, label if label != "the model" else model.graph.name or label, max_elements)
    except OnnxError as error:
        raise OnnxError(f"{label}: {error.message}") from error
    except DATA_ERRORS as error:  # names that are no text, say
        raise OnnxError(f"{label} is damaged: {type(error).__name__}: {error}") from error
    module.eval()
    return module
