"""Loops and branches on a mesh: all ranks in one process, against the graph of one process."""

import numpy as np
import pytest

import treadle as td
from treadle.autodiff import grad_graph
from treadle.distributed import Mesh, Sharding, unroll
from treadle.ir.builder import GraphBuilder, emit
from treadle.ir.ops_collective import COLLECTIVES
from treadle.ir.passes import TIDY
from treadle.ir.pipeline import Pipeline
from treadle.ir.types import TensorType

from . import job
from .test_partition import check
from .test_plans import check as check_step
from .test_plans import traced

STEPS, BATCH, WIDTH = 5, 4, 4


def recurrent(kind):
    """Loss and gradients of a recurrent layer over (batch, steps, width), and the parameters' names."""
    td.random.seed(0)
    model = getattr(td.nn, kind)(WIDTH, WIDTH, batch_first=True).to("float64")
    names = dict(model.named_parameters())
    x = np.zeros((BATCH, STEPS, WIDTH))
    graph = td.trace(lambda x: td.mean(td.square(model(x)[0])), x)
    captures = {id(t): name for name, t in names.items()}
    labels = {i: captures[id(t)] for i, t in graph.meta["captures"].items()}
    made = Pipeline(list(TIDY)).run(grad_graph(Pipeline(list(TIDY)).run(graph), sorted(labels)))
    return made, labels


