"""Convolutions by weights that are known while compiling: these are packed then, not in every call."""

import numpy as np
import pytest
from lowered import check, graph_of

from treadle.ir.builder import emit
from treadle.ir.dtypes import as_dtype

ATTRS = dict(stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("channels, groups", [(32, 1), (32, 8), (16, 16)])
def test_packed_while_compiling(channels, groups, dtype):
    rng = np.random.default_rng(0)
    weights = (rng.standard_normal((channels, channels // groups, 3, 3)) / 4).astype(as_dtype(dtype).np)

    def fn(x):
        w = emit("constant", value=weights)
        return [emit("conv", x, w, groups=groups, **ATTRS),
                emit("conv_input_grad", x, w, input_spatial=(7, 20), groups=groups, **ATTRS)]
    check(graph_of(fn, ((2, channels, 7, 20), dtype)), tol=1e-4 if dtype == "float32" else 0.1)
