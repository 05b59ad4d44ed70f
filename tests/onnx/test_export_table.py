"""Every op of the op table exported and run: in onnxruntime, or in ONNX's own evaluator where that has no kernel."""

import warnings

import numpy as np
import pytest

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime (the extra `test`)")

from export_tools import answers, between_wide, wide  # noqa: E402
from optable.checks import compare, joint_graph  # noqa: E402
from optable.table import TABLE, case_id, cases  # noqa: E402

from treadle.frontend.onnx import export_kernels, to_model  # noqa: E402
from treadle.frontend.onnx.export_rules import BEYOND, load_rules  # noqa: E402
from treadle.ir import interp  # noqa: E402
from treadle.ir.dtypes import as_dtype  # noqa: E402
from treadle.ir.errors import OnnxError  # noqa: E402
from treadle.ir.opdef import all_ops  # noqa: E402

NEWEST = 26
"""The newest opset that this onnxruntime runs."""
LOOSER = 4.0
# ONNX leaves NaN in comparisons open; onnxruntime passes over it.
PASSES_OVER_NAN = {"reduce_max", "reduce_min", "argmax", "argmin", "sort", "top_k", "sign", "max_pool"}
# The evaluator approximates erf; onnxruntime takes the scale of a product in f32.
LOOSE = {("erf", "float64"): 1e-6, ("erfc", "float64"): 1e-6, ("attention", "float64"): 1e-6}
# The least opset of ops that earlier ones cannot say.
SINCE = {"bitcast": 26, "pow": 12, "scatter_add": 16, "scatter_add_along_axis": 16, "scatter_add_nd": 16,
         "max_pool_grad": 16, "random_bits": 18, "bitwise_and": 18, "bitwise_or": 18, "bitwise_xor": 18}
DTYPE_SINCE = {"bfloat16": 13, "float8_e4m3fn": 19, "float8_e5m2": 19, "int4": 21, "uint4": 21}


def told(row, sample, opset):
    """Whether ONNX can say the sample, and onnxruntime agrees with IEEE about it."""
    if row.op in PASSES_OVER_NAN and sample.label == "extremes":
        return False
    if row.op == "reduce_prod" and sample.args[0].dtype.kind == "i" and sample.args[0].size > 1000:
        return False  # overflows, which onnxruntime saturates
    return DTYPE_SINCE.get(str(sample.attrs.get("dtype")), 0) <= opset


def check(row, dtype, opset):
    samples = [s for s in row.few(as_dtype(dtype)) if told(row, s, opset)]
    graph, arrays = joint_graph(row.op, samples)
    with np.errstate(all="ignore"):
        want = interp.run(graph, arrays)
    model = to_model(between_wide(graph), opset=opset, clamp=True)
    got = answers(model, [np.asarray(a).astype(wide(as_dtype(a.dtype)).np) for a in arrays])
    names = [str(sample) for sample in samples for _ in sample.graph(row.op).outputs]
    for g, w, value, name in zip(got, want, graph.outputs, names, strict=True):
        tol = LOOSE.get((row.op, dtype), LOOSER * row.tolerance(value.dtype))
        compare(g.astype(value.dtype.np), w, value.type, tol, f"{row.op} {name}")


@pytest.mark.parametrize(("row", "dtype"), [
    pytest.param(row, dtype, id=f"{case_id(row)}-{dtype}", marks=() if dtype == "float32" else pytest.mark.slow)
    for row, dtype in cases()])
def test_at_the_newest_opset(row, dtype):
    check(row, dtype, NEWEST)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [11, 13, 16, 18, 20, 23])
def test_at_older_opsets(opset):
    """Each op works, or is refused with the opset that it takes."""
    for row in TABLE:
        dtype = "float32" if "float32" in row.dtypes else row.dtypes[0]
        if row.op == "matmul" and row.variant:
            continue  # bytes and narrow floats, which the test above covers
        if SINCE.get(row.name, 0) <= opset:
            check(row, dtype, opset)
        else:
            with pytest.raises(OnnxError, match=f"opset={SINCE[row.name]} or above"):
                check(row, dtype, opset)


def test_every_op_can_be_exported():
    """The slot `onnx` is filled, or the op decomposes. A new op needs a rule in frontend/onnx/export_*.py."""
    load_rules()
    holes = [name for name, record in all_ops().items() if name not in BEYOND
             if not {"onnx", "decompose"} & set(record.slots) and "plugin" not in record.traits]
    assert not holes, f"neither `onnx` nor `decompose`: {holes}"


def test_the_kernel_table_is_that_of_onnxruntime():
    """`export_kernels` says what the registry of the installed release says (if it is the one it was read from)."""
    if not onnxruntime.__version__.startswith("1.31."):
        pytest.skip("the table was read from onnxruntime 1.31")
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernels = [k for k in state.get_all_opkernel_def()
                   if k.provider == "CPUExecutionProvider" and k.domain in ("", "ai.onnx")]
    floats = {"tensor(float)": "f32", "tensor(double)": "f64", "tensor(int64)": "i64", "tensor(int32)": "i32"}
    for kind, versions in export_kernels.KERNELS.items():
        since, newest = versions[-1]
        for parameter, dtypes in newest.items():
            installed = {floats[t] for k in kernels for t in k.type_constraints.get(parameter, ())
                         if k.op_name == kind and t in floats and k.version_range[1] >= NEWEST >= k.version_range[0]}
            assert installed == set(floats.values()) & set(dtypes.split()), (kind, since, parameter)
