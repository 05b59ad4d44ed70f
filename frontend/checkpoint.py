"""Checkpoints: model, optimizer, random state and step in one safetensors file.

The model's tensors stand under their own dotted names, so that any reader of safetensors can take the weights; the
rest stands under names that begin with `treadle/`. A file is written beside its place and moved there when it is whole;
a checksum over the data is kept in the header, so damage is found when reading. Nothing is pickled.

The ranks of a mesh write a folder that holds the same names in pieces (`parallel_checkpoint.py`); either is read here,
and either is loaded by a mesh (`stored.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..ir.errors import CheckpointError
from . import random
from .safetensors import write_safetensors
from .stored import OPTIMIZER, PREFIX, RNG, Stored, notes_of
from .tensor import Tensor


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
        arrays |= {f"{OPTIMIZER}{name}": _array(t) for name, t in optimizer.state_dict().items()}
    arrays[RNG] = random.default_generator().state.numpy()
    write_safetensors(path, arrays, notes_of(metadata, step=None if step is None else int(step)))


def load_checkpoint(path: Any, model: Any, optimizer: Any = None, strict: bool = True) -> Checkpoint:
    """Restores a model, an optimizer if given, and the random state from a file, in place.

    Args:
        path: a file by `save_checkpoint`, a folder that the ranks of a mesh wrote, or any safetensors file with the
            model's names.
        model: an `nn.Module`.
        optimizer: restored if given.
        strict: complain about names of the model that are missing on either side.

    Raises:
        CheckpointError: the file is missing, damaged, or does not fit the model or optimizer; the message names the
            file and, for shapes, both.
    """
    stored = Stored(path)
    stored.verify()
    own = {n: stored.array(n) for n in stored.shapes if not n.startswith(PREFIX)}
    moments = {n[len(OPTIMIZER):]: stored.array(n) for n in stored.shapes if n.startswith(OPTIMIZER)}
    if optimizer is not None and not moments:
        raise CheckpointError(f"{path} holds no optimizer state; it was saved without one")
    try:
        model.load_state_dict(own, strict=strict)
        if optimizer is not None:
            optimizer.load_state_dict(moments)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}") from None
    if RNG in stored.shapes:
        random.default_generator().state.assign(stored.array(RNG))
    step = stored.notes.get("step")
    return Checkpoint(int(step) if step is not None else None, stored.metadata)


def _array(x: Any) -> np.ndarray:
    array = x.numpy(copy=False) if isinstance(x, Tensor) else np.asarray(x)
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)
