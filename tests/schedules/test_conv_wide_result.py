"""Convolutions of 16-bit operands whose sums are kept in float32, as mixed precision has its weight gradients."""

import ml_dtypes
import numpy as np
import pytest

from treadle.frontend.building import build_executable
from treadle.ir import interp
from treadle.ir.builder import GraphBuilder
from treadle.ir.dtypes import as_dtype
from treadle.ir.types import TensorType
from treadle.schedules.conv_plain import needs_plain

WINDOW = {"stride": (1, 2), "padding": ((1, 1), (0, 2)), "dilation": (1, 1)}
X, Y = (3, 6, 9, 11), (3, 10, 9, 6)


def operands(op, groups):
    """Shapes of an op's operands, and its own attributes."""
    weights = (10, 6 // groups, 3, 3)
    return {"conv": (X, weights, {}), "conv_input_grad": (Y, weights, {"input_spatial": X[2:]}),
            "conv_weight_grad": (X, Y, {"kernel_spatial": weights[2:]})}[op]


def wide(op, dtype, groups):
    """The graph of one op: 16-bit operands, a float32 result with something after it."""
    first, second, own = operands(op, groups)
    with GraphBuilder(op) as builder:
        a, b = (builder.input(TensorType(s, as_dtype(dtype)), n, "data") for s, n in ((first, "a"), (second, "b")))
        (y,) = builder.emit(op, [a, b], {**WINDOW, **own, "groups": groups, "out_dtype": as_dtype("float32")})
        builder.output(y * y)
    return builder.graph


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("op", ["conv", "conv_input_grad", "conv_weight_grad"])
@pytest.mark.parametrize("groups", [1, 2])
def test_tiled_kernels_keep_their_sums(op, dtype, groups):
    graph, rng = wide(op, dtype, groups), np.random.default_rng(0)
    assert not needs_plain(graph.nodes[0])
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    arrays = [rng.standard_normal(v.shape).astype(kind) for v in graph.inputs]
    (want,) = interp.run(graph, arrays)
    (got,) = build_executable(graph, "cpu").run(arrays)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
