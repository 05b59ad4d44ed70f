"""Prices of a model's layers, and plans made of them, against the programs that ranks really run."""

import json
from dataclasses import replace

import numpy as np
import pytest

import treadle as td
from treadle.autodiff.budget import timeline
from treadle.distributed import Mesh, Plan
from treadle.distributed.comm import mpi_available
from treadle.distributed.cost import Cluster, Link
from treadle.distributed.layouts import Candidate, Chain, Costs, Machine
from treadle.distributed.planner import Choices
from treadle.frontend import pricing
from treadle.frontend.building import passes
from treadle.frontend.planning import ModelPrices, Planned, plan_of, search, shard_of, slots_of
from treadle.ir.dtypes import as_dtype
from treadle.ir.errors import ArgumentsError, AttributeValueError
from treadle.ir.pipeline import Pipeline
from treadle.ir.types import TensorType

from . import gpt

CLUSTER = Cluster(Link(1e-6, 1e9), flops=1e9, memory=1e9)
EXAMPLES = 8
TYPES = [TensorType((EXAMPLES, gpt.SMALL["length"]), as_dtype("int64"))] * 2


def step_of(accumulate=1, dtype="float32", layers=gpt.SMALL["layers"]):
    return gpt.step_of({**gpt.SMALL, "layers": layers}, dtype, clip_norm=1.0, accumulate=accumulate)


def prices_of(dtype="float32", layers=3, **options):
    return ModelPrices(Planned.of(step_of(1, dtype, layers), TYPES), CLUSTER, **options)


