"""Checkpoints written at one mesh and loaded at others."""

import json

import numpy as np
import pytest

import treadle as td
from treadle.distributed.comm import mpi_available
from treadle.ir.errors import CheckpointError

from . import job
from .test_mpi import start

MISSING = mpi_available()
OPTIONS = {"optimizer": "adamw", "clip": 0.05, "accumulate": 4}


@pytest.mark.slow
@pytest.mark.skipif(MISSING is not None, reason=f"no MPI: {MISSING}")
def test_any_mesh_loads_what_any_mesh_saved(tmp_path):
    losses, state, _ = job.run("whole", {}, OPTIONS)
    saved, tensor = {"zero": {"data": 2}, "pipe": {"pipe": 2}}, {"tensor": 2}
    cases = [[mesh, {**OPTIONS, "zero": int(name == "zero"), "name": f"save-{name}", "stop": 2,
                     "save": str(tmp_path / name)}] for name, mesh in saved.items()]
    cases += [[mesh, {**OPTIONS, "zero": int(mesh is saved["zero"]), "name": f"{a}-{i}", "load": str(tmp_path / a)}]
              for i, (a, mesh) in enumerate([("zero", saved["zero"]), ("zero", tensor), ("pipe", saved["zero"])])]
    done = start(2, "job.py", tmp_path, *map(json.dumps, cases))
    assert done.returncode == 0, done.stderr[-3000:]
    for a in saved:
        one = job.run("one", {}, {**OPTIONS, "load": str(tmp_path / a)})
        np.testing.assert_allclose(one[0], losses[2:], rtol=1e-7)
    for case in cases[len(saved):]:
        got = dict(np.load(tmp_path / f"{case[1]['name']}.npz"))
        np.testing.assert_allclose(got.pop("losses"), losses[2:], rtol=1e-7)
        for name, array in state.items():
            np.testing.assert_allclose(got[name], array, rtol=1e-7, atol=1e-7)
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"


def test_what_is_no_checkpoint(tmp_path):
    model = td.nn.Linear(2, 2)
    step = td.distributed.parallelize(
        td.train_step(model, lambda m, x: td.mean(m(x)), td.optim.SGD(model.parameters(), lr=0.1)),
        td.distributed.Mesh({}))
    with pytest.raises(CheckpointError, match="is no checkpoint of a mesh"):
        step.load(tmp_path)
    step.save(tmp_path / "a", {"epoch": "3"})
    assert step.load(tmp_path / "a") == {"epoch": "3"}
    step.save(tmp_path / "a")
    assert step.load(tmp_path / "a") == {}
    other = td.nn.Linear(3, 2)
    step = td.distributed.parallelize(
        td.train_step(other, lambda m, x: td.mean(m(x)), td.optim.SGD(other.parameters(), lr=0.1)),
        td.distributed.Mesh({}))
    with pytest.raises(CheckpointError, match=r"has \[2, 2\] for weight, the model \[2, 3\]"):
        step.load(tmp_path / "a")
    (tmp_path / "a" / "part-00000.safetensors").unlink()
    step.inner.model = model
    with pytest.raises(CheckpointError, match="cannot be read|has"):
        step.load(tmp_path / "a")
