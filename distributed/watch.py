"""The watchdog: waiting that notices when nobody will come.

While a rank waits in a collective it looks, every few milliseconds, for last words of a rank that failed, for
processes that are gone, for ranks that hang in the middle of a step (`hung.py`) or ended before the others, and at the
clock. Every rank keeps the number of its step and of its calls in memory that the ranks of a host share, so that the
error can say where a rank that does not come is; of other hosts the sockets of `links.py` tell.

One watch serves the process, whatever meshes it makes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ..ir.rounds import AT, CALL, CLOSED, COMPUTING, FAILED, LABEL, LEFT, STATE, WAITING
from .errors import DistributedError
from .hung import Pace, Stay
from .links import At, Links
from .progress import Progress

LOOK = 0.02     # seconds between looks
SPIN = 200      # tests of a request before the core is left to others
HEAD = 8 * AT   # bytes before the label: the words of `ir/rounds.py`
WORDS = 1000    # bytes of the last words
ADDRESS = 512   # bytes of a rank's addresses
PULSE = 16      # bytes behind them: how often it looked while it waited; how long it may stay, in milliseconds
SETTLE = 2.0    # seconds in which what a rank sent before it ended arrives
ASKING = 0.5    # seconds of waiting before ranks of other hosts are asked where they are
CROSSED = 20.0  # seconds in which nobody gets any further after which ranks in different ops wait for ever
HELD = 1.0      # seconds without a look after which a rank is held up where it should wait
ALIKE = ("Every rank has to take the same steps and to call save, load, gather and the like with the others, not "
         "rank 0 alone")


class Watch:
    """Waits for requests on behalf of one rank.

    Attributes:
        step: named in errors.
        timeout: seconds after which a rank that does not come is given up.
        begun: whether all ranks are known to have begun the step that this one is in.
        timeline: None, or a list, to which every op that is passed appends (label, when it came, when it left), on the
            clock `time.monotonic`, which the processes of a host share.
    """

    def __init__(self, mpi: Any, world: Any, timeout: float):
        self.mpi, self.timeout = mpi, timeout
        self.control = world.Dup()
        self.rank = world.rank
        self.label = ""
        self.near = world.Split_type(mpi.COMM_TYPE_SHARED)
        who = np.empty((self.near.size, 2), np.int64)
        self.near.Allgather(np.array([world.rank, os.getpid()], np.int64), who)
        self.near_ranks, self.pids = who.T.tolist()
        row = HEAD + LABEL + WORDS + PULSE
        self.window = mpi.Win.Allocate_shared(row, 1, comm=self.near)
        self.rows = [np.frombuffer(self.window.Shared_query(i)[0], np.uint8, row) for i in range(self.near.size)]
        self._own = self.rows[self.near.rank]
        self._own[:] = 0
        self._heads = [row[:HEAD].view(np.int64) for row in self.rows]
        self._pulses = [row[-PULSE:].view(np.int64) for row in self.rows]
        self._head, self._pulse = self._heads[self.near.rank], self._pulses[self.near.rank].data
        self._stays = [Stay(pid) for pid in self.pids]
        self.begun: Callable[[], bool] = lambda: False
        # The same memory: a word costs a tenth to write here.
        self._words, self._text = self._head.data, self._own[HEAD:HEAD + LABEL].data
        self._shown: dict[str, bytes] = {}
        self._entered = 0.0
        self._timeline: list[tuple[str, float, float]] | None = None
        hosts = np.empty(world.size, np.int64)
        world.Allgather(np.array([min(self.near_ranks)], np.int64), hosts)
        self.links = Links(self.rank, hosts.tolist(), self._exchange, lambda: self._at(self.near.rank))
        self._still: tuple[Any, float] = ((), 0.0)
        self.progress = Progress(self.control, lambda: bool(self.label)) if _many_threads(mpi) else None
        self.near.Barrier()

    def _exchange(self, text: str) -> list[str]:
        into = np.empty((self.control.size, ADDRESS), np.uint8)
        self.control.Allgather(np.frombuffer(text.encode()[:ADDRESS].ljust(ADDRESS, b"\0"), np.uint8), into)
        return [bytes(row).rstrip(b"\0").decode() for row in into]

    def moves(self, under_way: Callable[[], bool]) -> Callable[[], None]:
        """For who sends while something is computed: see `Progress.of`."""
        return self.progress.of(under_way) if self.progress is not None else lambda: None

    @property
    def step(self) -> int:
        return int(self._head[0])

    @step.setter
    def step(self, number: int) -> None:
        self._head[0] = number

    @property
    def calls(self) -> int:
        """The number of ops that this rank has come to."""
        return int(self._words[CALL])

    @property
    def timeline(self) -> list[tuple[str, float, float]] | None:
        return self._timeline

    @timeline.setter
    def timeline(self, entries: list[tuple[str, float, float]] | None) -> None:
        self._timeline = entries
        self._words[CLOSED] = entries is not None  # programs then leave every op to Python

    @property
    def address(self) -> int:
        """Where compiled programs find the words of `ir/rounds.py`."""
        return int(self._own.ctypes.data)

    def enter(self, label: str) -> None:
        """This rank has come to an op.

        Raises:
            DistributedError: a rank of another host is known to have failed or died. (MPICH has died of sending to it.)
        """
        self.label = label
        self._words[CALL] += 1
        self._words[STATE] = WAITING
        if label not in self._shown:
            self._shown[label] = shown(label)
        self._text[:] = self._shown[label]
        self._entered = time.monotonic()
        if self.links.lost or self.links.words:
            self.look(0.0)

    def resume(self, label: str, entered: float) -> None:
        """A compiled program came to an op at that time, and leaves the waiting to this watch."""
        self.label, self._entered = label, entered

    def leave(self) -> float:
        """It has passed it; the seconds that it took."""
        now = time.monotonic()
        if self._timeline is not None:
            self._timeline.append((self.label, self._entered, now))
        self.label = ""
        self._words[STATE] = COMPUTING
        return now - self._entered

    def paced(self, run: Callable[..., Any]) -> Pace:
        """`run`, a program of a step: a rank that stays in it for too long is given up."""
        return Pace(run, self._expect)

    def _expect(self, limit: float) -> None:
        self._pulse[1] = int(limit * 1000)

    def wait(self, request: Any) -> None:
        """Until the request is complete.

        Raises:
            DistributedError: another rank failed, died, ended, or did not come in time.
        """
        self.until(lambda: self._done(request))

    def until(self, done: Callable[[], bool]) -> None:
        """Until `done()`; raises as `wait`."""
        for _ in range(SPIN):
            if done():
                return
            os.sched_yield()
        started = looked = time.monotonic()
        self._still = (), started
        if self.links.sockets:
            self.links.ask(anew=True)
        while not done():
            now = time.monotonic()
            if now - looked > LOOK:
                looked = now
                self._pulse[0] += 1
                try:
                    self.look(now - started)
                except DistributedError:
                    if done():  # what it had to send has come; the next op will say it
                        break
                    raise
            if now - started > 0.002:
                time.sleep(0.0002)
            else:
                os.sched_yield()

    def _done(self, request: Any) -> bool:
        try:
            return bool(request.Test())
        except self.mpi.Exception as error:
            self.look(0.0)  # a dead rank says more than what MPI makes of it
            raise DistributedError(f"MPI failed in {self.where()} on rank {self.rank}: {error}. The ranks have called "
                                   "different collectives, or a connection broke") from error

    def look(self, waited: float) -> None:
        """Raises if there is no point in waiting."""
        self.control.Iprobe()  # moves on what MPI has under way: who waits in shared memory does not call it
        for rank, head, row in zip(self.near_ranks, self._heads, self.rows):
            if head[STATE] == FAILED and rank != self.rank:
                self._failed(rank, bytes(row[HEAD + LABEL:-PULSE]).rstrip(b"\0").decode(errors="replace"))
        for rank, text in list(self.links.words.items()):
            self._failed(rank, text)
        for rank, pid in zip(self.near_ranks, self.pids):
            if gone(pid):
                raise DistributedError(f"rank {rank} (process {pid}) is gone; it was last in {self.position(rank)}. "
                                       f"Rank {self.rank} was in {self.where()}", gone=rank)
        for rank, why in list(self.links.lost.items()):
            raise DistributedError(f"rank {rank} of another host is gone: {why}. Rank {self.rank} was in "
                                   f"{self.where()}", gone=rank)
        self._hung(waited)
        self._ended(waited)
        if waited > self.timeout:
            raise DistributedError(f"rank {self.rank} waited {waited:.0f} s in {self.where()}: {self.missing()}. If "
                                   "that may take so long, raise TREADLE_COMM_TIMEOUT")

    def _failed(self, rank: int, words: str) -> None:
        raise DistributedError(f"rank {rank} failed: {words}. Rank {self.rank} was in {self.where()}")

    def _hung(self, waited: float) -> None:
        """Raises if a rank comes no further in the middle of a step."""
        for place, (rank, pulse) in enumerate(zip(self.near_ranks, self._pulses)):
            stay = self._stay(place) if rank != self.rank else 0.0
            if pulse[1] and 1000 * stay > pulse[1]:
                self._hangs(rank, stay, "has come no further")
        if waited < ASKING:
            return
        self.links.ask()
        for rank, at in list(self.links.at.items()):
            if at.limit and at.stay > at.limit:
                self._hangs(rank, at.stay, "has come no further")
        for rank, seconds in self.links.silent.items():
            limit = self.links.at[rank].limit if rank in self.links.at else self._pulse[1] / 1000
            if limit and seconds > limit and (rank in self.links.at or self.begun()):
                self._hangs(rank, seconds, "has not answered")

    def _hangs(self, rank: int, seconds: float, what: str) -> None:
        raise DistributedError(f"rank {rank} hangs: for {seconds:.0f} s it {what}, in the middle of a step. It was "
                               f"last in {self.position(rank)}. Rank {self.rank} was in {self.where()}. If a step may "
                               "take so long, set TREADLE_STEP_TIMEOUT to more seconds; 0 leaves it to "
                               "TREADLE_COMM_TIMEOUT alone, as for a debugger")

    def _ended(self, waited: float) -> None:
        """Raises if a rank has ended normally and the others wait for what it will not send.

        They do if nobody computes and nobody has come any further for a while.
        """
        heads, others = self._heads, dict(self.links.at)
        ended = {r: int(h[0]) for r, h in zip(self.near_ranks, heads) if h[STATE] == LEFT} | self.links.left
        now, state = time.monotonic(), (*map(bytes, heads), *((at.calls, at.state) for at in others.values()))
        if state != self._still[0]:
            self._still = state, now
        still = min(now - self._still[1], waited)
        if still < SETTLE or any(h[STATE] == COMPUTING for h in heads):
            return
        if not ended:
            if still > CROSSED and not self.links.others and self._crossed():
                raise DistributedError(f"the ranks wait for each other in different places: rank {self.rank} in "
                                       f"{self.where()}, {self._others()}. {ALIKE}")
            return
        if all(r in ended or r in others and others[r].state == WAITING for r in self.links.others):
            rank, step = next(iter(ended.items()))
            raise DistributedError(f"rank {rank} has ended after step {step}, but rank {self.rank} waits in "
                                   f"{self.where()}: every rank has to do as many steps (on equally many batches), "
                                   "and to call save, load and gather like the others")

    def _crossed(self) -> bool:
        """Whether ranks, as far as is known where they are, wait in different ops."""
        found = [self.at(rank) for rank in range(self.control.size)]
        return len({at.label for at in found if at is not None}) > 1 and \
            all(at is None or at.stay <= HELD for at in found)

    def _others(self) -> str:
        return "; ".join(f"rank {r} in {self.position(r)}" for r in self.near_ranks if r != self.rank)

    def where(self) -> str:
        return f"{self.label or 'no op'} of step {self.step}"

    def position(self, rank: int) -> str:
        """Where a rank is, as far as it is known."""
        at = self.at(rank)
        return "nobody knows what" if at is None else str(at)

    def at(self, rank: int) -> At | None:
        """The same as numbers; None: it is on another host, and has not said."""
        if rank not in self.near_ranks:
            return self.links.at.get(rank)
        return self._at(self.near_ranks.index(rank))

    def _at(self, place: int) -> At:
        label = bytes(self.rows[place][HEAD:HEAD + LABEL]).split(b"\0")[0].decode(errors="replace")
        (step, calls, state, _), (looks, limit) = self._heads[place].tolist(), self._pulses[place].tolist()
        return At(step, calls, state, looks, limit / 1000, self._stay(place), label)

    def _stay(self, place: int) -> float:
        """Seconds that a rank of this host has been where it is."""
        return self._stays[place].look((*self._heads[place].tolist(), *self._pulses[place].tolist()))

    def missing(self) -> str:
        """Who has not come, as far as is known: ranks that do not wait as this one does; or else those that have made
        fewer calls, unless all wait, in different places."""
        found = {r: self.at(r) for r in range(self.control.size) if r != self.rank}
        others = "; ".join(f"rank {r} in {at}" for r, at in found.items())
        late = {r: at for r, at in found.items() if at is None or at.state == COMPUTING or at.stay > HELD}
        if not late and self._crossed():
            return f"the ranks wait for each other in different places: {others}. {ALIKE}"
        late = late or {r: at for r, at in found.items() if at is None or at.calls < self.calls}
        if late:
            return "; ".join(f"rank {r} has not come, it was last in {at}" if at else
                             f"rank {r} has not come, nor does it answer" for r, at in late.items())
        return f"every rank has come, and one of them hangs{': ' * bool(others)}{others}"

    def tell(self, error: BaseException) -> None:
        """Last words to all other ranks."""
        text = f"{type(error).__name__} in {self.where()}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        self.links.tell(f"failed {text}")
        self._own[HEAD + LABEL:-PULSE] = np.frombuffer(text.encode()[:WORDS].ljust(WORDS, b"\0"), np.uint8)
        self._head[STATE] = FAILED

    def end(self) -> None:
        """This rank ends normally."""
        if self.progress is not None:
            self.progress.end()
        self._head[STATE] = LEFT
        self.links.tell(f"left {self.step}")

    def end_others(self) -> None:
        """Ends the ranks of this host that are still there: those that hang, as the others have ended themselves."""
        for pid in self.pids:
            if pid != os.getpid() and not gone(pid):
                os.kill(pid, signal.SIGTERM)
                os.kill(pid, signal.SIGCONT)  # one that is stopped, too


def _many_threads(mpi: Any) -> bool:
    return bool(mpi.Query_thread() == mpi.THREAD_MULTIPLE)


def shown(label: str) -> bytes:
    """An op's name as other ranks read it."""
    return label.encode()[:LABEL - 1].ljust(LABEL, b"\0")


def gone(pid: int) -> bool:
    """Whether a process of this host has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return os.path.isdir("/proc/self")
    except OSError:
        return False
