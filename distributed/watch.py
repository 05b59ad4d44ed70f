"""The watchdog: waiting that notices when nobody will come.

While a rank waits in a collective it looks, every few milliseconds, for a message from a rank that failed, for
processes of its host that are gone, and at the clock. Every rank keeps the number of its step and of its calls in
memory that the ranks of a host share, so that the error can say where a rank that does not come is.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np

from .errors import DistributedError

FAILED = 7001  # tag of the last words of a rank
LOOK = 0.02    # seconds between looks
SPIN = 200     # tests of a request before the core is left to others
LABELS = 96    # bytes that name an op
WORDS = 1000   # bytes of the last words


class Watch:
    """Waits for requests on behalf of one rank.

    Attributes:
        step: named in errors.
        timeout: seconds after which a rank that does not come is given up.
    """

    def __init__(self, mpi: Any, world: Any, timeout: float):
        self.mpi, self.timeout = mpi, timeout
        self.control = world.Dup()
        self.rank = world.rank
        self.label, self.calls = "", 0
        self.kept: list[Any] = []
        self.near = world.Split_type(mpi.COMM_TYPE_SHARED)
        who = np.empty((self.near.size, 2), np.int64)
        self.near.Allgather(np.array([world.rank, os.getpid()], np.int64), who)
        self.near_ranks, self.pids = who.T.tolist()
        row = 3 * 8 + LABELS
        self.window = mpi.Win.Allocate_shared(row, 1, comm=self.near)
        self.rows = [np.frombuffer(self.window.Shared_query(i)[0], np.uint8, row) for i in range(self.near.size)]
        self._own = self.rows[self.near.rank]
        self._own[:] = 0
        self.step = 0
        self.near.Barrier()

    @property
    def step(self) -> int:
        return int(self._own[:8].view(np.int64)[0])

    @step.setter
    def step(self, number: int) -> None:
        self._own[:8].view(np.int64)[0] = number

    def enter(self, label: str) -> None:
        """This rank has come to an op."""
        self.label = label
        self.calls += 1
        self._own[8:16].view(np.int64)[0] = self.calls
        data = label.encode()[:LABELS - 1]
        self._own[24:24 + len(data)] = np.frombuffer(data, np.uint8)
        self._own[24 + len(data):] = 0

    def leave(self) -> None:
        """It has passed it."""
        self.label = ""

    def wait(self, request: Any) -> None:
        """Until the request is complete.

        Raises:
            DistributedError: another rank failed, died, or did not come in time.
        """
        for _ in range(SPIN):
            if request.Test():
                return
            os.sched_yield()
        started = looked = time.monotonic()
        while not request.Test():
            now = time.monotonic()
            if now - looked > LOOK:
                looked = now
                self.look(now - started)
            if now - started > 0.002:
                time.sleep(0.0002)
            else:
                os.sched_yield()

    def look(self, waited: float) -> None:
        """Raises if there is no point in waiting."""
        if self.control.Iprobe(self.mpi.ANY_SOURCE, FAILED):
            status, words = self.mpi.Status(), bytearray(WORDS)
            self.control.Recv([words, self.mpi.BYTE], self.mpi.ANY_SOURCE, FAILED, status)
            message = bytes(words).rstrip(b"\0").decode(errors="replace")
            raise DistributedError(f"rank {status.Get_source()} failed: {message}. Rank {self.rank} was in "
                                   f"{self.where()}")
        for rank, pid in zip(self.near_ranks, self.pids):
            if gone(pid):
                raise DistributedError(f"rank {rank} (process {pid}) is gone; it was last in {self.position(rank)}. "
                                       f"Rank {self.rank} was in {self.where()}")
        if waited > self.timeout:
            raise DistributedError(f"rank {self.rank} waited {waited:.0f} s in {self.where()}: {self.missing()}. If "
                                   "that may take so long, raise TREADLE_COMM_TIMEOUT")

    def where(self) -> str:
        return f"{self.label or 'no op'} of step {self.step}"

    def position(self, rank: int) -> str:
        """Where a rank of this host is."""
        row = self.rows[self.near_ranks.index(rank)]
        label = bytes(row[24:]).split(b"\0")[0].decode(errors="replace")
        step, calls = row[:16].view(np.int64)
        return f"{label or 'no op'} of step {step} (call {calls})"

    def missing(self) -> str:
        """The ranks of this host that have made fewer calls than this one."""
        late = [r for r, row in zip(self.near_ranks, self.rows) if row[8:16].view(np.int64)[0] < self.calls]
        if not late:
            return "every rank of this host has come; one of another host has not, or they wait for each other"
        return "; ".join(f"rank {r} has not come, it was last in {self.position(r)}" for r in late)

    def tell(self, error: BaseException) -> None:
        """Last words to all other ranks."""
        text = f"{type(error).__name__} in {self.where()}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        words = text.encode()[:WORDS].ljust(WORDS, b"\0")
        for other in range(self.control.size):
            if other != self.rank:
                self.kept.append((words, self.control.Isend([words, self.mpi.BYTE], other, FAILED)))


    def end_others(self) -> None:
        """Ends the ranks of this host that are still there: those that hang, as the others have ended themselves."""
        for pid in self.pids:
            if pid != os.getpid() and not gone(pid):
                os.kill(pid, signal.SIGTERM)


def gone(pid: int) -> bool:
    """Whether a process of this host has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return os.path.isdir("/proc/self")
    except OSError:
        return False
