"""Random steps under random plans (`random_steps.py`), and small graphs for what they brought to light."""

import pytest

import treadle as td
from treadle.distributed import Mesh, Sharding
from treadle.ir.builder import GraphBuilder, emit
from treadle.ir.types import TensorType

from . import random_steps
from .test_partition import check


@pytest.mark.parametrize("first", range(0, 56, 8))
def test_random_steps_are_those_of_one_process_or_refused(first):
    done = 0
    for seed in range(first, first + 8):
        try:
            random_steps.run(random_steps.case(seed))
            done += 1
        except td.ShapeError as error:
            assert "make it" in str(error) and "or leave the dimension whole" in str(error)
    assert done >= 3


def test_a_view_keeps_the_order_in_which_axes_cut():
    """[data,-,-,tensor] seen as one dimension: that is no cut by data first and then in 32 blocks."""
    with GraphBuilder("main") as builder:
        x = builder.input(TensorType((4, 2, 4, 4), "float64"), "x")
        builder.output(emit("reshape", x, shape=(128,)))
    check(builder.graph, Mesh({"tensor": 2, "data": 2}), {0: Sharding(("data", None, None, "tensor"))},
          {0: Sharding((("data", "tensor:32"),))})


@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 3}, {"data": 2, "tensor": 4}], ids=str)
def test_a_later_axis_leaves_room_where_a_sum_was_brought(sizes):
    """The sum over data goes to its parts, (data, -); the dimension does not divide over both axes."""
    with GraphBuilder("main") as builder:
        x = builder.input(TensorType((6, 4), "float64"), "x")
        p = builder.input(TensorType((4,), "float64"), "p", "parameter")
        total = emit("reduce_sum", x, axes=(0,))
        builder.output(total * 2.0 + p)
        builder.output(emit("tanh", total))
    check(builder.graph, Mesh(sizes), {0: Sharding(("data", "tensor")), 1: Sharding(("data",))},
          {0: Sharding(("data",)), 1: Sharding(("tensor",))})


def test_an_earlier_axis_leaves_room_where_a_value_is_to_lie():
    with GraphBuilder("main") as builder:
        x = builder.input(TensorType((4, 2), "float64"), "x")
        y = emit("annotate", emit("tanh", x), dims=("tensor", ""))
        builder.output(emit("square", y))
    check(builder.graph, Mesh({"data": 2, "tensor": 4}), {0: Sharding(("data", None))}, {0: Sharding(("data", None))})


def test_a_value_that_cannot_be_constrained_is_named_by_its_line():
    model = td.nn.Linear(4, 5)

    def loss(model, x):
        return td.mean(td.distributed.constrain(model(x), None, "tensor:2"))
    step = td.distributed.parallelize(td.train_step(model, loss, td.optim.SGD(model.parameters(), lr=0.1)), Mesh({}))
    step.mesh = Mesh({"tensor": 2})
    with pytest.raises(td.ShapeError, match=r"(?s)a value that `constrain` names .*make it 8.*test_random_steps.py:"):
        step.trace(td.zeros((4, 4)))
