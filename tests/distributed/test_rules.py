"""Every op's shard rule, in every way to split it, on the samples of the op table: all ranks together give what one
process gives."""

import numpy as np
import pytest
from optable.table import TABLE

from treadle import autodiff, distributed, schedules  # noqa: F401  (fills the slots)
from treadle.distributed import lockstep
from treadle.distributed.cost import Cluster
from treadle.distributed.mesh import Mesh
from treadle.distributed.partition import _Emitter
from treadle.distributed.propagate import RuleTable
from treadle.distributed.rules import Blocked, Linear
from treadle.distributed.sharding import PARTIAL, Sharding
from treadle.distributed.solve import Plan
from treadle.ir import interp
from treadle.ir.opdef import all_ops
from treadle.ir.verify import verify


def test_every_op_says_how_it_is_split():
    holes = [name for name, record in all_ops().items() if "shard" not in record.slots]
    assert not holes, f"no `shard` rule: {holes}"


def graph_of(row, sample):
    """The graph of one node."""
    return sample.graph(row.op), [np.asarray(a) for a in sample.args]


def parts_of(array, sharding, mesh, rng):
    """Every rank's part; a partial sum as numbers that add up."""
    parts = [sharding.cut(array, mesh, rank) for rank in range(mesh.size)]
    for rank, part in enumerate(parts):  # what is padded means nothing
        own = np.zeros(part.shape, bool)
        for at, _ in sharding.pieces(mesh, rank, array.shape):
            own[at] = True
        part[~own] = np.nan if part.dtype.kind == "f" else 1
    if sharding.partial:
        noise = [rng.standard_normal(p.shape).astype(p.dtype) for p in parts[1:]]
        parts = [(parts[0] - sum(noise)).astype(array.dtype), *noise]
    return parts


def check(graph, arrays, strategy, ranks):
    """One node under one strategy, all ranks in lockstep, against the node itself."""
    mesh, (node,) = Mesh({"axis": ranks}), graph.nodes
    table = RuleTable(graph)
    factors = table.factors[node]
    plan = Plan(graph, mesh, Cluster(), table=table, strategies={node: {"axis": strategy}})
    placements = [factors.operand_placement(strategy, i) for i in range(len(node.operands))]
    plan.inputs = [Sharding.of(v.rank, {"axis": p}) for v, p in zip(node.operands, placements)]
    plan.outputs = [Sharding.whole(v.rank) for v in node.results]
    made = _Emitter(plan).run(plan.inputs, plan.outputs)
    verify(made)
    rng = np.random.default_rng(0)
    cut = [parts_of(a, s, mesh, rng) for a, s in zip(arrays, plan.inputs)]
    results = lockstep.run(made, mesh, [[c[rank] for c in cut] for rank in range(ranks)])
    with np.errstate(all="ignore"):
        want = interp.run(graph, arrays)
    for own in results:
        for got, expected in zip(own, want):
            scale = max(1.0, np.max(np.abs(expected), initial=0.0, where=np.isfinite(expected))) \
                if expected.dtype.kind == "f" else 1.0
            tol = {"float64": 1e-9, "float32": 1e-5}.get(str(expected.dtype), 2e-2)
            np.testing.assert_allclose(got, expected, rtol=tol, atol=tol * scale)
    return any(p == PARTIAL for p in placements)


ROWS = {row.name: row for row in TABLE}


@pytest.mark.parametrize("name", ROWS)
def test_strategies(name):
    row = ROWS[name]
    dtype = next((d for d in ("float64", "float32", "int64", "bool") if d in row.dtypes), row.dtypes[0])
    for sample in row.samples(dtype):
        graph, arrays = graph_of(row, sample)
        if len(graph.nodes) != 1 or graph.nodes[0].op.has("regions"):
            continue
        table = RuleTable(graph)
        (node,) = graph.nodes
        for ranks in (2, 3):
            strategies = [label for label in table.limits[node] if table.fits(node, label, ranks)]
            strategies += [Blocked(label, 2) for label in strategies if label not in table.factors[node].ordered
                           and label not in table.factors[node].views and table.fits(node, Blocked(label, 2), ranks)]
            if dtype == "float64":
                finite = all(np.isfinite(a).all() for a in arrays if a.dtype.kind == "f")
                strategies += [Linear(k) for k in range(len(table.factors[node].linear)) if finite]
            for strategy in strategies:
                check(graph, arrays, strategy, ranks)


def test_a_rule_names_every_dimension():
    for row in TABLE:
        graph, _ = graph_of(row, next(iter(row.samples(row.dtypes[0]))))
        table = RuleTable(graph)
        for node, factors in table.factors.items():
            assert [len(x) for x in factors.operands] == [v.rank for v in node.operands], row.name
            assert [len(x) for x in factors.results] == [v.rank for v in node.results], row.name
