"""What a pipeline computes is what one process computes; here all stages run in one process."""

import numpy as np
import pytest

import treadle as td
from treadle.frontend.pipeline_stages import StageBuilder
from treadle.ir.errors import ArgumentsError, AttributeValueError

from . import job

CHUNKS = 3
F = td.nn.functional


class Net(td.nn.Module):
    """Three residual blocks with dropout and batch norm; one is recomputed, one keeps a count."""

    def __init__(self, dropout=0.25):
        super().__init__()
        self.lift = td.nn.Linear(6, 8)
        self.inner, self.outer = (td.nn.ModuleList([td.nn.Linear(8, 8) for _ in range(3)]) for _ in range(2))
        self.norms = td.nn.ModuleList([td.nn.BatchNorm1d(8) for _ in range(3)])
        self.drop = td.nn.Dropout(dropout)
        self.head = td.nn.Linear(8, 5)

    def block(self, i, x):
        return x + self.outer[i](self.drop(F.relu(self.norms[i](self.inner[i](x)))))

    def forward(self, x):
        x = self.lift(x)
        x = self.block(0, x)
        x = x + td.checkpoint(lambda x: self.outer[1](self.drop(F.relu(self.inner[1](x)))))(x)
        return self.head(self.block(2, x))


def loss_of(model, x, y):
    return F.cross_entropy(model(x), y)


def with_aux(model, x, y):
    logits = model(x)
    return F.cross_entropy(logits, y), {"right": td.sum(td.argmax(logits, axis=1) == y), "size": td.mean(x)}


def train(mesh, accumulate=4, examples=8, loss=loss_of, steps=3, dropout=0.25, dtype="float64", amp=None, model=None,
          descent=False, masked=False, own_weight=None, **plan):
    """Losses, everything that the step moved, the random numbers that come next, and the step."""
    td.random.seed(7)
    model = (model or Net)(dropout).to(dtype)
    opt = td.optim.SGD(model.parameters(), lr=1.0) if descent else td.optim.AdamW(model.parameters(), lr=1e-2)
    step = td.train_step(model, loss, opt, clip_norm=None if descent else 0.1, accumulate=accumulate, amp=amp,
                         weight=own_weight)
    if mesh is not None:
        step = td.distributed.parallelize(step, td.distributed.Mesh(mesh), td.distributed.Plan(**plan))
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((examples, 6)).astype(dtype), rng.integers(0, 5, examples)
    if masked:
        y[:3] = -100
    results = [step(x, y) for _ in range(steps)]
    state = {n: t.numpy() for n, t in model.state_dict().items()}
    return results, state, td.random.uniform((4,)).numpy(), step


def pipeline(**options):
    return train({"pipe": 1}, **{"schedule": "interleaved", "chunks": CHUNKS, **options})


def assert_same(got, want, tol=1e-9):
    for a, b in zip(got[0], want[0], strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol)
    for name, array in want[1].items():
        np.testing.assert_allclose(got[1][name], array, rtol=tol, atol=tol, err_msg=name)
    np.testing.assert_array_equal(got[2], want[2])


@pytest.fixture(scope="module")
def whole():
    return train(None)


@pytest.mark.parametrize("options", [{}, pytest.param({"schedule": "gpipe", "chunks": 1}, marks=pytest.mark.slow),
                                     {"recompute": True}], ids=["plain", "one stage", "recompute"])
def test_random_numbers_and_running_statistics(options, whole):
    found = pipeline(**options)
    assert_same(found, whole)
    assert len(found[3].cut.bounds) == options.get("chunks", CHUNKS)


@pytest.mark.slow
def test_recomputation_keeps_less():
    options = {"steps": 1, "model": Deep, "chunks": 1, "schedule": "gpipe"}
    kept = [pipeline(**options, recompute=again)[3].stages.kept_bytes[0] for again in (False, True)]
    assert kept[1] < kept[0] / 2


def test_other_results():
    want, found = train(None, loss=with_aux), pipeline(loss=with_aux)
    for (a, more), (b, other) in zip(found[0], want[0], strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-9)
        assert more["right"].numpy().tolist() == other["right"].numpy().tolist()
        np.testing.assert_allclose(more["size"].numpy(), other["size"].numpy(), rtol=1e-12)


