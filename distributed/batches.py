"""That every rank was given the same batch: a mistake that would otherwise train on nonsense, or wait for ever.

Each rank gives the whole batch and takes its part, so a loader that is seeded by the rank, or one that has run out on
some ranks, is an error. What is compared is the shapes and a checksum of some thousand elements; it costs a message of
256 bytes for each step, which travels while the step runs.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import DistributedError

SAMPLE = 4096  # elements of an array that are looked at, about
BYTES = 256    # of what a rank tells


class BatchCheck:
    """Compares what the ranks are given. `watch`: of this process."""

    def __init__(self, watch: Any):
        self.watch = watch
        self.comm = watch.control.Dup()
        self.told = np.zeros((self.comm.size, BYTES), np.uint8)
        self.own = np.zeros(BYTES, np.uint8)
        self.request: Any = None

    def begin(self, arrays: Sequence[Any], numbers: Sequence[Any], step: int, mode: int, random: Any = None) -> None:
        """Sends what this rank was given: the batch, numbers such as the learning rate, the number of the program that
        fits the model's mode, and, if the step draws random numbers, the state that it does from."""
        self.finish()
        checksum = zlib.crc32(np.array([float(n) for n in numbers]).tobytes())
        kind = numbers[0].dtype if numbers else ""
        text = f"step {step}: {describe(arrays)}; {kind} numbers {checksum:08x}; mode {mode}"
        text += "" if random is None else f"; random state {'.'.join(str(n) for n in random.tolist())}"
        self.own[:] = np.frombuffer(text.encode()[:BYTES].ljust(BYTES, b"\0"), np.uint8)
        self.request = self.comm.Iallgather(self.own, self.told)
        self.watch.begun = self.begun

    def begun(self) -> bool:
        """Whether all ranks are known to have been given theirs."""
        return self.request is None or bool(self.request.Test())

    def finish(self) -> None:
        """Compares; does nothing if that was done.

        Raises:
            DistributedError: a rank was given another batch, or is in another step.
        """
        if self.request is None:
            return
        self.watch.enter("compare the batches")
        self.watch.wait(self.request)
        self.watch.leave()
        self.request = None
        others = np.flatnonzero((self.told != self.told[0]).any(1))
        if others.size:
            first, other = (bytes(row).rstrip(b"\0").decode(errors="replace") for row in self.told[[0, others[0]]])
            more = f" (and so on: ranks {others.tolist()})" if others.size > 1 else ""
            what, remedy = _difference(first, other)
            raise DistributedError(f"{what}: rank 0 has {first}, rank {others[0]} has {other}{more}. {remedy}")


def _difference(first: str, other: str) -> tuple[str, str]:
    """What differs, and what to do."""
    a, b = (re.split("[:;] ", text) for text in (first, other))  # step, batch, numbers, mode, random state
    if a[:4] == b[:4]:
        return ("the ranks' random states differ", "Every rank draws as many numbers of td.random between steps; what "
                "one draws alone comes from a generator of its own, td.random.Generator(seed)")
    if a[:3] == b[:3]:
        return ("the ranks' models are in different modes", "Call model.train(), model.eval(), and whatever else "
                "changes what the model computes, on every rank before its step")
    if a[:2] == b[:2]:
        return ("the ranks' optimizers have different numbers", "Learning rate, other options, clip norm and which "
                "parameters are frozen have to be the same on every rank: decide on rank 0 and "
                "td.distributed.broadcast it")
    if a[1:2] == b[1:2]:
        return ("the ranks are in different steps", "Every rank takes as many steps: decide on rank 0 when to stop, "
                "and td.distributed.broadcast it")
    return ("the ranks were given different batches", "Every rank gives the whole batch, the same one, and takes its "
            "part of it: seed loaders alike on all of them")


def describe(arrays: Sequence[Any]) -> str:
    """`checksum 1f00a3c2 of float32[8,4] int64[8]`."""
    checksum, shapes = 0, []
    for x in arrays:
        array = np.asarray(x)
        row = array.reshape(-1)
        sample = np.ascontiguousarray(row[::max(1, row.size // SAMPLE)])
        checksum = zlib.crc32(sample.view(np.uint8).data, checksum)
        shapes.append(f"{array.dtype}{list(array.shape)}".replace(" ", ""))
    return f"checksum {checksum:08x} of {' '.join(shapes)}"
