"""From the records of the writers to a ModelProto, and from that to files."""

from __future__ import annotations

import contextlib
import os
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


def node_proto(record: Record, rename: Mapping[str, str]) -> onnx.NodeProto:
    """One node."""
    attrs = {k: attribute(v, rename) for k, v in record.attrs.items()}
    return helper.make_node(record.kind, [rename.get(n, n) for n in record.inputs],
                            [rename.get(n, n) for n in record.outputs], name=record.name, **attrs)


def attribute(value: Any, rename: Mapping[str, str]) -> Any:
    """An attribute as `make_node` takes it."""
    if isinstance(value, np.ndarray):
        return numpy_helper.from_array(value)
    if isinstance(value, Subgraph):
        nodes = [node_proto(r, rename) for r in live(value.records, [n for n, _ in value.outputs])]
        return helper.make_graph(nodes, value.name, [value_info(n, t) for n, t in value.inputs],
                                 [value_info(rename.get(n, n), t) for n, t in value.outputs])
    return value


def value_info(name: str, kind: TensorType) -> onnx.ValueInfoProto:
    """An input or output; symbolic sizes by name."""
    shape = [str(s) if isinstance(s, Dim) else int(s) for s in kind.shape]
    return helper.make_tensor_value_info(name, number_of(kind.dtype), shape)


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
