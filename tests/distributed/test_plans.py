"""Whole training steps (forward, backward, clipping, AdamW) under plans, all ranks in one process, in f64; and the
bytes that a step sends against the formulas."""

import numpy as np
import pytest

import treadle as td
from treadle.distributed import Mesh, MeshError, lockstep
from treadle.distributed.buckets import bucket, message_bytes
from treadle.ir import interp
from treadle.ir.errors import AttributeValueError, ShapeError
from treadle.ir.parse import parse
from treadle.ir.verify import verify

from . import job


def step_of(plan, clip=0.05, accumulate=1, dropout=0.0):
    """A training step and its batch; the mesh is given to `traced`, so no ranks are needed."""
    td.random.seed(0)
    model = job.Gpt(dropout).to("float64")
    opt = td.optim.AdamW(model.parameters(), lr=1e-2)
    inner = td.train_step(model, job.lm_loss, opt, clip_norm=clip, accumulate=accumulate)
    return td.distributed.parallelize(inner, Mesh({}), plan), job.batch_of({})


def arrays_of(made, batch):
    """Inputs of a traced step: the batch, numbers, and what the captured tensors hold."""
    captures, leaves = made.graph.meta["captures"], list(batch)
    found = []
    for i, (v, role) in enumerate(zip(made.whole.inputs, made.whole.roles)):
        if i in captures:
            found.append(captures[i].numpy())
        elif role == "scalar":
            found.append(np.asarray({"clip_norm": 0.05}.get(v.name, 0.01), v.dtype.np))
        else:
            found.append(np.asarray(leaves.pop(0)).reshape(v.shape))
    return found


def traced(axes, plan, **options):
    """A step partitioned for a mesh, and its inputs."""
    step, batch = step_of(plan, **options)
    step.mesh, step.plan = Mesh(axes), plan
    if "tensor" in axes:
        object.__setattr__(plan, "shard", job.tensor_plan(step.inner.model))
    made = step.trace(*batch)
    return made, arrays_of(made, batch), step


