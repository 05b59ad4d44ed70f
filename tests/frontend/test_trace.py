"""Tracing: what a graph holds, what is captured, what cannot be traced."""

from __future__ import annotations

import numpy as np
import pytest

import treadle as td
from treadle.frontend import recording, tree

from .tools import assert_close, run_graph, traced

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_a_graph_as_text():
    def mlp(x, w, b):
        return td.maximum(x @ w + b, 0)

    graph = td.trace(mlp, td.spec((2, 3)), td.spec((3, 4)), td.spec((4,), name="bias"))
    assert (
        str(graph)
        == """\
graph mlp(%x: f32[2,3] data, %w: f32[3,4] data, %bias: f32[4] data) -> (f32[2,4]) {
  %0 = matmul(%x, %w) : f32[2,4]
  %1 = add(%0, %bias) : f32[2,4]
  %2 = constant() {value=f32[] <0.0>} : f32[]
  %3 = maximum(%1, %2) : f32[2,4]
  return %3
}"""
    )
    assert td.ir.parse(str(graph)) == graph
    assert all(node.loc.file == __file__ for node in graph.nodes)


def test_arguments_and_results_are_trees():
    def fn(pair, options, scale, *, shift):
        return {"sum": pair[0] * scale + shift["by"], "rest": [options["b"], (pair[1],)], "none": None}

    args = ((X, X + 1), {"b": X[0], "a": np.float32(2)}, 3)
    graph = td.trace(fn, *args, shift={"by": td.ones(3)})
    assert [v.name for v in graph.inputs] == ["pair_0", "pair_1", "options_a", "options_b", "shift_by"]
    result = run_graph(graph, *args, np.ones(3, np.float32))
    assert_close(result, {"sum": X * 3 + 1, "rest": [X[0], (X + 1,)], "none": None})
    assert [v.name for v in td.trace(lambda *xs: xs[0], X, X).inputs] == ["xs0", "xs1"]


def test_symbolic_sizes():
    batch = td.Dim("batch")
    graph = td.trace(
        lambda x: td.softmax(x.reshape((x.shape[0], -1)) @ td.ones((6, 2)), 1)[:, 0].sum() / 2,
        td.spec((batch, 2, 3)),
    )
    assert str(graph.inputs[0].type) == "f32[batch,2,3]"
    graph = td.trace(
        lambda x: td.concatenate([x, x[1:-1], td.zeros((x.shape[0], 3))]).mean(0), td.spec(("n", 3))
    )
    assert_close(
        run_graph(graph, X.repeat(2, 0)),
        np.concatenate([X.repeat(2, 0), X.repeat(2, 0)[1:-1], np.zeros((4, 3))]).mean(0).astype("f4"),
    )
    with pytest.raises(td.TreadleError, match="known only at run time"):
        td.trace(lambda x: list(x), td.spec(("n", 3)))
    with pytest.raises(td.TreadleError, match="known only at run time"):
        td.trace(lambda x: x * x.shape[0], td.spec(("n", 3)))


def test_concrete_tensors_are_captured_once():
    w, table, scalar = td.nn.Parameter(X), td.tensor(X[0]), td.tensor(2.0)
    state = td.tensor(0.0, role="state")
    w.name = "weight"
    graph = td.trace(lambda x: (x * w + w * table + table * scalar, state + 1), X)
    assert [(v.name, r) for v, r in zip(graph.inputs, graph.roles)][1:] == [
        ("weight", "parameter"),
        ("", "constant"),
        ("", "state"),
    ]
    assert [t is e for t, e in zip(graph.meta["captures"].values(), (w, table, state))] == [True] * 3
    assert sum(n.op.name == "constant" for n in graph.nodes) == 2


def test_arrays_are_constants_or_captured_by_size():
    big = np.ones((64, 64), np.float32)
    graph = td.trace(lambda x: x + X + X @ np.ones((3, 3), np.float32) + (td.matmul(big, big) + big)[0, 0], X)
    assert len(graph.inputs) == 2 and graph.inputs[1].shape == (64, 64)
    X2 = X.copy()
    graph = td.trace(lambda x: x + X2, X)
    X2 += 1
    assert_close(run_graph(graph, X), X + X)


