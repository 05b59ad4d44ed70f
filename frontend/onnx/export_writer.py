"""What export rules write with: ONNX nodes whose dtypes are right for the opset and for the runtime.

`Writer.op` is the one place where an ONNX node is made. It looks up the op's schema at the chosen opset, and where the
schema or the runtime's CPU kernels (`export_kernels`) do not take a dtype, it computes in one that holds every value of
it and casts back. So the rules say what is computed, and need not know which op takes which dtype since when.

Small constants become `Constant` nodes (initializers are for parameters and state, so that an importer can tell them
apart), each written once, in front of the main graph. So are symbolic sizes, which are read from the inputs' shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnx

from ...ir.dims import Dim, FloorDiv, Size
from ...ir.dtypes import DType, as_dtype
from ...ir.errors import OnnxError
from ...ir.graph import Graph, Node, Value
from ...ir.phases import names_in
from .dtypes import BY_NUMBER, number_of
from .export_kernels import KERNELS
from .export_ranges import Known
from .node import schema_of

INT64, BOOL, F32 = as_dtype("int64"), as_dtype("bool"), as_dtype("float32")
FAR = np.iinfo(np.int64).max
"""A limit beyond every axis."""
SMALL_CONSTANT = 64
"""Constants of more elements than this are written as initializers, which can live outside the file."""

# Dtypes that hold every value of a dtype, the nearest first.
WIDER: dict[str, tuple[str, ...]] = {
    "float16": ("float32", "float64"), "bfloat16": ("float32", "float64"), "float32": ("float64",),
    "float8_e4m3fn": ("float16", "float32"), "float8_e5m2": ("float16", "float32"),
    "int32": ("int64", "float64"), "int16": ("int32", "int64", "float32"),
    "int8": ("int16", "int32", "int64", "float32"), "int4": ("int8", "int32", "int64", "float32"),
    "uint32": ("uint64", "int64", "float64"), "uint16": ("uint32", "int32", "int64", "float32"),
    "uint8": ("uint16", "uint32", "int32", "int64", "float32"), "uint4": ("uint8", "int32", "int64", "float32"),
    "bool": ("uint8", "int8", "int32", "int64", "float32"),
}
# Ops that are right modulo 2**64, or only move elements: these take u64 as the i64 of the same bits.
WRAPS = frozenset("Add Sub Mul Equal Where Gather GatherElements GatherND Concat Slice Transpose Reshape Expand Pad "
                  "Squeeze Unsqueeze ReduceSum ReduceProd CumSum MatMul ScatterElements ScatterND".split())
_NAMES = {f"tensor({onnx.TensorProto.DataType.Name(n).lower()})": d for n, d in BY_NUMBER.items()}


class Ref(NamedTuple):
    """A value of the ONNX graph."""

    name: str
    dtype: DType


@dataclass
class Record:
    """A node before it is serialised: names may still change."""

    kind: str
    inputs: list[str]
    outputs: list[str]
    attrs: dict[str, Any]
    name: str


@dataclass
class Subgraph:
    """A region: what an attribute of a Record holds."""

    name: str
    inputs: list[tuple[str, Any]]
    outputs: list[tuple[str, Any]]
    records: list[Record]


@dataclass
class Model:
    """What all scopes of one export share.

    Attributes:
        opset: the target.
        clamp: see `save`.
        names: all that are taken; counts: the last number given to each stem.
        preamble: constants and sizes, in front of the main graph's nodes.
        initializers: constants that are too large for a node.
        constants: what stands for each, by its elements; arrays: the elements, by name.
        sizes: what stands for each symbolic size or shape, and what is made of sizes alone.
        sources: name of a size -> (input, axis, slope, offset) that it is read from.
        counted: the sizes that the graph counts itself, each as an int64 vector of one element.
        known: of indices.
        renamed: outputs of nodes that are outputs of the model -> their name there.
        unrunnable: (op, dtype) that ONNX allows and onnxruntime has no kernel for.
        turned: results of Transpose -> what is transposed, and how.
    """

    opset: int
    clamp: bool | None = None
    names: set[str] = field(default_factory=set)
    counts: dict[str, int] = field(default_factory=dict)
    preamble: list[Record] = field(default_factory=list)
    initializers: dict[str, np.ndarray] = field(default_factory=dict)
    constants: dict[Any, Ref] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    sizes: dict[Any, Ref] = field(default_factory=dict)
    sources: dict[str, tuple[Ref, int, int, int]] = field(default_factory=dict)
    counted: dict[str, Ref] = field(default_factory=dict)
    known: Known = field(default_factory=Known)
    renamed: dict[str, str] = field(default_factory=dict)
    unrunnable: set[tuple[str, str]] = field(default_factory=set)
    turned: dict[str, tuple[Ref, tuple[int, ...]]] = field(default_factory=dict)

    def unique(self, stem: str) -> str:
        """A name that nothing else has: the stem, or the stem with a number."""
        name = stem
        while name in self.names or not name:
            count = self.counts[stem] = self.counts.get(stem, 0) + 1
            name = f"{stem}_{count}"
        self.names.add(name)
        return name


class Writer:
    """Writes the nodes of one graph (the main one, or a region's).

    Attributes:
        model: shared by all scopes; `opset` is the target.
        records: the nodes written so far.
        refs: what stands for the values of the IR graph.
        node: the IR node whose rule is running; named by errors.
        uses: how many readers each value of the IR graph has (graph outputs count).
    """

    def __init__(self, model: Model):
        self.model = model
        self.records: list[Record] = []
        self.refs: dict[Value, Ref] = {}
        self.node: Node | None = None
        self.uses: dict[Value, int] = {}

    @property
    def opset(self) -> int:
        """The opset that is written."""
        return self.model.opset

    def fail(self, message: str) -> OnnxError:
        """An error that names the IR node at hand and the user's line; raise it."""
        where = None if self.node is None else self.node.loc
        what = "export" if self.node is None else f"export of {self.node.op.name}"
        return OnnxError(f"{what} to ONNX, opset {self.opset}: {message}", where)

    def needs(self, opset: int, why: str) -> None:
        """Raises unless the opset is at least the given one."""
        if self.opset < opset:
            raise self.fail(f"{why} needs opset {opset}: save with opset={opset} or above")

    # Nodes ------------------------------------------------------------------------------------------------------

    def op(self, kind: str, *inputs: Ref | None, dtype: Any = None, results: int = 1, **attrs: Any) -> Any:
        """Writes a node; gives its result, or a tuple for `results` above 1.

        Inputs are cast where the schema or the runtime needs another dtype, and the results back.

        Args:
            dtype: of the results whose dtype does not follow from an input's.
        """
        schema = self.schema(kind)
        formals = schema.inputs
        names = [formals[min(i, len(formals) - 1)].type_str for i in range(len(inputs))]
        given: dict[str, DType] = {}
        for name, ref in zip(names, inputs):
            if ref is not None:
                given.setdefault(name, ref.dtype)
        carriers = {name: self.carrier(kind, schema, name, d) for name, d in given.items()}
        cast = [r if r is None else self.cast(r, carriers[n]) for n, r in zip(names, inputs)]
        made: list[tuple[DType, DType]] = []
        for i in range(results):
            name = schema.outputs[min(i, len(schema.outputs) - 1)].type_str
            known = None if name in carriers else _only(_allowed(schema, name)) or as_dtype(dtype)
            made.append((known, known) if known is not None else (carriers[name], given[name]))
        refs = self.node_of(kind, cast, [actual for actual, _ in made], attrs)
        back = tuple(self.cast(r, wanted) for r, (_, wanted) in zip(refs, made))
        return back[0] if results == 1 else back

    def node_of(self, kind: str, inputs: Sequence[Ref | None], dtypes: Sequence[DType], attrs: Any) -> list[Ref]:
        """Writes a node as it stands."""
        given = ["" if r is None else r.name for r in inputs]
        while given and not given[-1]:
            given.pop()
        stem = kind.lower()
        outputs = [self.model.unique(stem) for _ in dtypes]
        self.records.append(Record(kind, given, outputs, {k: v for k, v in attrs.items() if v is not None},
                                   self.model.unique(f"{kind}.{outputs[0]}") if outputs else kind))
        return [Ref(name, d) for name, d in zip(outputs, dtypes)]

    def schema(self, kind: str) -> Any:
        """The schema of an ONNX op at the opset.

        Raises:
            OnnxError: the opset does not have the op.
        """
        schema = schema_of(kind, "", self.opset)
        if schema is None or schema.deprecated:
            first = next((v for v in range(self.opset, onnx.defs.onnx_opset_version() + 1)
                          if (s := schema_of(kind, "", v)) is not None and not s.deprecated), None)
            remedy = f"save with opset={first} or above" if first else "no later opset has it either"
            raise self.fail(f"the ONNX op {kind} does not exist at this opset: {remedy}")
        return schema

    def takes(self, kind: str, dtype: Any) -> bool:
        """Whether the runtime computes the op in this very dtype at the opset."""
        schema = schema_of(kind, "", self.opset)
        if schema is None:
            return False
        parameter = schema.inputs[0].type_str
        runs = _kernels(kind, self.opset, parameter)
        return dtype in _allowed(schema, parameter) and (runs is None or dtype in runs or dtype == "float16")

    def carrier(self, kind: str, schema: Any, parameter: str, dtype: DType) -> DType:
        """The dtype to compute in."""
        allowed = _allowed(schema, parameter)
        if parameter in _NAMES:  # the schema names one dtype
            return _NAMES[parameter]
        runs = _kernels(kind, self.opset, parameter)
        candidates = [dtype, *map(as_dtype, WIDER.get(dtype, ()))]
        if dtype == "uint64" and kind in WRAPS:
            candidates.append(INT64)
        for candidate in candidates:
            # a runtime without a kernel for float16 inserts casts by itself
            if candidate in allowed and (runs is None or candidate in runs or candidate == "float16"):
                return candidate
        for candidate in candidates:
            if candidate in allowed:
                self.model.unrunnable.add((kind, str(candidate)))
                return candidate
        later = next((v for v in range(self.opset + 1, onnx.defs.onnx_opset_version() + 1)
                      if dtype in _allowed(schema_of(kind, "", v), parameter)), None)
        remedy = f"save with opset={later} or above" if later else "cast before this op"
        raise self.fail(f"the ONNX op {kind} takes no {dtype} at this opset: {remedy}")

    def cast(self, ref: Ref, dtype: Any) -> Ref:
        """The value in another dtype; a constant is cast here and now."""
        target = as_dtype(dtype)
        if ref.dtype == target:
            return ref
        if ref.name in self.model.arrays and ref.dtype not in ("int4", "uint4"):
            with np.errstate(all="ignore"):
                return self.const(self.model.arrays[ref.name].astype(target.np))
        self.check_dtype(ref.dtype)
        self.check_dtype(target)
        saturate = 0 if target in ("float8_e4m3fn", "float8_e5m2") else None  # out of range is NaN or inf, as here
        return self.node_of("Cast", [ref], [target], {"to": number_of(target), "saturate": saturate})[0]

    def check_dtype(self, dtype: Any) -> None:
        """Raises unless the opset has the dtype."""
        if dtype not in _allowed(schema_of("Cast", "", self.opset), "T1"):
            first = next(v for v in range(self.opset, onnx.defs.onnx_opset_version() + 1)
                         if dtype in _allowed(schema_of("Cast", "", v), "T1"))
            raise self.fail(f"there is no dtype {dtype} at this opset: save with opset={first} or above")

    # Constants and sizes ------------------------------------------------------------------------------------------

    def const(self, array: Any, dtype: Any = None) -> Ref:
        """A constant; equal ones are one."""
        value = np.asarray(array, None if dtype is None else as_dtype(dtype).np)
        kind = as_dtype(value.dtype)
        self.check_dtype(kind)
        key = (kind, value.shape, value.tobytes())
        if key not in self.model.constants:
            name = self.model.unique("constant")
            self.model.arrays[name] = value
            if value.size > SMALL_CONSTANT:
                self.model.initializers[name] = value
            else:
                self.model.preamble.append(Record("Constant", [], [name], {"value": value}, f"Constant.{name}"))
            self.model.constants[key] = Ref(name, kind)
        return self.model.constants[key]

    def ints(self, *values: int) -> Ref:
        """A vector of int64."""
        return self.const(np.array(values, np.int64))

    def like(self, number: Any, ref: Ref) -> Ref:
        """A scalar of the dtype of a value."""
        return self.const(np.asarray(number).astype(ref.dtype.np))

    def array_of(self, ref: Ref) -> np.ndarray | None:
        """The elements of a constant; None for what is not one."""
        return self.model.arrays.get(ref.name)

    def size(self, size: Size) -> Ref:
        """A size as an int64 vector of one element."""
        if not isinstance(size, Dim):
            return self.ints(int(size))
        return self.shared(size, lambda first: first._compute(size))

    def shape(self, sizes: Iterable[Size]) -> Ref:
        """A shape as an int64 vector."""
        listed = tuple(sizes)
        if not any(isinstance(s, Dim) for s in listed):
            return self.ints(*map(int, listed))
        parts = [self.size(s) for s in listed]
        return parts[0] if len(parts) == 1 else self.shared(
            ("shape", *listed), lambda first: first.op("Concat", *parts, axis=0))

    def shared(self, key: Any, write: Callable[[Writer], Ref]) -> Ref:
        """What depends on nothing but sizes and constants: written once, in front of the main graph.

        What depends on sizes that the graph counts is written here.
        """
        if self.model.counted.keys() & names_in(key):
            return write(self)
        if key not in self.model.sizes:
            first = Writer(self.model)
            first.node = self.node
            first.records = self.model.preamble
            self.model.sizes[key] = write(first)
        return self.model.sizes[key]

    def _compute(self, dim: Dim) -> Ref:
        total: Ref | None = None
        for monomial, coefficient in sorted(dim.terms.items(), key=str):
            factors = [self._atom(atom) for atom in monomial]
            if coefficient != 1 or not factors:
                factors.append(self.ints(coefficient))
            term = factors[0]
            for factor in factors[1:]:
                term = self.op("Mul", term, factor)
            total = term if total is None else self.op("Add", total, term)
        assert total is not None
        return total

    def _atom(self, atom: str | FloorDiv) -> Ref:
        if isinstance(atom, FloorDiv):
            return self.op("Div", self.size(atom.numerator), self.ints(atom.divisor))
        if atom in self.model.counted:
            return self.model.counted[atom]
        if atom not in self.model.sources:
            raise self.fail(f"the size {atom!r} does not follow from the shape of any input: give an input whose "
                            f"shape has it, or a number for it")
        source, axis, slope, offset = self.model.sources[atom]
        if self.opset >= 15:
            size = self.node_of("Shape", [source], [INT64], {"start": axis, "end": axis + 1})[0]
        else:
            whole = self.node_of("Shape", [source], [INT64], {})[0]
            size = self.op("Gather", whole, self.ints(axis), axis=0)
        if offset:
            size = self.op("Sub", size, self.ints(offset))
        return size if slope == 1 else self.op("Div", size, self.ints(slope))

    # Scopes -----------------------------------------------------------------------------------------------------

    def inner(self) -> Writer:
        """A writer for a region, which sees what is written here."""
        inside = Writer(self.model)
        inside.node = self.node
        return inside

    def bind(self, graph: Graph, refs: Sequence[Ref]) -> None:
        """Says what stands for the inputs of an IR graph, and counts the readers of its values."""
        self.refs.update(zip(graph.inputs, refs, strict=True))
        for value in (*(v for n in graph.nodes for v in n.operands), *graph.outputs):
            self.uses[value] = self.uses.get(value, 0) + 1


def _allowed(schema: Any, parameter: str) -> frozenset[str]:
    """The dtypes that a schema allows for one of its type parameters."""
    key = (schema.name, schema.since_version, parameter)
    if key not in _dtypes:
        found = frozenset({_NAMES[parameter]} if parameter in _NAMES else ())
        for constraint in schema.type_constraints:
            if constraint.type_param_str == parameter:
                found = frozenset(_NAMES[t] for t in constraint.allowed_type_strs if t in _NAMES)
        _dtypes[key] = found
    return _dtypes[key]


_dtypes: dict[tuple[str, int, str], frozenset[str]] = {}


def _only(dtypes: frozenset[str]) -> DType | None:
    return as_dtype(next(iter(dtypes))) if len(dtypes) == 1 else None


def _kernels(kind: str, opset: int, parameter: str) -> frozenset[str] | None:
    """The dtypes that the runtime has kernels for; None if it has no table for the op."""
    found = None
    for start, dtypes in KERNELS.get(kind, ()):
        if start <= opset and parameter in dtypes:
            found = frozenset(map(str, map(as_dtype, dtypes[parameter].split())))
    return found
