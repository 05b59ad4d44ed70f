"""Measures the links between the processes of a job: messages go from rank 0 to another rank and back.

Short messages give the latency, long ones the bandwidth (of half a round trip). The median of some rounds counts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from .comm import load_mpi
from .cost import Link
from .errors import LaunchError

SHORT, LONG = 8, 16 << 20  # bytes
ROUNDS = {SHORT: 200, LONG: 10}


def links() -> Iterator[tuple[int, str, Link]]:
    """(rank, its host, the link from rank 0) for every other rank; called by all ranks.

    Raises:
        LaunchError: mpi4py is missing, or the job has one process.
    """
    world = load_mpi().COMM_WORLD
    if world.size < 2:
        raise LaunchError("a job of one process has no links to measure; start it with: mpiexec -n 2 treadle links")
    hosts = world.allgather(load_mpi().Get_processor_name())
    for other in range(1, world.size):
        short, long = (_half_round(world, other, nbytes) for nbytes in (SHORT, LONG))
        latency, seconds = world.bcast((short, long), 0)
        yield other, hosts[other], Link(latency, LONG / max(seconds - latency, 1e-9))


def _half_round(world: Any, other: int, nbytes: int) -> float:
    """Seconds of a message between rank 0 and another, on rank 0."""
    data, rank, taken = np.zeros(nbytes, np.uint8), world.rank, []
    world.Barrier()
    if rank not in (0, other):
        return 0.0
    for _ in range(ROUNDS[nbytes]):
        started = time.perf_counter()
        if rank == 0:
            world.Send(data, other)
            world.Recv(data, other)
        else:
            world.Recv(data, 0)
            world.Send(data, 0)
        taken.append((time.perf_counter() - started) / 2)
    return float(np.median(taken))