def test_assignments_become_outputs_that_take_over_inputs():
    counter, other = td.tensor([0.0], role="state"), td.tensor([5.0], role="state")

    def fn(x):
        before = counter + 0
        counter.assign(counter + x.sum())
        other.assign(counter)
        return before, counter * 1

    graph = td.trace(fn, X)
    assert graph.aliases == {2: 1, 3: 2}
    assert_close(run_graph(graph, X), (np.zeros(1, "f4"), np.full(1, 15, "f4")))
    assert counter.item() == 15 and other.item() == 15
    with pytest.raises(td.TreadleError, match="traced value"):
        td.trace(lambda x: x.assign(0.0), X)
    scalar = td.tensor(1.0)
    with pytest.raises(td.TreadleError, match="role='state'"):
        td.trace(lambda x: [x * scalar, scalar.assign(2.0)], X)


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda x: 1 if x.sum() > 0 else 2, "td.where for elements, td.cond"),
        (lambda x: float(x.sum()), "astype"),
        (lambda x: range(x.sum().astype("int64")), "td.scan"),
        (lambda x: np.sin(x), "td"),
        (lambda x: x.numpy(), "return it"),
        (lambda x: x.item(), "return it"),
        (lambda x: x.tolist(), "return it"),
        (lambda x: x and x, "td.cond"),
        (lambda x: int(x[0, 0]), "astype"),
        (lambda x: x.backward(), "td.grad"),
        (lambda x: object(), "must return tensors"),
        (lambda x: setattr(x, "requires_grad", True), "argnums"),
        (lambda x: td.tensor([[x]]) and np.asarray([x, x]), "elements"),
    ],
)
def test_what_cannot_be_traced(fn, words):
    with pytest.raises(td.TreadleError, match=words) as caught:
        td.trace(fn, X)
    assert "test_trace.py" in str(caught.value)


def test_a_leaked_tracer_is_refused():
    leaked = []
    td.trace(lambda x: [leaked.append(x * 2), x][1], X)
    for use in (
        lambda: leaked[0] + 1,
        lambda: td.trace(lambda x: x + leaked[0], X),
        lambda: leaked[0].numpy(),
        lambda: bool(leaked[0]),
    ):
        with pytest.raises(
            td.TreadleError, match=r"belongs to the trace of 'lambda', which is over.*"
        ) as caught:
            use()
        assert "test_trace.py" in str(caught.value) and "made at" in str(caught.value)
    with pytest.raises(td.TreadleError, match="is not the one that is recording"):
        td.trace(lambda x: td.trace(lambda y: y + x, X) and x, X)
    assert td.ones(1).item() == 1, "the builders are closed again after an error"


def test_guards_tell_what_a_trace_depends_on():
    scalar = td.tensor(2.0)
    graph = td.trace(lambda x: x * scalar, X)
    ((read, then),) = graph.meta["guards"]
    before = recording.world.changes
    assert read() is then
    scalar.assign(3.0)
    assert read() is not then and recording.world.changes > before


def test_elements_of_concrete_tensors_read_while_tracing():
    state, plain = td.tensor(np.zeros(2), role="state"), td.tensor([1.0, 2.0])
    with pytest.raises(td.TreadleError, match="keep the present value for ever"):
        td.trace(lambda x: x * state.numpy()[0], X)
    f = td.compile(lambda x: x * plain.tolist()[0])
    assert_close(f(X), X)
    plain.assign(3.0)
    assert_close(f(X), X * 3)


def test_no_grad_inside_a_trace_stops_gradients():
    def fn(x):
        with td.no_grad():
            y = x * 3
        return (x * y).sum()

    assert_close(traced(td.grad(fn), X), X * 3)
    with td.no_grad():
        assert_close(traced(td.grad(lambda x: (x * x).sum()), X), X * 2)


def test_specs():
    assert str(td.spec((8, "seq"), "bf16")) == "bf16[8,seq]" and td.spec(3, np.int8).shape == (3,)
    for wrong in (lambda: td.spec((1.5,)), lambda: td.spec((2,), "float7"), lambda: td.spec((-1,))):
        with pytest.raises(td.TreadleError):
            wrong()


def test_trees():
    from collections import namedtuple

    Pair = namedtuple("Pair", "left right")
    value = {"b": [1, (2, None)], "a": Pair(3, {"z": 4})}
    leaves, structure = tree.flatten(value)
    assert leaves == [3, 4, 1, 2] and tree.unflatten(structure, leaves) == value and structure.leaves == 4
    assert list(structure.paths()) == ["['a'].left", "['a'].right['z']", "['b'][0]", "['b'][1][0]"]
    assert hash(structure) == hash(tree.flatten(value)[1])
    assert str(tree.flatten((1, [2], {"k": None}))[1]) == "(*, [*], {'k': None})"
    assert tree.map(lambda a, b: a + b, (1, [2]), (3, [4])) == (4, [6])
    assert tree.from_json(tree.to_json(tree.flatten((1, {"k": [2]}))[1])) == tree.flatten((1, {"k": [2]}))[1]
    with pytest.raises(td.TreadleError, match="differ"):
        tree.map(max, (1, 2), [1, 2])

    class Box:
        def __init__(self, x):
            self.x = x

    tree.register(Box, lambda b: {"x": b.x}, lambda parts: Box(parts["x"]))
    assert_close(
        traced(lambda b: b.x * 2, Box(X))
        if False
        else td.trace(lambda b: Box(b.x * 2), Box(X)).output_types[0].shape,
        (2, 3),
    )
    with pytest.raises(td.TreadleError, match="registered"):
        tree.register(Box, vars, Box)
