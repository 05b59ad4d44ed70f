"""Pipelines without processes: where a model is cut, and all stages run by one process."""

import numpy as np
import pytest

import treadle as td
from treadle.distributed.halves import halves
from treadle.distributed.stages import cut_at_home, cut_graph, needed, stages_of
from treadle.ir import interp
from treadle.ir.errors import AttributeValueError
from treadle.ir.passes import TIDY
from treadle.ir.pipeline import Pipeline
from treadle.ir.rewrite import Rewriter, rewrite
from treadle.ir.verify import verify

from . import job


def loss_graph():
    """The loss of the small GPT, and its inputs."""
    td.random.seed(0)
    model, (tokens, labels) = job.Gpt().to("float64"), job.batch_of({})
    graph = td.trace(lambda x, y: job.lm_loss(model, x, y), tokens, labels)
    captures = graph.meta["captures"]
    arrays = [captures[i].numpy() if i in captures else (tokens, labels)[i] for i in range(len(graph.inputs))]
    return Pipeline(list(TIDY)).run(graph), arrays


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_stages_one_after_the_other_are_the_graph(count):
    graph, arrays = loss_graph()
    chain, cut = cut_graph(graph, (0, 1), count)
    handed = []
    for stage in stages_of(chain, cut):
        verify(stage.graph)
        handed = interp.run(stage.graph, [*handed, *(arrays[i] for i in stage.inputs)])
    np.testing.assert_allclose(handed[0], interp.run(graph, arrays)[0], rtol=1e-12)
    assert len(cut.bounds) == count


@pytest.mark.parametrize("count", [2, 4])
def test_other_steps_are_cut_where_the_inputs_are_at_home(count):
    """Of a graph with more steps between the same parameters: each stage reads what it read of the first one."""
    graph, arrays = loss_graph()
    chain, cut = cut_graph(graph, (0, 1), count)
    stages = stages_of(chain, cut)
    homes = [{0, 1, *stage.inputs} for stage in stages]
    more, again = with_more_steps(graph), stages_of(*cut_at_home(graph, (0, 1), homes))
    assert sum(v.type.nbytes for s in again for v in s.out) <= sum(v.type.nbytes for s in stages for v in s.out)
    handed, other = [], stages_of(*cut_at_home(more, (0, 1), homes))
    assert len(other) == count and len(more.nodes) > len(graph.nodes)
    for stage, home in zip(other, homes):
        assert home.issuperset(stage.inputs)
        handed = interp.run(stage.graph, [*handed, *(arrays[i] for i in stage.inputs)])
    np.testing.assert_allclose(handed[0], interp.run(more, arrays)[0], rtol=1e-12)
    assert cut_at_home(graph, (0, 1), homes[::-1]) is None


def with_more_steps(graph):
    """The graph with a sine in place of each tanh, and an exponential in front of it."""
    class Other(Rewriter):
        def replace(self, node):
            if node.op.name != "tanh":
                return None
            return self.emit("sin", self.emit("exp", node.operands, {}), {})

    return rewrite(graph, Other("loss"))


def test_a_graph_has_only_so_many_layers():
    graph, _ = loss_graph()
    with pytest.raises(AttributeValueError, match="can be cut into [0-9]+ stages at most, not 500"):
        cut_graph(graph, (0, 1), 500)


def test_halves_are_the_whole():
    from treadle.autodiff import grad_graph

    graph, arrays = loss_graph()
    joint = grad_graph(graph, [2, 3])
    parts = halves(joint)
    out, *kept = interp.run(parts.forward, [arrays[i] for i in parts.forward_inputs])
    grads = interp.run(parts.backward, [*kept, *(arrays[i] for i in parts.backward_inputs)])
    for got, want in zip([out, *grads], interp.run(joint, arrays), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)
    assert [parts.forward.outputs[i].type for i in parts.kept] == [v.type for v in parts.backward.inputs[:len(kept)]]
    assert len(needed(joint, joint.outputs)) == len(joint.nodes)


@pytest.mark.parametrize("chunks", [1, 3])
def test_one_process_runs_all_stages(chunks):
    options = {"accumulate": 4, "clip": 0.05, "optimizer": "adamw", "stop": 2, "schedule": "interleaved",
               "chunks": chunks}
    losses, state, _ = job.run("whole", {}, options)
    got, other, step = job.run("pipe", {"pipe": 1}, options)
    np.testing.assert_allclose(got, losses, rtol=1e-9)
    for name, array in state.items():
        np.testing.assert_allclose(other[name], array, rtol=1e-7, atol=1e-9)
    assert len(step.cut.bounds) == chunks
