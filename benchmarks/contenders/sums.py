"""all_reduce as compiled programs call it, beside mpi4py's Allreduce: a contender of distributed.py, under mpiexec.

    sums.py ROUNDS SIZE MOST

One command, `start`: {"rows": [[bytes, seconds of mpi4py, of a program on this host's shared memory, of a program over
messages], ...]}, medians over interleaved rounds of the slowest rank's time of a call. Programs of short sums hold many
of them, one after the other: what the call of a program itself takes is another benchmark's matter.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import treadle as td
from treadle.distributed.comm import Job
from treadle.frontend.compile import build_executable
from treadle.frontend.parallel import aligned, register
from treadle.ir.builder import GraphBuilder
from treadle.ir.types import TensorType

SIZES = {"small": [4, 64, *(1 << n for n in (10, 12, 14, 15, 16, 17, 18, 20, 22, 24, 26, 28))],
         "tiny": [4, 1 << 10, 1 << 20]}
TARGET = 0.05  # seconds of a round
MOST = 500     # calls of a round
CHAIN = 20     # sums in a program, of messages of at most SHORT bytes
SHORT = 64 << 10


def chain(nbytes: int) -> int:
    """Sums in a program."""
    return CHAIN if nbytes <= SHORT else 1


def program(job: Job, count: int, x: np.ndarray) -> Callable[[], Any]:
    """A program of a chain of sums over the ranks of the job's only axis."""
    ((axis, ranks),) = job.mesh.axes
    with GraphBuilder(f"sums_{axis}") as builder:
        value = builder.input(TensorType((count,), td.float32), "x", "parameter")
        for _ in range(chain(4 * count)):
            (value,) = builder.emit("all_reduce", [value], {"axis": axis, "size": ranks, "reduce": "sum"})
        builder.output(value)
    register(builder.graph, job)
    executable = build_executable(builder.graph, "cpu")
    return lambda: executable.run([x])


def timed(job: Job, call: Callable[[], Any], repeat: int) -> float:
    """Seconds of a call on the slowest rank."""
    job.barrier()
    started = time.perf_counter()
    for _ in range(repeat):
        call()
    return max(job.gather_all((time.perf_counter() - started) / repeat))


def row(jobs: list[Job], nbytes: int, rounds: int) -> list[float]:
    """The figures of one size."""
    near, world = jobs[0], jobs[0].world.size
    x, y = (aligned(np.full(nbytes // 4, near.rank, np.float32)) for _ in range(2))
    programs = [program(job, nbytes // 4, x) for job in jobs]
    for call in programs:
        assert (call()[0] == world * (world - 1) / 2 * float(world) ** (chain(nbytes) - 1)).all()
    calls = [(lambda: near.world.Allreduce(x, y), 1), *((call, chain(nbytes)) for call in programs)]
    repeat = int(max(2, min(MOST, TARGET / max(timed(near, call, 2) / n for call, n in calls))))
    found = [[timed(near, call, -(-repeat // n)) / n for call, n in calls] for _ in range(rounds)]
    return [nbytes, *(statistics.median(column) for column in zip(*found))]


def main() -> None:
    rounds, sizes = int(sys.argv[1]), [n for n in SIZES[sys.argv[2]] if n <= int(sys.argv[3])]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    td.set_num_threads(1)
    jobs = [Job(td.distributed.Mesh({axis: td.distributed.world_size()})) for axis in ("near", "far")]
    jobs[1].transports = jobs[1].far
    if jobs[0].rank == 0:
        assert sys.stdin.readline().strip() == "start"
    rows = [row(jobs, nbytes, rounds) for nbytes in sizes]
    if jobs[0].rank == 0:
        replies.write(json.dumps({"rows": rows}) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
