"""Ranks that hang in the middle of a step.

Between steps a rank may take its time: it loads data, evaluates, compiles, writes a checkpoint. Not so in the middle of
a step that it has run before, where nothing but compiled programs and their collectives are left: if it then comes no
further for ten times as long as its longest step, and ten seconds at least, it hangs. A rank says in memory that the
ranks of its host share how long it may stay where it is (`Pace`), and whoever waits looks at it (`watch.py`). Ranks of
other hosts are asked, over the sockets of `links.py`.

What counts is not time but what a rank could have done in it (`Stay`). A rank that waits for a core, or for a page from
the disk, does not hang, however long that takes on a machine under load; nor does time count in which nobody looked:
the machine was suspended, or who looks was itself stopped.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from ..ir import config

LEAST, TIMES = 10.0, 10.0  # seconds that a rank may stay where it is at least; and in its longest steps
GAP = 1.0    # seconds between two looks that count at most
OFTEN = 0.2  # seconds between two looks at a process
TICKS = os.sysconf("SC_CLK_TCK")


class Pace:
    """A program of a step and how long it took so far. `expect` is told, in seconds, how long this rank may now stay
    where it is; 0: as long as it likes."""

    def __init__(self, run: Callable[..., Any], expect: Callable[[float], None]):
        self.run, self.expect, self.longest = run, expect, 0.0

    def __call__(self, *arguments: Any) -> Any:
        """What the program gives."""
        started = time.monotonic()
        self.expect(self.limit())
        try:
            result = self.run(*arguments)
        finally:
            self.expect(0.0)
        self.longest = max(self.longest, time.monotonic() - started)
        return result

    def limit(self) -> float:
        """Seconds; 0 before the program has run once."""
        given = config.get("TREADLE_STEP_TIMEOUT")
        wanted: float = max(LEAST, TIMES * self.longest) if given is None else given
        return wanted if self.longest else 0.0


class Stay:
    """How long a process of this host has been where it is."""

    def __init__(self, pid: int):
        self.pid, self.seconds = pid, 0.0
        self._where: Any = None
        self._looked = self._ran = 0.0

    def look(self, where: Any) -> float:
        """Seconds since `where` changed, of those in which the process could run."""
        now = time.monotonic()
        if where != self._where:
            self._where, self.seconds, self._looked = where, 0.0, now
            self._ran = -1.0
        elif now - self._looked > OFTEN:
            busy, ran = activity(self.pid)
            passed = min(now - self._looked, GAP)
            if busy:
                passed = max(0.0, min(passed, ran - self._ran)) if self._ran >= 0 else 0.0
            self.seconds += passed
            self._looked, self._ran = now, ran
        return self.seconds


def activity(pid: int) -> tuple[bool, float]:
    """Whether a thread of a process, but for the one that asks, runs, or waits for a core or the disk; and the seconds
    that these threads have run.

    (False, 0.0) where that is not known.
    """
    busy, ticks, own = False, 0, str(threading.get_native_id())
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            if thread == own:
                continue
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/stat") as file:
                state, *fields = file.read().rpartition(")")[2].split()
                busy = busy or state in "RD"
                ticks += int(fields[10]) + int(fields[11])  # user and system
    return busy, ticks / TICKS
