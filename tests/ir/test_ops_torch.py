"""References against torch: its recorded answers (tests/oracle/ops.npz) always, torch itself where it is installed."""

import functools
import importlib.util
import json
import pathlib

import numpy as np
import pytest
from optable.checks import as_tuple
from optable.table import TABLE

from treadle.ir.dtypes import as_dtype
from treadle.ir.opdef import op

FOLDER = pathlib.Path(__file__).parents[1] / "oracle"


@functools.cache
def recorded():
    """op -> samples (attributes, operands, results)."""
    with np.load(FOLDER / "ops.npz") as data:
        arrays = dict(data)
    cases = {}
    for key in arrays:
        if key.endswith("/attrs"):
            stem = key.removesuffix("attrs")
            parts = [[v for k, v in arrays.items() if k.startswith(stem + kind)] for kind in ("arg/", "result/")]
            cases.setdefault(key.split("/")[0], []).append((tuples(json.loads(str(arrays[key]))), *parts))
    return cases


def tuples(value):
    if isinstance(value, list):
        return tuple(map(tuples, value))
    return {k: tuples(v) for k, v in value.items()} if isinstance(value, dict) else value


def check(name, arrays, attrs, results, tol):
    got = as_tuple(op(name).reference(*arrays, **attrs))
    for g, want in zip(got, results, strict=True):
        assert g.shape == want.shape
        np.testing.assert_allclose(np.asarray(g, want.dtype), want, rtol=tol, atol=tol, err_msg=f"{name} {attrs}")


@pytest.mark.parametrize("name", sorted(recorded()))
def test_recorded_answers(name):
    for attrs, arrays, results in recorded()[name]:
        wide = [a.astype(np.float64) if a.dtype == np.float32 else a for a in arrays]
        check(name, wide, attrs, results, 1e-6)


def test_the_record_is_small_and_has_the_ops_that_need_a_second_oracle():
    assert {"conv", "conv_input_grad", "conv_weight_grad", "max_pool", "avg_pool", "attention", "cross_entropy",
            "batch_norm", "group_norm", "layer_norm", "rms_norm"} <= set(recorded())
    assert sum(f.stat().st_size for f in FOLDER.glob("*.npz")) < 1_000_000


@functools.cache
def live():
    spec = importlib.util.spec_from_file_location("torch_ops", FOLDER / "torch_ops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", sorted(recorded()))
def test_live_answers(name, dtype):
    count = 0
    for row in TABLE:
        if row.op == name and not row.variant:
            for sample in row.samples(as_dtype(dtype)):
                if live().comparable(name, sample):
                    attrs = sample.graph(name).nodes[0].attrs
                    results = live().answer(name, sample.args, attrs)
                    check(name, sample.args, attrs, results, 1e-11 if dtype == "float64" else 2e-5)
                    count += 1
    assert count
