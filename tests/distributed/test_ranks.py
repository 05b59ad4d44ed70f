"""Python values between ranks, and on one process, where they come back as they were given."""

import json

import numpy as np
import pytest

import treadle as td
from treadle.distributed.comm import mpi_available

d = td.distributed


@pytest.mark.skipif(mpi_available() is not None, reason=f"no MPI: {mpi_available()}")
def test_values_of_every_rank(place):
    done = place.start(3, "values_job.py", timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert [f["main"] for f in found] == [True, False, False]
    for f in found:
        assert [(g["rank"], len(g["name"])) for g in f["gathered"]] == [(0, 0), (1, 1000), (2, 2000)]
        assert all(np.isnan(g["nan"][0]) for g in f["gathered"])
        assert f["broadcast"] == [1.0, 1.0] and f["stop"] is True
        assert f["sums"] == [12, 1.5, [3.0, 6.0, 9.0], "float32"] and f["of"] == [1.0, 2, 0]
        assert "rank 0 is in broadcast from rank 0, rank 1 in barrier. Every rank has to call" in f["mixed"]
        assert "rank 0 * of the shapes [2], rank 1 * of the shapes [3]" in f["shapes"]
        assert "root is 3; this job has the ranks 0 to 2" in f["root"]
        assert f["unsendable"].startswith("ArgumentsError: all_gather: function cannot be sent to other ranks")


def test_one_process():
    d.barrier()
    assert d.is_main() and d.rank() == 0 and d.world_size() == 1
    assert d.all_gather("x") == ["x"] and d.broadcast([1, None]) == [1, None]
    sums = d.all_reduce({"correct": 3, "loss": 0.5, "each": td.tensor([1.0, 2.0]), "any": True})
    assert sums["correct"] == 3 and isinstance(sums["correct"], int) and sums["loss"] == 0.5
    np.testing.assert_array_equal(sums["each"], [1, 2])


def test_what_cannot_be_reduced():
    with pytest.raises(td.AttributeValueError, match="op is 'product'; expected sum, mean, max, min"):
        d.all_reduce(1, "product")
    with pytest.raises(td.ArgumentsError, match="'text' is neither a number nor an array of numbers"):
        d.all_reduce({"a": "text"})
    with pytest.raises(td.AttributeValueError, match="root is -1; this job has the ranks 0 to 0"):
        d.broadcast(1, root=-1)
