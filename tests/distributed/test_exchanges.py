"""Collectives over shared memory and over messages of MPI, against NumPy: every op, dtypes, splits, sizes of rounds."""

import re
import signal

import numpy as np
import pytest

from treadle.distributed.comm import mpi_available
from treadle.distributed.near import blocks

from .launched import Place

MISSING = mpi_available()


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.skipif(MISSING is not None, reason=f"no MPI: {MISSING}")
def test_every_collective_gives_what_numpy_gives(ranks, place):
    done = place.start(ranks, "exchanges.py", timeout=300)
    assert done.returncode == 0 and done.stdout == "fine\n", done.stderr[-4000:]


@pytest.mark.skipif(MISSING is not None, reason=f"no MPI: {MISSING}")
def test_who_is_killed_in_the_midst_of_short_sums_is_missed():
    done = Place().launched(2, "rounds.py")
    said = re.search(r"rank 1 \(process \d+\) is gone; it was last in all_reduce:data of step 7 \(call \d+\). "
                     r"Rank 0 was in all_reduce:data of step 7", done.stderr)
    assert done.returncode == 128 + signal.SIGKILL and said, done.stderr[-4000:]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (2, 3, 5), (5, 1, 1), (0, 3)])
@pytest.mark.parametrize("most", [1, 2, 4, 6, 100])
def test_blocks_cover_an_array_once(shape, most):
    seen = np.zeros(shape, int)
    for block in blocks(shape, most):
        assert 0 < seen[block].size <= most
        seen[block] += 1
    assert (seen == 1).all()
