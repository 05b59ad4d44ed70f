"""Training under mpiexec against one process, in f64: losses, every gradient, five AdamW steps.

One job per number of ranks runs all of its cases, one thread a rank.
"""

import json

import numpy as np
import pytest

import treadle as td
from treadle.distributed.comm import mpi_available

from . import job

MISSING = mpi_available()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"no MPI: {MISSING}")


FAST = ("gpt-zero1", "gpt-tp2", "gpt-pp2-1f1b")  # the others run with the slow tests


def ranks_of(name):
    return td.distributed.Mesh(job.CASES[name][0]).size


@pytest.fixture(scope="module")
def results(tmp_path_factory, place):
    """case -> (arrays, facts), each job run once; what it finished counts even if it fails later."""
    folder, found = tmp_path_factory.mktemp("jobs"), {}

    def get(name):
        if name not in found:
            names = [n for n in job.CASES if ranks_of(n) == ranks_of(name) and (n in FAST) == (name in FAST)]
            done = place.start(ranks_of(name), "job.py", folder, *names)
            for n in names:
                found[n] = done.stdout[-1000:] + done.stderr[-4000:]
                if (folder / f"{n}.json").exists():
                    found[n] = dict(np.load(folder / f"{n}.npz")), json.loads((folder / f"{n}.json").read_text())
        assert not isinstance(found[name], str), found[name]
        arrays, facts = found[name]
        return dict(arrays), facts

    return get


@pytest.fixture(scope="module")
def expected():
    """The same model on one process, by its options."""
    found = {}

    def get(name):
        options = {k: v for k, v in job.CASES[name][1].items()
                   if k in ("model", "dropout", "accumulate", "weight", "fused", "vocab", "turns", "examples")}
        key = repr(options)
        if key not in found:
            found[key] = job.run(name, {}, {**job.CASES[name][1], "sequence": False})[:2]
        return found[key]

    return get


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in job.CASES])
def test_as_one_process(name, results, expected):
    """Losses; every gradient of the first step; and what five steps of AdamW make of the parameters."""
    (losses, state), (got, facts) = expected(name), results(name)
    np.testing.assert_allclose(got["losses"][:1], losses[:1], rtol=1e-9)
    np.testing.assert_allclose(got.pop("losses"), losses, rtol=1e-7)
    assert set(got) == set(state)
    for parameter, array in state.items():
        tol = 1e-9 if parameter.endswith(".grad") else 1e-7
        np.testing.assert_allclose(got[parameter], array, rtol=tol, atol=tol, err_msg=parameter)
    assert sum(facts["calls"].values()) > 0


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow)
                                  for n in job.CASES if "pipe" not in job.CASES[n][0]])
def test_what_was_called_is_what_the_program_says(name, results):
    _, facts = results(name)
    steps = job.CASES[name][1]["stop"]
    called = {}
    for label, count in facts["calls"].items():
        if label.split(":")[0] in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "start"):
            called[label] = count / steps
    assert sum(called.values()) == sum(facts["collectives"].values())
    assert all(called[label] <= count for label, count in facts["collectives"].items() if label in called)


def sent(name):
    """Bytes that each rank sends in a step by the formulas: Rajbhandari et al. 2020 (arXiv:1910.02054), section 7, for
    the data axis, Shoeybi et al. 2019 (arXiv:1909.08053), section 3, for the tensor axis."""
    mesh, options = job.CASES[name]
    ranks, zero, found = mesh.get("data", 1), options.get("zero", 0), {}
    model = job.Gpt() if options["model"] == "gpt" else job.ResNet()
    plan = job.tensor_plan(model) if "tensor" in mesh else {}
    local = [8 * p.size // (mesh.get("tensor", 1) if any(plan.get(n, ())) else 1) for n, p in model.named_parameters()]
    once = sum(local) * (ranks - 1) / ranks
    if ranks > 1:
        found["all_reduce:data"] = 0 if zero else 2 * once
        found["reduce_scatter:data"] = once if zero else 0
        found["all_gather:data"] = 0 if not zero else once if zero < 3 else 2 * once
    if "tensor" in mesh and options["model"] == "gpt":
        n, activation = mesh["tensor"], job.BATCH // ranks * job.SEQ * job.WIDTH * 8
        found["all_reduce:tensor"] = 4 * len(model.blocks) * 2 * activation * (n - 1) / n
    return found


FORMULAS = [f"gpt-{n}" for n in ("dp2", "zero1", "zero2", "zero3", "tp2", "tp4", "dp2xtp2")]
FORMULAS += [f"resnet-{n}" for n in ("dp2", "zero1", "zero2", "zero3")]


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in FORMULAS])
def test_a_step_sends_what_the_papers_say(name, results):
    """Up to scalars (loss, norms), statistics of batch norms, and parameters that do not divide. ZeRO-3 gathers a tied
    table for each of its readers, and not again what the backward pass does not read (biases, looked-up positions)."""
    traffic, expected = results(name)[1]["traffic"], sent(name)
    few = 2000 if name.startswith("resnet") else 400
    for label, nbytes in expected.items():
        again = label == "all_gather:data" and "zero3" in name
        least, most = 0.9 * nbytes if again else nbytes, nbytes + again * 4 * 8 * job.VOCAB * job.WIDTH
        assert least - few <= traffic.get(label, 0) <= most + few, (label, traffic, expected)
    assert all(nbytes <= few for label, nbytes in traffic.items() if label not in expected)


@pytest.mark.slow
def test_zero_keeps_a_part_of_everything(results, expected):
    whole = sum(v.nbytes for k, v in expected("gpt-zero3")[1].items() if k.endswith(".grad"))
    kept = {name: results(name)[1]["bytes"] for name in ("gpt-zero2", "gpt-zero3")}
    assert kept["gpt-zero3"] == {"parameter": whole / 4, "state": 2 * whole / 4}
    assert kept["gpt-zero2"] == {"parameter": whole, "state": 2 * whole / 4}


@pytest.mark.slow
def test_blocks_and_padding_are_not_seen_in_checkpoints(place, tmp_path):
    """Written in parts that are several pieces or padded, read at another mesh."""
    options = {"optimizer": "adamw", "clip": 0.05, "fused": True, "vocabulary": True, "vocab": 17}
    cases = [[{"tensor": 2}, {**options, "name": "save", "stop": 2, "save": str(tmp_path / "at")}],
             [{"data": 2}, {**options, "name": "data", "zero": 1, "load": str(tmp_path / "at")}],
             [{"tensor": 2}, {**options, "name": "tensor", "load": str(tmp_path / "at")}]]
    done = place.start(2, "job.py", tmp_path, *map(json.dumps, cases))
    assert done.returncode == 0, done.stderr[-3000:]
    losses, state, _ = job.run("whole", {}, {**options, "vocabulary": False})
    for name in ("data", "tensor"):
        got = dict(np.load(tmp_path / f"{name}.npz"))
        np.testing.assert_allclose(got.pop("losses"), losses[2:], rtol=1e-9)
        for parameter, array in state.items():
            np.testing.assert_allclose(got[parameter], array, rtol=1e-7, atol=1e-9, err_msg=parameter)
