"""Scripts on a mesh go on as on one process whatever they do between steps, and never read what is out of date."""

import json

import numpy as np
import pytest

from treadle.distributed.comm import mpi_available

from .usage_job import run, two_steps

MESHES = [{"data": 2}, {"tensor": 2}, {"pipe": 2}]


@pytest.mark.skipif(mpi_available() is not None, reason=f"no MPI: {mpi_available()}")
def test_between_steps(place):
    done = place.start(2, "usage_job.py", *map(json.dumps, MESHES), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (want, said), by_turns = run({}), two_steps({})
    assert said.startswith("read: ") and len(want) >= 10
    for axes, ranks in zip(MESHES, json.loads(done.stdout), strict=True):
        for rank, (found, said, two) in enumerate(ranks):
            np.testing.assert_allclose(two, by_turns, rtol=1e-9, err_msg=str(axes))
            np.testing.assert_allclose(found, want, rtol=1e-9, err_msg=str(axes))
            where = f"another stage (pipe={1 - rank})" if "pipe" in axes else "in parts on the ranks of the mesh"
            assert where in said and "call step.gather() on every rank" in said
