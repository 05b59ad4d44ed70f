"""Partitioned graphs, all ranks in one process, against the graph of one process, in f64; and what they send."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir.graphs import arrays_for, graphs

from treadle import autodiff  # noqa: F401
from treadle.autodiff import grad_graph
from treadle.distributed import Mesh, MeshError, Sharding, lockstep
from treadle.distributed.partition import partition
from treadle.distributed.sharding import split
from treadle.ir import interp
from treadle.ir.builder import GraphBuilder, build, copy_into, emit
from treadle.ir.errors import ShapeError
from treadle.ir.parse import parse
from treadle.ir.types import TensorType
from treadle.ir.verify import verify

from .models import arrays_of, convnet, gpt, with_gradients

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


def check(graph, mesh, inputs, outputs=None, seed=0):
    """The partitioned graph, verified, round-tripped and compared."""
    made = partition(graph, mesh, inputs, outputs)
    verify(made.graph)
    assert parse(str(made.graph)) == made.graph
    arrays = arrays_of(graph, seed)
    with np.errstate(all="ignore"):
        for got, want in zip(lockstep.run_whole(made, arrays), interp.run(graph, arrays), strict=True):
            np.testing.assert_allclose(got, want, **TOLERANCE)
    return made


@st.composite
def meshes(draw):
    sizes = draw(st.sampled_from([(2,), (3,), (4,), (2, 2), (2, 3), (4, 2), (2, 2, 2)]))
    return Mesh(dict(zip("abc", sizes)))


def some_shardings(draw, values, mesh, padded=False):
    """Random annotations that fit, or may be padded."""
    found = {}
    for i, v in enumerate(values):
        if draw(st.booleans()):
            placements = {}
            for axis in mesh.names:
                ways = [split(d, blocks) for d in range(v.rank) for blocks in (1, 1, 2, 3)]
                fit = [p for p in ways if fits(v, {**placements, axis: p}, mesh, padded)]
                if fit and draw(st.booleans()):
                    placements[axis] = draw(st.sampled_from(fit))
            found[i] = Sharding.of(v.rank, placements)
    return found


def fits(v, placements, mesh, padded):
    try:
        Sharding.of(v.rank, placements).check(v.type, mesh, padded=padded)
    except ShapeError:
        return False
    return True


@settings(max_examples=60)
@given(st.data())
def test_random_graphs_on_random_meshes(data):
    graph = data.draw(graphs(dtypes=("float64",), sizes=(1, 2, 4, 6, 12)))
    mesh = data.draw(meshes())
    padded = data.draw(st.booleans())
    graph.roles[:] = ["parameter" if padded else "data"] * len(graph.roles)
    inputs = some_shardings(data.draw, graph.inputs, mesh, padded)
    made = partition(graph, mesh, inputs, some_shardings(data.draw, graph.outputs, mesh, padded))
    verify(made.graph)
    arrays = arrays_for(graph)
    with np.errstate(all="ignore"):
        for got, want in zip(lockstep.run_whole(made, arrays), interp.run(graph, arrays), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * max(1, np.max(np.abs(want), initial=0)))


# Models ------------------------------------------------------------------------------------------------------------

MESHES = {
    "dp2": {"data": 2}, "dp4": {"data": 4}, "tp2": {"tensor": 2}, "dp2 x tp2": {"data": 2, "tensor": 2},
}


def axes_of(mesh):
    return {"data": "data" if "data" in mesh else None, "tensor": "tensor" if "tensor" in mesh else None}


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("extra", [{}, {"sequence": True}, {"vocabulary": True}, {"fused": True}],
                         ids=["plain", "sequence", "vocabulary", "fused"])
def test_gpt(axes, extra):
    mesh = Mesh(axes)
    if extra and "tensor" not in mesh:
        pytest.skip("needs a tensor axis")
    graph, shardings = gpt(**axes_of(mesh), **extra)
    graph, outputs = with_gradients(graph, shardings)
    check(graph, mesh, shardings, outputs)


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_convnet(axes):
    mesh = Mesh(axes)
    graph, shardings = convnet(**axes_of(mesh))
    graph, outputs = with_gradients(graph, shardings)
    check(graph, mesh, shardings, outputs)


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_transformer_block_has_one_all_reduce_per_half_and_direction(layers, fused):
    mesh = Mesh({"tensor": 2})
    graph, shardings = gpt(layers=layers, tensor="tensor", fused=fused)
    forward = check(graph, mesh, shardings)
    assert forward.collectives() == {"all_reduce:tensor": 2 * layers}
    graph, outputs = with_gradients(graph, shardings)
    both = check(graph, mesh, shardings, outputs)
    assert both.collectives() == {"all_reduce:tensor": 4 * layers}
    activation = 4 * 8 * 8 * 8  # batch, seq, width, bytes
    assert both.traffic() == {"all_reduce:tensor": 4 * layers * 2 * activation // 2}


def test_sequence_parallelism_scatters_and_gathers_instead():
    mesh = Mesh({"tensor": 2})
    graph, shardings = gpt(tensor="tensor", sequence=True)
    forward = check(graph, mesh, shardings).collectives()
    assert forward["all_reduce:tensor"] <= 1  # of the loss
    # for the two halves of the block; the head and the loss work on the rank's tokens
    assert forward["reduce_scatter:tensor"] == 2 and forward["all_gather:tensor"] == 2


@pytest.mark.parametrize("axes", [{"tensor": 2}, {"tensor": 4}, {"data": 2, "tensor": 2}], ids=str)
def test_sequence_parallelism_sends_what_tensor_parallelism_does(axes):
    """Korthikanti et al. 2022 (arXiv:2205.05198), section 4.2.2: an all-reduce becomes a reduce-scatter and an
    all-gather, so the bytes are the same. (Here the head's input and the norms' gradients come in besides.)"""
    layers, mesh = 3, Mesh(axes)
    batch, seq, width = 8, 128, 512
    graph, shardings = gpt(batch=batch, seq=seq, width=width, count=4, layers=layers, vocab=4096, **axes_of(mesh),
                           sequence=True, vocabulary=True)
    graph, outputs = with_gradients(graph, shardings)
    made = partition(graph, mesh, shardings, outputs)
    n, replicas = mesh["tensor"], mesh.size // mesh["tensor"]
    activation = batch * seq * width * 8 // replicas
    once = activation * (n - 1) // n
    found = made.collectives()
    # four for each layer; the table's look-up forwards, and the head backwards: scattered; and the other way round
    assert found["reduce_scatter:tensor"] == 4 * layers + 2 and found["all_gather:tensor"] <= 4 * layers + 3
    assert made.traffic()["reduce_scatter:tensor"] == (4 * layers + 2) * once
    positions = seq * width * 8
    assert made.traffic()["all_gather:tensor"] <= (4 * layers + 2) * once + positions


def test_vocabulary_parallel_loss_sends_no_logits():
    mesh = Mesh({"tensor": 2})
    graph, shardings = gpt(batch=8, tensor="tensor", vocabulary=True, vocab=512)
    made = check(graph, mesh, shardings)
    logits = 8 * 8 * 512 * 8
    assert sum(made.traffic().values()) < logits / 2
    assert not any(512 in v.shape for n in made.graph.nodes for v in n.results)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_vocabulary_that_does_not_divide_is_padded(ranks):
    """257 rows over the ranks: what is beyond the end takes part in no maximum, sum or gradient."""
    mesh = Mesh({"tensor": ranks})
    graph, shardings = gpt(batch=8, tensor="tensor", vocabulary=True, vocab=257, count=4)
    graph, outputs = with_gradients(graph, shardings)
    made = check(graph, mesh, shardings, outputs)
    table = next(i for i, v in enumerate(graph.inputs) if v.name == "embedding")
    assert made.graph.inputs[table].shape == (-(-257 // ranks), 8)
    even, shardings = gpt(batch=8, tensor="tensor", vocabulary=True, vocab=256, count=4)
    even, outputs = with_gradients(even, shardings)
    assert made.collectives() == check(even, mesh, shardings, outputs).collectives()
    assert not any(257 in v.shape and v.rank > 1 for n in made.graph.nodes for v in n.results)


@pytest.mark.parametrize("size", [5, 6, 7, 10])
def test_widths_that_do_not_divide_are_padded(size):
    graph = build("half", half, *[TensorType(s, "float64") for s in ((4, 3), (3, size), (size, 3))])
    graph.roles[1] = graph.roles[2] = "parameter"
    column, row = Sharding((None, "tensor")), Sharding(("tensor", None))
    graph, shardings = with_gradients(graph_of_sum(graph), {1: column, 2: row})
    made = check(graph, Mesh({"tensor": 4}), {1: column, 2: row}, shardings)
    assert made.collectives() == {"all_reduce:tensor": 1}


def graph_of_sum(graph):
    """The sum of the squares of a graph's output."""
    with GraphBuilder("loss") as builder:
        inputs = [builder.input(v.type, v.name, role) for v, role in zip(graph.inputs, graph.roles)]
        (out,) = copy_into(graph, inputs)
        builder.output(emit("reduce_sum", emit("square", out), axes=(0, 1)))
    return builder.graph


