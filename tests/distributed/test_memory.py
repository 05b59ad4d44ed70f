"""What a rank holds during a step, under ZeRO: the plan of the arena, by what its tensors are for, against the formulas
of the paper (arXiv:1910.02054, section 5). All ranks in one process."""

import pytest

import treadle as td
from treadle.distributed import Mesh
from treadle.frontend.compile import passes
from treadle.ir.pipeline import Pipeline

from . import gpt8

RANKS = 4


def planned(plan, ranks=RANKS, **options):
    """The program of a rank for a GPT of eight equal layers, and the bytes of the model and of a layer."""
    step = gpt8.step_of({}, plan, **options)
    step.mesh, step.plan = Mesh({"data": ranks}), plan
    return step.trace(*gpt8.batch(ranks)), *gpt8.sizes(step)


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
    made, model, layer = planned(td.distributed.Plan(zero=zero), clip=clip)
    found = accounted(made)
    promised = {1: model + model + 2 * model / RANKS, 2: model + 3 * model / RANKS, 3: 4 * model / RANKS}[zero]
    assert sum(found.values()) - found["activations"] <= promised + layer
    assert found["activations"] < layer  # the batch is small: nothing of a layer's size is called an activation


@pytest.mark.slow
def test_without_zero_everything_is_whole():
    made, whole, _ = planned(td.distributed.Plan(), clip=1.0)
    found = accounted(made)
    assert found["parameters"] >= whole and found["gradients"] >= 0.99 * whole and found["states"] >= 2 * whole
