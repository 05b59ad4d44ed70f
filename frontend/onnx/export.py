"""`save`: any traced graph as an ONNX file.

    td.onnx.save(m, "out.onnx")                                          # an imported module: its inputs are known
    td.onnx.save(net, "net.onnx", td.spec(("batch", 784)))               # any module or function, with specs
    td.onnx.save(net, "net.onnx", example)                               # or with an example, whose sizes are fixed
    td.onnx.save(graph, "graph.onnx", opset=17)

The function is traced, the graph tidied by the passes that compiling uses too, and each op written by its rule in the
slot `onnx` (`export_rules`). What a traced function uses from outside becomes an initializer under its name. What it
*assigns* (running statistics, parameters and optimizer state of a training step) is an input with the present value as
its default, and an output `<name>.new`: run it, feed the outputs back, and the step goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from ...ir.dims import Dim
from ...ir.errors import ArgumentsError, AttributeValueError, OnnxError, TreadleError
from ...ir.graph import Graph
from ...ir.location import user_location
from ...ir.passes import TIDY
from ...ir.pipeline import Pipeline
from ...ir.types import TensorType
from ..compile import Compiled
from ..tensor import Tensor
from .export_kept import can_keep, kept
from .export_proto import (
    LIMIT,
    Storage,
    finished,
    initializer,
    names_in_order,
    node_proto,
    rename_sizes,
    validate,
    value_info,
    write_files,
)
from .export_rules import load_rules, write_graph
from .export_sources import opset_of, source_of
from .export_writer import Model, Record, Ref, Writer

log = logging.getLogger("treadle.onnx")

DEFAULT_OPSET = 20
OLDEST = 11


@dataclass
class Signature:
    """How the graph looks from outside.

    Attributes:
        inputs: (name, type) of what the caller gives.
        initializers: arrays by name.
        defaults: names of initializers that are inputs as well.
        outputs: (name, type).
    """

    inputs: list[tuple[str, TensorType]]
    initializers: dict[str, np.ndarray]
    defaults: list[tuple[str, TensorType]]
    outputs: list[tuple[str, TensorType]]


def save(model: Any, path: Any, *specs: Any, opset: int | None = None, input_names: Sequence[str] | None = None,
         output_names: Sequence[str] | None = None, train: bool = False, merge: bool = False,
         clamp: bool | None = None, keep: bool | None = None, external_data: bool | None = None, check: bool = True,
         metadata: Mapping[str, str] | None = None) -> None:
    """Writes a module, function or graph as an ONNX file; the file is either whole or not there.

    Args:
        model: an `nn.Module` (imported or not), a function of tensors, a compiled function, a `train_step`, or a Graph.
        path: of the file.
        *specs: the arguments: `td.spec`s, in which sizes given by name stay dynamic, or tensors or arrays, whose types
            count. Not for a Graph; an imported module has its own.
        opset: 11 or above; default 20, and for an imported module its own.
        input_names, output_names: what to call them; by default the names of the function's parameters (with the path
            inside containers) and `output`, `output_1`... or the keys of a dict, and for an imported module its own.
        train: export a module as it trains (dropout, batch statistics), instead of as it predicts.
        merge: store a weight that has an adapter (LoRA) as it is read, with the adapter folded in. False: weight and
            adapter are stored apart, and the graph adds them.
        clamp: whether indices of gathers that may lie outside are clamped in the graph, as Treadle does (ONNX has an
            error). None: those that the graph computes are, those that the caller passes in are not.
        keep: write the graph of an imported module as it is in its file, with the present weights, instead of what is
            traced. None: only if it cannot be traced with open sizes; that is logged (`treadle.onnx`).
        external_data: put weights into `<path>.data`. None: if they do not fit into one file (2 GB).
        check: run ONNX's checker with strict shape inference on the result.
        metadata: strings to keep in the file.

    Raises:
        OnnxError: an op cannot be said at this opset (the message names op, line and remedy), or the file cannot be
            written.
        ArgumentsError: specs, names or options that do not fit the model.
    """
    place = Path(path)
    written = _written(model, specs, Options(opset, input_names, output_names, train, merge, clamp, keep))
    external = written.nbytes > LIMIT if external_data is None else external_data
    if written.nbytes > LIMIT and not external:
        raise OnnxError(f"{place}: {written.nbytes:,} bytes of weights do not fit into one ONNX file (2 GB): save with "
                        "external_data=True", user_location())
    storage = Storage(f"{place.name}.data") if external else None
    write_files(written.proto(storage, metadata), place, storage, check)


def to_model(model: Any, *specs: Any, opset: int | None = None, input_names: Sequence[str] | None = None,
             output_names: Sequence[str] | None = None, train: bool = False, merge: bool = False,
             clamp: bool | None = None, keep: bool | None = None, check: bool = True,
             metadata: Mapping[str, str] | None = None) -> onnx.ModelProto:
    """The ModelProto that `save` writes; see there."""
    written = _written(model, specs, Options(opset, input_names, output_names, train, merge, clamp, keep))
    proto = written.proto(None, metadata)
    if check and written.nbytes <= LIMIT:  # what does not fit into one file cannot be checked as one either
        validate(proto)
    return proto


@dataclass(frozen=True)
class Options:
    """Those of `save` that say what is written."""

    opset: int | None
    input_names: Sequence[str] | None
    output_names: Sequence[str] | None
    train: bool
    merge: bool
    clamp: bool | None
    keep: bool | None


# Choices ------------------------------------------------------------------------------------------------------

def _checked_opset(model: Any, opset: int | None) -> int:
    newest = onnx.defs.onnx_opset_version()
    if opset is None:
        return min(max(opset_of(model) or DEFAULT_OPSET, OLDEST), newest)
    if isinstance(opset, bool) or not isinstance(opset, int) or not OLDEST <= opset <= newest:
        raise OnnxError(f"opset is {opset!r}; this version writes opsets {OLDEST} to {newest}", user_location())
    return opset


# Writing ---------------------------------------------------------------------------------------------------------

def _written(model: Any, specs: Sequence[Any], options: Options) -> Traced | Kept:
    if isinstance(model, Compiled) and not isinstance(model.fn, Graph):
        model = model.fn
    named = options.input_names is not None or options.output_names is not None
    keeps = can_keep(model, options.opset) and not specs and not named and not options.train
    if options.keep and not keeps:
        raise ArgumentsError("onnx.save(keep=True) is for an imported module as it came: without modules wrapped "
                             "around its nodes, specs, other names, another opset, or train=True", user_location())
    if options.keep or keeps and options.keep is None and any(i is None for i in model.inputs):
        return Kept(model, options.merge)
    try:
        return _traced(model, specs, options)
    except TreadleError as error:
        if not keeps or options.keep is not None or isinstance(error, (ArgumentsError, AttributeValueError)):
            raise
        log.warning("%s: cannot be traced for open sizes, so its graph is written as it was read, with the present "
                    "weights. %s", model.label, error.message)
        return Kept(model, options.merge)


@dataclass
class Kept:
    """An imported module whose graph is written as it was read."""

    module: Any
    merge: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(t.numpy(copy=False).nbytes for _, t in (*self.module.named_parameters(),
                                                            *self.module.named_buffers()))

    def proto(self, storage: Storage | None, metadata: Mapping[str, str] | None) -> onnx.ModelProto:
        """The model; what fits into a storage goes there."""
        model = kept(self.module, self.merge, storage)
        if metadata:
            helper.set_model_props(model, {**{p.key: p.value for p in model.metadata_props}, **metadata})
        return model


def _traced(model: Any, specs: Sequence[Any], options: Options) -> Traced:
    load_rules()
    target = _checked_opset(model, options.opset)
    source = source_of(model, specs, options.train, options.merge)
    graph = Pipeline(TIDY).run(source.graph)
    shared = Model(target, options.clamp)
    out = Writer(shared)
    for value in (*graph.inputs, *graph.outputs):
        out.check_dtype(value.dtype)
    signature, refs = _sign(graph, source.names, shared, options.input_names or source.input_names,
                            options.output_names or source.output_names)
    _give(out, signature, write_graph(out, graph, refs))
    written = Traced(signature, shared, _final_records(signature, out), source.sizes)
    kinds = {r.kind for r in written.records}
    if lost := [f"{kind} of {dtype}" for kind, dtype in sorted(shared.unrunnable) if kind in kinds]:
        log.warning("%s: onnxruntime has no kernel for %s on a CPU; the model is valid, but to run it there cast it to "
                    "float32 first", graph.name, ", ".join(lost))
    return written


def _final_records(signature: Signature, out: Writer) -> list[Record]:
    shared = out.model
    seen = [n for n, _ in (*signature.inputs, *signature.defaults, *signature.outputs)]
    taken = {*seen, *signature.initializers, *shared.initializers}
    return finished([*shared.preamble, *out.records], shared.renamed, seen, taken)


def _sign(graph: Graph, named: Mapping[int, str], shared: Model, input_names: Sequence[str] | None,
          output_names: Sequence[str] | None) -> tuple[Signature, list[Ref]]:
    """Names for everything that is seen from outside, and what stands for the inputs."""
    captures: dict[int, Tensor] = graph.meta.get("captures", {})
    given = [i for i in range(len(graph.inputs)) if i not in captures]
    _check_names("input", input_names, len(given))
    wanted = dict(zip(given, input_names or ()))
    updated = set(graph.aliases.values())
    signature = Signature([], {}, [], [])
    names: list[str] = []
    for i, value in enumerate(graph.inputs):
        tensor = captures.get(i)
        stem = wanted.get(i) or (named.get(id(tensor)) if tensor is not None else None) or value.name
        name = shared.unique(stem or ("input" if tensor is None else value.dtype.short + "_constant"))
        names.append(name)
        if tensor is None:
            signature.inputs.append((name, value.type))
            shared.known.given.add(value)
            continue
        signature.initializers[name] = array = tensor.numpy(copy=False)
        if i in updated:
            signature.defaults.append((name, value.type))
        else:
            shared.known.arrays[value] = array
    for i, value in enumerate(graph.inputs):
        _note_sizes(shared, Ref(names[i], value.dtype), value.type)
    count = len(graph.outputs) - len(graph.aliases)
    _check_names("output", output_names, count)
    stems = list(output_names or _output_names(graph, count))
    for i, value in enumerate(graph.outputs):
        stem = f"{names[graph.aliases[i]]}.new" if i in graph.aliases else stems.pop(0)
        signature.outputs.append((shared.unique(stem), value.type))
    return signature, [Ref(n, v.dtype) for n, v in zip(names, graph.inputs)]


def _check_names(what: str, names: Sequence[str] | None, count: int) -> None:
    if names is not None and (len(names) != count or len(set(names)) != count or not all(names)):
        raise ArgumentsError(f"{what}_names is {list(names)!r}; the model has {count} {what}s, each of which needs a "
                             "name of its own", user_location())


def _output_names(graph: Graph, count: int) -> list[str]:
    structure = graph.meta.get("out_structure")
    paths = [] if structure is None or structure.kind != "dict" else list(structure.paths())
    if len(paths) == count:
        return ["".join(c if c.isalnum() or c in "._" else "_" for c in p.replace("'", "").replace("]", "")).strip("_")
                for p in paths]
    return ["output" if i == 0 else f"output_{i}" for i in range(count)]


def _note_sizes(shared: Model, ref: Ref, kind: TensorType) -> None:
    """Where each named size can be read: from an axis a * name + b of an input."""
    for axis, size in enumerate(kind.shape):
        if not isinstance(size, Dim) or len(size.names) != 1:
            continue
        (name,) = size.names
        slope = size.terms.get((name,), 0)
        if slope > 0 and set(size.terms) <= {(name,), ()}:
            plain = (slope, size.terms.get((), 0)) == (1, 0)
            if name not in shared.sources or plain and shared.sources[name][2:] != (1, 0):
                shared.sources[name] = (ref, axis, slope, size.terms.get((), 0))


def _give(out: Writer, signature: Signature, results: Sequence[Ref]) -> None:
    """Gives the results their names: by renaming what a node of the main graph makes, else by an Identity."""
    made = {name for record in out.records for name in record.outputs}
    for (name, _), ref in zip(signature.outputs, results, strict=True):
        if ref.name in made:
            made.discard(ref.name)
            out.model.renamed[ref.name] = name
        else:
            out.records.append(Record("Identity", [ref.name], [name], {}, f"Identity.{name}"))


@dataclass
class Traced:
    """A graph that was written, before it is serialised."""

    signature: Signature
    shared: Model
    records: list[Record]
    sizes: Mapping[str, str]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The initializers."""
        return {**self.signature.initializers, **self.shared.initializers}

    @property
    def nbytes(self) -> int:
        """Bytes of the initializers."""
        return sum(a.nbytes for a in self.arrays.values())

    def proto(self, storage: Storage | None, metadata: Mapping[str, str] | None) -> onnx.ModelProto:
        """The model; what fits into a storage goes there."""
        signature, arrays = self.signature, self.arrays
        read = dict.fromkeys(n for r in self.records for n in names_in_order(r))
        stored = [n for n in (*read, *(n for n, _ in signature.defaults if n not in read)) if n in arrays]
        graph = helper.make_graph(
            [node_proto(r) for r in self.records], "main",
            [value_info(n, t) for n, t in (*signature.inputs, *signature.defaults)],
            [value_info(n, t) for n, t in signature.outputs],
            initializer=[initializer(n, arrays[n], storage) for n in stored])
        rename_sizes(graph, self.sizes)
        opsets = [helper.make_opsetid("", self.shared.opset)]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="treadle",
                                  ir_version=helper.find_min_ir_version_for(opsets))
        if metadata:
            helper.set_model_props(model, dict(metadata))
        return model
