"""What a rank holds during a step, under ZeRO: the plan of the arena, by what its tensors are for, against the formulas
of the paper (arXiv:1910.02054, section 5), and the memory of processes under mpiexec."""

import json

import numpy as np
import pytest

import treadle as td
from treadle.distributed import Mesh
from treadle.distributed.comm import mpi_available
from treadle.frontend.compile import passes
from treadle.ir.pipeline import Pipeline

from . import gpt

RANKS = 4
OBJECTS = 6 << 20  # what a traced and loaded program of this size takes besides tensors, whatever their width
MISSING = mpi_available()


def planned(plan, ranks=RANKS, **options):
    """The program of a rank for a GPT of eight equal layers, and the bytes of the model and of a layer."""
    step = td.distributed.parallelize(gpt.step_of(gpt.EIGHT, **options), Mesh({}), plan)
    step.mesh, step.plan = Mesh({"data": ranks}), plan
    return step.trace(*gpt.batch(gpt.EIGHT, ranks)), *gpt.nbytes(step.inner.model)


def accounted(made):
    """Bytes at the peak of the arena, by subject, with what lies between steps and what is under way."""
    from treadle.schedules.lower import lower
    from treadle.schedules.plan import plan_memory

    found = {"messages": made.under_way(), **plan_memory(lower(Pipeline(passes()).run(made.graph), "cpu")).at_peak}
    for v, role in zip(made.graph.inputs, made.graph.roles):
        subject = {"parameter": "parameters", "state": "states"}.get(role, "activations")
        found[subject] = found.get(subject, 0) + v.type.nbytes
    return found


@pytest.mark.parametrize(("zero", "clip"), [
    (3, 1.0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, None), (2, 1.0), (2, None), (3, None)))])
def test_a_rank_holds_its_part_and_a_layer(zero, clip):
    """Parameters, gradients and AdamW's two states at a quarter where the stage says so, plus one layer: what is
    gathered, made and sent just now."""
    made, model, layer = planned(td.distributed.Plan(zero=zero), clip_norm=clip)
    found = accounted(made)
    promised = {1: model + model + 2 * model / RANKS, 2: model + 3 * model / RANKS, 3: 4 * model / RANKS}[zero]
    assert sum(found.values()) - found["activations"] <= promised + layer
    assert found["activations"] < layer  # the batch is small: nothing of a layer's size is called an activation


@pytest.mark.slow
def test_without_zero_everything_is_whole():
    made, whole, _ = planned(td.distributed.Plan(), clip_norm=1.0)
    found = accounted(made)
    assert found["parameters"] >= whole and found["gradients"] >= 0.99 * whole and found["states"] >= 2 * whole


@pytest.mark.slow
@pytest.mark.skipif(MISSING is not None, reason=f"no MPI: {MISSING}")
def test_the_process_of_a_rank_holds_no_more(place, tmp_path):
    """The same, of the memory that processes fill under mpiexec: from making the model to the third step no rank ever
    has the whole of it. (Programs are compiled by a first job: that takes memory of another kind.)"""
    cases = [{"name": name, "zero": zero, "width": width, "clip": 1.0}
             for name, zero, width in (("warm", 3, 64), ("zero3", 3, 256), ("zero2", 2, 256))]
    for _ in range(2):
        done = place.start(RANKS, "parts_job.py", tmp_path, *map(json.dumps, cases))
        assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(RANKS):
        three, two = (json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for name in ("zero3", "zero2"))
        model, layer = three["model"], three["layer"]
        assert three["made"] < layer / 2  # nothing is drawn until the parts are known
        assert max(three["peaks"]) <= 4 * model / RANKS + layer + OBJECTS
        assert max(two["peaks"]) <= model + 3 * model / RANKS + layer + OBJECTS
        assert sum(three["memory"].values()) <= 4 * model / RANKS + layer
        assert "lives in parts" in three["read"] and "call step.gather()" in three["read"]
        np.testing.assert_allclose(three["losses"], two["losses"], rtol=1e-4)
