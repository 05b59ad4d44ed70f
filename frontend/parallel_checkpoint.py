"""Checkpoints of a training step on a mesh, in global coordinates.

A checkpoint is a folder. Every rank writes the parts that it has, each under the tensor's name and the place of the
part in the whole tensor; of equal parts on several ranks one is written. So a checkpoint says nothing of the mesh
that wrote it: a rank of any other mesh, or one process, looks up the pieces that overlap its own parts. The files have
new names each time, and rank 0 publishes them by replacing the index that names them, once all are on the disk:
whoever is killed in between leaves the checkpoint that was there before. What fails on one rank fails on all.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..distributed import Sharding
from ..distributed.errors import DistributedError
from ..ir.errors import ArgumentsError, CheckpointError
from ..ir.location import user_location
from ..ir.types import TensorType
from . import random
from .parallel import ParallelStep
from .pending import Elsewhere, Pending
from .safetensors import sync_folder, write_safetensors
from .stored import (
    INDEX,
    OPTIMIZER,
    PREFIX,
    RNG,
    VERSION,
    Place,
    Stored,
    newest,
    notes_of,
    place_text,
    read_index,
)
from .tensor import Tensor

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Held:
    """A tensor as this rank has it: its part if it has one, the pieces of that, and whether this rank writes it.

    A piece is where it lies in the part, and where in the whole tensor.
    """

    tensor: Tensor
    part: np.ndarray | None
    pieces: list[tuple[Place, Place]]
    writes: bool


@dataclass(frozen=True)
class _Loaded:
    """Elements that a checkpoint has: of a parameter that nobody has looked at yet, a rank reads its part alone."""

    type: TensorType
    stored: Stored
    name: str

    def part(self, place: Place) -> np.ndarray:
        """The elements of a part."""
        into = np.empty([s.stop - s.start for s in place], self.type.dtype.np)
        self.stored.read(self.name, place, into)
        return into


def _tensors(step: ParallelStep) -> Iterator[tuple[str, Tensor]]:
    """Everything that a step changes, by name; what is shared comes under each of its names."""
    model = step.inner.model
    named = model.named_state() if hasattr(model, "named_state") else getattr(model, "items", lambda: ())()
    for name, tensor in named:
        if name.startswith(PREFIX):
            raise CheckpointError(f"the name {name!r} is reserved; rename the tensor")
        yield name, tensor
    for i, slots in enumerate(step.inner.opt.state):
        for slot, tensor in slots.items():
            yield f"{OPTIMIZER}{i}.{slot}", tensor
    yield RNG, random.default_generator().state


def _held(step: ParallelStep, tensor: Tensor) -> _Held:
    here = step.mesh.coordinates(step.rank)
    if id(tensor) in step.parts:
        _, sharding, part = step.parts[id(tensor)]
    else:
        sharding, part = Sharding.whole(tensor.ndim), None
    writes = step.holds(tensor) and all(
        here[a] == 0 for a in step.mesh.names if a not in sharding.split_axes and a != step.stage_axis)
    return _Held(tensor, part, list(sharding.pieces(step.mesh, step.rank, tensor.shape)), writes)


def _agreed(step: ParallelStep, action: Callable[[], Result]) -> Result:
    """What the action gives; if it raises on one rank, it raises on all of them.

    Raises:
        CheckpointError: as the action. DistributedError: another rank is gone.
    """
    result, problem = None, ""
    try:
        result = action()
    except CheckpointError as error:
        if step.job is None:
            raise
        problem = error.message
    if step.job is not None:
        for rank, told in enumerate(step.job.gather_all(problem)):
            if told:
                raise CheckpointError(told if rank == step.rank else f"{told} (found by rank {rank})")
    return result  # type: ignore[return-value]


@contextlib.contextmanager
def _named(step: ParallelStep, what: str) -> Iterator[None]:
    """While it lasts, errors of other ranks say that this one was doing it."""
    if step.job is None:
        yield
        return
    step.job.watch.enter(what)
    yield
    step.job.watch.leave()


def save(path: Any, step: ParallelStep, metadata: Mapping[str, str] | None = None, data: Any = None) -> None:
    """Writes model, optimizer, random state and step count to a folder; called by every rank.

    Args:
        metadata: strings for the caller.
        data: what feeds the step, by its `state_dict()`: the position in the data (`td.finetune.Cursor`).

    Raises:
        CheckpointError: the folder cannot be written. DistributedError: another rank failed.
        ArgumentsError: `data` has no `state_dict()`, or JSON cannot hold it.
    """
    step.settle()
    folder, job = Path(path), step.job
    notes = notes_of(metadata, step=step.inner.opt.steps, mesh=step.mesh,
                     data=None if data is None else _position(data))
    with _named(step, f"save {folder.name}"):
        token = secrets.token_hex(6)
        token = job.gather_all(token)[0] if job is not None else token
        own = folder / f"part-{token}-{step.rank:05}.safetensors"
        pieces, index = _pieces(step)
        try:
            _agreed(step, lambda: _write(own, pieces))
            index |= {"files": [f"part-{token}-{r:05}.safetensors" for r in range(step.mesh.size)], "notes": notes}
            _agreed(step, lambda: _publish(folder, index) if step.rank == 0 else None)
        except BaseException as error:
            _clear(folder, token, step.rank, error)
            raise


def _position(data: Any) -> str:
    """The position in the data, as text.

    Raises:
        ArgumentsError: it has no `state_dict()` and `load_state_dict()`, or JSON cannot hold what that gives.
    """
    if not hasattr(data, "state_dict") or not hasattr(data, "load_state_dict"):
        raise ArgumentsError(f"data is a {type(data).__name__}; expected something with state_dict() and "
                             "load_state_dict(), such as td.finetune.Cursor", user_location())
    try:
        text = json.dumps(data.state_dict())
    except (TypeError, ValueError) as error:
        raise ArgumentsError(f"the state_dict() of data, a {type(data).__name__}, holds what JSON cannot: {error}; "
                             "give numbers, strings, lists and dicts", user_location()) from error
    return text


def _pieces(step: ParallelStep) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What this rank writes, and what the index says of the tensors."""
    opt = step.inner.opt
    numbers = {f"{OPTIMIZER}steps": np.asarray(opt.steps, np.int64),
               f"{OPTIMIZER}skipped": np.asarray(opt.skipped, np.int64)}
    pieces: dict[str, np.ndarray] = {}
    shapes = {name: list(array.shape) for name, array in numbers.items()}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in _tensors(step):
        if first.setdefault(id(tensor), name) != name:
            aliases[name] = first[id(tensor)]
            continue
        held = _held(step, tensor)
        shapes[name] = list(tensor.shape)
        if held.writes:
            part = tensor.numpy(copy=False) if held.part is None else held.part
            for own, place in held.pieces:
                pieces[f"{name}|{place_text(place)}"] = np.ascontiguousarray(part[own])
    if step.rank == 0:
        pieces |= {f"{name}|{place_text(tuple(slice(0, n) for n in a.shape))}": a for name, a in numbers.items()}
    return pieces, {"version": VERSION, "shapes": shapes, "aliases": aliases}