class Deep(td.nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.up, self.down = (td.nn.ModuleList([td.nn.Linear(*size) for _ in range(4)]) for size in ((6, 24), (24, 6)))
        self.head = td.nn.Linear(6, 5)

    def forward(self, x):
        for up, down in zip(self.up, self.down):
            x = x + down(td.tanh(up(x)))
        return self.head(x)


class Plain(td.nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.layers = td.nn.ModuleList([td.nn.Linear(6, 6) for _ in range(4)])
        self.head = td.nn.Linear(6, 5)

    def forward(self, x):
        for layer in self.layers:
            x = td.tanh(layer(x))
        return self.head(x)


def test_uneven_micro_batches_are_one_batch():
    found = pipeline(examples=10, model=Plain)
    assert_same(found, train(None, accumulate=1, examples=10, model=Plain))
    assert found[3].shares == [0.3, 0.3, 0.2, 0.2]


def test_micro_batches_weighed_by_what_counts():
    """The step's own weight and the plan's; a mean over the labels that are not masked."""
    options = {"model": Plain, "masked": True, "accumulate": 4}
    want = train(None, **{**options, "accumulate": 1})
    assert_same(pipeline(**options, weight=lambda x, y: (y != -100).sum()), want)
    assert_same(pipeline(**options, own_weight=lambda x, y: td.sum(y != -100)), want)


class Skips(td.nn.Module):
    """Everything goes on to the end: no single tensor crosses anywhere."""

    def __init__(self, dropout):
        super().__init__()
        self.layers = td.nn.ModuleList([td.nn.Linear(6, 6) for _ in range(4)])
        self.head = td.nn.Linear(24, 5)

    def forward(self, x):
        seen = []
        for layer in self.layers:
            x = td.tanh(layer(x))
            seen.append(x)
        return self.head(td.concat(seen, axis=1))


def test_several_tensors_cross():
    found = pipeline(model=Skips, chunks=4)
    assert_same(found, train(None, model=Skips))
    rows = str(found[3].cut).splitlines()
    assert len(rows) == 5 and rows[-1].endswith("the loss")
    assert any(" 2 x " in row for row in rows) and any(" 3 x " in row for row in rows)


@pytest.mark.slow
def test_cut_by_measured_times():
    found = pipeline(model=Deep, measure=True)
    assert_same(found, train(None, model=Deep))
    times = [layer.forward + layer.backward for layer in found[3].cut.layers]
    assert min(times) > 0 and found[3].cut.seconds >= max(times)
    assert str(found[3].cut).count("\n") == CHUNKS


@pytest.mark.parametrize("again", [False, True])
def test_mixed_precision(again, monkeypatch):
    """The gradients of one step: what plain descent takes from the parameters. Each is cast once for all
    micro-batches."""
    graphs, compiled = [], StageBuilder.compiled
    monkeypatch.setattr(StageBuilder, "compiled", lambda self, graph, held=1: graphs.append(graph) or compiled(
        self, graph, held))
    options = {"dtype": "float32", "amp": "bfloat16", "steps": 1, "descent": True, "model": Plain}
    before, want, found = train(None, **{**options, "steps": 0}), train(None, **options), pipeline(
        **options, recompute=again)
    exact = train(None, **{**options, "amp": None})
    np.testing.assert_allclose(float(found[0][0].numpy()), float(want[0][0].numpy()), rtol=1e-2)
    for name, array in want[1].items():
        np.testing.assert_allclose(found[1][name], array, atol=2e-2 * np.abs(array - before[1][name]).max() + 1e-6,
                                   err_msg=name)
    assert not np.allclose(found[1]["head.weight"], exact[1]["head.weight"], rtol=1e-6)
    copied = [v.shape for graph in graphs if graph.name == "casts" for v in graph.inputs if v.dtype == "bfloat16"]
    assert sorted(shape for shape in copied if len(shape) == 2) == [(5, 6), *[(6, 6)] * 4]
    for graph in graphs:
        if graph.name != "casts":
            cast = {n.operands[0] for n in graph.nodes if n.op.name == "cast" and n.result.dtype == "bfloat16"}
            assert cast.isdisjoint(v for v, role in zip(graph.inputs, graph.roles) if role == "parameter"), str(graph)


def test_what_a_pipeline_refuses():
    with pytest.raises(AttributeValueError, match="cannot be cut into 9 micro-batches"):
        pipeline(accumulate=9)
    with pytest.raises(ArgumentsError, match="another shape for each size of micro-batch"):
        pipeline(examples=10, loss=lambda model, x, y: (loss_of(model, x, y), model(x)))
    with pytest.raises(AttributeValueError, match="can be cut into [0-9]+ stages at most, not 200"):
        pipeline(chunks=200)
    with pytest.raises(AttributeValueError, match="no cut into 3 stages fits in 100 bytes a device; the least"):
        pipeline(memory=100)


@pytest.mark.slow
def test_a_gpt_and_a_resnet():
    for options in ({"dropout": 0.25}, {"model": "resnet"}):
        options = {"accumulate": 4, "clip": 0.05, "optimizer": "adamw", "stop": 2, "schedule": "interleaved",
                   "chunks": CHUNKS, **options}
        losses, state, _ = job.run("whole", {}, options)
        got, other, _ = job.run("pipe", {"pipe": 1}, options)
        np.testing.assert_allclose(got, losses, rtol=1e-9)
        for name, array in state.items():
            np.testing.assert_allclose(other[name], array, rtol=1e-7, atol=1e-9, err_msg=name)
