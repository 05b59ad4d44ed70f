"""Checkpoints of a training step on a mesh, in global coordinates.

A checkpoint is a folder. Every rank writes the parts that it has, each under the tensor's name and the place of the
part in the whole tensor; of equal parts on several ranks one is written. So a checkpoint says nothing of the mesh
that wrote it: a rank of any other mesh looks up the pieces that overlap its own parts. The folder is written beside
its place and renamed when every rank is done.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..distributed import Sharding
from ..ir.errors import CheckpointError
from . import random
from .checkpoint import read_safetensors, write_safetensors
from .parallel import ParallelStep
from .tensor import Tensor

INDEX, VERSION = "index.json", 1


@dataclass(frozen=True)
class _Held:
    """A tensor as this rank has it: its part, and whether this rank is the one that writes it."""

    tensor: Tensor
    part: np.ndarray
    place: tuple[slice, ...]
    writes: bool
    own: bool


def _tensors(step: ParallelStep) -> Iterator[tuple[str, Tensor]]:
    """Everything that a step changes, by name."""
    model = step.inner.model
    yield from model.named_parameters()
    yield from model.named_buffers()
    for i, (p, slots) in enumerate(zip(step.inner.opt.params, step.inner.opt.state)):
        for name, tensor in slots.items():
            yield f"treadle/optimizer/{step.names.get(id(p), i)}/{name}", tensor
    yield "treadle/rng", random.default_generator().state


def _held(step: ParallelStep, tensor: Tensor) -> _Held:
    here = step.mesh.coordinates(step.rank)
    own = step.holds(tensor)
    if id(tensor) in step.parts:
        _, sharding, part = step.parts[id(tensor)]
    else:
        sharding, part = Sharding.whole(tensor.ndim), tensor.numpy(copy=False)
    writes = own and all(here[a] == 0 for a in step.mesh.names if a not in sharding.dims and a != step.stage_axis)
    return _Held(tensor, part, sharding.part(step.mesh, step.rank, tensor.shape), writes, own)


def save(path: Any, step: ParallelStep, metadata: Mapping[str, str] | None = None) -> None:
    """Writes model, optimizer, random state and step count to a folder; called by every rank.

    Args:
        metadata: strings for the caller: the position in the data, the epoch...

    Raises:
        CheckpointError: the folder cannot be written. DistributedError: another rank failed.
    """
    path, job = Path(path), step.job
    token = secrets.token_hex(6) if step.rank == 0 else ""
    token = job.gather_all(token)[0] if job is not None else token
    temporary = path.with_name(f".{path.name}-{token}")
    pieces: dict[str, np.ndarray] = {}
    shapes = {}
    for name, tensor in _tensors(step):
        held = _held(step, tensor)
        shapes[name] = list(tensor.shape)
        if held.writes:
            pieces[f"{name}|{_place_text(held.place)}"] = np.ascontiguousarray(held.part)
    try:
        temporary.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
    write_safetensors(temporary / f"part-{step.rank:05}.safetensors", pieces)
    if job is not None:
        job.barrier()
    if step.rank == 0:
        index = {"version": VERSION, "mesh": dict(step.mesh.axes), "parts": step.mesh.size, "shapes": shapes,
                 "steps": step.inner.opt.steps, "skipped": list(step.inner.opt.skipped),
                 "metadata": dict(metadata or {})}
        _publish(temporary, path, index)
    if job is not None:
        job.barrier()


def _publish(temporary: Path, path: Path, index: Mapping[str, Any]) -> None:
    try:
        with open(temporary / INDEX, "w") as file:
            json.dump(index, file)
            file.flush()
            os.fsync(file.fileno())
        old = path.with_name(f".{path.name}-old-{secrets.token_hex(6)}")
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error


def load(path: Any, step: ParallelStep) -> dict[str, str]:
    """Restores what `save` wrote, at any mesh, in place; gives its metadata. Called by every rank.

    Raises:
        CheckpointError: the folder is missing, damaged or incomplete, or does not fit the model; it is named.
    """
    path = Path(path)
    index = _read_index(path)
    targets = {name: _held(step, tensor) for name, tensor in _tensors(step)}
    for name, held in targets.items():
        if name not in index["shapes"] or index["shapes"][name] != list(held.tensor.shape):
            raise CheckpointError(f"{path} has {index['shapes'].get(name, 'nothing')} for {name}, the model "
                                  f"{list(held.tensor.shape)}")
    filled = {name: np.empty(held.part.shape, held.part.dtype) for name, held in targets.items()}
    missing = {name: array.size for name, array in filled.items()}
    for number in range(index["parts"]):
        arrays, _ = read_safetensors(path / f"part-{number:05}.safetensors")
        for key, array in arrays.items():
            name, _, text = key.rpartition("|")
            if name in targets:
                missing[name] -= _copy(array, _place(text), filled[name], targets[name].place)
    if lacking := [name for name, count in missing.items() if count]:
        raise CheckpointError(f"{path} is incomplete: elements of {', '.join(lacking[:4])} are missing")
    for name, held in targets.items():
        if id(held.tensor) in step.parts:
            held.part[...] = filled[name]
        else:
            held.tensor.assign(filled[name])
    step.inner.opt.steps = int(index["steps"])
    step.inner.opt.skipped = list(index["skipped"])
    found: dict[str, str] = index["metadata"]
    return found


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads((path / INDEX).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no checkpoint of a mesh: {error}") from error
    if not isinstance(index, dict) or index.get("version") != VERSION:
        raise CheckpointError(f"{path}: its {INDEX} is damaged, or of another version than {VERSION}")
    return index


def _place_text(place: tuple[slice, ...]) -> str:
    return ",".join(f"{s.start}:{s.stop}" for s in place)


def _place(text: str) -> tuple[slice, ...]:
    return tuple(slice(*map(int, part.split(":"))) for part in text.split(",") if part)


def _copy(source: np.ndarray, source_place: tuple[slice, ...], target: np.ndarray,
          target_place: tuple[slice, ...]) -> int:
    """Copies where two parts of a tensor overlap; gives the number of elements."""
    reads, writes, count = [], [], 1
    for a, b in zip(source_place, target_place, strict=True):
        low, high = max(a.start, b.start), min(a.stop, b.stop)
        if low >= high:
            return 0
        reads.append(slice(low - a.start, high - a.start))
        writes.append(slice(low - b.start, high - b.start))
        count *= high - low
    target[tuple(writes)] = source[tuple(reads)]
    return count
