"""How ranks of a host exchange small tensors, as far as compiled programs and `distributed/near.py` have to agree.

Ranks that share memory meet in numbered rounds: each fills its slot, says so by the number at the head of its memory,
waits until all have said so, and reads. Python does it; a compiled program does it by itself where a round is short,
since the way into Python takes longer than the round. What the two agree on is here: when an exchange is one round,
where in a slot each tensor lies, and a *record*, int64 words of memory, that tells a program where everything is. There
is a record for each host function; a program finds its address in its table, or 0: then Python does all of it.

A program that has waited long enough leaves the rest of its round to Python, whose watchdog finds out who is missing.
`STAGE` says how far it has come.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

READ = 128 << 10  # bytes that a rank reads at most where an exchange is one round: everybody reads everything
MOST_RANKS = 16   # up to which a program does it by itself
HEADER = 128      # bytes before a rank's two slots: the number of the round that it has filled
LINE = 64         # bytes; every tensor in a slot begins at a multiple
LABEL = 96        # bytes that name an op

# A record's words.
STAGE, GROUP, WATCH, CALLS, NANOSECONDS, ENTERED, TEXT = range(7)
RECORD = TEXT + LABEL // 8
# Values of STAGE. BEGUN: this rank's slot is filled, and it has said so.
DONE, ASIDE, BEGUN = range(3)
# A group's words, at the address GROUP: bytes of a slot, looks at a late rank before the core is left to others, this
# rank's place, and the addresses of all ranks' memory. Round k uses slot k % 2, at HEADER + k % 2 * SLOT.
SLOT, LOOKS, PLACE, MEMORY = range(4)
# The words at WATCH, that other ranks can read: the step, calls, state and, not 0, that programs leave it to Python;
# then the label.
STEP, CALL, STATE, CLOSED, AT = range(5)
COMPUTING, WAITING, LEFT, FAILED = range(4)  # values of STATE


def room(nbytes: int) -> int:
    """Bytes that a tensor takes in a slot: whole cache lines."""
    return -(-nbytes // LINE) * LINE


def places(sizes: Iterable[int], ranks: int) -> list[int] | None:
    """Where tensors of so many bytes lie in each rank's slot; None: they are too many for one round."""
    ends = list(accumulate(map(room, sizes), initial=0))
    return ends[:-1] if ends[-1] <= READ // ranks else None
