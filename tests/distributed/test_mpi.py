"""Training under mpiexec against one process, in f64: losses, every gradient, five AdamW steps.

One job per number of ranks runs all of its cases, one thread a rank.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

import treadle as td
from treadle.distributed.comm import mpi_available
from treadle.distributed.launch import command

from . import job

MISSING = mpi_available()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"no MPI: {MISSING}")


FAST = ("zero1-adamw", "tp2", "1f1b")  # the others run with the slow tests


def ranks_of(name):
    return td.distributed.Mesh(job.CASES[name][0]).size


def start(ranks, script, *arguments, timeout=900, **environment):
    """Runs a script on ranks; gives the finished process."""
    folder = Path(__file__).parent
    return subprocess.run(command(ranks, [str(folder / script), *map(str, arguments)]), capture_output=True, text=True,
                          timeout=timeout, env={**os.environ, "TREADLE_NUM_THREADS": "1", "PYTHONWARNINGS": "default",
                                                **environment})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """case -> (arrays, facts), each job run once."""
    folder, found = tmp_path_factory.mktemp("jobs"), {}

    def get(name):
        if name not in found:
            names = [n for n in job.CASES if ranks_of(n) == ranks_of(name) and (n in FAST) == (name in FAST)]
            done = start(ranks_of(name), "job.py", folder, *names)
            assert done.returncode == 0, done.stderr[-4000:]
            for n in names:
                found[n] = dict(np.load(folder / f"{n}.npz")), json.loads((folder / f"{n}.json").read_text())
        return found[name]

    return get


@pytest.fixture(scope="module")
def expected():
    """The same model on one process, by its options."""
    found = {}

    def get(name):
        options = job.CASES[name][1]
        key = repr({k: v for k, v in options.items() if k not in ("zero", "sequence", "vocabulary")})
        if key not in found:
            found[key] = job.run(name, {}, options)[:2]
        return found[key]

    return get


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in job.CASES])
def test_as_one_process(name, results, expected):
    (losses, state), (got, facts) = expected(name), results(name)
    tol = 1e-7 if job.CASES[name][1].get("optimizer") else 1e-9
    np.testing.assert_allclose(got.pop("losses"), losses, rtol=tol)
    assert set(got) == set(state)
    for parameter, array in state.items():
        np.testing.assert_allclose(got[parameter], array, rtol=tol, atol=tol, err_msg=parameter)
    assert sum(facts["calls"].values()) > 0


@pytest.mark.slow
def test_zero_keeps_a_part_of_everything(results, expected):
    whole = {k: sum(v.nbytes for v in expected("zero3-4")[1].values()) for k in ("parameter",)}
    assert results("zero3-4")[1]["bytes"]["parameter"] == whole["parameter"] / 4
    assert results("zero3-4")[1]["bytes"]["state"] == 2 * whole["parameter"] / 4
    assert results("zero2-4")[1]["bytes"]["parameter"] == whole["parameter"]
    assert results("zero2-4")[1]["bytes"]["state"] == 2 * whole["parameter"] / 4