def inside(made):
    """The collectives that stand in a region."""
    return [n.op.name for n in made.graph.walk() if n not in made.graph.nodes and n.op.name in COLLECTIVES]


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("axes", [{"data": 2}, {"data": 4}], ids=str)
def test_gradients_of_weights_are_reduced_once_behind_the_loop(kind, axes):
    graph, labels = recurrent(kind)
    assert any(n.op.name == "scan" for n in graph.nodes)
    made = check(graph, Mesh(axes), {0: Sharding(("data", None, None))})
    assert not inside(made)
    assert made.collectives() == {"all_reduce:data": len(labels) + 1}
    (forward, *_) = [n for n in made.graph.nodes if n.op.name == "scan"]
    assert forward.results[0].shape == (BATCH // axes["data"], WIDTH)


def test_gradients_that_are_kept_in_parts_are_scattered_behind_the_loop():
    graph, labels = recurrent("LSTM")
    parts = {k + 1: Sharding(("data", *(None,) * (graph.outputs[k + 1].rank - 1))) for k in range(len(labels))}
    made = check(graph, Mesh({"data": 2}), {0: Sharding(("data", None, None))}, parts)
    assert not inside(made) and made.collectives() == {"reduce_scatter:data": len(labels), "all_reduce:data": 1}


@pytest.mark.parametrize("axes", [{"tensor": 2}, {"data": 2, "tensor": 2}], ids=str)
def test_gates_are_split_by_blocks(axes):
    """An LSTM's weights hold four gates one after the other: each is split, and the state is gathered in each step."""
    graph, labels = recurrent("LSTM")
    shardings = {i: Sharding(("tensor:4", None) if "weight" in name else ("tensor:4",)) for i, name in labels.items()}
    if "data" in axes:
        shardings[0] = Sharding(("data", None, None))
    outputs = {k + 1: shardings[i] for k, i in enumerate(sorted(labels))}
    made = check(graph, Mesh(axes), shardings, outputs)
    assert set(inside(made)) <= {"all_gather", "reduce_scatter", "all_reduce"}
    (scan, *_) = [n for n in made.graph.nodes if n.op.name == "scan"]
    assert scan.regions[0].inputs[0].shape[-1] == WIDTH // 2  # the state
    assert made.collectives()["all_gather:tensor"] >= STEPS


def layers(count, mesh_axis, width=4):
    """A scan over the layers of an MLP: (x, up, down), weights stacked along the first dimension."""
    with GraphBuilder("layers") as builder:
        x = builder.input(TensorType((4, width), "float64"), "x")
        up = builder.input(TensorType((count, width, 2 * width), "float64"), "up", "parameter")
        down = builder.input(TensorType((count, 2 * width, width), "float64"), "down", "parameter")
        with GraphBuilder("layer") as body:
            h, a, b = (body.input(t.with_shape(t.shape[i:])) for i, t in ((0, x.type), (1, up.type), (1, down.type)))
            body.output(h + emit("matmul", emit("tanh", emit("matmul", h, a)), b))
        y = emit("scan", x, up, down, regions=(body.graph,), n_carry=1, n_xs=2, length=count)
        builder.output(emit("reduce_sum", emit("square", y), axes=(0, 1)))
    shardings = {1: Sharding((None, None, mesh_axis)), 2: Sharding((None, mesh_axis, None))}
    return Pipeline(list(TIDY)).run(grad_graph(builder.graph, [1, 2])), shardings


def test_a_scan_over_layers_has_one_all_reduce_for_each_and_direction():
    count = 6
    graph, shardings = layers(count, "tensor")
    made = check(graph, Mesh({"tensor": 2}), shardings, {1: shardings[1], 2: shardings[2]})
    assert made.collectives()["all_reduce:tensor"] == 2 * count
    made = check(graph, Mesh({"data": 2, "tensor": 2}), {0: Sharding(("data", None)), **shardings},
                 {1: shardings[1], 2: shardings[2]})
    assert made.collectives()["all_reduce:tensor"] == 2 * count and made.collectives()["all_reduce:data"] == 3


@pytest.mark.parametrize(("axes", "plan"), [({"data": 2}, {}), ({"data": 2}, {"zero": 1}),
                                            ({"data": 2, "tensor": 2}, {})], ids=str)
def test_parts_of_a_batch_in_a_loop(axes, plan, monkeypatch):
    """Accumulation over more parts than are written out: over the data axis nothing is sent within the loop."""
    monkeypatch.setattr(unroll, "MOST_STEPS", 1)
    made, arrays, _ = traced(axes, td.distributed.Plan(**plan), accumulate=2, clip=None)
    check_step(made, arrays)
    (scan,) = [n for n in made.graph.nodes if n.op.name == "scan"]
    own = [i for i, v in enumerate(scan.operands) if v.name.endswith("norm1.weight")]
    assert own and all(scan.operands[i].shape == (job.WIDTH,) for i in own)
    assert not [n for n in scan.regions[0].walk() if n.attrs.get("axis") == "data" and n.op.name == "reduce_scatter"]


def test_while_and_cond_are_split_where_their_condition_is_whole():
    """Doubles x until its norm is large; then adds or subtracts a split vector."""
    with GraphBuilder("main") as builder:
        x = builder.input(TensorType((4, 6), "float64"), "x")
        y = builder.input(TensorType((4, 6), "float64"), "y")
        with GraphBuilder("small") as condition:
            h = condition.input(x.type)
            condition.output(emit("lt", emit("reduce_sum", emit("square", h), axes=(0, 1)), h_const(100.0)))
        with GraphBuilder("twice") as body:
            h = body.input(x.type)
            body.output(h * 2.0)
        grown = emit("while_loop", x, regions=(condition.graph, body.graph), n_carry=1)
        branches = []
        for op in ("add", "sub"):
            with GraphBuilder(op) as branch:
                a, b = branch.input(x.type), branch.input(x.type)
                branch.output(emit(op, a, b))
            branches.append(branch.graph)
        total = emit("reduce_sum", grown, axes=(0, 1))
        builder.output(emit("cond", emit("lt", total, h_const(0.0)), grown, y, regions=tuple(branches)))
    made = check(builder.graph, Mesh({"data": 2}), {0: Sharding(("data", None))}, {0: Sharding(("data", None))})
    loops = [n for n in made.graph.nodes if n.regions]
    assert [n.results[0].shape for n in loops] == [(2, 6), (2, 6)]
    assert inside(made) == ["all_reduce"]  # of the norm


def h_const(value):
    return emit("constant", value=np.asarray(value))
