"""From the records of the writers to a ModelProto, and from that to files."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ...ir.dims import Dim
from ...ir.errors import OnnxError
from ...ir.types import TensorType
from .dtypes import number_of
from .export_writer import Record, Subgraph

INLINE = 1024
"""Initializers of fewer bytes stay in the model's own file."""
LIMIT = (1 << 31) - (1 << 24)
"""Bytes of data above which a model does not fit into one protobuf file."""
ALIGNMENT = 4096


@dataclass
class Storage:
    """Initializers that go to a file beside the model.

    Attributes:
        location: the name of that file.
        arrays: each with its place in the file, in bytes.
    """

    location: str
    arrays: list[tuple[int, np.ndarray]] = field(default_factory=list)
    end: int = 0

    def add(self, array: np.ndarray) -> tuple[int, int]:
        """Sets a place aside; gives offset and length."""
        self.end += -self.end % (ALIGNMENT if array.nbytes > ALIGNMENT else 64)
        offset, self.end = self.end, self.end + array.nbytes
        self.arrays.append((offset, array))
        return offset, array.nbytes


def live(records: Sequence[Record], wanted: Iterable[str]) -> list[Record]:
    """The records that the wanted names depend on."""
    needed, kept = set(wanted), []
    for record in reversed(records):
        if needed & set(record.outputs):
            kept.append(record)
            needed |= names_read(record)
    return kept[::-1]


def names_read(record: Record) -> set[str]:
    """The names that a node reads, those that its subgraphs see around them included."""
    names = set(record.inputs)
    for attr in record.attrs.values():
        if isinstance(attr, Subgraph):
            names |= {n for inner in attr.records for n in names_read(inner)} | {n for n, _ in attr.outputs}
    return names


def finished(records: Sequence[Record], renamed: Mapping[str, str], outputs: Iterable[str],
             taken: Iterable[str]) -> list[Record]:
    """The live records in their final order and under their final names.

    Constants and sizes stand in front of their first reader, and names are counted in this order: so equal graphs give
    equal files, whatever was written and dropped on the way.

    Args:
        records: preamble first.
        renamed: names that are outputs of the model -> the name there.
        outputs: of the model; other names count as well, in vain.
        taken: names that are given already.
    """
    wanted = set(outputs)
    kept = live(records, wanted | {old for old, new in renamed.items() if new in wanted})
    names = _Names(renamed, taken)
    return [names.apply(r) for r in arranged(kept)]


def arranged(records: Sequence[Record]) -> list[Record]:
    """Nodes without inputs of their own (constants, sizes) moved to where they are first read."""
    maker = {name: r for r in records for name in r.outputs}
    early = {id(r) for r in records if r.kind in ("Constant", "Shape")}
    placed: set[int] = set()
    order: list[Record] = []

    def place(record: Record) -> None:
        if id(record) in placed:
            return
        placed.add(id(record))
        for name in names_in_order(record):
            if name in maker:
                place(maker[name])
        order.append(record)

    for record in records:
        if id(record) not in early:
            place(record)
    return order + [r for r in records if id(r) not in placed]


def names_in_order(record: Record) -> list[str]:
    """`names_read`, each where it is read first."""
    names = list(record.inputs)
    for attr in record.attrs.values():
        if isinstance(attr, Subgraph):
            names += [n for inner in attr.records for n in names_in_order(inner)] + [n for n, _ in attr.outputs]
    return names


class _Names:
    """Gives values and nodes their final names, counted for each kind of node."""

    def __init__(self, renamed: Mapping[str, str], taken: Iterable[str]):
        self.final = dict(renamed)
        self.given = frozenset(taken)
        self.taken = {*taken, *renamed.values()}
        self.counts: dict[str, int] = {}

    def fresh(self, stem: str) -> str:
        """An unused name."""
        while True:
            count = self.counts[stem] = self.counts.get(stem, -1) + 1
            name = f"{stem}_{count}" if count else stem
            if name not in self.taken:
                self.taken.add(name)
                return name

    def value(self, name: str, stem: str) -> str:
        """The name of something that is made here."""
        if name and name not in self.final:
            self.final[name] = self.fresh(stem)
        return self.final.get(name, name)

    def apply(self, record: Record) -> Record:
        """The record under final names; subgraphs are walked when they are met."""
        attrs = {k: self.subgraph(v) if isinstance(v, Subgraph) else v for k, v in record.attrs.items()}
        inputs = [self.final.get(n, n) for n in record.inputs]
        outputs = [n if n in self.given else self.value(n, record.kind.lower()) for n in record.outputs]
        return Record(record.kind, inputs, outputs, attrs, self.fresh(record.kind))

    def subgraph(self, graph: Subgraph) -> Subgraph:
        """A region's records, the live ones."""
        inputs = [(self.value(n, n.rstrip("0123456789").rstrip("_")), t) for n, t in graph.inputs]
        records = [self.apply(r) for r in live(graph.records, [n for n, _ in graph.outputs])]
        outputs = [(self.final.get(n, n), t) for n, t in graph.outputs]
        return Subgraph(self.fresh(graph.name.rstrip("0123456789").rstrip("_")), inputs, outputs, records)


