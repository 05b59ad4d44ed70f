"""Every op of the table: its reference against an oracle, its decomposition against the reference."""

import numpy as np
import pytest
from optable.checks import as_tuple, compare, widened
from optable.table import TABLE, case_id, cases

from treadle.ir import interp
from treadle.ir.decompose import decompose
from treadle.ir.dtypes import as_dtype
from treadle.ir.opdef import all_ops, op
from treadle.ir.ops_collective import OPS as SEVERAL_RANKS
from treadle.ir.parse import parse
from treadle.ir.verify import verify


def test_every_op_has_a_row():
    elsewhere = {*SEVERAL_RANKS, "bind_size"}  # the latter: frontend/test_data_sizes.py
    missing = set(all_ops()) - {row.op for row in TABLE} - elsewhere
    assert not missing, f"ops without a row in tests/optable/table.py: {sorted(missing)}"


@pytest.mark.parametrize(("row", "dtype"), cases(), ids=case_id)
def test_reference_against_oracle(row, dtype):
    count = 0
    for sample in row.samples(as_dtype(dtype)):
        graph = sample.graph(row.op)
        verify(graph)
        (node,) = graph.nodes
        regions = {"regions": tuple(interp._callable(r, {}) for r in node.regions)} if node.regions else {}
        got = as_tuple(op(row.op).reference(*sample.args, **node.attrs, **regions))
        with np.errstate(all="ignore"):
            want = as_tuple(row.answer()(*map(widened, sample.args), **node.attrs))
        for g, w, value in zip(got, want, graph.outputs, strict=True):
            compare(g, w, value.type, row.tolerance(value.dtype), f"{row.op} {sample}")
        count += 1
    assert count >= 2, "too few samples"


DECOMPOSED = [(row, dtype) for row, dtype in cases() if "decompose" in op(row.op).slots]


@pytest.mark.parametrize(("row", "dtype"), DECOMPOSED, ids=case_id)
def test_decomposition_against_reference(row, dtype):
    for sample in row.samples(as_dtype(dtype)):
        whole = sample.graph(row.op)
        parts = decompose(whole, lambda node: node.op.name == row.op).graph
        verify(parts)
        assert row.op not in {node.op.name for node in parts.nodes}
        assert parts.output_types == whole.output_types
        for got, want, value in zip(interp.run(parts, sample.args), interp.run(whole, sample.args), whole.outputs):
            compare(got, want, value.type, 2 * row.tolerance(value.dtype), f"{row.op} {sample}")


@pytest.mark.parametrize("row", TABLE, ids=case_id)
def test_text_round_trip(row):
    for sample in row.samples(as_dtype(row.dtypes[0])):
        graph = sample.graph(row.op)
        again = parse(str(graph))
        assert again == graph
        assert [node.attrs.keys() for node in again.nodes] == [node.attrs.keys() for node in graph.nodes]
