"""Mixed precision, accumulation and recomputation of a whole training step on a mesh, all ranks in one process."""

from collections import Counter

import numpy as np
import pytest

import treadle as td
from treadle.distributed import Mesh, lockstep
from treadle.distributed.partition import kind_of
from treadle.frontend.compile import passes
from treadle.ir import interp
from treadle.ir.errors import AttributeValueError
from treadle.ir.pipeline import Pipeline
from treadle.ir.verify import verify

from . import job
from .test_plans import arrays_of

DATA, BOTH = {"data": 2}, {"data": 2, "tensor": 2}


def inner_of(dtype, loss=job.lm_loss, optimizer=td.optim.AdamW, **options):
    td.random.seed(0)
    model = job.Gpt().to(dtype)
    return td.train_step(model, loss, optimizer(model.parameters(), lr=1e-2), clip_norm=0.05, **options)


def on_a_mesh(inner, axes, plan, batch):
    """A step's program for the ranks of a mesh, without the ranks."""
    step = td.distributed.parallelize(inner, Mesh({}), plan)
    step.mesh, step.plan = Mesh(axes), plan
    if "tensor" in axes:
        object.__setattr__(plan, "shard", job.tensor_plan(inner.model))
    made = step.trace(*batch)
    verify(made.graph)
    return made


def some_batch(examples):
    tokens, labels = np.random.default_rng(1).integers(0, job.VOCAB, (2, examples, job.SEQ))
    labels[0, :5], labels[3] = -100, -100
    return tokens, labels


def reductions(made):
    """The dtypes in which gradients are reduced, and in which parameters are gathered."""
    found = {"reduced": Counter(), "gathered": Counter()}
    for node in made.graph.nodes:
        if kind_of(node) and any(v.rank > 1 for v in node.operands):
            kind = "gathered" if kind_of(node) == "all_gather" else "reduced"
            found[kind][str(node.operands[0].dtype)] += 1
    return found


# Mixed precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_mixed_precision_over_data_is_that_of_one_process(zero):
    """Nothing but the order of f32 sums differs."""
    inner, batch = inner_of("float32", amp="bfloat16"), some_batch(8)
    made = on_a_mesh(inner, DATA, td.distributed.Plan(zero=zero), batch)
    arrays = arrays_of(made, batch)
    for got, want in zip(lockstep.run_whole(made, arrays), interp.run(made.whole, arrays), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.max(np.abs(want), initial=0))
    assert set(reductions(made)["reduced"]) == {"float32"}  # gradients keep their digits
    assert any(n.op.name == "start" for n in made.graph.nodes)  # and leave while the backward pass runs
    if zero == 3:
        assert reductions(made)["gathered"]["bfloat16"] > reductions(made)["gathered"]["float32"]


@pytest.mark.parametrize(("axes", "zero"), [({"tensor": 2}, 0), (BOTH, 3)], ids=str)
def test_mixed_precision_over_tensors_is_that_of_one_process(axes, zero):
    """Partial sums of activations are rounded to 16 bits, so gradients agree to some of these. SGD moves a parameter by
    its gradient; AdamW would blow up the noise of those that are zero (a key's bias has no effect on attention)."""
    inner, batch = inner_of("float32", optimizer=td.optim.SGD, amp="bfloat16"), some_batch(8)
    made = on_a_mesh(inner, axes, td.distributed.Plan(zero=zero), batch)
    arrays = arrays_of(made, batch)
    got, want = lockstep.run_whole(made, arrays), interp.run(made.whole, arrays)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-2)
    steps = [(got[i] - arrays[j], want[i] - arrays[j]) for i, j in made.whole.aliases.items()]
    most = max(np.max(np.abs(b)) for _, b in steps)
    assert most > 0
    for a, b in steps:
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-2 * most)
    if zero == 3:
        assert reductions(made)["gathered"]["bfloat16"] > reductions(made)["gathered"]["float32"]


def test_gradients_travel_in_another_dtype_if_the_plan_says_so():
    inner, batch = inner_of("float32"), some_batch(8)
    plain = on_a_mesh(inner, DATA, td.distributed.Plan(zero=2), batch)
    made = on_a_mesh(inner, DATA, td.distributed.Plan(zero=2, reduce_dtype="bfloat16"), batch)
    assert set(reductions(made)["reduced"]) == {"bfloat16"}
    assert made.traffic()["reduce_scatter:data"] == plain.traffic()["reduce_scatter:data"] / 2
    arrays = arrays_of(made, batch)
    for got, want in zip(lockstep.run_whole(made, arrays), lockstep.run_whole(plain, arrays), strict=True):
        np.testing.assert_allclose(got, want, rtol=3e-2, atol=3e-2 * np.max(np.abs(want), initial=0))
    with pytest.raises(AttributeValueError, match="reduce_dtype is 'int8'; expected 'bfloat16'"):
        td.distributed.Plan(reduce_dtype="int8")


# Accumulation ------------------------------------------------------------------------------------------------------


def counted(tokens, labels):
    return (labels != -100).sum()


