"""Collectives of ranks that share a host: through memory that they share, in one or two passes over the tensors.

Each rank of a group owns a slot of shared memory that all can read. A collective is a list of *pieces*: what a rank
copies into its slot for others, and what it then makes of its own and the others' slots: a sum, or a copy. Pieces go in
*rounds* of as many as a slot holds. In a round every rank fills its slot, says so, waits until all have said so, and
takes. Two slots are used in turn: who says that round k is filled has done with round k - 1, so when all have, the
slot of round k - 1 is free again, and one meeting a round is enough.

A slot is small enough to stay in the caches: each tensor is read once and written once, from where it lies to where it
belongs, however it is split; nothing is joined or dealt out. What a rank keeps is not copied into its slot. A sum is
made by one rank for all, or by all in the same order, so every rank gets the same bits.

Short exchanges, of one round, are made by compiled programs themselves (`ir/rounds.py`); of such a round, what is left
when another rank is late is made here.

MPI does the same over a network, and with copies into messages of its own: see `far.py`. On one host its algorithms
reached a tenth of the memory's bandwidth (docs/distributed.md).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..ir.rounds import GROUP, HEADER, LINE, MEMORY, READ, RECORD, TEXT, WATCH, places, room
from .buffers import WIDENED, cut, flat
from .watch import shown

SLOT = 512 << 10     # bytes that a rank hands out in a round
SPIN = 300           # looks at a counter before the watchdog takes over
LOOKS = (1000, 20)   # a program's looks before it leaves the core to others: if every rank has one, and if not

Array = np.ndarray
Run = Callable[[], None]


@dataclass
class _Piece:
    """What fits a round: (bytes from the beginning, source) to copy into the own slot; (result, parts) to take.

    A part is an array of this rank's, or (rank, bytes from the beginning of the piece) in a slot.
    """

    nbytes: int
    fills: list[tuple[int, Array]] = field(default_factory=list)
    takes: list[tuple[Array, list[Any]]] = field(default_factory=list)


Calls = list[tuple[Callable[..., Any], tuple[Any, ...]]]


_MADE: dict[tuple[int, ...], Near] = {}


def near(mpi: Any, group: Any, watch: Any) -> Near:
    """The collectives of a group; groups of the same ranks share the memory, which may be scarce (containers)."""
    everybody = mpi.COMM_WORLD.Get_group()
    ranks = tuple(group.Get_group().Translate_ranks(list(range(group.size)), everybody))
    if ranks not in _MADE:
        _MADE[ranks] = Near(mpi, group, watch)
    return _MADE[ranks]


class Near:
    """The collectives of one group, whose ranks are all on this host.

    `slot`: bytes of a slot; `watch`: who waits when another rank is late.
    """

    def __init__(self, mpi: Any, group: Any, watch: Any, slot: int = SLOT):
        self.group, self.watch, self.slot = group, watch, slot
        self.size, self.rank = group.size, group.rank
        own = HEADER + 2 * slot
        self.window = mpi.Win.Allocate_shared(own, 1, comm=group)
        self.window.Lock_all(mpi.MODE_NOCHECK)  # `Sync` orders memory within such an epoch
        memory = [np.frombuffer(self.window.Shared_query(i)[0], np.uint8, own) for i in range(self.size)]
        self.slots = [[m[HEADER + i * slot:HEADER + (i + 1) * slot] for m in memory] for i in range(2)]
        counters = [m[:8].data.cast("q") for m in memory]
        self.counter = counters[self.rank]
        self.others = [c for i, c in enumerate(counters) if i != self.rank]
        self.counter[0] = 0
        self.begun = False  # a program has filled its slot for the next round of `run`, and has said so
        crowded = watch.near.size > len(os.sched_getaffinity(0))
        self.words = np.array([slot, LOOKS[crowded], self.rank, *(m.ctypes.data for m in memory)], np.int64)
        assert len(self.words) == MEMORY + self.size
        group.Barrier()

    # Collectives: each gives a function that runs it on these arrays --------------------------------------------

    def all_reduce(self, xs: Sequence[Array], outs: Sequence[Array], reduce: str) -> Run:
        """outs[i] becomes the sum (max, min) of all ranks' xs[i]; it may be the same array."""
        rows = [(flat(x), flat(out)) for x, out in zip(xs, outs)]
        if places((x.nbytes for x in xs), self.size) is not None and self.slot >= READ // self.size:
            pieces = []
            for x, out in rows:
                piece = _Piece(room(x.nbytes), [(0, x)])
                piece.takes.append((out, [(r, 0) for r in range(self.size)]))  # all in one order, and `out` may be x
                pieces.append(piece)
            return self._program([pieces], reduce)
        scattered, gathered = [], []
        for x, out in rows:
            step = max(self.size, self.slot // 2 // x.itemsize)
            for start in range(0, x.size, step):
                part, into = x[start:start + step], out[start:start + step]
                ends = [part.size * r // self.size for r in range(self.size + 1)]
                cuts = [slice(a, b) for a, b in itertools.pairwise(ends)]
                scattered.append(self._scatter([part[c] for c in cuts], into[cuts[self.rank]]))
                gathered.append(self._gather(into[cuts[self.rank]], [into[c] for c in cuts], placed=True))
        return self._program(list(_in_turns(scattered, gathered, self.slot)), reduce)

    def reduce_scatter(self, xs: Sequence[Array], outs: Sequence[Array], dims: Sequence[int]) -> Run:
        """outs[i] becomes this rank's part along dims[i] of the sum of all ranks' xs[i]."""
        pieces = []
        for x, out, dim in zip(xs, outs, dims):
            parts = cut(x, dim, self.size)
            for block in blocks(out.shape, (self.slot // (self.size - 1) - LINE) // out.itemsize):
                pieces.append(self._scatter([p[block] for p in parts], out[block]))
        return self._program([pieces], "sum")

    def all_gather(self, xs: Sequence[Array], outs: Sequence[Array], dims: Sequence[int]) -> Run:
        """outs[i] becomes all ranks' xs[i] one after the other along dims[i]."""
        pieces = []
        for x, out, dim in zip(xs, outs, dims):
            parts = cut(out, dim, self.size)
            for block in blocks(x.shape, self.slot // x.itemsize):
                pieces.append(self._gather(x[block], [p[block] for p in parts]))
        return self._program([pieces], "sum")

    def all_to_all(self, x: Array, out: Array, split: int, concat: int) -> Run:
        """Part i of x along `split` goes to rank i; what arrives lies along `concat` of out."""
        pieces, given, taken = [], cut(x, split, self.size), cut(out, concat, self.size)
        for block in blocks(taken[0].shape, (self.slot // self.size - LINE) // x.itemsize):
            size = room(given[0][block].nbytes)
            piece = _Piece(self.size * size)
            piece.fills += [(r * size, p[block]) for r, p in enumerate(given) if r != self.rank]
            piece.takes += [(p[block], [given[r][block] if r == self.rank else (r, self.rank * size)])
                            for r, p in enumerate(taken)]
            pieces.append(piece)
        return self._program([pieces], "sum")

    # Pieces -----------------------------------------------------------------------------------------------------

    def _scatter(self, parts: Sequence[Array], out: Array) -> _Piece:
        """Each rank's part of a block to that rank; the sum of what comes for this one into `out`."""
        sizes, piece = [room(p.nbytes) for p in parts], _Piece(0)

        def place(giver: int, taker: int) -> int:
            return sum(size for r, size in enumerate(sizes[:taker]) if r != giver)

        piece.fills = [(place(self.rank, r), p) for r, p in enumerate(parts) if r != self.rank]
        others = [(r, place(r, self.rank)) for r in range(self.size) if r != self.rank]
        piece.takes = [(out, [parts[self.rank], *others])]  # the own part first: `out` may be its memory
        piece.nbytes = max(sum(sizes) - size for size in sizes)  # the same on every rank
        return piece

    def _gather(self, x: Array, outs: Sequence[Array], placed: bool = False) -> _Piece:
        """A block to everybody; everybody's into `outs`. `placed`: this rank's is there already."""
        return _Piece(max(room(out.nbytes) for out in outs), [(0, x)],
                      [(out, [x if r == self.rank else (r, 0)]) for r, out in enumerate(outs)
                       if r != self.rank or not placed])

    # Rounds -----------------------------------------------------------------------------------------------------

    def _program(self, phases: Sequence[Sequence[_Piece]], reduce: str) -> Run:
        """What runs the pieces of each phase; no round holds pieces of two."""
        rounds = [found for pieces in phases for found in _rounds(pieces, self.slot)]
        laid: list[list[tuple[Calls, Calls]] | None] = [None, None]  # for either slot to begin with

        def run() -> None:
            first = (self.counter[0] - self.begun) % 2
            ready = laid[first]
            if ready is None:
                ready = laid[first] = [self._lay(found, (first + 1 + i) % 2, reduce) for i, found in enumerate(rounds)]
            for fills, takes in ready:
                if not self.begun:
                    for function, arguments in fills:
                        function(*arguments)
                    self.window.Sync()  # what was written is seen by whoever sees the counter
                    self.counter[0] += 1
                self.begun = False
                self._meet()
                with np.errstate(all="ignore"):  # like programs, and MPI
                    for function, arguments in takes:
                        function(*arguments)

        return run

    def _lay(self, pieces: Sequence[_Piece], turn: int, reduce: str) -> tuple[Calls, Calls]:
        """What to call before the ranks meet and after, on views into the slots, for the pieces of a round."""
        fills: Calls = []
        takes: Calls = []
        slots, start = self.slots[turn], 0

        def view(rank: int, begin: int, like: Array) -> Array:
            return slots[rank][begin:begin + like.nbytes].view(like.dtype).reshape(like.shape)

        for piece in pieces:
            fills += [(np.copyto, (view(self.rank, start + at, x), x)) for at, x in piece.fills if x.size]
            for out, parts in piece.takes:
                if out.size:
                    takes += folds(out, [view(p[0], start + p[1], out) if isinstance(p, tuple) else p for p in parts],
                                   reduce)
            start += piece.nbytes
        return fills, takes

    def _meet(self) -> None:
        """This rank's slot is filled; back when everybody's is."""
        number = self.counter[0]
        for other in self.others:
            if other[0] < number:
                self._wait(other, number)
        self.window.Sync()

    def record(self, label: str) -> np.ndarray:
        """What a compiled program has to know for its rounds, under the name of an op (`ir/rounds.py`)."""
        made = np.zeros(RECORD, np.int64)
        made[GROUP], made[WATCH] = self.words.ctypes.data, self.watch.address
        made[TEXT:] = np.frombuffer(shown(label), np.int64)
        return made

    def _wait(self, other: Any, number: int) -> None:
        for _ in range(SPIN):
            if other[0] >= number:
                return
        os.sched_yield()
        self.watch.until(lambda: other[0] >= number)


def _rounds(pieces: Sequence[_Piece], slot: int) -> Iterator[list[_Piece]]:
    """The pieces in order, as many together as a slot holds."""
    found: list[_Piece] = []
    held = 0
    for piece in pieces:
        if found and held + piece.nbytes > slot:
            yield found
            found, held = [], 0
        found.append(piece)
        held += piece.nbytes
    if found:
        yield found


def _in_turns(first: Sequence[_Piece], then: Sequence[_Piece], slot: int) -> Iterator[list[_Piece]]:
    """A round of first pieces, then the same ones' second pieces, and so on: what was summed is still in the cache."""
    start = 0
    for found in _rounds(first, slot):
        yield found
        yield list(then[start:start + len(found)])
        start += len(found)


def blocks(shape: Sequence[int], most: int) -> Iterator[tuple[slice, ...]]:
    """An array of a shape in blocks of at most `most` elements (at least 1), long rows whole where they fit."""
    most = max(1, most)
    if 0 in shape:
        return
    inner = 1
    at = len(shape)  # dimensions from here on are whole in a block
    while at and inner * shape[at - 1] <= most:
        at -= 1
        inner *= shape[at]
    if not at:
        yield ()
        return
    step = max(1, most // inner)
    for outer in np.ndindex(*shape[:at - 1]):
        for start in range(0, shape[at - 1], step):
            yield (*(slice(i, i + 1) for i in outer), slice(start, min(start + step, shape[at - 1])))


def folds(out: Array, parts: Sequence[Array], reduce: str) -> Calls:
    """The calls that make `out` the parts added (or the largest, the smallest) in order."""
    if len(parts) == 1:
        return [(np.copyto, (out, parts[0]))]
    if reduce == "sum" and out.dtype.name in WIDENED:
        return [(_add_wide, (out, *parts))]
    combine = (BOOLEAN if out.dtype == np.bool_ else COMBINE)[reduce]
    return [(combine, (parts[0], parts[1], out)), *((combine, (out, part, out)) for part in parts[2:])]


def _add_wide(out: Array, *parts: Array) -> None:
    """Narrow floats are added up in f32, and rounded once."""
    total = parts[0].astype(np.float32)
    for part in parts[1:]:
        total += part.astype(np.float32)
    out[...] = total


def _largest(a: Array, b: Array, out: Array) -> None:  # NumPy wants the result of these two by name
    np.maximum(a, b, out=out)


def _smallest(a: Array, b: Array, out: Array) -> None:
    np.minimum(a, b, out=out)


COMBINE: dict[str, Callable[..., Any]] = {"sum": np.add, "max": _largest, "min": _smallest}
BOOLEAN: dict[str, Callable[..., Any]] = {"sum": np.logical_or, "max": np.logical_or, "min": np.logical_and}
