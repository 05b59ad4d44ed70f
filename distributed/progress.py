"""Messages move on while this process computes.

MPI moves messages when it is called. What fits the kernel's socket buffers travels all the same, but a longer message
waits for both sides: 8 MB over a wire of 200 Mbit/s, sent and received by processes that computed for 300 ms, still
needed all of its 340 ms afterwards. With a call of MPI in every millisecond nothing was left to wait for, at 2 % of a
core. So a thread makes that call, as long as something is under way and the process does not wait itself.

The thread needs an MPI that several threads may call. That has a price within a host (a sum of one number takes 5 us
instead of 1), where nothing is gained: such an MPI is asked for where ranks have several hosts (`process.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

PERIOD = 0.001  # seconds between calls


class Progress:
    """The thread. `control`: a communicator, on which nothing is sent; `waits`: whether the process waits in MPI."""

    def __init__(self, control: Any, waits: Callable[[], bool]):
        self.control, self.waits = control, waits
        self.sources: list[Callable[[], bool]] = []
        self.calls = 0
        self._begun, self._ended = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def of(self, under_way: Callable[[], bool]) -> Callable[[], None]:
        """Takes care of what some part of the program sends: it says whether something is `under_way`, and calls what
        this gives whenever it has begun something."""
        self.sources.append(under_way)
        return self._begin

    def end(self) -> None:
        """No more calls; before MPI is finalized."""
        self._ended.set()
        self._begun.set()
        if self._thread is not None:
            self._thread.join()

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="treadle-progress", daemon=True)
            self._thread.start()
        if not self._begun.is_set():
            self._begun.set()

    def _run(self) -> None:
        while not self._ended.wait(PERIOD):
            if not any(under_way() for under_way in self.sources):
                self._begun.clear()
                # Unless something was begun just now, or the end told, of which this has cleared the sign.
                if not self._ended.is_set() and not any(under_way() for under_way in self.sources):
                    self._begun.wait()
            elif not self.waits():
                self.calls += 1
                try:
                    self.control.Iprobe()
                except Exception:  # a broken connection: whoever waits for it will say so
                    return
