"""Collectives over MPI, on the tensors' own memory, under a watchdog.

A `Job` is this process's place in a running mesh: a communicator for each mesh axis, made by splitting the world.
Every call is started without blocking and then waited for, and the wait looks around (`watch.py`): a rank that failed
has said so, a rank that died is missed, one that does not come is named when the time is up. Either way what is
raised here names the rank, the op and the step; no process hangs.

mpi4py is imported when a job is joined, not before.
"""

from __future__ import annotations

import ast
import atexit
import functools
import hashlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..ir import config
from ..ir.graph import Graph
from ..ir.ops_collective import host_attrs
from . import buffers
from .errors import DistributedError, LaunchError
from .launch import find_mpiexec
from .mesh import Mesh
from .watch import Watch

REDUCE = {"sum": "SUM", "max": "MAX", "min": "MIN"}


def load_mpi() -> Any:
    """`mpi4py.MPI`, initialised.

    Raises:
        LaunchError: it is not installed.
    """
    try:
        import mpi4py

        mpi4py.rc.finalize = False  # a job that failed must not wait for the others in MPI_Finalize
        mpi4py.rc.thread_level = "serialized"
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(f"mpi4py cannot be loaded ({error}); install it with: pip install 'treadle[mpi]'") from error
    _at_exit(MPI)
    return MPI


class _State:
    """What the process knows about its end."""

    job: Job | None = None
    failed = False
    registered = False


def _at_exit(mpi: Any) -> None:
    if not _State.registered:
        _State.registered = True
        atexit.register(_leave, mpi)
        previous = sys.excepthook

        def hook(kind: Any, error: Any, trace: Any) -> None:
            fail(error)
            previous(kind, error, trace)

        sys.excepthook = hook


def _leave(mpi: Any) -> None:
    if not mpi.Is_initialized() or mpi.Is_finalized():
        return
    if not _State.failed:
        mpi.Finalize()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(1.5)  # the launcher may end a job when its first process leaves: let the others say what they know
    if _State.job is not None:
        _State.job.watch.end_others()
    os._exit(1)


def fail(error: BaseException) -> None:
    """Tells the other ranks that this one gives up; called for any exception that ends the process."""
    if not _State.failed:
        _State.failed = True
        if _State.job is not None:
            _State.job.watch.tell(error)


