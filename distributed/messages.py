"""What the devices of a pipeline hand each other.

A send never waits: its array is kept until the message has gone. A receive is posted before the task that comes before
the one that reads it, into memory that is used again, so a message travels while both devices compute. On one host MPI
copies straight from the sender's memory when the receiver asks, so a sender that computes is not needed; over a network
both sides have to call MPI meanwhile, which a thread does (`progress.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..ir.types import TensorType
from .buffers import as_bytes

Key = tuple[Any, ...]


class Buffers:
    """Arrays that are lent and come back; once every kind is there as often as it is needed, nothing is allocated."""

    def __init__(self) -> None:
        self.free: dict[tuple[Any, ...], list[np.ndarray]] = {}
        self.made = 0

    def lend(self, type: TensorType) -> np.ndarray:
        """An array of a type, with any contents."""
        free = self.free.get((type.shape, type.dtype.np))
        if free:
            return free.pop()
        self.made += 1
        return np.empty(type.shape, type.dtype.np)

    def back(self, array: np.ndarray) -> None:
        """The array is free again."""
        self.free.setdefault((array.shape, array.dtype), []).append(array)


class Messages:
    """This device's messages along the pipeline's axis.

    Args:
        group: its communicator; watch: who waits for requests; apart: whether other devices are on other hosts.
    """

    def __init__(self, group: Any, watch: Any, apart: bool = False):
        self.group, self.watch, self.buffers = group, watch, Buffers()
        self.sent: list[tuple[Any, np.ndarray]] = []
        self.posted: dict[Key, list[tuple[Any, np.ndarray]]] = {}
        self.begun = watch.moves(lambda: bool(self.sent or self.posted)) if apart else lambda: None

    def send(self, arrays: Sequence[np.ndarray], device: int, tag: int) -> None:
        """Starts sending; the arrays must not change before the messages have gone, which holding them sees to."""
        self.sent = [(request, array) for request, array in self.sent if not request.Test()]
        for i, array in enumerate(arrays):
            data = as_bytes(array)
            self.sent.append((self.group.Isend(data, device, tag + i), data))
        self.begun()

    def post(self, key: Key, types: Sequence[TensorType], device: int, tag: int) -> None:
        """Gets ready to receive; `take` gives the arrays. Posting again does nothing."""
        if key not in self.posted:
            into = [self.buffers.lend(t) for t in types]
            self.posted[key] = [(self.group.Irecv(a.reshape(-1).view(np.uint8), device, tag + i), a)
                                for i, a in enumerate(into)]
            self.begun()

    def take(self, key: Key, label: str) -> list[np.ndarray]:
        """What was received; it goes back to `buffers` when nobody reads it any more."""
        waiting = self.posted.pop(key)
        if waiting:
            self.watch.enter(label)
            for request, _ in waiting:
                self.watch.wait(request)
            self.watch.leave()
        return [array for _, array in waiting]

    def finish(self) -> None:
        """Waits until everything has been sent: the receivers have posted long since, so this is short."""
        self.watch.enter("the last messages of the pipeline")
        for request, _ in self.sent:
            self.watch.wait(request)
        self.watch.leave()
        self.sent.clear()
