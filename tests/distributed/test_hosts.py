"""Ranks of two hosts: network namespaces over a veth pair, nothing shared but files."""

import json
import re
import subprocess
import time

import numpy as np
import pytest

from treadle.distributed.launch import _is_hydra, find_mpiexec

from .test_mpi import expected  # noqa: F401 (a fixture)

SUITE = ("gpt-tp4", "gpt-zero3", "gpt-dp2xtp2", "gpt-dp2xpp2", "resnet-dp2xtp2")
"""Cases of job.py: of a mesh of two axes the last lies on one host, the first between hosts."""


@pytest.fixture
def lasting():
    """Ranks outlast the death of another."""
    if not _is_hydra(find_mpiexec()):
        pytest.skip("Open MPI ends ranks whose connections break")


def test_ranks_find_out_who_is_where(hosts, tmp_path):
    done = hosts.launched(4, "--logs", tmp_path, "--no-prefix", "whereabouts.py", TREADLE_NUM_THREADS=None)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads((tmp_path / f"rank{r}.log").read_text().splitlines()[-1]) for r in range(4)]
    assert [t["near"] for t in told] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [t["linked"] for t in told] == [[2, 3], [2, 3], [0, 1], [0, 1]]
    assert len({t["host"] for t in told}) == 2 and told[3]["host"] == hosts.b
    assert all(t["sum"] == 6 and t["threads"] == told[0]["threads"] for t in told)
    assert json.loads(done.stdout.splitlines()[-1]) == told[0], "rank 0 alone is shown"


@pytest.mark.slow
def test_training_is_that_of_one_process(hosts, expected, tmp_path):  # noqa: F811
    before = hosts.sent()
    done = hosts.launched(4, "job.py", tmp_path, *SUITE, timeout=800, TREADLE_COMM_TIMEOUT="300")
    assert done.returncode == 0, done.stderr[-3000:]
    parameters = 0
    for name in SUITE:
        losses, state = expected(name)
        got = dict(np.load(tmp_path / f"{name}.npz"))
        np.testing.assert_allclose(got.pop("losses"), losses, rtol=1e-7)
        for parameter, array in state.items():
            tol = 1e-9 if parameter.endswith(".grad") else 1e-7
            np.testing.assert_allclose(got[parameter], array, rtol=tol, atol=tol, err_msg=f"{name} {parameter}")
        parameters += sum(array.nbytes for array in state.values())
    assert hosts.sent() - before > parameters, "it went over the wire"


@pytest.mark.usefixtures("lasting")
def test_a_rank_of_the_other_host_that_dies(hosts, tmp_path):
    started = time.monotonic()
    done = hosts.launched(4, "faults.py", '{"data": 4}', "kill", "collective", tmp_path / "run",
                          TREADLE_COMM_TIMEOUT="100")
    assert done.returncode == 137 and "rank 3 (on " in done.stderr and time.monotonic() - started < 60
    said = re.findall(r"\[(\d)\] .*DistributedError: (rank .*)", done.stderr)
    assert {rank for rank, _ in said} == {"0", "1", "2"}, done.stderr[-3000:]
    for rank, words in said:
        seen = r"\(process \d+\) is gone; it was last in \w+:data of step 2|of another host is gone: its process"
        assert re.match(rf"(rank \d failed: DistributedError in .*: )?rank 3 ({seen})", words), (rank, words)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["raise", "hang"])
def test_the_others_of_both_hosts_say_what_happened(kind, hosts, tmp_path):
    done = hosts.launched(4, "faults.py", '{"data": 4}', kind, "collective", tmp_path / "run",
                          TREADLE_COMM_TIMEOUT="6")
    assert done.returncode == 1
    words = {"raise": r"rank 3 failed: ValueError in \w+:data of step 2: on purpose",
             "hang": r"waited \d+ s in \w+:data of step 2: .*rank 3"}[kind]
    assert re.search(words, done.stderr), done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.usefixtures("lasting")
def test_a_host_that_does_not_answer_is_given_up(hosts, tmp_path):
    started = time.monotonic()
    done = hosts.launched(4, "faults.py", '{"data": 4}', "unplug", "collective", tmp_path / "run",
                          TREADLE_COMM_TIMEOUT="100", TEST_WIRE=hosts.wires[1])
    hosts.up()
    assert done.returncode != 0 and time.monotonic() - started < 60
    assert re.search(r"\[[01]\] .*DistributedError: rank [23] of another host is gone: its host does not answer",
                     done.stderr), done.stderr[-3000:]
    assert "is lost: its host does not answer" in done.stderr
    for _ in range(50):
        left = subprocess.run(["pgrep", "-f", str(tmp_path / "run")], capture_output=True, text=True).stdout.split()
        if not left:
            break
        time.sleep(0.2)
    assert not left, "the ranks on the other side have ended, too"


@pytest.mark.slow
@pytest.mark.usefixtures("lasting")
def test_a_job_of_two_hosts_goes_on_after_a_restart(hosts, tmp_path):
    mesh, calm = '{"data": 2, "tensor": 2}', tmp_path / "calm"
    done = hosts.launched(4, "faults.py", mesh, "none", "none", calm)
    assert done.returncode == 0, done.stderr[-3000:]
    done = hosts.launched(4, "--max-restarts", "1", "faults.py", mesh, "kill", "collective", tmp_path / "run")
    assert done.returncode == 0 and "starting again (1 of 1)" in done.stderr, done.stderr[-3000:]
    found, wanted = (dict(np.load(p.with_suffix(".npz"))) for p in (tmp_path / "run", calm))
    for name, array in wanted.items():
        assert found[name].tobytes() == array.tobytes(), name