def _write(path: Path, pieces: Mapping[str, np.ndarray]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path.parent} cannot be written: {error.strerror or error}") from error
    write_safetensors(path, pieces)


def _publish(folder: Path, index: Mapping[str, Any]) -> None:
    if absent := [name for name in index["files"] if not (folder / name).exists()]:
        raise CheckpointError(f"{folder}: rank 0 does not see {absent[0]}, which another rank wrote: the folder has to "
                              "lie on a file system that all hosts share")
    temporary = folder / f".{INDEX}-{secrets.token_hex(6)}"
    try:
        with open(temporary, "w") as file:
            json.dump(index, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / INDEX)
        sync_folder(folder)
        _sweep(folder, set(index["files"]))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error


def _clear(folder: Path, token: str, rank: int, error: BaseException) -> None:
    """Removes what a save that failed has written, unless it may have been published meanwhile.

    Only rank 0 knows that; so it clears, and the others do if they know that rank 0 is dead, or (a `CheckpointError`
    is one of all ranks) that there is nothing more to come.
    """
    decided = rank == 0 or isinstance(error, CheckpointError) or (isinstance(error, DistributedError) and
                                                                  error.gone == 0)
    with contextlib.suppress(OSError, CheckpointError):
        published = (folder / INDEX).exists() and any(token in name for name in read_index(folder)["files"])
        for file in folder.glob(f"*{token}*") if decided and not published else ():
            file.unlink(missing_ok=True)


