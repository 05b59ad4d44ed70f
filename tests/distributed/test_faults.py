"""A rank that raises, dies, hangs, ends early or runs something else: the others end within seconds and say so, and a
restarted job ends as one that nothing happened to."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest

from treadle.distributed.comm import mpi_available

MISSING = mpi_available()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"no MPI: {MISSING}")

DATA, PIPE = {"data": 2}, {"pipe": 2}
OP = r"[\w: .>]+"
WORDS = {
    "kill": rf"rank 1 (\(process \d+\) is gone; it was last in {OP} of step \d \(call \d+\)|of another host is gone: "
            rf"its process has ended). Rank 0 was in {OP} of step \d",
    "hang": rf"rank 0 waited 3 s in {OP} of step \d: (rank 1 has not come, it was last in|every rank has come, and one "
            rf"of them hangs: rank 1 in) ({OP}) of step \d",
    "raise": rf"rank 1 failed: ValueError in ({OP}) of step \d: on purpose. Rank 0 was in {OP} of step \d",
}
FAST = {("kill", "collective"), ("kill", "save")}
ACCIDENTS = [pytest.param(kind, where, id=f"{kind} {where}",
                          marks=() if (kind, where) in FAST else pytest.mark.slow)
             for kind in WORDS for where in ("compute", "collective", "receive", "save")]


def run(place, folder, mesh, kind="none", where="none", *options):
    return place.launched(2, *options, "faults.py", json.dumps(mesh), kind, where, folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, place):
    """The final state of a job on a mesh, each run once."""
    folder, found = tmp_path_factory.mktemp("undisturbed"), {}

    def get(mesh):
        name = "-".join(mesh)
        if name not in found:
            done = run(place, folder / name, mesh)
            assert done.returncode == 0 and done.stdout.count("done") == 2, done.stderr[-3000:]
            found[name] = dict(np.load(folder / f"{name}.npz"))
        return found[name]

    return get


@pytest.mark.parametrize(("kind", "where"), ACCIDENTS)
def test_a_restarted_job_ends_as_if_nothing_had_happened(kind, where, place, undisturbed, tmp_path):
    mesh = PIPE if where == "receive" else DATA
    expected, started = undisturbed(mesh), time.monotonic()
    done = run(place, tmp_path / "run", mesh, kind, where, "--max-restarts", "1")
    assert done.returncode == 0 and done.stdout.count("done") == 2, done.stderr[-3000:]
    assert time.monotonic() - started < 100
    left = [name for name in re.findall(r"memory: (\S+)", done.stdout) if Path(name).exists()]
    assert not left, "of memory that ranks shared nothing is left"
    said = re.search(WORDS[kind], done.stderr)
    assert said, done.stderr[-3000:]
    assert "starting again (1 of 1)" in done.stderr and "half-written: []" in done.stdout
    found = dict(np.load(tmp_path / "run.npz"))
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize(("kind", "where", "limit"), [
    ("spin", "kernel", "1"), pytest.param("stop", "collective", None, marks=pytest.mark.slow),
    pytest.param("hang", "receive", "1", marks=pytest.mark.slow)])
def test_a_rank_that_hangs_in_the_middle_of_a_step_is_given_up_soon(kind, where, limit, place, tmp_path):
    mesh, started = PIPE if where == "receive" else DATA, time.monotonic()
    done = place.launched(2, "faults.py", json.dumps(mesh), kind, where, tmp_path / "run", TREADLE_COMM_TIMEOUT="300",
                          TREADLE_STEP_TIMEOUT=limit)
    assert done.returncode == 1 and "done" not in done.stdout and time.monotonic() - started < 100
    what = "has come no further|has not answered" if kind == "stop" else "has come no further"
    last = rf"{OP} of step \d \(call \d+\)" if what == "has come no further" else ".*"
    assert re.search(rf"rank 1 hangs: for \d+ s it ({what}), in the middle of a step. It was last in ({last}). "
                     rf"Rank 0 was in {OP} of step 2. .* TREADLE_STEP_TIMEOUT", done.stderr), done.stderr[-3000:]


@pytest.mark.slow
def test_a_rank_may_take_its_time_between_steps_and_in_the_first(place, tmp_path):
    done = place.launched(2, "faults.py", json.dumps(DATA), "none", "slow", tmp_path / "run",
                          TREADLE_COMM_TIMEOUT="300", TREADLE_STEP_TIMEOUT="0.5")
    assert done.returncode == 0 and done.stdout.count("done") == 2, done.stderr[-3000:]


MISTAKES = {
    "shape": r"different batches: rank 0 has step 2: checksum \w+ of float64\[8,8\].*, rank 1 has step 2: checksum "
             r"\w+ of float64\[4,8\]",
    "data": r"different batches: rank 0 has step 0: checksum (\w+) of .* rank 1 has step 0: checksum (?!\1)",
    "rate": r"optimizers have different numbers: rank 0 .*numbers (\w+); .*, rank 1 .*numbers (?!\1)",
    "eval": r"models are in different modes: rank 0 has .*mode 0.*, rank 1 has .*mode 1",
    "draw": r"random states differ: rank 0 has step 2: .*random state (\S+), rank 1 .*random state (?!\1)",
    "alone": r"wait for each other in different places: .*not rank 0 alone",
    "fewer": r"rank 1 has ended after step 2, but rank 0 waits in [\w: ]+ of step 3: every rank has to do as many",
    "model": r"not agree on what they start from: ranks \[1\] differ from rank 0, first in line 3: rank 0 has "
             "`optimizer",
    "dtype": r"optimizers have different numbers: rank 0 .*; float64 numbers \w+; .*, rank 1 .*; float32 numbers \w+",
    "plan": r"not agree on what they start from: .*rank 0 has `plan: .*zero=1.*, rank 1 has `plan: .*zero=0",
    "seed": r"not agree on what they start from: .*rank 0 has `[\w.]+: f64.* checksum (\w+)`, "
            r"rank 1 .* checksum (?!\1)",
    "mesh": r"do not agree on the mesh, or on what is installed: .* rank 0 has `mesh: data=2`, rank 1 has "
            r"`mesh: other=2`",
    "version": r"do not agree on .* installed: .* rank 0 has `NumPy: [\d.]+`, rank 1 has `NumPy: 0.1`",
    "early": r"rank 1 \(on .*\) ended with exit code 1 first; rank 0 \(on .*\) was still running",
}


@pytest.mark.parametrize("kind", [k if k == "shape" else pytest.param(k, marks=pytest.mark.slow)
                                  for k in MISTAKES])
def test_ranks_that_differ_are_told(kind, place, tmp_path):
    done = run(place, tmp_path / "run", DATA, kind)
    assert done.returncode == 1 and "done" not in done.stdout
    assert re.search(MISTAKES[kind], done.stderr), done.stderr[-3000:]
    if kind not in ("shape", "fewer", "alone", "draw", "eval"):
        assert not (tmp_path / "run").exists(), "nothing was computed"


@pytest.mark.slow
def test_a_mesh_of_another_size_than_the_job(place, tmp_path):
    done = run(place, tmp_path / "run", {"data": 3})
    assert done.returncode == 1 and "Start it with `treadle launch -n 3 script.py`" in done.stderr