@pytest.mark.parametrize(("axes", "zero", "examples"), [(DATA, 0, 10), (DATA, 1, 16), (DATA, 3, 10), (BOTH, 2, 20)],
                         ids=str)
def test_parts_make_the_step_of_the_whole_batch(axes, zero, examples):
    batch = some_batch(examples)
    made = on_a_mesh(inner_of("float64", accumulate=4, weight=counted), axes, td.distributed.Plan(zero=zero), batch)
    whole = on_a_mesh(inner_of("float64"), {}, td.distributed.Plan(), batch)
    got = lockstep.run_whole(made, arrays_of(made, batch))
    for a, b in zip(got, interp.run(whole.whole, arrays_of(whole, batch)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    once = on_a_mesh(inner_of("float64"), axes, td.distributed.Plan(zero=zero), batch).traffic()
    scattered = made.traffic()["reduce_scatter:data"] / (once["reduce_scatter:data"] or 1)
    assert scattered == {0: 0, 1: 1, 2: 4, 3: 4}[zero]  # stages 2 and 3 keep no whole sums


# Recomputation -----------------------------------------------------------------------------------------------------


def planned(graph, budget=None):
    from treadle.schedules.lower import lower
    from treadle.schedules.plan import plan_memory

    after = Pipeline(passes(memory_budget=budget)).run(graph)
    return after, plan_memory(lower(after, "cpu")).arena_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("axes", "zero"), [(DATA, 3), (BOTH, 1)], ids=str)
def test_recomputation_takes_less_memory_and_changes_nothing(axes, zero):
    batch = some_batch(32)
    made = on_a_mesh(inner_of("float64", memory_budget=1 << 30), axes, td.distributed.Plan(zero=zero), batch)
    arrays = arrays_of(made, batch)
    plain, most = planned(made.graph)
    less, arena = planned(made.graph, most * 7 // 10)
    assert arena <= most * 8 // 10 and len(less.nodes) > len(plain.nodes)
    cut = [[s.cut(a, made.mesh, rank) for s, a in zip(made.inputs, arrays)] for rank in range(made.mesh.size)]
    for got, want in zip(lockstep.run(less, made.mesh, cut), lockstep.run(plain, made.mesh, cut)):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_checkpointed_layers_gather_their_parameters_again():
    batch = some_batch(32)
    plans = [td.distributed.Plan(zero=3, recompute=recompute) for recompute in (False, True)]
    plain, made = (on_a_mesh(inner_of("float64"), DATA, plan, batch) for plan in plans)
    arrays = arrays_of(plain, batch)
    for got, want in zip(lockstep.run_whole(made, arrays), lockstep.run_whole(plain, arrays), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    assert made.traffic()["all_gather:data"] > plain.traffic()["all_gather:data"]
    assert planned(made.graph)[1] < 0.8 * planned(plain.graph)[1]


# Modes of the model ------------------------------------------------------------------------------------------------


def by_turns(axes):
    """Losses of steps between which the model changes its mode."""
    td.random.seed(0)
    model, batch = job.Gpt(dropout=0.5).to("float64"), some_batch(8)
    step = td.train_step(model, job.lm_loss, td.optim.SGD(model.parameters(), lr=0.1), accumulate=2)
    step = step if axes is None else td.distributed.parallelize(step, Mesh(axes))
    for training in (True, False, False, True):
        model.train(training)
        yield float(step(*batch).numpy())


def test_a_step_sees_that_the_model_changes_its_mode():
    losses = list(by_turns({}))
    np.testing.assert_allclose(losses, list(by_turns(None)), rtol=1e-9)


class Backwards(td.nn.Module):
    """Reads its layers in the other order, and ends with a square, if it is not trained."""

    def __init__(self):
        super().__init__()
        self.layers = td.nn.ModuleList([td.nn.Linear(4, 4) for _ in range(4)])

    def forward(self, x):
        for layer in self.layers if self.training else list(self.layers)[::-1]:
            x = td.tanh(layer(x))
        return x if self.training else x ** 2


def test_a_pipeline_sees_that_the_model_changes_its_mode():
    """What the stages read stays where it is, though other steps are computed on it."""
    np.testing.assert_allclose(list(by_turns({"pipe": 1})), list(by_turns(None)), rtol=1e-9)


def test_a_pipeline_refuses_a_mode_that_reads_parameters_in_another_order():
    model = Backwards()
    inner = td.train_step(model, lambda model, x: td.mean(model(x)), td.optim.SGD(model.parameters(), lr=0.1))
    step = td.distributed.parallelize(inner, Mesh({"pipe": 1}), td.distributed.Plan(schedule="interleaved", chunks=2))
    step(np.ones((2, 4), np.float32))
    last = {id(p) for layer in list(model.layers)[2:] for p in layer.parameters()}
    step.devices, step.stations = 2, {t: frozenset([int(t in last)]) for t in step.stations}  # as with two devices
    model.eval()
    with pytest.raises(AttributeValueError, match="in this mode, the model reads its parameters in another order"):
        step(np.ones((2, 4), np.float32))
