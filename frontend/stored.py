"""An open checkpoint: one file of a process, or a folder into which the ranks of a mesh wrote their parts.

Both hold the same names: the model's tensors under their own, the rest under `treadle/` (see `checkpoint.py`). In a
folder a tensor lies in pieces, each under its name and its place in the whole tensor, `weight|0:4,0:8`; a file is one
piece of everything. `index.json` names the files that belong to the checkpoint, so that replacing this one file
publishes a new checkpoint, and whoever is killed before that leaves the old one.

Only headers are read when a checkpoint is opened, and what is asked for later: a rank reads its part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..ir.errors import CheckpointError
from .safetensors import SafetensorsFile

INDEX, VERSION = "index.json", 2
PREFIX = "treadle/"
OPTIMIZER, RNG = f"{PREFIX}optimizer/", f"{PREFIX}rng"
USER = "user."  # before the keys of the caller's own strings among the notes

Place = tuple[slice, ...]


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor: under which key of which file, and where it lies in the whole."""

    file: SafetensorsFile
    key: str
    place: Place


class Stored:
    """A checkpoint whose headers were read.

    Attributes:
        path: as given.
        shapes: of every tensor, whole; a folder's second names of shared tensors included.
        notes: strings: `step`, `data`, and the caller's own under `user.`.

    Raises:
        CheckpointError: it is missing, damaged or of another version.
    """

    def __init__(self, path: Any):
        self.path = Path(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.aliases: dict[str, str] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        if self.path.is_dir():
            self._open_folder()
            return
        file = SafetensorsFile(self.path)
        self.files, self.notes = [file], file.metadata
        for name, entry in file.entries.items():
            self.shapes[name] = entry.shape
            self._pieces[name] = [_Piece(file, name, whole(entry.shape))]

    def _open_folder(self) -> None:
        index = read_index(self.path)
        try:
            self.notes, self.aliases = dict(index["notes"]), dict(index["aliases"])
            self.shapes = {name: tuple(shape) for name, shape in index["shapes"].items()}
            self.shapes |= {name: self.shapes[first] for name, first in self.aliases.items()}
            names = [str(name) for name in index["files"]]
            if any(Path(name).name != name for name in names):
                raise ValueError("a file of it lies elsewhere")
            self.files = [SafetensorsFile(self.path / name) for name in names]
            for file in self.files:
                for key in file.entries:
                    name, _, text = key.rpartition("|")
                    place = tuple(slice(*map(int, part.split(":"))) for part in text.split(",") if part)
                    self._pieces.setdefault(name, []).append(_Piece(file, key, place))
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.path}: its {INDEX} is damaged: {error}") from error

    def verify(self, share: int = 0, shares: int = 1) -> None:
        """Checks the checksum of every file, or of every `shares`-th: ranks divide the work.

        Raises:
            CheckpointError: one does not match.
        """
        for file in self.files[share::shares]:
            file.verify()

    def pieces(self, name: str, place: Place) -> list[tuple[_Piece, Place, Place]]:
        """What of a tensor lies in a place: (piece, where in the piece, where in the place).

        Raises:
            CheckpointError: the pieces do not cover it.
        """
        found, count = [], 0
        for piece in self._pieces.get(self.aliases.get(name, name), ()):
            overlap = _overlap(piece.place, place)
            if overlap is not None:
                found.append((piece, *overlap))
                count += size(overlap[0])
        if count != size(place):
            raise CheckpointError(f"{self.path} is incomplete: elements of {name} are missing")
        return found

    def read(self, name: str, place: Place, into: np.ndarray) -> None:
        """Fills an array with what lies in a place of a tensor, cast to the array's dtype."""
        for piece, source, target in self.pieces(name, place):
            into[target] = piece.file.array(piece.key)[source]

    def array(self, name: str) -> np.ndarray:
        """A whole tensor."""
        found = self._pieces.get(self.aliases.get(name, name))
        if not found:
            raise CheckpointError(f"{self.path} is incomplete: {name} is missing")
        into = np.empty(self.shapes[name], found[0].file.entries[found[0].key].dtype.np)
        self.read(name, whole(into.shape), into)
        return into

    @property
    def metadata(self) -> dict[str, str]:
        """The caller's own strings."""
        return {k[len(USER):]: v for k, v in self.notes.items() if k.startswith(USER)}


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder.

    Raises:
        CheckpointError: the folder is no checkpoint, or one of another version.
    """
    try:
        index = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no checkpoint: {error}") from error
    if not isinstance(index, dict) or index.get("version") != VERSION:
        raise CheckpointError(f"{folder}: its {INDEX} is damaged, or of another version than {VERSION}")
    return index


def newest(folder: Any) -> Path | None:
    """The checkpoint that was published last: the folder or file itself, or one directly in the folder.

    What a killed job left half-written is no checkpoint and is passed over. None: there is none.
    """
    folder = Path(folder)
    if folder.is_file() or (folder / INDEX).is_file():
        return folder
    found = [p for p in folder.iterdir() if not p.name.startswith(".")] if folder.is_dir() else []
    dated = [(_published(p), p) for p in found if p.suffix == ".safetensors" or (p / INDEX).is_file()]
    return max(dated)[1] if dated else None


def _published(path: Path) -> float:
    return (path / INDEX if path.is_dir() else path).stat().st_mtime_ns


def notes_of(metadata: Mapping[str, str] | None, **more: Any) -> dict[str, str]:
    """The notes of a checkpoint: the caller's strings, and ours where they are not None."""
    notes = {f"{USER}{k}": str(v) for k, v in (metadata or {}).items()}
    return notes | {k: str(v) for k, v in more.items() if v is not None}


def whole(shape: tuple[int, ...]) -> Place:
    """The place of all of a tensor."""
    return tuple(slice(0, n) for n in shape)


def size(place: Place) -> int:
    """How many elements a place has."""
    count = 1
    for s in place:
        count *= s.stop - s.start
    return count


def place_text(place: Place) -> str:
    """`0:4,0:8`."""
    return ",".join(f"{s.start}:{s.stop}" for s in place)


def _overlap(source: Place, target: Place) -> tuple[Place, Place] | None:
    """Where two parts of a tensor overlap, as places in the one and in the other; None: nowhere."""
    reads, writes = [], []
    for a, b in zip(source, target, strict=True):
        low, high = max(a.start, b.start), min(a.stop, b.stop)
        if low >= high:
            return None
        reads.append(slice(low - a.start, high - a.start))
        writes.append(slice(low - b.start, high - b.start))
    return tuple(reads), tuple(writes)