class Job:
    """This process as a rank of a mesh.

    Attributes:
        rank: its number; `here`: its coordinates.
        step: counted by whoever runs steps; errors name it.
        calls, seconds: what was communicated so far, by `op:axis`.
        timeline: None, or a list: every communication appends (op:axis, when it began, when it ended), on the clock
            `time.monotonic`, which the processes of a host share.
        error: what ended a collective; a compiled program can only pass on its text.

    Raises:
        MeshError: the job has another number of processes than the mesh.
        LaunchError: MPI is missing.
    """

    def __init__(self, mesh: Mesh, timeout: float | None = None):
        mpi = load_mpi()
        self.mpi, self.mesh, self.world = mpi, mesh, mpi.COMM_WORLD
        mesh.check_world(self.world.size)
        self.rank = self.world.rank
        self.here = mesh.coordinates(self.rank)
        self.world.Set_errhandler(mpi.ERRORS_RETURN)
        self.groups = {axis: self.world.Split(self._color(axis), self.here[axis]) for axis in mesh.names}
        self.watch = Watch(mpi, self.world, timeout or config.get("TREADLE_COMM_TIMEOUT"))
        self.calls: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.timeline: list[tuple[str, float, float]] | None = None
        self.error: BaseException | None = None
        self.started: dict[int, tuple[Any, np.ndarray, np.ndarray]] = {}
        _State.job = self

    def _color(self, axis: str) -> int:
        return self.mesh.rank({**self.here, axis: 0})

    @property
    def step(self) -> int:
        """The number of the running step."""
        return self.watch.step

    @step.setter
    def step(self, number: int) -> None:
        self.watch.step = number

    # What programs call ---------------------------------------------------------------------------------------

    def host_function(self, name: str) -> Callable[..., None]:
        """The function that a program calls under a name that `host_name` wrote: (*operands, *results)."""
        op, attrs = host_attrs(name)
        method = getattr(self, op)
        label = f"{op}:{attrs['axis']}"

        def call(*arrays: np.ndarray) -> None:
            started = time.monotonic()
            self.watch.enter(label)
            try:
                method(arrays, **attrs)
            except BaseException as error:
                self.error = error
                fail(error)
                raise
            self.watch.leave()
            self.count(label, started)

        return call

    def count(self, label: str, started: float) -> None:
        """Notes one communication that ends now; `started` by `time.monotonic`."""
        ended = time.monotonic()
        self.calls[label] = self.calls.get(label, 0) + 1
        self.seconds[label] = self.seconds.get(label, 0.0) + ended - started
        if self.timeline is not None:
            self.timeline.append((label, started, ended))

    def all_reduce(self, arrays: Sequence[np.ndarray], axis: str, size: int, reduce: str) -> None:
        """Operands, then results."""
        xs, outs = halves(arrays)
        op, direct = getattr(self.mpi, REDUCE[reduce]), len(xs) == 1 and xs[0].dtype == buffers.reducible(xs[0]).dtype
        send = buffers.join(xs)
        into = buffers.flat(outs[0]) if direct else np.empty_like(send)
        self.watch.wait(self.groups[axis].Iallreduce(send, into, op))
        if not direct:
            buffers.deal(into, outs)

    def start(self, arrays: Sequence[np.ndarray], kind: str, axis: str, size: int, dims: tuple[int, ...],
              tag: int) -> None:
        """Operands, token. What is sent is a copy: the program may use the operands' memory again."""
        xs, group = arrays[:-1], self.groups[axis]
        if kind == "all_reduce":
            send = buffers.join(xs)
            send = send.copy() if len(xs) == 1 else send
            into = np.empty_like(send)
            request = group.Iallreduce(send, into, self.mpi.SUM)
        else:
            send = np.ascontiguousarray(buffers.cut_for(xs, dims, size))
            into = np.empty(send.shape[1], send.dtype)
            request = group.Ireduce_scatter_block(send, into)
        self.started[tag] = (request, send, into)
        arrays[-1][...] = 0

    def wait(self, arrays: Sequence[np.ndarray], axis: str, size: int, tag: int) -> None:
        """Token, results."""
        request, _, into = self.started.pop(tag)
        self.watch.wait(request)
        buffers.deal(into, arrays[1:])

    def all_gather(self, arrays: Sequence[np.ndarray], axis: str, size: int, dims: tuple[int, ...]) -> None:
        """Operands, then results."""
        xs, outs = halves(arrays)
        if len(xs) == 1 and buffers.leading(outs[0].shape, dims[0]):
            self.watch.wait(self.groups[axis].Iallgather(as_bytes(xs[0]), as_bytes(outs[0])))
            return
        for kind in sorted({x.dtype.name for x in xs}):
            chosen = [i for i, x in enumerate(xs) if x.dtype.name == kind]
            send = np.concatenate([np.ravel(xs[i]) for i in chosen])
            into = np.empty((size, send.size), send.dtype)
            self.watch.wait(self.groups[axis].Iallgather(as_bytes(send), as_bytes(into)))
            buffers.joined_from(into, [outs[i] for i in chosen], [dims[i] for i in chosen])

    def reduce_scatter(self, arrays: Sequence[np.ndarray], axis: str, size: int, dims: tuple[int, ...]) -> None:
        """Operands, then results."""
        xs, outs = halves(arrays)
        plain = len(xs) == 1 and xs[0].dtype == buffers.reducible(xs[0]).dtype
        if plain and buffers.leading(xs[0].shape, dims[0]):
            self.watch.wait(self.groups[axis].Ireduce_scatter_block(buffers.flat(xs[0]), buffers.flat(outs[0])))
            return
        send = np.ascontiguousarray(buffers.cut_for(xs, dims, size))
        into = np.empty(send.shape[1], send.dtype)
        self.watch.wait(self.groups[axis].Ireduce_scatter_block(send, into))
        buffers.deal(into, outs)

    def all_to_all(self, arrays: Sequence[np.ndarray], axis: str, size: int, split: int, concat: int) -> None:
        """Operand, result."""
        x, out = arrays
        send = np.ascontiguousarray(np.stack(np.split(x, size, split)))
        into = np.empty_like(send)
        self.watch.wait(self.groups[axis].Ialltoall(as_bytes(send), as_bytes(into)))
        out[...] = np.concatenate(list(into), concat)

    def axis_index(self, arrays: Sequence[np.ndarray], axis: str, size: int) -> None:
        """The result."""
        arrays[0][...] = self.here[axis]

    def send(self, arrays: Sequence[np.ndarray], axis: str, size: int, shift: int, tag: int) -> None:
        """Operand, token."""
        other = (self.here[axis] + shift) % size
        self.watch.wait(self.groups[axis].Isend(as_bytes(arrays[0]), other, tag))
        arrays[1][...] = 0

    def recv(self, arrays: Sequence[np.ndarray], axis: str, size: int, shift: int, tag: int) -> None:
        """Result."""
        other = (self.here[axis] + shift) % size
        self.watch.wait(self.groups[axis].Irecv(as_bytes(arrays[0]), other, tag))

    # What jobs do outside programs ----------------------------------------------------------------------------

    def gather_all(self, thing: Any) -> list[Any]:
        """Every rank's small Python value (text, numbers), everywhere, in the order of the ranks."""
        data = np.frombuffer(repr(thing).encode(), np.uint8)
        sizes = np.empty(self.world.size, np.int64)
        self.watch.wait(self.world.Iallgather(np.array([data.size], np.int64), sizes))
        into = np.empty(int(sizes.sum()), np.uint8)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self.watch.wait(self.world.Iallgatherv(np.array(data), [into, sizes, starts, self.mpi.BYTE]))
        return [ast.literal_eval(bytes(into[s:s + n]).decode()) for s, n in zip(starts, sizes)]

    def barrier(self) -> None:
        """Waits for every rank."""
        self.watch.enter("barrier")
        self.watch.wait(self.world.Ibarrier())
        self.watch.leave()

    def agree(self, what: str, text: str) -> None:
        """That every rank has the same text (a program, the shapes of a batch), before anything is sent.

        Raises:
            DistributedError: not; the message names the ranks that differ and the first line that does.
        """
        self.watch.enter(f"agree on {what}")
        digests = self.gather_all(hashlib.sha256(text.encode()).hexdigest())
        self.watch.leave()
        if len(set(digests)) == 1:
            return
        lines = self.gather_all(text.splitlines())
        others = [r for r, d in enumerate(digests) if d != digests[0]]
        own, other = lines[0], lines[others[0]]
        at = next((i for i, (a, b) in enumerate(zip(own, other)) if a != b), min(len(own), len(other)))

        def line(text: list[str]) -> str:
            return text[at].strip() if at < len(text) else "nothing more"

        raise DistributedError(f"the ranks do not agree on {what}: ranks {others} differ from rank 0, first in line "
                               f"{at + 1}: rank 0 has `{line(own)}`, rank {others[0]} has `{line(other)}`. Every rank "
                               "has to run the same script on batches of the same shapes")

    def agree_on_program(self, graph: Graph) -> None:
        """`agree` on a per-rank program."""
        self.agree("the program", str(graph))


def halves(arrays: Sequence[np.ndarray]) -> tuple[Sequence[np.ndarray], Sequence[np.ndarray]]:
    """Operands and results of a variadic collective."""
    middle = len(arrays) // 2
    return arrays[:middle], arrays[middle:]


def as_bytes(array: np.ndarray) -> np.ndarray:
    """The array's memory as bytes: moving needs no dtype."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@functools.cache
def mpi_available() -> str | None:
    """None if jobs can be started here, else what is missing."""
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed"
    return None if find_mpiexec() else "mpiexec is not installed"