def node_proto(record: Record) -> onnx.NodeProto:
    """One node."""
    attrs = {k: attribute(v) for k, v in record.attrs.items()}
    return helper.make_node(record.kind, record.inputs, record.outputs, name=record.name, **attrs)


def attribute(value: Any) -> Any:
    """An attribute as `make_node` takes it."""
    if isinstance(value, np.ndarray):
        return numpy_helper.from_array(value)
    if isinstance(value, Subgraph):
        return helper.make_graph([node_proto(r) for r in value.records], value.name,
                                 [value_info(n, t) for n, t in value.inputs],
                                 [value_info(n, t) for n, t in value.outputs])
    return value


def value_info(name: str, kind: TensorType) -> onnx.ValueInfoProto:
    """An input or output; symbolic sizes by name."""
    shape = [str(s) if isinstance(s, Dim) else int(s) for s in kind.shape]
    return helper.make_tensor_value_info(name, number_of(kind.dtype), shape)


def rename_sizes(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Gives symbolic sizes other names, in subgraphs too."""
    if not names:
        return
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda word: names.get(word.group(), word.group()), dim.dim_param)
    for node in graph.node:
        for attr in node.attribute:
            if attr.HasField("g"):
                rename_sizes(attr.g, names)


def initializer(name: str, array: np.ndarray, storage: Storage | None) -> onnx.TensorProto:
    """An array under a name; large ones in the storage, if there is one."""
    if storage is None or array.nbytes < INLINE:
        return numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
    offset, length = storage.add(array)
    proto = numpy_helper.from_array(np.zeros(0, array.dtype), name)
    proto.ClearField("raw_data")
    del proto.dims[:]
    proto.dims.extend(array.shape)
    proto.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", storage.location), ("offset", offset), ("length", length)):
        proto.external_data.add(key=key, value=str(value))
    return proto


# Files -----------------------------------------------------------------------------------------------------------

def write_files(model: onnx.ModelProto, path: Path, storage: Storage | None, check: bool) -> None:
    """Writes the data and then the model, each aside first: what is at the path is always whole.

    Raises:
        OnnxError: a file cannot be written, or the model is not valid.
    """
    token = secrets.token_hex(6)
    made: list[tuple[Path, Path]] = []
    try:
        try:
            if storage is not None and storage.arrays:
                aside = path.with_name(f".{storage.location}-{token}")
                made.append((aside, path.with_name(storage.location)))
                _write_arrays(aside, storage)
            aside = path.with_name(f".{path.name}-{token}")
            made.append((aside, path))
            with open(aside, "wb") as file:
                file.write(model.SerializeToString(deterministic=True))
                file.flush()
                os.fsync(file.fileno())
            if check and storage is None:
                validate(model)
            for source, target in made:
                os.replace(source, target)
        finally:
            for source, _ in made:
                with contextlib.suppress(OSError):
                    source.unlink(missing_ok=True)
    except OSError as error:
        raise OnnxError(f"{path} cannot be written: {error.strerror or error}") from error
    if check and storage is not None:
        validate(str(path))


def _write_arrays(path: Path, storage: Storage) -> None:
    with open(path, "wb") as file:
        for offset, array in storage.arrays:
            file.seek(offset)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def validate(model: Any) -> None:
    """Runs ONNX's checker with strict shape inference.

    Raises:
        OnnxError: the model is not valid, which is a mistake of the exporter (or of a rule of the user's own).
    """
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker and shape inference raise classes of their own
        raise OnnxError(f"the exported model is not valid: {error}. This is a fault of an export rule; save with "
                        "check=False to look at the file") from error
