"""What the ranks of test_exchanges.py run: every collective over shared memory and over messages, on the same arrays.

`mpiexec -n N python exchanges.py`: says `fine` on rank 0, or raises. Expectations are NumPy's, of all ranks' arrays,
which every rank can draw for itself.
"""

import itertools

import ml_dtypes
import numpy as np
from rounds import check_programs

from treadle.distributed import far
from treadle.distributed.comm import Job
from treadle.distributed.far import Far
from treadle.distributed.mesh import Mesh
from treadle.distributed.near import Near, near

SHAPES = [(8, 4, 3), (1,), (), (12, 8), (64, 4, 5), (4, 1), (0, 4), (4096,), (260, 36)]
DTYPES = ["float32", "float64", "int64", "int8", "float16", ml_dtypes.bfloat16]


def drawn(rank, shape, dtype, seed=0):
    """What a rank has: small whole numbers, whose sums are exact in every dtype."""
    return np.random.default_rng([seed, rank]).integers(-4, 5, shape).astype(dtype)


def fresh(*shapes, dtype):
    return [np.full(shape, 99, dtype) for shape in shapes]


def check(transport, ranks, rank, dtype):
    everyone = [[drawn(r, shape, dtype, i) for i, shape in enumerate(SHAPES)] for r in range(ranks)]
    for reduce, fold in {"sum": np.sum, "max": np.max, "min": np.min}.items():
        want = [fold([own[i].astype(np.float64) for own in everyone], 0) for i in range(len(SHAPES))]
        for chosen in ([0], [3], [7], range(len(SHAPES)), [8, 6, 0]):
            outs = fresh(*(SHAPES[i] for i in chosen), dtype=dtype)
            run = transport.all_reduce([everyone[rank][i] for i in chosen], outs, reduce)
            for _ in range(3):  # the same arrays again, from either slot
                run()
                for i, out in zip(chosen, outs):
                    np.testing.assert_array_equal(out.astype(np.float64), want[i])
        for chosen in ([0], [8], [0, 3]):  # in place
            own = [everyone[rank][i].copy() for i in chosen]
            transport.all_reduce(own, own, reduce)()
            for i, out in zip(chosen, own):
                np.testing.assert_array_equal(out.astype(np.float64), want[i])
    cut = [(i, d) for i, s in enumerate(SHAPES) for d in range(len(s)) if s[d] % ranks == 0]
    for chosen in ([cut[0]], [cut[1]], cut, cut[::-2]):
        xs = [everyone[rank][i] for i, _ in chosen]
        dims = [d for _, d in chosen]
        parts = [[np.split(own[i], ranks, d) for i, d in chosen] for own in everyone]
        outs = fresh(*(p[rank].shape for p in parts[rank]), dtype=dtype)
        run = transport.reduce_scatter(xs, outs, dims)
        for _ in range(3):
            run()
            for k, out in enumerate(outs):
                total = sum(own[k][rank].astype(np.float64) for own in parts)
                np.testing.assert_array_equal(out.astype(np.float64), total)
        wholes = fresh(*(SHAPES[i] for i, _ in chosen), dtype=dtype)
        run = transport.all_gather([np.ascontiguousarray(p[rank]) for p in parts[0]], wholes, dims)
        for _ in range(3):
            run()
            for (i, _), whole in zip(chosen, wholes):
                np.testing.assert_array_equal(whole, everyone[0][i])
    for i, shape in enumerate(SHAPES):
        for split, concat in itertools.permutations(range(len(shape)), 2):
            if shape[split] % ranks == 0:
                want = np.concatenate([np.split(own[i], ranks, split)[rank] for own in everyone], concat)
                (out,) = fresh(want.shape, dtype=dtype)
                transport.all_to_all(everyone[rank][i], out, split, concat)()
                np.testing.assert_array_equal(out, want)


def check_started(transport, ranks, rank):
    xs = [drawn(rank, (12, 4), "float32", 1), drawn(rank, (4, 12), "float32", 2)]
    everyone = [[drawn(r, (12, 4), "float32", 1), drawn(r, (4, 12), "float32", 2)] for r in range(ranks)]
    totals = [sum(own[i] for own in everyone) for i in range(2)]
    token = np.ones((), np.int64)
    wholes, parts = fresh((12, 4), (4, 12), dtype="float32"), fresh((12 // ranks, 4), (4, 12 // ranks), dtype="float32")
    runs = [transport.start(xs, token, "all_reduce", (), 0), transport.start(xs, token, "reduce_scatter", (0, 1), 1),
            transport.wait(parts, 1), transport.wait(wholes, 0)]
    gathered = fresh((12 * ranks, 4), (4, 12 * ranks), dtype="float32")
    runs += [transport.start(xs, token, "all_gather", (0, 1), 2), transport.wait(gathered, 2)]
    for _ in range(2):
        for run in runs:
            run()
        for whole, total in zip(wholes, totals):
            np.testing.assert_array_equal(whole, total)
        for part, total, dim in zip(parts, totals, (0, 1)):
            np.testing.assert_array_equal(part, np.split(total, ranks, dim)[rank])
        for i, whole in enumerate(gathered):
            np.testing.assert_array_equal(whole, np.concatenate([own[i] for own in everyone], i))


def main():
    from mpi4py import MPI

    ranks = MPI.COMM_WORLD.size
    job = Job(Mesh({"data": ranks}))
    group, here = job.groups["data"], job.watch.near
    assert list(job.near) == ["data"] * (here.size == ranks) and job.apart == ["data"] * (here.size < ranks)
    far.LONGEST = 4096  # so that some sums take several messages
    transports = [Far(job.mpi, group, job.watch)]
    if here.size > 1:  # what shares memory: all ranks, or those of this host
        transports += [near(job.mpi, here, job.watch), Near(job.mpi, here, job.watch, slot=8192)]
    for transport, dtype in itertools.product(transports, DTYPES):
        check(transport, transport.group.size, transport.group.rank, dtype)
    check_started(job.far["data"], ranks, job.rank)
    for transport in transports:
        (out,) = fresh((3,), dtype=bool)
        transport.all_reduce([np.arange(3) < transport.group.rank], [out], "sum")()
        np.testing.assert_array_equal(out, np.arange(3) < transport.group.size - 1)
    if job.near:
        check_programs(job)
    job.barrier()
    if job.rank == 0:
        print("fine")


if __name__ == "__main__":
    main()
