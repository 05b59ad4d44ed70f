"""Ops from outside the package on a mesh: all ranks in one process, against one process."""

import contextlib

import numpy as np
import pytest

import treadle as td
from treadle.distributed import Mesh, Sharding, lockstep
from treadle.distributed.partition import partition
from treadle.frontend import plugins
from treadle.ir import interp

X, W = (np.random.default_rng(0).standard_normal(shape) for shape in ((4, 6), (6, 8)))
MESH = Mesh({"data": 2, "tensor": 2})


@contextlib.contextmanager
def registered(name, operands, **rules):
    yield plugins.register_op(name, operands, **rules)
    plugins.unregister_op(name)


def product(**rules):
    """x @ w under another name, with gradients."""
    return registered("user_product", "x w", infer=lambda x, w: x.with_shape((*x.shape[:-1], w.shape[-1])),
                      reference=lambda x, w: x @ w, **rules,
                      vjp=lambda ct, out, x, w: (ct @ w.T, td.swapaxes(x, -1, -2) @ ct))


def on_mesh(function, inputs, *arrays):
    """What a function gives on the mesh, compared with one process; and the program of a rank."""
    graph = td.trace(function, *arrays)
    made = partition(graph, MESH, inputs)
    for got, want in zip(lockstep.run_whole(made, arrays), interp.run(graph, arrays), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
    return made


@pytest.mark.parametrize(("where", "collectives"), [
    ({0: ("data", None), 1: (None, "tensor")}, {"all_gather:data", "all_gather:tensor"}),
    ({0: ("data", "tensor"), 1: ("tensor", None)}, {"all_gather:data", "all_reduce:tensor"})])
def test_a_rule_says_what_is_split_together(where, collectives):
    with product(shard="b k, k n -> b n") as op:
        made = on_mesh(lambda x, w: op(x, w), {i: Sharding(d) for i, d in where.items()}, X, W)
        (node,) = [n for n in made.graph.nodes if n.op.name == "user_product"]
        assert node.result.shape[0] == 2 and set(made.collectives()) == collectives


def test_gradients_of_an_op_with_a_rule():
    with product(shard="b k, k n -> b n") as op:
        def loss(x, w):
            return (op(td.tanh(x), w) ** 2).mean()

        where = {0: Sharding(("data", None)), 1: Sharding((None, "tensor"))}
        made = on_mesh(td.grad(loss, argnums=(0, 1)), where, X, W)
        assert made.collectives()["all_reduce:data"] == 1  # the gradient of w


def test_what_has_to_be_whole_is_gathered():
    with registered("user_cumulated", "x", infer=lambda x: x, reference=lambda x: np.cumsum(x, -1),
                    shard="... . -> ... .") as op:
        for dims, local in ((("data", "tensor"), (2, 6)), ((None, "tensor"), (4, 6))):
            made = on_mesh(lambda x: op(x), {0: Sharding(dims)}, X)
            assert [n.result.shape for n in made.graph.nodes if n.op.name == "user_cumulated"] == [local]


def test_without_a_rule():
    """An elementwise op is split anywhere; one that is simpler ops as they are; of others nothing is assumed."""
    split = {0: Sharding(("data", "tensor"))}
    rules = {"infer": lambda x: x, "reference": lambda x: x - x.mean(-1, keepdims=True)}
    with registered("user_centred", "x", **rules, decompose=lambda x: x - x.mean(-1, keepdims=True)) as op:
        assert "all_reduce:tensor" in on_mesh(lambda x: op(x), split, X).collectives()
    with registered("user_centred", "x", **rules) as op:
        made = on_mesh(lambda x: op(x), split, X)
        assert [n.result.shape for n in made.graph.nodes if n.op.name == "user_centred"] == [(4, 6)]
    with registered("user_twice", "x", infer=lambda x: x, reference=lambda x: 2 * x, traits=("elementwise",)) as op:
        made = on_mesh(lambda x: op(x), split, X)
        assert [n.result.shape for n in made.graph.nodes if n.op.name == "user_twice"] == [(2, 3)]


def test_any_number_of_operands_and_broadcasting():
    with registered("user_sum", "*xs", infer=lambda *xs: xs[0], reference=lambda *xs: sum(xs[1:], xs[0]),
                    shard="... -> ...") as op:
        where = {0: Sharding(("data", None)), 1: Sharding(("data", None))}
        made = on_mesh(lambda x, y: op(x, y, x[:1]), where, X, X + 1)
        assert [n.result.shape for n in made.graph.nodes if n.op.name == "user_sum"] == [(2, 6)]


@pytest.mark.parametrize(("text", "problem"), [
    ("b k, k n", "there is no ->"), ("b k -> b", "labels 1 operands, the op has 2"),
    ("b 2, k n -> b n", "'2' is no label"), ("b b, k n -> b n", "'b' stands twice in one place"),
    ("b k, k n -> b m", "'m' is in no operand"),
    ("b ... k, k n -> b n", "'...' is no label")])
def test_rules_that_do_not_read(text, problem):
    with pytest.raises(td.RegistryError, match=f"rule of 'user_product' is .*{problem}.*such as 'b k, k n -> b n'"):
        product(shard=text).__enter__()
    with product():  # nothing was registered
        pass


def test_rules_of_another_rank():
    message = r"labels 2 dimensions of a f64\[2,4,6\]"
    with product(shard="b k, k n -> b n") as op, pytest.raises(td.ShapeError, match=message):
        on_mesh(lambda x, w: op(x, w), {0: Sharding(("data", None, None))}, np.stack([X, X]), W)
