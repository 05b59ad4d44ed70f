"""Short collectives that compiled programs make by themselves: `check_programs` is part of exchanges.py.

`rounds.py`: sums in an endless loop, until the last rank is killed from outside while it does.
"""

import os
import subprocess
import sys
import time

import ml_dtypes
import numpy as np

import treadle as td
from treadle.distributed.comm import Job
from treadle.distributed.mesh import Mesh
from treadle.frontend.compile import build_executable
from treadle.frontend.parallel import register
from treadle.ir.builder import GraphBuilder
from treadle.ir.dtypes import as_dtype
from treadle.ir.rounds import LINE, READ
from treadle.ir.types import TensorType

NARROW = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
DTYPES = ["float32", "float64", "int64", "int32", "int8", "uint64", "uint16", "bool", *NARROW]
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 6e-8, 65504.0]
LONG = [((READ // 16 + 1,), "int64")]  # of two ranks and of more
CHAIN = 12


def drawn(rank, shape, dtype, seed):
    """What a rank has: all bits of integers, floats that have to be rounded, and special ones."""
    rng, dtype = np.random.default_rng([seed, rank]), np.dtype(dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.kind in "iu":
        return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape).copy()
    values = rng.standard_normal(shape)
    if values.size > 4:
        chosen = rng.random(shape) < 0.3
        values[chosen] = rng.choice(SPECIAL, int(chosen.sum()))
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def folded(parts, reduce):
    """Parts combined in order; narrow floats are added in f32."""
    dtype = parts[0].dtype
    with np.errstate(all="ignore"):
        if reduce != "sum" or dtype not in NARROW:
            fold = {"sum": np.add, "max": np.maximum, "min": np.minimum}[reduce]
            total = parts[0]
            for part in parts[1:]:
                total = fold(total, part)
            return total
        wide = parts[0].astype(np.float32)
        for part in parts[1:]:
            wide = wide + part.astype(np.float32)
        return wide.astype(dtype)


def same_bits(found, expected):
    """Equal bytes, but for what NaN carries."""
    found, expected = (np.where(np.isnan(a), np.array(np.nan, a.dtype), a) if a.dtype.kind in "fV" else a
                       for a in (found, expected))
    return found.dtype == expected.dtype and found.tobytes() == expected.tobytes()


def cases(ranks):
    """(op, attributes, what the operands are): every dtype in one call, odd sizes, the shortest, the longest, and one
    that is too long."""
    mixed = [((3, 7), dtype) for dtype in DTYPES]
    found = [("all_reduce", {"reduce": reduce}, mixed) for reduce in ("sum", "max", "min")]
    single = [[(shape, "float32")] for shape in ((), (1,), (37,), (READ // ranks // LINE * LINE // 4,))]
    for given in (*single, LONG, [((0, 3), "float32"), ((5,), "float32")]):
        found.append(("all_reduce", {"reduce": "sum"}, given))
    for dim in range(3):
        shape = tuple(2 * ranks if d == dim else 3 for d in range(3))
        split = [(shape, dtype) for dtype in DTYPES]
        found.append(("reduce_scatter", {"dims": (dim,) * len(split)}, split))
        found.append(("all_gather", {"dims": (dim,) * len(DTYPES)}, [((3, 1, 5), dtype) for dtype in DTYPES]))
    return found


def expectation(op, attrs, everyone, rank):
    """The results on a rank, of the operands of all."""
    ranks, found = len(everyone), []
    for i in range(len(everyone[0])):
        parts = [own[i] for own in everyone]
        if op == "all_gather":
            found.append(np.concatenate(parts, attrs["dims"][i]))
        elif op == "all_reduce":
            found.append(folded(parts, attrs["reduce"]))
        else:
            parts = [np.split(part, ranks, attrs["dims"][i])[rank] for part in parts]
            found.append(folded([parts[rank], *(p for r, p in enumerate(parts) if r != rank)], "sum"))
    return found


def program(job, calls):
    """An executable of collectives along the job's axis, each on inputs of its own."""
    ((axis, ranks),) = job.mesh.axes
    with GraphBuilder("rounds") as builder:
        for k, (op, attrs, operands) in enumerate(calls):
            values = [builder.input(TensorType(shape, as_dtype(np.dtype(dtype).name)), f"x{k}_{i}", "data")
                      for i, (shape, dtype) in enumerate(operands)]
            for result in builder.emit(op, values, {"axis": axis, "size": ranks, **attrs}):
                builder.output(result)
    register(builder.graph, job)
    return build_executable(builder.graph, "cpu")


def check_programs(job):
    """Every case, several times from either slot: by programs, by Python, and half by either as ranks come late."""
    ranks, rank = job.world.size, job.rank
    calls = cases(ranks)
    operands = [[[drawn(r, shape, dtype, 100 * k + i) for i, (shape, dtype) in enumerate(given)] for r in range(ranks)]
                for k, (_, _, given) in enumerate(calls)]
    expected = [x for (op, attrs, _), everyone in zip(calls, operands)
                for x in expectation(op, attrs, everyone, rank)]
    executable = program(job, calls)
    inputs = [x for everyone in operands for x in everyone[rank]]
    long = sum(given is LONG for _, _, given in calls)

    def tallies():
        return np.array([sum(job._calls.values()), sum(job.calls.values()), job.watch.calls])

    def run():
        """Runs it, and gives how many of its calls came to Python."""
        before = tallies()
        for found, wanted in zip(executable.run(inputs), expected, strict=True):
            assert same_bits(found, wanted), (found, wanted)
        by_python, made, shown = (tallies() - before).tolist()
        assert made == shown == len(calls)
        return by_python

    for _ in range(3):
        assert run() >= long
    late = 0
    for turn in range(2 * ranks):  # each rank is late in its turn, at the first call of the program
        if turn % ranks == rank:
            time.sleep(0.05)
            run()
        else:
            late += run() > long
    assert late > 0  # somebody else waited in Python
    job.watch.timeline = []  # every call is to be seen
    assert run() == len(calls)
    assert [op for op, *_ in calls] == [label.split(":")[0] for label, _, _ in job.watch.timeline]
    assert all(0 < came < left for _, came, left in job.watch.timeline)
    job.watch.timeline = None
    assert run() >= long and min(job.seconds.values()) > 0


def main():
    td.set_num_threads(1)
    job = Job(Mesh({"data": td.distributed.world_size()}))
    executable = program(job, [("all_reduce", {"reduce": "sum"}, [((5,), "float32")])] * CHAIN)
    inputs = [np.full(5, job.rank, np.float32)] * CHAIN
    job.step = 7
    executable.run(inputs)
    job.barrier()
    if job.rank == job.world.size - 1:
        subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(0.3); os.kill({os.getpid()}, 9)"])
    while True:
        executable.run(inputs)


if __name__ == "__main__":
    main()
