"""Places for things that live for a while: how temporaries share one arena.

Offsets are found greedily, the largest temp first, each in the smallest gap that holds it (Pisarchyk and Lee,
"Efficient Memory Management for Deep Neural Net Inference", 2020, "greedy by size"), and once more in order of
birth; the smaller arena wins. `plan.py` asks when a program is compiled, `sized.py` when one with open sizes is called.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_NO_GAP = np.iinfo(np.int64).max

Life = tuple[int, int, int]
"""Of a temp: bytes, first and last position."""


def place(lives: Sequence[Life]) -> tuple[list[int], int]:
    """(offset of each temp, bytes of the arena)."""
    best: tuple[int, list[int]] | None = None
    for order in (_by_size, _by_birth):
        offsets = _pack(lives, sorted(range(len(lives)), key=lambda i: order(lives[i])))
        size = max((offset + life[0] for offset, life in zip(offsets, lives)), default=0)
        if best is None or size < best[0]:
            best = size, offsets
    assert best is not None
    return best[1], best[0]


def _by_size(life: Life) -> tuple[int, ...]:
    nbytes, first, last = life
    return (-nbytes, first - last, first)


def _by_birth(life: Life) -> tuple[int, ...]:
    return (life[1], -life[0])


def lower_bound(lives: Sequence[Life]) -> int:
    """The largest sum of bytes that are live at one position."""
    change: dict[int, int] = {}
    for nbytes, first, last in lives:
        change[first] = change.get(first, 0) + nbytes
        change[last + 1] = change.get(last + 1, 0) - nbytes
    live = peak = 0
    for position in sorted(change):
        live += change[position]
        peak = max(peak, live)
    return peak


def _pack(lives: Sequence[Life], order: Sequence[int]) -> list[int]:
    """Offsets of temps, placed in the given order: each goes into the smallest gap among those it meets, or on top."""
    placed = np.zeros((4, len(lives)), np.int64)  # rows: offset, end, first, last; columns sorted by offset
    offsets = [0] * len(lives)
    for count, number in enumerate(order):
        nbytes, first, last = lives[number]
        begins, ends, firsts, lasts = placed[:, :count]
        meeting = (firsts <= last) & (lasts >= first)
        # Free from where everything before has ended to where the next one begins.
        free = np.concatenate(([0], np.maximum.accumulate(ends[meeting])))
        gaps = begins[meeting] - free[:-1]
        gaps[gaps < nbytes] = _NO_GAP
        best = int(gaps.argmin()) if len(gaps) else 0
        offset = int(free[best] if len(gaps) and gaps[best] < _NO_GAP else free[-1])
        offsets[number] = offset
        column = int(np.searchsorted(begins, offset, side="right"))
        placed[:, column + 1 : count + 1] = placed[:, column:count]
        placed[:, column] = offset, offset + nbytes, first, last
    return offsets
