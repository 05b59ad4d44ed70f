"""Collectives of ranks that no common memory joins: over MPI, whose messages cross any network.

Each method binds a collective to arrays and gives the function that runs it. Every call is started without blocking
and then waited for under the watchdog. A single tensor whose parts lie one after the other is sent from where it is
and received where it belongs; others are packed. Messages of a group use the same memory one after the other, but for
those that are on their way while something else is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .buffers import as_bytes, cut, deal, flat, leading, pack, summed_as

Array = np.ndarray
Run = Callable[[], None]
REDUCE = {"sum": "SUM", "max": "MAX", "min": "MIN"}
LONGEST = 16 << 20  # bytes of a message of a sum: MPICH copies longer ones through memory, at half the speed


class Scratch:
    """Memory of messages that is used again: fresh pages in every step would cost as much as the copies."""

    def __init__(self) -> None:
        self.free: list[Array] = []

    def lend(self, nbytes: int) -> Array:
        """So many bytes, with any contents."""
        fitting = [a for a in self.free if a.nbytes >= nbytes]
        if not fitting:
            return np.empty(nbytes, np.uint8)
        best = min(fitting, key=lambda a: a.nbytes)
        self.free = [a for a in self.free if a is not best]
        return best

    def back(self, *arrays: Array) -> None:
        """They are free again."""
        self.free += arrays


class Far:
    """The collectives of one group over MPI. `watch` waits for requests."""

    def __init__(self, mpi: Any, group: Any, watch: Any):
        self.mpi, self.group, self.watch, self.size = mpi, group, watch, group.size
        self.scratch = Scratch()
        self.started: dict[int, tuple[Any, Array, Sequence[int] | None, tuple[Array, Array]]] = {}
        self.begun = watch.moves(lambda: bool(self.started))

    def all_reduce(self, xs: Sequence[Array], outs: Sequence[Array], reduce: str) -> Run:
        """outs[i] becomes the sum (max, min) of all ranks' xs[i]; it may be the same array."""
        op, dtype = getattr(self.mpi, REDUCE[reduce]), summed_as(xs[0].dtype)
        if len(xs) == 1 and dtype == xs[0].dtype:
            send = None if np.may_share_memory(xs[0], outs[0]) else flat(xs[0])
            return lambda: self._reduce(send, flat(outs[0]), op)

        def run() -> None:
            with _Message(self.scratch, dtype, sum(x.size for x in xs)) as row:
                pack(row, xs)
                self._reduce(None, row, op)
                deal(row, outs)

        return run

    def _reduce(self, send: Array | None, into: Array, op: Any) -> None:
        """Everybody's `send` (None: what `into` holds) reduced into `into`, one message after the other."""
        step = LONGEST // into.itemsize
        for start in range(0, into.size, step):
            given = self.mpi.IN_PLACE if send is None else send[start:start + step]
            self.watch.wait(self.group.Iallreduce(given, into[start:start + step], op))

    def reduce_scatter(self, xs: Sequence[Array], outs: Sequence[Array], dims: Sequence[int]) -> Run:
        """outs[i] becomes this rank's part along dims[i] of the sum of all ranks' xs[i]."""
        dtype, size = summed_as(xs[0].dtype), sum(out.size for out in outs)
        if len(xs) == 1 and dtype == xs[0].dtype and leading(xs[0].shape, dims[0]):
            send, into = flat(xs[0]), flat(outs[0])
            return lambda: self.watch.wait(self.group.Ireduce_scatter_block(send, into))
        parts = _parts(xs, dims, self.size)

        def run() -> None:
            with _Message(self.scratch, dtype, self.size * size) as row, _Message(self.scratch, dtype, size) as into:
                for r, own in enumerate(parts):
                    pack(row[r * size:(r + 1) * size], own)
                self.watch.wait(self.group.Ireduce_scatter_block(row, into))
                deal(into, outs)

        return run

    def all_gather(self, xs: Sequence[Array], outs: Sequence[Array], dims: Sequence[int]) -> Run:
        """outs[i] becomes all ranks' xs[i] one after the other along dims[i]."""
        if len(xs) == 1 and leading(outs[0].shape, dims[0]):
            send, into = as_bytes(xs[0]), as_bytes(outs[0])
            return lambda: self.watch.wait(self.group.Iallgather(send, into))
        dtype, size = xs[0].dtype, sum(x.size for x in xs)
        parts = _parts(outs, dims, self.size)

        def run() -> None:
            with _Message(self.scratch, dtype, size) as row, _Message(self.scratch, dtype, self.size * size) as rows:
                pack(row, xs)
                self.watch.wait(self.group.Iallgather(as_bytes(row), as_bytes(rows)))
                for r, own in enumerate(parts):
                    deal(rows[r * size:(r + 1) * size], own)

        return run

    def all_to_all(self, x: Array, out: Array, split: int, concat: int) -> Run:
        """Part i of x along `split` goes to rank i; what arrives lies along `concat` of out."""
        given, taken = cut(x, split, self.size), cut(out, concat, self.size)

        def run() -> None:
            with _Message(self.scratch, x.dtype, x.size) as rows, _Message(self.scratch, x.dtype, x.size) as into:
                pack(rows, given)
                self.watch.wait(self.group.Ialltoall(as_bytes(rows), as_bytes(into)))
                deal(into, taken)

        return run

    # While something else is computed ---------------------------------------------------------------------------

    def start(self, xs: Sequence[Array], token: Array, kind: str, dims: Sequence[int], tag: int) -> Run:
        """Starts a sum, or a gather, of a copy of xs: the program may use their memory again. `wait` gives what comes
        of it."""
        total, gathers = sum(x.size for x in xs), kind == "all_gather"
        dtype = xs[0].dtype if gathers else summed_as(xs[0].dtype)
        parts = _parts(xs, dims, self.size) if kind == "reduce_scatter" else [list(xs)]
        size = total // len(parts)
        comes = size * self.size if gathers else size
        begin = {"all_reduce": self.group.Iallreduce, "reduce_scatter": self.group.Ireduce_scatter_block,
                 "all_gather": lambda row, into: self.group.Iallgather(as_bytes(row), as_bytes(into))}[kind]

        def run() -> None:
            send, into = self.scratch.lend(total * dtype.itemsize), self.scratch.lend(comes * dtype.itemsize)
            row, arrived = send[:total * dtype.itemsize].view(dtype), into[:comes * dtype.itemsize].view(dtype)
            for r, own in enumerate(parts):
                pack(row[r * size:(r + 1) * size], own)
            self.started[tag] = (begin(row, arrived), arrived, dims if gathers else None, (send, into))
            self.begun()
            token[...] = 0

        return run

    def wait(self, outs: Sequence[Array], tag: int) -> Run:
        """The results of what was started under a tag."""

        def run() -> None:
            request, arrived, dims, lent = self.started.pop(tag)
            self.watch.wait(request)
            parts = [outs] if dims is None else _parts(outs, dims, self.size)
            size = arrived.size // len(parts)
            for r, own in enumerate(parts):
                deal(arrived[r * size:(r + 1) * size], own)
            self.scratch.back(*lent)

        return run


class _Message:
    """A row of elements in lent memory, for as long as the block."""

    def __init__(self, scratch: Scratch, dtype: np.dtype, size: int):
        self.scratch, self.dtype, self.nbytes = scratch, dtype, size * dtype.itemsize

    def __enter__(self) -> Array:
        self.raw = self.scratch.lend(self.nbytes)
        row: Array = self.raw[:self.nbytes].view(self.dtype)
        return row

    def __exit__(self, *_: object) -> None:
        self.scratch.back(self.raw)


def _parts(arrays: Sequence[Array], dims: Sequence[int], ranks: int) -> list[list[Array]]:
    """parts[r]: what of each array is rank r's, cut along its dimension."""
    return [list(own) for own in zip(*(cut(a, d, ranks) for a, d in zip(arrays, dims)))]
