"""Files of named arrays in the safetensors format, which is little: eight bytes with the length of a JSON header, the
header (name -> dtype, shape, where), the data (https://github.com/huggingface/safetensors, "Format").

It is written and read here directly, tensor by tensor, so that a checkpoint never doubles in memory, every dtype of
ml_dtypes passes, and a rank of a mesh reads of a file no more than what it needs. A file is written beside its place
and moved there when it is whole; a checksum over the data is kept in the header.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..ir.dtypes import DType, as_dtype
from ..ir.errors import CheckpointError

_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
          "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64",
          "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL"}
_DTYPES: dict[str, DType] = {name: as_dtype(dtype) for dtype, name in _NAMES.items()}
_HEADER_LIMIT = 100 << 20
_CHUNK = 4 << 20  # bytes that a checksum looks at in one go


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
            sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Puts the names in a folder onto the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@dataclass(frozen=True)
class Entry:
    """One array of a file: its type and the bytes where it lies."""

    dtype: DType
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """The header of a file; the arrays are read when they are asked for.

    Attributes:
        entries: name -> what and where; metadata: the strings of the header.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or holds a dtype unknown here.
    """

    def __init__(self, path: Any):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or not 2 <= length <= min(_HEADER_LIMIT, size - 8):
                    raise CheckpointError("damaged or no safetensors file: its header does not fit into the file "
                                          "(cut short?)")
                header = json.loads(file.read(length))
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self.begin, self.end = 8 + length, size
            self.entries = self._entries(header)
            # Mapped once: what is asked for later is there even if the file has been replaced.
            self._data = np.memmap(self.path, np.uint8, "r")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error.message}") from None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error

    def _entries(self, header: Mapping[str, Any]) -> dict[str, Entry]:
        entries, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
            if dtype is None:
                raise CheckpointError(f"{name} has the dtype {entry['dtype']}, which is not supported")
            expected = math.prod(shape) * dtype.itemsize
            if start != end or min(shape, default=0) < 0 or stop - start != expected or self.begin + stop > self.end:
                raise CheckpointError(f"damaged: the place of {name} does not fit its shape {shape} or the file's size")
            entries[name], end = Entry(dtype, shape, self.begin + start, self.begin + stop), stop
        if self.begin + end != self.end:
            raise CheckpointError("damaged: there are bytes after the last tensor")
        return entries

    def array(self, name: str) -> np.ndarray:
        """An array, read-only and not yet read: the system fetches the pages that are looked at."""
        entry = self.entries[name]
        if entry.start == entry.stop:
            return np.empty(entry.shape, entry.dtype.np)
        return np.asarray(self._data)[entry.start:entry.stop].view(entry.dtype.np).reshape(entry.shape)

    def verify(self) -> None:
        """Compares the data with the checksum in the header, if there is one; holds a chunk at a time.

        Raises:
            CheckpointError: they differ.
        """
        if "crc32" not in self.metadata:
            return
        checksum = 0
        for start in range(self.begin, self.end, _CHUNK):
            checksum = zlib.crc32(self._data[start:start + _CHUNK].data, checksum)
        if f"{checksum:08x}" != self.metadata["crc32"]:
            raise CheckpointError(f"{self.path}: damaged: the checksum of the data does not match; use another copy")


def read_safetensors(path: Any) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and metadata of a safetensors file, all read and checked.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or holds a dtype unknown here.
    """
    file = SafetensorsFile(path)
    file.verify()
    return {name: np.array(file.array(name)) for name in file.entries}, file.metadata
