"""Checkpoints: model, optimizer, random state and step in one safetensors file.

The model's tensors stand under their own dotted names, so that any reader of safetensors can take the weights; the
rest stands under names that begin with `treadle/`. A file is written beside its place and moved there when it is whole;
a checksum over the data is kept in the header, so damage is found when reading. Nothing is pickled.

The format is little: eight bytes with the length of a JSON header, the header (name -> dtype, shape, where), the data
(https://github.com/huggingface/safetensors, "Format"). It is written and read here directly, tensor by tensor, so that
a checkpoint never doubles in memory and every NumPy dtype of ml_dtypes passes.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..ir.dtypes import DType, as_dtype
from ..ir.errors import CheckpointError
from . import random
from .tensor import Tensor

PREFIX = "treadle/"
_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
          "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64",
          "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL"}
_DTYPES: dict[str, DType] = {name: as_dtype(dtype) for dtype, name in _NAMES.items()}
_HEADER_LIMIT = 100 << 20


@dataclass
class Checkpoint:
    """What `load_checkpoint` found besides what it restored.

    Attributes:
        step: as given to `save_checkpoint`; None if it was not.
        metadata: the strings given to `save_checkpoint`.
    """

    step: int | None
    metadata: dict[str, str] = field(default_factory=dict)


def save_checkpoint(path: Any, model: Any, optimizer: Any = None, step: int | None = None,
                    metadata: Mapping[str, str] | None = None) -> None:
    """Writes a checkpoint; the file is either whole or not there.

    Args:
        path: of the file, by custom `*.safetensors`.
        model: an `nn.Module`, or a mapping from names to tensors.
        optimizer: its state is saved too; so is the default random generator's.
        step: a number for the caller, e.g. steps taken.
        metadata: strings for the caller.

    Raises:
        CheckpointError: the file cannot be written, or a name is reserved.
    """
    state = model.state_dict() if hasattr(model, "state_dict") else model
    arrays = {name: _array(t) for name, t in state.items()}
    if reserved := [n for n in arrays if n.startswith(PREFIX)]:
        raise CheckpointError(f"{path}: the name {reserved[0]!r} is reserved; rename the tensor")
    if optimizer is not None:
        arrays |= {f"{PREFIX}optimizer/{name}": _array(t) for name, t in optimizer.state_dict().items()}
    arrays[f"{PREFIX}rng"] = random.default_generator().state.numpy()
    notes = {f"user.{k}": str(v) for k, v in (metadata or {}).items()}
    if step is not None:
        notes["step"] = str(int(step))
    write_safetensors(path, arrays, notes)


def load_checkpoint(path: Any, model: Any, optimizer: Any = None, strict: bool = True) -> Checkpoint:
    """Restores a model, an optimizer if given, and the random state from a file, in place.

    Args:
        path: a file by `save_checkpoint`, or any safetensors file with the model's names.
        model: an `nn.Module`.
        optimizer: restored if given.
        strict: complain about names of the model that are missing on either side.

    Raises:
        CheckpointError: the file is missing, damaged, or does not fit the model or optimizer; the message names the
            file and, for shapes, both.
    """
    arrays, notes = read_safetensors(path)
    own = {n: a for n, a in arrays.items() if not n.startswith(PREFIX)}
    moments = {n[len(PREFIX) + 10:]: a for n, a in arrays.items() if n.startswith(f"{PREFIX}optimizer/")}
    if optimizer is not None and not moments:
        raise CheckpointError(f"{path} holds no optimizer state; it was saved without one")
    try:
        model.load_state_dict(own, strict=strict)
        if optimizer is not None:
            optimizer.load_state_dict(moments)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}") from None
    if f"{PREFIX}rng" in arrays:
        random.default_generator().state.assign(arrays[f"{PREFIX}rng"])
    step = notes.get("step")
    return Checkpoint(int(step) if step is not None else None,
                      {k[5:]: v for k, v in notes.items() if k.startswith("user.")})


def _array(x: Any) -> np.ndarray:
    array = x.numpy(copy=False) if isinstance(x, Tensor) else np.asarray(x)
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


# The format ----------------------------------------------------------------------------------------------------


def _bytes(array: np.ndarray) -> Any:
    return array.reshape(-1).view(np.uint8).data


def write_safetensors(path: Any, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes named arrays to a safetensors file, atomically, with a checksum of the data in the metadata.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = Path(path)
    header: dict[str, Any] = {}
    at = checksum = 0
    for name, array in arrays.items():
        dtype = as_dtype(array.dtype)
        if dtype not in _NAMES:
            raise CheckpointError(f"{path}: {name} has the dtype {dtype}, which safetensors has no name for; cast it")
        header[name] = {"dtype": _NAMES[dtype], "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
        checksum = zlib.crc32(_bytes(array), checksum)
    header = {"__metadata__": {"format": "treadle", "crc32": f"{checksum:08x}", **(metadata or {})}, **header}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for array in arrays.values():
                    file.write(_bytes(array))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error


def read_safetensors(path: Any) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and metadata of a safetensors file; arrays are read-only views of its bytes.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or holds a dtype unknown here.
    """
    path = Path(path)
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        arrays, metadata = _parse(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error
    return arrays, metadata


def _parse(data: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    length = int.from_bytes(data[:8].tobytes(), "little")
    if data.size < 8 or not 2 <= length <= min(_HEADER_LIMIT, data.size - 8):
        raise CheckpointError("damaged or no safetensors file: its header does not fit into the file (cut short?)")
    header = json.loads(data[8:8 + length].tobytes())
    metadata = header.pop("__metadata__", {})
    body = data[8 + length:]
    arrays, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
        if dtype is None:
            raise CheckpointError(f"{name} has the dtype {entry['dtype']}, which is not supported")
        count = int(np.prod(shape, dtype=np.int64))
        if start != end or min(shape, default=0) < 0 or stop - start != count * dtype.itemsize or stop > body.size:
            raise CheckpointError(f"damaged: the place of {name} does not fit its shape {shape} or the file's size")
        array = np.frombuffer(body[start:stop].tobytes(), dtype.np).reshape(shape)
        arrays[name], end = array, stop
    if end != body.size:
        raise CheckpointError("damaged: there are bytes after the last tensor")
    if "crc32" in metadata and f"{zlib.crc32(body.data):08x}" != metadata["crc32"]:
        raise CheckpointError("damaged: the checksum of the data does not match; use another copy")
    return arrays, metadata