def test_data_parallelism_reduces_each_gradient_once():
    mesh = Mesh({"data": 4})
    graph, shardings = gpt(data="data")
    graph, outputs = with_gradients(graph, shardings)
    made = check(graph, mesh, shardings, outputs)
    assert made.collectives() == {"all_reduce:data": len(outputs) + 1}  # and the loss
    wanted = sum(graph.outputs[i].type.nbytes for i in outputs) + 8
    assert made.traffic()["all_reduce:data"] == pytest.approx(2 * 3 / 4 * wanted, abs=len(outputs) + 1)


def test_a_dimension_over_two_axes():
    """The batch over data and experts, or a weight over data (ZeRO-3) and tensor on its one dimension that divides."""
    mesh = Mesh({"data": 2, "expert": 2})
    graph, shardings = gpt(data=("data", "expert"))
    made = check(graph, mesh, shardings)
    assert made.inputs[0].dims == (("data", "expert"), None) and made.graph.inputs[0].shape == (1, 8)
    assert made.collectives() == {"all_reduce:data": 1, "all_reduce:expert": 1}
    mesh = Mesh({"data": 2, "tensor": 2})
    whole = {"dims": ("", ""), "whole": ("data",)}
    graph = build("half", lambda x, up, down: half(x, emit("annotate", up, **whole), emit("annotate", down, **whole)),
                  *(TensorType(s, "float64") for s in ((256, 7), (7, 8), (8, 7))))
    made = check(graph, mesh, {0: Sharding(("data", None)), 1: Sharding((None, ("data", "tensor"))),
                               2: Sharding((("data", "tensor"), None))}, {0: Sharding(("data", None))})
    assert [v.shape for v in made.graph.inputs[1:]] == [(7, 2), (2, 7)]
    assert made.collectives() == {"all_gather:data": 2, "all_reduce:tensor": 1}


