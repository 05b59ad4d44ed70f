"""Collectives on the tensors' own memory, under a watchdog.

A `Job` is this process's place in a running mesh: a communicator for each mesh axis, made by splitting the world.
Along an axis whose ranks share a host, collectives go through memory that they share (`near.py`), along others as
messages of MPI (`far.py`). Whoever waits looks around (`watch.py`): a rank that failed has said so, a rank that died is
missed, one that does not come is named when the time is up. Either way what is raised here names the rank, the op and
the step; no process hangs.

A collective is bound to arrays once (views cut, messages laid out), and then run at every call.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..ir import config
from ..ir.graph import Graph
from ..ir.ops_collective import host_attrs
from ..ir.rounds import BEGUN, CALLS, DONE, ENTERED, NANOSECONDS, STAGE
from .batches import BatchCheck
from .buffers import as_bytes
from .errors import DistributedError
from .far import Far
from .launch import find_mpiexec
from .mesh import Mesh
from .near import Near, near
from .process import fail, join, load_mpi, versions

SHORT = ("all_reduce", "all_gather", "reduce_scatter")  # that programs make rounds of

Arrays = Sequence[np.ndarray]
Run = Callable[[], None]


class Job:
    """This process as a rank of a mesh.

    Attributes:
        rank: its number; `here`: its coordinates.
        batches: compares what the ranks are given.
        step: counted by whoever runs steps; errors name it.
        error: what ended a collective; a compiled program can only pass on its text.

    Raises:
        MeshError: the job has another number of processes than the mesh.
        LaunchError: MPI is missing.
    """

    def __init__(self, mesh: Mesh, timeout: float | None = None):
        mpi = load_mpi()
        self.mpi, self.mesh, self.world = mpi, mesh, mpi.COMM_WORLD
        self.watch = join(timeout or config.get("TREADLE_COMM_TIMEOUT"))
        mesh.check_world(self.world.size)
        self.rank = self.world.rank
        self.here = mesh.coordinates(self.rank)
        self.batches = BatchCheck(self.watch)
        self.agree("the mesh, or on what is installed", f"mesh: {mesh}\n{versions()}")
        self.groups = {axis: self.world.Split(self._color(axis), self.here[axis]) for axis in mesh.names}
        self._calls: dict[str, int] = {}  # from Python
        self._seconds: dict[str, float] = {}
        self._records: dict[str, np.ndarray] = {}
        self.error: BaseException | None = None
        self.far = {axis: Far(mpi, group, self.watch) for axis, group in self.groups.items()}
        self.near = {axis: near(mpi, self.groups[axis], self.watch) for axis in self._on_one_host()}
        self.transports: dict[str, Any] = {**self.far, **self.near}

    def _color(self, axis: str) -> int:
        return self.mesh.rank({**self.here, axis: 0})

    def _on_one_host(self) -> list[str]:
        """The axes along which all ranks, everywhere in the mesh, share memory with their group."""
        groups = [group for axis, group in self.groups.items() if self.mesh[axis] > 1]
        wanted = int(config.get("TREADLE_SHARED_MEMORY"))
        mine = [wanted * int(group.Split_type(self.mpi.COMM_TYPE_SHARED).size == group.size) for group in groups]
        all_do = np.array(mine, np.int64)
        self.world.Allreduce(self.mpi.IN_PLACE, all_do, self.mpi.MIN)
        return [axis for axis, together in zip((a for a in self.mesh.names if self.mesh[a] > 1), all_do) if together]

    def transport(self, group: Any) -> Any:
        """The collectives of some ranks, by their communicator; all of them call this."""
        together = np.array(int(config.get("TREADLE_SHARED_MEMORY"))
                            * int(group.Split_type(self.mpi.COMM_TYPE_SHARED).size == group.size), np.int64)
        group.Allreduce(self.mpi.IN_PLACE, together, self.mpi.MIN)
        return near(self.mpi, group, self.watch) if together else Far(self.mpi, group, self.watch)

    @property
    def apart(self) -> list[str]:
        """The axes whose ranks are not all on one host: there it pays to send while something else is computed."""
        return [axis for axis in self.mesh.names if axis not in self.near]

    @property
    def step(self) -> int:
        """The number of the running step."""
        return self.watch.step

    @step.setter
    def step(self, number: int) -> None:
        self.watch.step = number

    @property
    def calls(self) -> dict[str, int]:
        """What was communicated so far, by `op:axis`: how often."""
        return self._tally(self._calls, CALLS, 1)

    @property
    def seconds(self) -> dict[str, float]:
        """And how long it took."""
        return self._tally(self._seconds, NANOSECONDS, 1e-9)

    def _tally(self, found: dict[str, Any], word: int, unit: float) -> dict[str, Any]:
        """What Python counted, and what compiled programs did."""
        found = dict(found)
        for name, record in self._records.items():
            if record[CALLS]:
                label = op_label(name)
                found[label] = found.get(label, 0) + unit * int(record[word])
        return found

    # What programs call ---------------------------------------------------------------------------------------

    def host_function(self, name: str) -> Callable[..., Callable[[], None]]:
        """The function that a program calls under a name that `host_name` wrote.

        It takes the arrays (*operands, *results) and gives what each call on these very arrays runs.
        """
        op, attrs = host_attrs(name)
        bind, watch = getattr(self, op), self.watch
        label = op_label(name)
        record = self.record(name)
        words = None if record is None else record.data

        def bound(*arrays: np.ndarray) -> Callable[[], None]:
            run = bind(arrays, **attrs)

            def call() -> None:
                try:
                    if words is not None and words[STAGE] == BEGUN:  # by the program, which has waited long enough
                        words[STAGE] = DONE
                        self.transports[attrs["axis"]].begun = True
                        watch.resume(label, 1e-9 * words[ENTERED])
                    else:
                        watch.enter(label)
                    run()
                except BaseException as error:
                    self.error = error
                    fail(error)
                    raise
                self._calls[label] = self._calls.get(label, 0) + 1
                self._seconds[label] = self._seconds.get(label, 0.0) + watch.leave()

            return call

        return bound

    def record(self, name: str) -> np.ndarray | None:
        """What lets a program run short collectives of a name by itself (`ir/rounds.py`); None: it cannot."""
        op, attrs = host_attrs(name)
        if op not in SHORT or not zeros_like_programs(attrs.get("reduce", "sum")):
            return None
        transport = self.transports[attrs["axis"]]
        if not isinstance(transport, Near):
            return None
        if name not in self._records:
            self._records[name] = transport.record(op_label(name))
        return self._records[name]

    def all_reduce(self, arrays: Arrays, axis: str, size: int, reduce: str) -> Run:
        """Operands, then results."""
        return self._together(axis, "all_reduce", arrays, None, reduce)

    def all_gather(self, arrays: Arrays, axis: str, size: int, dims: tuple[int, ...]) -> Run:
        """Operands, then results."""
        return self._together(axis, "all_gather", arrays, dims)

    def reduce_scatter(self, arrays: Arrays, axis: str, size: int, dims: tuple[int, ...]) -> Run:
        """Operands, then results."""
        return self._together(axis, "reduce_scatter", arrays, dims)

    def _together(self, axis: str, method: str, arrays: Arrays, dims: Sequence[int] | None, *more: Any) -> Run:
        """A collective of as many results as operands; messages hold one dtype each."""
        xs, outs = halves(arrays)
        transport, runs = self.transports[axis], list[Run]()
        bind = getattr(transport, method)
        if isinstance(transport, Near):
            return bind(xs, outs, *more if dims is None else (dims,))
        for dtype in dict.fromkeys(x.dtype for x in xs):
            chosen = [i for i, x in enumerate(xs) if x.dtype == dtype]
            given = more if dims is None else ([dims[i] for i in chosen],)
            runs.append(bind([xs[i] for i in chosen], [outs[i] for i in chosen], *given))
        if len(runs) == 1:
            return runs[0]
        return lambda: [run() for run in runs][-1]

    def all_to_all(self, arrays: Arrays, axis: str, size: int, split: int, concat: int) -> Run:
        """Operand, result."""
        return self.transports[axis].all_to_all(*arrays, split, concat)

    def start(self, arrays: Arrays, kind: str, axis: str, size: int, dims: tuple[int, ...], tag: int) -> Run:
        """Operands, token."""
        return self.far[axis].start(arrays[:-1], arrays[-1], kind, dims, tag)

    def wait(self, arrays: Arrays, axis: str, size: int, tag: int) -> Run:
        """Token, results."""
        return self.far[axis].wait(arrays[1:], tag)

    def axis_index(self, arrays: Arrays, axis: str, size: int) -> Run:
        """The result."""
        return lambda: arrays[0].fill(self.here[axis])

    def send(self, arrays: Arrays, axis: str, size: int, shift: int, tag: int) -> Run:
        """Operand, token."""
        group, data, other = self.groups[axis], as_bytes(arrays[0]), (self.here[axis] + shift) % size

        def run() -> None:
            self.watch.wait(group.Isend(data, other, tag))
            arrays[1].fill(0)

        return run

    def recv(self, arrays: Arrays, axis: str, size: int, shift: int, tag: int) -> Run:
        """Result."""
        group, data, other = self.groups[axis], as_bytes(arrays[0]), (self.here[axis] + shift) % size
        return lambda: self.watch.wait(group.Irecv(data, other, tag))

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
        texts = self.gather_all(text.splitlines())
        others = [r for r, d in enumerate(digests) if d != digests[0]]
        own, other = texts[0], texts[others[0]]
        at = next((i for i, (a, b) in enumerate(zip(own, other)) if a != b), min(len(own), len(other)))

        lines = [text[at].strip() if at < len(text) else "nothing more" for text in (own, other)]
        shown = excerpts(lines[0], lines[1])
        raise DistributedError(f"the ranks do not agree on {what}: ranks {others} differ from rank 0, first in line "
                               f"{at + 1}: rank 0 has `{shown[0]}`, rank {others[0]} has `{shown[1]}`. Every rank has "
                               "to run the same script, with the same seeds and files, on the same batches")

    def agree_on_program(self, graph: Graph) -> None:
        """`agree` on a per-rank program."""
        self.agree("the program", str(graph))


def excerpts(a: str, b: str, width: int = 80) -> tuple[str, str]:
    """Two lines around the first place where they differ, if they are long."""
    at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    start = max(0, at - width) if at > 2 * width else 0
    stop = max(at + width, start + 3 * width)
    found = [("..." if start else "") + text[start:stop] + ("..." if stop < len(text) else "") for text in (a, b)]
    return found[0], found[1]


def halves(arrays: Sequence[np.ndarray]) -> tuple[Sequence[np.ndarray], Sequence[np.ndarray]]:
    """Operands and results of a variadic collective."""
    middle = len(arrays) // 2
    return arrays[:middle], arrays[middle:]


def op_label(name: str) -> str:
    """How errors and tallies call what a host function runs."""
    op, attrs = host_attrs(name)
    return f"{op}:{attrs['axis']}"


@functools.cache
def zeros_like_programs(reduce: str) -> bool:
    """Whether NumPy takes the zeros for the larger and smaller ones that compiled programs do.

    IEEE 754 leaves it open and processors differ; ranks that finish a round in two ways have to get the same bits.
    """
    if reduce == "sum":
        return True
    choose = {"max": np.maximum, "min": np.minimum}[reduce]
    for dtype in (np.float16, np.float32, np.float64):
        zeros = np.zeros(3, dtype)
        if np.signbit(choose(zeros, -zeros)).all() == (dtype == np.float16):
            return False
    return True


@functools.cache
def mpi_available() -> str | None:
    """None if jobs can be started here, else what is missing."""
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed"
    return None if find_mpiexec() else "mpiexec is not installed"