def _sweep(folder: Path, keep: set[str]) -> None:
    """Removes the files of the checkpoint before, and what killed jobs left."""
    for pattern in ("part-*", ".part-*", f".{INDEX}-*"):
        for file in folder.glob(pattern):
            if file.name not in keep:
                with contextlib.suppress(OSError):
                    file.unlink()


def load(path: Any, step: ParallelStep, data: Any = None) -> dict[str, str]:
    """Restores in place what any mesh, or `td.save_checkpoint`, wrote; gives its metadata. Called by every rank.

    A rank reads the pieces of files that it keeps; checksums are verified by all ranks together, each file by one.
    Nothing is changed before everything was found to fit.

    Args:
        data: what feeds the step; its `load_state_dict` gets what `save` was given.

    Raises:
        CheckpointError: it is missing, damaged or incomplete, or does not fit the model, on any rank.
    """
    step.settle()
    if data is not None:
        _position(data)  # that it has one
    with _named(step, f"load {Path(path).name}"):
        targets: dict[str, _Held] = {}
        seen: set[int] = set()
        for name, tensor in _tensors(step):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                targets[name] = _held(step, tensor)
        stored = _agreed(step, lambda: _fitting(path, step, targets, data))
        if data is not None:
            _agreed(step, lambda: data.load_state_dict(json.loads(stored.notes["data"])))
        for name, held in targets.items():
            for own, place in held.pieces:
                if held.part is not None:
                    stored.read(name, place, held.part[own] if own else held.part)
                else:
                    _restore(held.tensor, _Loaded(held.tensor.type, stored, name), place)
        opt = step.inner.opt
        opt.steps = int(stored.array(f"{OPTIMIZER}steps"))
        opt.skipped = [int(n) for n in stored.array(f"{OPTIMIZER}skipped")]
    return stored.metadata


def _restore(tensor: Tensor, source: _Loaded, place: Place) -> None:
    """A tensor that this rank does not have in parts: at once if it has elements, else when they are asked for."""
    value = tensor._value
    if not isinstance(value, Pending) or not value.waiting:
        tensor.assign(source.part(place))
    elif not isinstance(value.source, Elsewhere):
        value.source = source


def _fitting(path: Any, step: ParallelStep, targets: Mapping[str, _Held], data: Any) -> Stored:
    """The opened checkpoint, after everything that can be wrong with it was looked for."""
    stored = Stored(path)
    if f"{OPTIMIZER}steps" not in stored.shapes:
        raise CheckpointError(f"{path} holds no optimizer state; it was saved without one")
    if data is not None and "data" not in stored.notes:
        raise CheckpointError(f"{path} holds no position in the data; it was saved without `data`")
    own = {f"{OPTIMIZER}steps", f"{OPTIMIZER}skipped", *stored.aliases, *(name for name, _ in _tensors(step))}
    if left := sorted(set(stored.shapes) - own):
        raise CheckpointError(f"{path} has {', '.join(left[:4])}, which the model and its optimizer have not")
    for name, held in targets.items():
        if stored.shapes.get(name) != tuple(held.tensor.shape):
            there = list(stored.shapes[name]) if name in stored.shapes else "nothing"
            raise CheckpointError(f"{path} has {there} for {name}, the model {list(held.tensor.shape)}")
        for _, place in held.pieces:
            stored.pieces(name, place)
    stored.verify(step.rank, step.mesh.size)
    return stored


def resume(folder: Any, step: ParallelStep, data: Any = None) -> dict[str, str] | None:
    """Loads the checkpoint that was published last, `folder` itself or one in it; None if there is none yet.

    Called by every rank; rank 0 looks, so that all load the same.
    """
    found = newest(folder) if step.rank == 0 else None
    text = str(found.relative_to(folder)) if found is not None else None
    text = step.job.gather_all(text)[0] if step.job is not None else text
    return None if text is None else load(Path(folder) / text, step, data)
