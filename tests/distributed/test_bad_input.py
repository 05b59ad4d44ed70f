"""What a user may get wrong before anything runs: the error says what, where, and what to do instead."""

import numpy as np
import pytest

import treadle as td
from treadle.distributed import Mesh, MeshError

d = td.distributed
NAMES = ["up.weight", "down.weight"]


def loss_of(model, x, y):
    return td.nn.functional.mse_loss(model(x), y)


@pytest.fixture
def step():
    model = td.nn.Sequential(td.nn.Linear(4, 4), td.nn.Linear(4, 2))
    return td.train_step(model, loss_of, td.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(("field", "value", "message"), [
    ("zero", 4, "zero is 4; expected a ZeRO stage: 0 .off., 1, 2 or 3"), ("zero", "1", "zero is '1'"),
    ("schedule", "1f1bb", "schedule is '1f1bb'; expected one of gpipe, 1f1b, interleaved, zb-h1"),
    ("chunks", 0, "chunks is 0; expected a whole number of at least 1"),
    ("chunks", 2, "the schedule '1f1b' has one stage on each device; use schedule='interleaved'"),
    ("bucket_bytes", -1, "bucket_bytes is -1"),
    ("memory", "24GB", "memory is '24GB'; expected a positive number of bytes"),
    ("weight", 3, "weight is 3; expected a function of the batch"),
    ("data", 3, "data is 3; expected the name of a mesh axis"),
    ("accumulate", 0, "accumulate is 0"), ("cut", 3, "cut is 3"), ("mesh", {"data": 0}, "'data' has 0 ranks"),
    ("reduce_dtype", "int8", "reduce_dtype is 'int8'; expected 'bfloat16'"),
    ("shard", [("up", None)], "shard is .*such as {'.*': .'tensor', None"),
    ("shard", {"up": "tensor"}, "shard has 'up': 'tensor'; expected for each dimension"),
    ("shard", {"up": (0, None)}, "shard has .up.: .0, None."),
    ("shard", {"up": ("tensor:x",)}, "split over 'tensor:x'"),
    ("shard", {"up": ("tensor", "tensor")}, "uses a mesh axis twice")])
def test_fields_of_a_plan(field, value, message):
    with pytest.raises((td.AttributeValueError, MeshError), match=message):
        d.Plan(**{field: value})


@pytest.mark.parametrize(("plan", "message"), [
    ({"shard": {"*.up": ("tensor",)}}, "pattern '.*up' matches no parameter; there are: up.weight, down.weight"),
    ({"shard": {"up.weight": ("model", None)}}, "splits 'up.weight' over the mesh axis 'model', which this mesh"),
    ({"shard": {"*.weight": ("tensor", None), "up.weight": (None, "tensor")}},
     r"'up.weight' decides over no parameter: '\*.weight' stands in front of it.*narrower pattern first"),
    ({"zero": 1}, "ZeRO needs the batch's axis 'data' in the mesh, which is tensor=2")])
def test_plans_and_meshes(plan, message):
    with pytest.raises(MeshError, match=message):
        d.Plan(**plan).check(Mesh({"tensor": 2}), NAMES)


def test_meshes():
    for axes, message in ((["data"], "made of axes and their ranks"), ({"data": "2"}, "'data' has '2' ranks"),
                          ({"data": 8}, "data=8 needs 8 ranks, but this job has 1. Start it with `treadle launch -n 8"),
                          ({"data": -1, "tensor": 3}, "1 processes do not divide into groups of 3")):
        with pytest.raises(MeshError, match=message):
            d.make_mesh(axes)
    with pytest.raises(MeshError, match="-1, what the job has left, is for make_mesh"):
        Mesh({"data": -1})
    with pytest.raises(MeshError, match=r"one of 1 rank, but this job has 2.*make a mesh of 2, such as {'data': 2}"):
        Mesh({}).check_world(2)
    assert d.make_mesh({"data": np.int64(1)}) == d.make_mesh({"data": -1})


def test_what_parallelize_takes(step):
    assert d.parallelize(step, {"data": -1}).mesh == Mesh({"data": 1})
    for arguments, error, message in (
            ((step.model, {}), td.ArgumentsError, "takes what td.train_step returned, not Sequential"),
            ((step,), MeshError, "give parallelize a mesh"), ((step, 4), MeshError, "made of axes and their ranks"),
            ((step, {}, {"zero": 1}), td.ArgumentsError, "expected a td.distributed.Plan")):
        with pytest.raises(error, match=message):
            d.parallelize(*arguments)


def test_what_find_plan_takes(step):
    batch = td.spec((8, 4)), td.spec((8, 2))
    for options, message in (({"devices": 0}, "devices is 0"), ({"memory": "1GB"}, "memory is '1GB'; expected bytes"),
                             ({"devices": 4, "memory": 100.0}, "fits in 100 bytes each; the least that does is")):
        with pytest.raises(td.AttributeValueError, match=message):
            d.find_plan(step, *batch, **options)
    with pytest.raises(td.ArgumentsError, match="takes what td.train_step returned, not Sequential"):
        d.find_plan(step.model, *batch)


def test_constrain():
    for dims in ((None,), (None, 0), (None, None, "tensor")):
        with pytest.raises(td.ArgumentsError, match="for a tensor of 2 dimensions; give a mesh axis or None for each"):
            d.constrain(np.zeros((2, 2)), *dims)


def test_what_a_step_says_of_itself(step):
    made = d.parallelize(step, {})
    for asked in ("memory", "local_bytes"):
        with pytest.raises(td.ArgumentsError, match="no program yet.*run it on a batch first"):
            getattr(made, asked)
    assert repr(made) == "<ParallelStep on 1 rank, rank 0: 0 steps done>"
    assert "td.distributed" in d.__doc__