def check(made, arrays):
    verify(made.graph)
    assert parse(str(made.graph)) == made.graph
    want = interp.run(made.whole, arrays)
    for got, expected in zip(lockstep.run_whole(made, arrays), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


PLANS = [
    ({"data": 2}, {}, {}), ({"data": 4}, {"zero": 1}, {}), ({"data": 4}, {"zero": 3}, {}),
    ({"tensor": 4}, {}, {}), ({"data": 2, "tensor": 2}, {"zero": 1}, {}), ({"data": 2, "tensor": 4}, {"zero": 3}, {}),
    ({"data": 2}, {"zero": 1}, {"accumulate": 2}), ({"data": 2, "tensor": 2}, {}, {"dropout": 0.25}),
    ({"data": 2}, {"zero": 1, "recompute": True}, {"accumulate": 2, "dropout": 0.25}),
    ({"data": 3}, {}, {}), ({"data": 5, "tensor": 2}, {"zero": 3}, {}), ({"data": 3}, {"zero": 2}, {"accumulate": 2}),
]


@pytest.mark.parametrize(("axes", "plan", "options"), PLANS, ids=str)
def test_a_step_is_that_of_one_process(axes, plan, options):
    made, arrays, _ = traced(axes, td.distributed.Plan(**plan), **options)
    check(made, arrays)


def split_bytes(made, ranks):
    """Bytes of the parameters that ZeRO splits (those with a dimension that divides)."""
    return sum(v.type.nbytes for v, role in zip(made.whole.inputs, made.whole.roles)
               if role == "parameter" and any(s % ranks == 0 for s in v.shape))


@pytest.mark.parametrize("ranks", [2, 4])
def test_zero_sends_what_the_paper_says(ranks):
    """With P bytes of parameters: data parallelism and ZeRO-1/2 send 2 P (n - 1) / n, ZeRO-3 half as much again
    (arXiv:1910.02054, section 7)."""
    sent = {}
    for zero in (0, 1, 2, 3):
        made, _, _ = traced({"data": ranks}, td.distributed.Plan(zero=zero), clip=None)
        sent[zero] = made.traffic()
    size, part = split_bytes(made, ranks), (ranks - 1) / ranks
    few = 2 * 16 * part + 8  # the loss: its sum, its tokens
    assert sent[0]["all_reduce:data"] == pytest.approx(2 * size * part, abs=few)
    for zero in (1, 2):
        assert sent[zero]["reduce_scatter:data"] == pytest.approx(size * part, abs=few)
        assert sent[zero]["all_gather:data"] == pytest.approx(size * part, abs=few)
        assert sent[zero]["all_reduce:data"] <= few
    assert sent[3]["reduce_scatter:data"] == pytest.approx(size * part, abs=few)
    assert size * part <= sent[3]["all_gather:data"] <= 2 * size * part * 1.3  # the table is tied: read three times


@pytest.mark.parametrize("zero", [1, 3])
def test_parts_within_a_host_are_repeated_on_others(zero):
    """Hybrid sharding: gradients are scattered within a host, and only these parts summed between hosts."""
    plan = td.distributed.Plan(data=("hosts", "data"), zero_over="data", zero=zero)
    made, arrays, _ = traced({"hosts": 2, "data": 4}, plan, clip=None)
    check(made, arrays)
    once, sent, few = split_bytes(made, 4), made.traffic(), 400
    assert sent["reduce_scatter:data"] == pytest.approx(once * 3 / 4, abs=few)
    assert sent["all_reduce:hosts"] == pytest.approx(2 * once / 4 / 2, abs=few)
    assert sent["all_reduce:data"] <= few and not sent["reduce_scatter:hosts"] and not sent["all_gather:hosts"]
    assert once * 3 / 4 <= sent["all_gather:data"] + 1 <= (1 if zero == 1 else 2) * once * 3 / 4 * 1.3
    both = traced({"hosts": 2, "data": 2}, td.distributed.Plan(data=("hosts", "data"), zero=zero), clip=None)
    check(*both[:2])
    assert both[0].traffic()["all_gather:hosts"] > 400


def test_gradients_go_in_buckets():
    made, arrays, step = traced({"data": 2}, td.distributed.Plan())
    assert sum(made.collectives().values()) <= 4
    few = bucket(made.graph, 1 << 30)
    many = traced({"data": 2}, td.distributed.Plan(bucket_bytes=2000))[0]
    assert sum(many.collectives().values()) > 6
    assert sum(many.traffic().values()) == pytest.approx(sum(made.traffic().values()), abs=40)
    made.graph = few
    check(made, arrays)
    check(many, arrays)


def test_gradients_leave_while_the_backward_pass_runs():
    made, arrays, _ = traced({"data": 2}, td.distributed.Plan(bucket_bytes=2000))
    names = [n.op.name for n in made.graph.nodes]
    starts = {n.attrs["tag"]: i for i, n in enumerate(made.graph.nodes) if n.op.name == "start"}
    waits = {n.attrs["tag"]: i for i, n in enumerate(made.graph.nodes) if n.op.name == "wait"}
    assert starts.keys() == waits.keys() and len(starts) > 2
    meanwhile = [names[starts[tag]:waits[tag]].count("matmul") for tag in starts]
    assert sum(count > 0 for count in meanwhile) > len(starts) / 2
    for i in waits.values():  # each message holds a copy of what it sends: two at a time
        assert sum(starts[tag] < i <= waits[tag] for tag in starts) <= 2
    check(made, arrays)
    plain = traced({"data": 2}, td.distributed.Plan(bucket_bytes=2000, overlap=False))[0]
    assert plain.collectives() == made.collectives() and plain.traffic() == made.traffic()


@pytest.mark.parametrize(("axes", "options"), [({"data": 2}, {}), ({"data": 2, "tensor": 2}, {"accumulate": 2})],
                         ids=str)
def test_parameters_are_gathered_while_the_layer_before_computes(axes, options):
    made, arrays, _ = traced(axes, td.distributed.Plan(zero=3, bucket_bytes=2000), clip=None, **options)
    nodes = made.graph.nodes
    starts = {n.attrs["tag"]: i for i, n in enumerate(nodes) if n.attrs.get("kind") == "all_gather"}
    waits = {n.attrs["tag"]: i for i, n in enumerate(nodes) if n.op.name == "wait"}
    heavy = [any(n.op.has("contraction") for n in nodes[i:waits[tag]]) for tag, i in starts.items()]
    assert sum(heavy) > 0.6 * len(starts) > 10
    assert made.under_way() <= 2 * max(message_bytes(n) for n in nodes if n.op.name == "start")
    check(made, arrays)
    plain = traced(axes, td.distributed.Plan(zero=3, bucket_bytes=2000, overlap=False), clip=None, **options)[0]
    assert plain.collectives() == made.collectives() and plain.traffic() == made.traffic()
    assert not any(n.op.name == "start" for n in plain.graph.nodes)


def test_plans_that_do_not_fit():
    with pytest.raises(MeshError, match=r"matches no parameter; there are: tokens.weight"):
        step_of(td.distributed.Plan(shard={"*.query": (None,)}))
    with pytest.raises(MeshError, match="ZeRO needs the batch's axis 'data' that is also in zero_over, 'tensor'"):
        td.distributed.Plan(zero=1, zero_over="tensor").check(Mesh({"data": 2, "tensor": 2}), [])
    with pytest.raises(MeshError, match="under a pipeline the batch is split over one mesh axis"):
        td.distributed.Plan(data=("a", "b")).check(Mesh({"a": 2, "b": 2, "pipe": 2}), [])
    with pytest.raises(AttributeValueError, match="zero_over is 3; expected one of the axes `data`"):
        td.distributed.Plan(zero_over=3)
    with pytest.raises(AttributeValueError, match="zero is 4"):
        td.distributed.Plan(zero=4)
    step, batch = step_of(td.distributed.Plan())
    step.mesh = Mesh({"data": 3, "tensor": 2})
    step.plan = td.distributed.Plan(shard={"norm.bias": (("data", "tensor"),)})
    with pytest.raises(ShapeError, match=r"norm.bias .* the 2 ranks of 'tensor' and 3 ranks of 'data'; nothing is pad"):
        step.trace(*batch)
    pytest.importorskip("mpi4py", reason="needs the extra `mpi`")
    with pytest.raises(MeshError, match="needs 2 ranks, but this job has 1"):
        td.distributed.parallelize(step.inner, Mesh({"data": 2}))
    with pytest.raises(MeshError, match="only one mesh axis may be -1"):
        td.distributed.make_mesh({"data": -1, "tensor": -1})


def test_an_axis_of_one_rank_calls_nobody():
    for zero in (0, 1, 3):
        made, _, _ = traced({"data": 1, "tensor": 2}, td.distributed.Plan(zero=zero))
        assert {name.split(":")[1] for name in made.collectives()} <= {"tensor"}
