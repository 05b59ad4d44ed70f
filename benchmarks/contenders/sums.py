"""all_reduce as compiled programs call it, beside mpi4py's Allreduce: a contender of distributed.py, under mpiexec.

    sums.py ROUNDS SIZE

One command, `start`: {"rows": [[bytes, seconds of mpi4py, of a program on this host's shared memory, of a program over
messages], ...]}, medians over interleaved rounds of the slowest rank's time of a call. A program's figure is what its
host call took (`job.seconds`): how long the call of a program itself takes is another benchmark's matter.
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

SIZES = {"small": [4, 64, 1 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20],
         "tiny": [4, 1 << 10, 1 << 20]}
TARGET = 0.05  # seconds of a round
MOST = 500     # calls of a round


def program(job: Job, count: int, x: np.ndarray) -> Callable[[], Any]:
    """A program that sums x over the ranks, many times in one run so that its own start does not count."""
    with GraphBuilder("sums") as builder:
        value = builder.input(TensorType((count,), td.float32), "x", "parameter")
        (total,) = builder.emit("all_reduce", [value], {"axis": "data", "size": job.mesh["data"], "reduce": "sum"})
        builder.output(total)
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


def main() -> None:
    rounds, sizes = int(sys.argv[1]), SIZES[sys.argv[2]]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    td.set_num_threads(1)
    world = td.distributed.world_size()
    job = Job(td.distributed.Mesh({"data": world}))
    if job.rank == 0:
        assert sys.stdin.readline().strip() == "start"
    rows = []
    for nbytes in sizes:
        x, y = (aligned(np.full(nbytes // 4, job.rank, np.float32)) for _ in range(2))
        raw = lambda x=x, y=y: job.groups["data"].Allreduce(x, y)  # noqa: E731
        calls = [raw]
        for transports in ({**job.far, **job.near}, job.far):
            job.transports = transports
            calls.append(program(job, nbytes // 4, x))
            (total,) = calls[-1]()
            assert (total == world * (world - 1) / 2).all()
        one = max(timed(job, call, 2) for call in calls)
        repeat = int(max(2, min(MOST, TARGET / one)))
        found = [[timed(job, call, repeat) for call in calls] for _ in range(rounds)]
        rows.append([nbytes, *(statistics.median(column) for column in zip(*found))])
    if job.rank == 0:
        replies.write(json.dumps({"rows": rows}) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