def test_a_large_table_is_reduced_once_with_all_that_is_added_to_it():
    """Looked up and multiplied with (tied weights): both gradients are partial sums, and no update is gathered."""
    graph, shardings = gpt(batch=8, data="data", vocab=4096)
    graph, outputs = with_gradients(graph, shardings)
    made = check(graph, Mesh({"data": 2}), shardings, outputs)
    assert made.collectives() == {"all_reduce:data": len(outputs) + 1}


GOLDEN = """
graph half(%x: f64[4,4] data, %up: f64[4,4] data, %down: f64[4,4] data) -> (f64[4,4]) {
  %0 = matmul(%x, %up) : f64[4,4]
  %1 = tanh(%0) : f64[4,4]
  %2 = matmul(%1, %down) : f64[4,4]
  %3 = all_reduce(%2) {axis="tensor", size=2} : f64[4,4]
  %4 = add(%3, %x) : f64[4,4]
  return %4
}
"""


def half(x, up, down):
    return emit("matmul", emit("tanh", emit("matmul", x, up)), down) + x


def test_the_program_of_a_rank():
    f64 = [TensorType(s, "float64") for s in ((4, 4), (4, 8), (8, 4))]
    graph = build("half", half, *f64)
    for v, name in zip(graph.inputs, ("x", "up", "down")):
        v.name = name
    made = check(graph, Mesh({"tensor": 2}), {1: Sharding((None, "tensor")), 2: Sharding(("tensor", None))})
    assert str(made.graph).strip() == GOLDEN.strip()


def test_a_gradient_of_the_per_rank_program():
    """The vjp rules of collectives are those of the sum of all ranks' losses."""
    def loss(x):
        whole = emit("all_gather", x, axis="a", size=2, dims=(0,))
        part = emit("reduce_scatter", emit("square", whole), axis="a", size=2, dims=(1,))
        moved = emit("all_to_all", part, axis="a", size=2, split=0, concat=1)
        return emit("reduce_sum", emit("all_reduce", emit("sin", moved), axis="a", size=2), axes=(0, 1))

    graph = grad_graph(build("loss", loss, TensorType((2, 4), "float64")), [0])
    mesh, rng = Mesh({"a": 2}), np.random.default_rng(0)
    xs = [rng.standard_normal((2, 4)) for _ in range(2)]
    direction = [rng.standard_normal((2, 4)) for _ in range(2)]

    def total(step):
        return sum(out[0] for out in lockstep.run(graph, mesh, [[x + step * d] for x, d in zip(xs, direction)]))

    slope = (total(1e-6) - total(-1e-6)) / 2e-6
    grads = [out[1] for out in lockstep.run(graph, mesh, [[x] for x in xs])]
    np.testing.assert_allclose(sum(np.vdot(g, d) for g, d in zip(grads, direction)), slope, rtol=1e-6)


# Bad input ---------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    graph = build("half", half, *[TensorType(s, "float64") for s in ((4, 4), (4, 6), (6, 4))])
    with pytest.raises(ShapeError, match="over the 4 ranks of 'tensor' in 3 blocks; nothing is padded: make it 12"):
        partition(graph, Mesh({"tensor": 4}), {1: Sharding((None, "tensor:3"))})
    with pytest.raises(MeshError, match="no mesh axis 'model'"):
        partition(graph, Mesh({"tensor": 2}), {1: Sharding((None, "model"))})
    with pytest.raises(MeshError, match="uses a mesh axis twice"):
        Sharding(("tensor", "tensor"))
    with pytest.raises(MeshError, match="is for 1 dimensions"):
        partition(graph, Mesh({"tensor": 2}), {1: Sharding(("tensor",))})
    with pytest.raises(MeshError, match="needs 8 ranks, but this job has 2.*treadle launch -n 8"):
        Mesh({"data": 8}).check_world(2)
