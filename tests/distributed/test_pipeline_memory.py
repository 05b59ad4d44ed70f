"""`memory_budget` of a step whose model is cut into stages."""

import numpy as np
import pytest

import treadle as td
from treadle.autodiff.budget import keep_less
from treadle.autodiff.reverse import grad_graph
from treadle.distributed.halves import halves
from treadle.distributed.pipeline import SCHEDULES, Task, most_held, most_waiting, schedule, stash_bound
from treadle.ir import interp
from treadle.ir.builder import build, emit
from treadle.ir.errors import CompileError
from treadle.ir.passes import TIDY
from treadle.ir.pipeline import Pipeline
from treadle.ir.types import TensorType
from treadle.ir.verify import verify

WIDTH, ROWS, MICRO = 16, 64, 4


class Deep(td.nn.Module):
    """Layers whose products and what is made of them are kept for the backward pass."""

    def __init__(self):
        super().__init__()
        self.layers = td.nn.ModuleList([td.nn.Linear(WIDTH, WIDTH) for _ in range(6)])
        self.drop = td.nn.Dropout(0.25)

    def forward(self, x):
        for layer in self.layers:
            x = x + self.drop(td.sin(td.exp(-td.tanh(layer(x)) ** 2)))
        return x


def train(mesh=None, budget=None, amp=None, dtype="float64", **plan):
    td.random.seed(2)
    model = Deep().to(dtype)
    inner = td.train_step(model, lambda model, x: td.mean(model(x) ** 2), td.optim.SGD(model.parameters(), lr=1.0),
                          accumulate=MICRO, memory_budget=budget, amp=amp)
    step = inner if mesh is None else td.distributed.parallelize(
        inner, td.distributed.Mesh(mesh), td.distributed.Plan(**plan))
    x = np.random.default_rng(0).standard_normal((MICRO * ROWS, WIDTH)).astype(dtype)
    losses = [float(np.asarray(step(x))) for _ in range(2)]
    return losses, {n: t.numpy() for n, t in model.state_dict().items()}, step


@pytest.fixture(scope="module")
def whole():
    return train()


@pytest.mark.parametrize(("kind", "chunks", "share"), [("gpipe", 1, 0.5), *(
    pytest.param(*case, marks=pytest.mark.slow) for case in (("1f1b", 1, 0.8), ("interleaved", 2, 0.7),
                                                             ("zb-h1", 1, 0.8)))])
def test_a_device_keeps_to_the_budget(kind, chunks, share, whole):
    plan = {"schedule": kind, "chunks": chunks}
    free = train({"pipe": 1}, **plan)[2]
    budget = int(share * free.memory["activations"])
    losses, state, step = train({"pipe": 1}, budget, **plan)
    assert 0 < step.memory["activations"] <= budget
    if kind == "gpipe":
        assert step.stages.kept_bytes[0] < share * free.stages.kept_bytes[0]
    np.testing.assert_allclose(losses, whole[0], rtol=1e-9)
    for name, array in whole[1].items():  # two steps of plain descent: what is taken off are gradients
        np.testing.assert_allclose(state[name], array, rtol=1e-9, atol=1e-9, err_msg=name)
    assert {k: v for k, v in step.memory.items() if k != "activations"} == {
        k: v for k, v in free.memory.items() if k != "activations"}


def test_a_budget_out_of_reach_says_what_would_do():
    with pytest.raises(CompileError, match=r"memory_budget is 1,000 bytes, but .* takes ([0-9,]+) even .* 4 micro-"
                                           r"batches wait") as raised:
        train({"pipe": 1}, 1000, schedule="gpipe")
    least = int(str(raised.value).split(" takes ")[1].split()[0].replace(",", ""))
    assert train({"pipe": 1}, least, schedule="gpipe")[2].memory["activations"] <= least


# The pieces ----------------------------------------------------------------------------------------------------------


def test_less_is_kept_and_the_same_computed():
    def loss(x, *weights):
        for w in weights:
            x = emit("tanh", emit("matmul", x, w)) + emit("sin", x)
        return [emit("reduce_mean", emit("square", x), axes=(0, 1))]

    f64 = lambda *shape: TensorType(shape, "float64")  # noqa: E731
    depth = 6
    graph = Pipeline(TIDY).run(grad_graph(build("loss", loss, f64(64, 16), *[f64(16, 16)] * depth), range(depth + 1)))
    arrays = [np.random.default_rng(i).standard_normal(v.shape) / 4 for i, v in enumerate(graph.inputs)]
    want, before = interp.run(graph, arrays), None
    for share in (1.0, 0.6, 0.3, 0.0):
        result = keep_less(graph, 1, int(share * keep_less(graph, 1, 1 << 40).stats["kept_before"]))
        verify(result.graph)
        parts = halves(result.graph, 1)
        kept = sum(int(parts.forward.outputs[i].type.nbytes) for i in parts.kept)
        assert before is None or kept < before
        before = kept
        ahead = interp.run(parts.forward, [arrays[i] for i in parts.forward_inputs])
        behind = interp.run(parts.backward, [*(ahead[i] for i in parts.kept),
                                             *(arrays[i] for i in parts.backward_inputs)])
        for a, b in zip([ahead[0], *behind], want, strict=True):
            np.testing.assert_array_equal(a, b)
    assert kept == 0  # everything follows from the inputs


@pytest.mark.parametrize("kind", SCHEDULES)
def test_what_a_device_holds_follows_from_its_order(kind):
    """Against the bound of the schedule, where a micro-batch leaves 1 behind, and running takes nothing."""
    chunks = 2 if kind == "interleaved" else 1
    for device, tasks in enumerate(schedule(kind, 4, 8, chunks)):
        stages = {t.stage for t in tasks}
        last = "W" if any(t.phase == "W" for t in tasks) else "B"
        waiting = {(phase, s): int(phase != last) for phase in "FBW" for s in stages}
        found = most_held(tasks, waiting, dict.fromkeys(waiting, 0))
        assert found == stash_bound(kind, 4, 8, device, chunks) or kind == "zb-h1" and found <= 4
        assert sum(most_waiting(tasks, s) for s in stages) >= found
    assert most_held([Task("F", 0, 0), Task("B", 0, 0)], {("F", 0): 3, ("B", 0): 0}, {("F", 0): 9, ("B", 0): 7}) == 10
