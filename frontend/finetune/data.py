"""Batches in an order that a resumed run finds again: it follows from the seed and the epoch alone.

Anything with the two methods of `Batches` serves as training data; `Arrays` holds everything in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ...ir.errors import ArgumentsError, CheckpointError


@runtime_checkable
class Batches(Protocol):
    """Training data."""

    def __len__(self) -> int:
        """Batches of an epoch."""

    def batch(self, epoch: int, index: int) -> tuple[Any, ...]:
        """The batch of this number, inputs first and the target last; always the same for the same numbers."""


class Arrays:
    """Arrays whose first axis is the example: inputs, then the target.

    Args:
        *columns: arrays (or tensors) of equal length.
        batch_size: examples of a batch.
        shuffle: whether each epoch has an order of its own.
        seed: of the orders.
        drop_last: leave out an incomplete batch, so that every batch has one shape; otherwise it is kept.
        augment: `augment(rng, *columns of a batch) -> columns`, applied to each training batch; `rng` follows from
            seed, epoch and index.

    Raises:
        ArgumentsError: columns of different lengths, or none.
    """

    def __init__(self, *columns: Any, batch_size: int = 32, shuffle: bool = True, seed: int = 0,
                 drop_last: bool = True, augment: Any = None):
        self.columns = tuple(np.asarray(c) for c in columns)
        lengths = {len(c) for c in self.columns if c.ndim}
        if len(lengths) != 1 or not all(c.ndim for c in self.columns):
            raise ArgumentsError("Arrays takes columns of one length, got shapes "
                                 f"{[c.shape for c in self.columns]}")
        (self.examples,) = lengths
        if batch_size < 1 or self.examples < 1 or (drop_last and self.examples < batch_size):
            raise ArgumentsError(f"Arrays: {self.examples} examples do not make a batch of {batch_size}")
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.drop_last, self.augment = drop_last, augment
        self._order: tuple[int, np.ndarray] = (-1, np.arange(self.examples))

    def __len__(self) -> int:
        whole, rest = divmod(self.examples, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def order(self, epoch: int) -> np.ndarray:
        """The order of the examples in an epoch."""
        if not self.shuffle:
            return np.arange(self.examples)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.examples))
        return self._order[1]

    def batch(self, epoch: int, index: int) -> tuple[Any, ...]:
        """Inputs and target of the batch; the last axis order is that of the arrays."""
        rows = self.order(epoch)[index * self.batch_size:(index + 1) * self.batch_size]
        batch = tuple(c[rows] for c in self.columns)
        if self.augment is not None:
            batch = tuple(self.augment(np.random.default_rng([self.seed, epoch, index, 1]), *batch))
        return batch


class Cursor:
    """The batches of some data one after the other, from a position that a checkpoint can carry.

        cursor = td.finetune.Cursor(td.finetune.Arrays(x, y, batch_size=32), epochs=3)
        step.resume("run", data=cursor)
        for x, y in cursor:
            step(x, y)
            step.save("run", data=cursor)       # resumes with the batch after this one

    Args:
        data: the batches.
        epochs: after so many it ends; None: it does not.
    """

    def __init__(self, data: Batches, epochs: int | None = None):
        self.data, self.epochs = data, epochs
        self.epoch = self.index = 0

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        while self.epochs is None or self.epoch < self.epochs:
            batch = self.data.batch(self.epoch, self.index)
            self.index += 1
            if self.index >= len(self.data):
                self.epoch, self.index = self.epoch + 1, 0
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The position: epoch and index of the next batch."""
        return {"epoch": self.epoch, "index": self.index, "batches": len(self.data)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes to a position.

        Raises:
            CheckpointError: it is one in other data.
        """
        if state.get("batches") != len(self.data):
            raise CheckpointError(f"the position is in data of {state.get('batches')} batches an epoch; this data has "
                                  f"{len(self.data)}")
        self.epoch, self.index = int(state["epoch"]), int(state["index"])


def as_batches(data: Any, batch_size: int, seed: int) -> Batches:
    """Training data from what a user gives: `Batches`, or a tuple or mapping of arrays."""
    if isinstance(data, Batches):
        return data
    columns = list(data.values()) if isinstance(data, Mapping) else data
    if not isinstance(columns, Sequence) or len(columns) < 2:
        raise ArgumentsError(f"data is (inputs..., target) as arrays, or has batch(epoch, index), got {type(data)}")
    return Arrays(*columns, batch_size=batch_size, seed=seed)


def whole_batches(data: Any, batch_size: int) -> Any:
    """Yields (columns padded to `batch_size` rows by the last one, how many rows are real), in order."""
    if isinstance(data, Arrays):
        columns: Sequence[Any] = data.columns
    elif isinstance(data, Batches):
        for index in range(len(data)):
            batch = data.batch(0, index)
            yield batch, len(batch[-1])
        return
    else:
        columns = [np.asarray(c) for c in (data.values() if isinstance(data, Mapping) else data)]
    count = len(columns[-1])
    for start in range(0, count, batch_size):
        part = [c[start:start + batch_size] for c in columns]
        real = len(part[-1])
        if real < batch_size:
            part = [np.concatenate([c, np.repeat(c[-1:], batch_size - real, axis=0)]) for c in part]
        yield tuple(part), real