def candidate(data=1, tensor=1, pipe=1, micro=1, **more):
    axes = (("pipe", pipe), ("data", data), ("tensor", tensor))
    return Candidate(axes, micro, EXAMPLES // data // micro, **more)


def layout_of(prices, c, bounds=(0,)):
    units = prices.exact(c.size("tensor"), c.examples, c.recompute)
    return Costs(c, Chain(units), Machine(c.mesh.size, 1e12, CLUSTER)).layout(bounds)


def test_weights_are_split_as_megatron_does():
    """Columns, then rows; the table by the vocabulary; nothing else. Nobody said so."""
    prices = prices_of()
    column, row = ("tensor", None), (None, "tensor")
    assert shard_of(prices.model, prices, layout_of(prices, candidate(tensor=2))) == {
        "tokens.weight": column, "blocks.*.q.weight": column, "blocks.*.q.bias": ("tensor",),
        "blocks.*.k.weight": column, "blocks.*.k.bias": ("tensor",), "blocks.*.v.weight": column,
        "blocks.*.v.bias": ("tensor",), "blocks.*.out.weight": row, "blocks.*.up.weight": column,
        "blocks.*.up.bias": ("tensor",), "blocks.*.down.weight": row}


def test_a_plain_net_finds_pairs_of_columns_and_rows():
    """Two layers, of which neither alone would pay."""
    layers = [td.nn.Linear(64, 256), td.nn.Linear(256, 64)]
    model = td.nn.Sequential(layers[0], td.nn.Tanh(), layers[1])
    f32 = TensorType((8, 64), as_dtype("float32"))
    cluster = Cluster(Link(1e-5, 1e8), flops=1e9, memory=1e10)
    what = Planned.of(lambda x, y: td.mean((model(x) - y) ** 2), [f32, f32], [model])
    prices = ModelPrices(what, cluster)
    found = {what.name(prices.pricer(8, 2).loss, i): d for run in prices.runs(2) for i, d in run.dims.items()}
    weights = [d for name, d in found.items() if name.endswith("weight")]
    assert weights == [("tensor", None), (None, "tensor")]


def test_equal_layers_are_priced_once(monkeypatch):
    made = []
    real = pricing.Pricer._price
    monkeypatch.setattr(pricing.Pricer, "_price", lambda self, *a: (made.append(1), real(self, *a))[1])

    def count(layers):
        made.clear()
        prices_of(layers=layers).exact(2, 4, False)
        return len(made)

    assert count(8) == count(3)


LAYOUTS = [({"data": 2}, {}), ({"data": 2}, {"zero": 1}), ({"data": 4}, {"zero": 3}), ({"tensor": 2}, {}),
           ({"data": 2, "tensor": 2}, {"zero": 1}), ({"data": 2}, {"micro": 2}), ({"data": 2}, {"micro": 2, "zero": 3})]


def real_step(prices, layout):
    """The program of a rank under a layout without a pipeline, partitioned and not compiled."""
    c = layout.candidate
    step = td.distributed.parallelize(step_of(c.micro), Mesh({}))
    step.mesh, step.plan = c.mesh, plan_of(prices.model, prices, layout)
    return step.trace(*gpt.batch(gpt.SMALL, EXAMPLES))


@pytest.mark.parametrize(("axes", "options"), LAYOUTS, ids=str)
def test_what_a_rank_sends(axes, options):
    """Exact but for what the model leaves out: ZeRO's small tensors that do not divide, sums of the loss."""
    prices = prices_of()
    layout = layout_of(prices, candidate(**axes, **options))
    assert layout.sent == pytest.approx(sum(real_step(prices, layout).traffic().values()), rel=0.1)


def test_interpolated_units_are_near_the_priced_ones():
    prices = prices_of()
    for tensor, examples, again in ((1, 4, False), (2, 2, False), (2, 4, True)):
        near, exact = prices.units(tensor, examples, again), prices.exact(tensor, examples, again)
        for name in ("forward", "backward", "sent"):
            assert sum(getattr(u, name) for u in near) == pytest.approx(sum(getattr(u, name) for u in exact), rel=0.25)


def test_recomputation_keeps_what_is_handed_on():
    prices = prices_of()
    plain, again = prices.exact(1, 4, False), prices.exact(1, 4, True)
    stream = 4 * gpt.SMALL["length"] * gpt.SMALL["width"] * 4
    assert sum(u.activations for u in again) <= (len(again) + 1) * stream < sum(u.activations for u in plain) / 2
    assert sum(u.backward for u in again) > sum(u.backward for u in plain)


def test_given_patterns_are_taken():
    shard = {"*.up.weight": ("tensor", None), "*.up.bias": ("tensor",), "*.down.weight": (None, "tensor")}
    prices = prices_of(shard=shard)
    layout = layout_of(prices, candidate(tensor=2))
    assert shard_of(prices.model, prices, layout) == {
        "blocks.*.up.weight": ("tensor", None), "blocks.*.up.bias": ("tensor",),
        "blocks.*.down.weight": (None, "tensor")}
    assert layout.sent == pytest.approx(sum(real_step(prices, layout).traffic().values()), rel=0.1)


def test_a_training_step_brings_its_optimizer():
    assert prices_of().model.slots == pytest.approx(2.0)
    assert slots_of("sgd") == 0 and slots_of("AdamW") == 2 and slots_of("lion") == 1 and slots_of("momentum") == 1
    with pytest.raises(ArgumentsError, match="there is no optimizer 'adamx'; there are: .*adamw"):
        slots_of("adamx")


def test_a_model_of_one_batch_size_is_refused():
    weight = td.nn.Linear(4, 4)
    f32 = TensorType((8, 4), as_dtype("float32"))
    what = Planned.of(lambda x: td.mean(weight(x.reshape((2, 16)).reshape((8, 4)))), [f32], [weight])
    with pytest.raises(ArgumentsError, match="cannot be traced for a micro-batch of 2 of its 8 examples"):
        search(ModelPrices(what, CLUSTER), Machine(2, 1e9, CLUSTER))
    with pytest.raises(ArgumentsError, match="no parameters to train"):
        search(ModelPrices(Planned.of(lambda x: td.mean(x), [f32]), CLUSTER), Machine(2, 1e9, CLUSTER))


def test_the_search_gives_exact_layouts_that_fit():
    prices = prices_of()
    free = search(prices, Machine(4, 1e12, CLUSTER), most=3)
    assert [x.seconds for x in free.layouts] == sorted(x.seconds for x in free.layouts)
    limit = free.layouts[0].nbytes * 0.7
    tight = search(prices, Machine(4, limit, CLUSTER)).layouts[0]
    assert tight.nbytes <= limit and tight.seconds >= free.layouts[0].seconds
    c = tight.candidate
    assert tight.units == prices.exact(c.size("tensor"), c.examples, c.recompute)


# Plans that run ------------------------------------------------------------------------------------------------------


PLANNED = [{"pipe": (2,), "tensor": (2,), "schedules": ("1f1b",), "recompute": (False,)},
           {"pipe": (2,), "tensor": (1,), "schedules": ("interleaved",), "zero": (1,), "recompute": (True,)},
           {"pipe": (1,), "tensor": (2,), "zero": (2,), "micro": (2,), "recompute": (False,)},
           {"pipe": (1,), "tensor": (1,), "zero": (1,), "micro": (1,), "recompute": (False,)}]


@pytest.mark.slow
@pytest.mark.skipif(mpi_available() is not None, reason="needs MPI")
@pytest.mark.parametrize("number", range(len(PLANNED)))
def test_a_planned_layout_runs(number, place, tmp_path):
    """Planned for four devices, written, read by four ranks, and trained: the losses and parameters of one process."""
    prices = prices_of("float64")
    best = search(prices, Machine(4, 1e12, CLUSTER), choices=Choices(**PLANNED[number])).layouts[0]
    path = tmp_path / "plan.json"
    plan = plan_of(prices.model, prices, best)
    plan.save(path)
    assert Plan.load(path) == plan
    done = place.start(4, "planned_job.py", path, tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr[-4000:]
    got = dict(np.load(tmp_path / "out.npz"))
    alone = step_of(best.candidate.micro, "float64")
    np.testing.assert_allclose(got.pop("losses"), gpt.losses(alone), rtol=1e-9)
    facts = json.loads(str(got.pop("facts")))
    for name, tensor in alone.model.state_dict().items():
        np.testing.assert_allclose(got[name], tensor.numpy(), rtol=1e-7, atol=1e-9, err_msg=name)
    if plan.cut is not None:
        kept = {int(s): n for fact in facts for s, n in fact["kept"].items()}
        handed = sum(run[-1].output for run in best.runs()[:-1])  # the runtime keeps it apart
        assert sum(kept.values()) + handed == pytest.approx(sum(u.activations for u in best.units), rel=0.2)
    else:  # inputs of the compiled step (parameters, states, batch) and what lies between its kernels
        assert facts[0]["memory"] == pytest.approx(best.nbytes, rel=0.25)


def test_plans_that_do_not_match(tmp_path):
    step = step_of()
    with pytest.raises(td.distributed.MeshError, match="give parallelize a mesh"):
        td.distributed.parallelize(step)
    alone = td.distributed.parallelize(step, plan=Plan(mesh={}))
    assert alone.mesh.size == 1
    with pytest.raises(td.distributed.MeshError, match="the plan counts 4 micro-batches, the training step 1: make it"):
        td.distributed.parallelize(step, Mesh({"data": 2}), Plan(accumulate=4))
    with pytest.raises(AttributeValueError, match="a plan with a `weight` cannot be saved"):
        Plan(weight=lambda x, y: 1).save(tmp_path / "p.json")
    for text in ("", "[]", '{"treadle": "plan 0"}', '{"treadle": "plan 1", "colour": 1}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(AttributeValueError, match="holds no plan"):
            Plan.load(tmp_path / "bad.json")
    with pytest.raises(AttributeValueError, match="holds no plan"):
        Plan.load(tmp_path / "missing.json")
    assert replace(Plan(), shard={"a": ("tensor", None)}) == Plan(shard={"a": ("tensor", None)})


def test_layers_computed_again_without_a_pipeline():
    """The same step, with less waiting for the backward pass, as its plan says."""
    prices = prices_of("float64")
    peaks, results = [], []
    for again in (False, True):
        step = td.distributed.parallelize(step_of(1, "float64"), Mesh({}), Plan(recompute=again))
        graph = Pipeline(passes()).run(step.trace(*gpt.batch(gpt.SMALL, EXAMPLES)).graph)
        peaks.append(timeline(graph).peak)
        results.append(gpt.losses(step))
    assert peaks[1] < 0.8 * peaks[0]
    np.testing.assert_allclose(results[1], results[0], rtol=1e-12)
    kept = [sum(u.activations for u in prices.exact(1, EXAMPLES, again)) for again in (False, True)]
    assert kept[1] < 0.5 * kept[0]
