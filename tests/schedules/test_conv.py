"""Convolution kernels and both gradients against sums over kernel taps in NumPy, in float64."""

import dataclasses

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np
import pytest
import tvm
from tvm import tirx
from tvm.script.ir_builder import tirx as T

import treadle as td
from treadle.ir.errors import AttributeValueError, DTypeError, ShapeError
from treadle.schedules.conv import conv_input_grad_primfunc, conv_primfunc, conv_weight_grad_primfunc
from treadle.schedules.conv_problem import ConvConfig, ConvProblem, input_grad_phases, propose, split_row
from treadle.schedules.target import Target

LAYOUTS = [("NHWC", "NHWC"), ("NCHW", "NCHW"), ("NCHW", "NHWC"), ("NHWC", "NCHW")]
TARGETS = ["cpu", "cpu:avx2"]
MAKERS = {"conv": conv_primfunc, "conv_input_grad": conv_input_grad_primfunc,
          "conv_weight_grad": conv_weight_grad_primfunc}  # fmt: skip
TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "float16": 2e-3, "bfloat16": 1e-2}


def case(batch, cin, cout, spatial, kernel, **more):
    return ConvProblem(batch, cin, cout, spatial, kernel, **more)


CASES = [
    case(2, 5, 7, (9,), (3,)),
    case(1, 4, 4, (100,), (5,), dilation=(20,), padding=((80, 0),)),  # causal: nearly every tile is partial
    case(2, 1, 3, (40,), (7,), stride=(3,), padding=((2, 4),), dilation=(2,)),
    case(2, 16, 32, (14, 14), (3, 3), padding=((1, 1), (1, 1))),
    case(1, 64, 40, (7, 7), (3, 3), padding=((1, 1), (1, 1))),
    case(2, 3, 40, (15, 17), (3, 5), stride=(2, 3), padding=((1, 0), (2, 3))),
    case(1, 3, 64, (23, 23), (7, 7), stride=(2, 2), padding=((3, 3), (3, 3))),
    case(1, 4, 6, (11, 10), (3, 3), stride=(3, 2), padding=((-1, 2), (1, -1)), dilation=(1, 2)),
    case(3, 70, 50, (7, 9), (1, 1)),
    case(3, 20, 18, (7, 9), (1, 1), stride=(2, 2)),
    case(1, 8, 12, (20, 37), (3, 3), padding=((4, 4), (9, 9)), dilation=(2, 6), groups=4, stride=(1, 2)),
    case(2, 6, 6, (5, 5), (2, 2), stride=(4, 4), padding=((0, 0), (3, 3)), groups=2),  # phases without any tap
    case(2, 33, 17, (4, 5, 6), (2, 3, 1), padding=((1, 0), (1, 1), (0, 0)), stride=(1, 2, 1)),
    case(1, 19, 19, (9, 30), (3, 3), padding=((1, 1), (1, 1)), groups=19),
    case(2, 32, 32, (11, 12), (5, 3), padding=((2, 2), (0, 3)), stride=(2, 2), dilation=(1, 2), groups=32),
    case(1, 16, 16, (3, 4, 5), (3, 2, 2), padding=((1, 1), (1, 0), (0, 1)), groups=16),
    case(2, 16, 32, (6, 9), (3, 3), padding=((1, 1), (0, 1)), groups=8),  # groups fold into shared tiles
    case(2, 32, 32, (5, 19), (3, 3), padding=((1, 1), (2, 1)), groups=8),  # and are reduced by the vector
    case(1, 32, 32, (9, 10), (3, 2), padding=((1, 0), (1, 1)), stride=(2, 2), groups=16),
]


def window(problem, tap):
    """Slices of the padded input that kernel position `tap` multiplies."""
    starts = [k * d - min(low, 0) for k, d, (low, _) in zip(tap, problem.dilation, problem.padding)]
    return tuple(slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, problem.out_spatial, problem.stride))


def reference(problem, x, w, dy):
    """(y, dx, dw) in float64, channels first."""
    g = problem.groups
    pads = [(max(low, 0), max(high, 0)) for low, high in problem.padding]
    padded = np.pad(x.astype("f8"), [(0, 0), (0, 0), *pads])
    padded = padded.reshape(problem.batch, g, -1, *padded.shape[2:])  # (n, g, i, *spatial)
    wide_w = w.astype("f8").reshape(g, -1, *w.shape[1:])  # (g, o, i, *kernel)
    wide_dy = dy.astype("f8").reshape(problem.batch, g, -1, *problem.out_spatial)
    y, dx, dw = np.zeros_like(wide_dy), np.zeros_like(padded), np.zeros_like(wide_w)
    for tap in np.ndindex(*problem.kernel):
        at, wk = (..., *window(problem, tap)), wide_w[(..., *tap)]
        y += np.einsum("ngi...,goi->ngo...", padded[at], wk)
        dx[at] += np.einsum("ngo...,goi->ngi...", wide_dy, wk)
        flat_x, flat_dy = (a.reshape(*a.shape[:3], -1) for a in (padded[at], wide_dy))
        dw[(..., *tap)] = np.einsum("ngip,ngop->goi", flat_x, flat_dy)
    crop = tuple(slice(low, low + n) for (low, _), n in zip(pads, problem.spatial))
    return y.reshape(dy.shape), dx[(..., *crop)].reshape(x.shape), dw.reshape(w.shape)


def arrays(problem, seed=0):
    rng = np.random.default_rng(seed)
    x_shape = (problem.batch, problem.in_channels, *problem.spatial)
    y_shape = (problem.batch, problem.out_channels, *problem.out_spatial)
    return [rng.standard_normal(s).astype(problem.dtype) for s in (x_shape, problem.w_shape, y_shape)]


def to_layout(array, layout):
    return np.ascontiguousarray(array if layout == "NCHW" else np.moveaxis(array, 1, -1))


def from_layout(array, layout):
    return array if layout == "NCHW" else np.moveaxis(array, -1, 1)


def device(array):
    return tvm.runtime.tensor(np.ascontiguousarray(array))


def run(problem, op, inputs, target="cpu", config=None):
    """The result of one kernel, channels first; `inputs` channels first too."""
    target = Target.parse(target)
    if not target.runnable_here():
        pytest.skip(f"this machine cannot run {target}")
    kernel = tvm.compile(MAKERS[op](problem, config, target, "k"), target.tvm_target)["k"]
    x, w, dy = inputs
    x, dy = to_layout(x, problem.layout), to_layout(dy, problem.out_layout)
    operands, shape, layout = {
        "conv": ((x, w), problem.y_shape, problem.out_layout),
        "conv_input_grad": ((dy, w), problem.x_shape, problem.layout),
        "conv_weight_grad": ((x, dy), problem.w_shape, "NCHW"),
    }[op]
    result = device(np.full(shape, np.nan, problem.dtype))
    kernel(*map(device, operands), result)
    return from_layout(result.numpy(), layout)


def check(problem, inputs, target="cpu", ops=tuple(MAKERS), config=None):
    expected = dict(zip(MAKERS, reference(problem, *inputs)))
    for op in ops:
        found = run(problem, op, inputs, target, config).astype("f8")
        scale = np.abs(expected[op]).max()
        np.testing.assert_allclose(found / scale, expected[op] / scale, atol=TOLERANCE[problem.dtype], err_msg=op)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_every_shape(number):
    """Each case with two layouts, on two instruction sets, in rotation."""
    for turn in range(2):
        layouts = LAYOUTS[(number + turn * (1 + number // 4 % 3)) % 4]
        problem = dataclasses.replace(CASES[number], layout=layouts[0], out_layout=layouts[1])
        check(problem, arrays(problem), TARGETS[turn])


@pytest.mark.parametrize("dtype, number, layout", [
    ("float64", 5, "NCHW"), ("float64", 10, "NHWC"), ("float64", 14, "NHWC"),
    ("float16", 8, "NHWC"), ("float16", 9, "NCHW"),
    ("bfloat16", 3, "NHWC"), ("bfloat16", 5, "NCHW"), ("bfloat16", 9, "NCHW"), ("bfloat16", 12, "NHWC"),
    ("bfloat16", 13, "NCHW"), ("bfloat16", 16, "NHWC"),
])  # fmt: skip
def test_every_dtype(dtype, number, layout):
    problem = dataclasses.replace(CASES[number], dtype=dtype, layout=layout, out_layout=layout)
    check(problem, arrays(problem))


@pytest.mark.parametrize("config", [
    ConvConfig(pixels=14, vectors=2), ConvConfig(pixels=7, vectors=4, block=16, channels_outer=False),
    ConvConfig(pixels=3, vectors=3, block=1, chunks=3), ConvConfig(pixels=28, vectors=1, block=5, blocks=3, chunks=2),
])  # fmt: skip
def test_any_config_is_correct(config):
    problem = case(3, 10, 50, (9, 13), (3, 3), padding=((1, 1), (1, 1)), layout="NHWC")
    check(problem, arrays(problem), config=config)


def bias_relu_residual(problem, layout):
    """relu(acc + bias[c]) + residual, and the buffers it needs."""
    channels, shape = problem.out_channels, problem.y_shape
    bias = tirx.decl_buffer((channels,), "float32")
    residual, out = tirx.decl_buffer(shape, "float32"), tirx.decl_buffer(shape, "float32")

    def store(n, c, spatial, acc):
        index = [n, c, *spatial] if layout == "NCHW" else [n, *spatial, c]
        T.buffer_store(out, T.max(acc + bias[c], T.float32(0)) + residual[tuple(index)], index)

    return store, (bias, residual, out)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("number", [5, 8, 13])
def test_epilogue(layout, number):
    problem = dataclasses.replace(CASES[number], layout=layout, out_layout=layout)
    store, buffers = bias_relu_residual(problem, layout)
    target = Target.parse("cpu")
    kernel = tvm.compile(conv_primfunc(problem, None, target, "k", store, buffers), target.tvm_target)["k"]
    x, w, residual = arrays(problem)
    bias = np.linspace(-3, 3, problem.out_channels, dtype="f4")
    out = device(np.full(problem.y_shape, np.nan, "f4"))
    kernel(device(to_layout(x, layout)), device(w), device(bias), device(to_layout(residual, layout)), out)
    y = reference(problem, x, w, residual)[0]
    expected = np.maximum(y + bias.reshape(-1, *[1] * len(problem.spatial)), 0) + residual
    np.testing.assert_allclose(from_layout(out.numpy(), layout), expected, atol=1e-3)


def test_gradients_take_an_epilogue():
    problem = case(2, 6, 20, (8, 9), (3, 2), stride=(2, 1), layout="NHWC")
    x, w, dy = arrays(problem)
    _, dx, dw = reference(problem, x, w, dy)
    target = Target.parse("cpu")
    doubled = tirx.decl_buffer(problem.x_shape, "float32")

    def store_dx(n, c, spatial, acc):
        T.buffer_store(doubled, acc * T.float32(2), [n, *spatial, c])

    f = conv_input_grad_primfunc(problem, None, target, "k", store_dx, [doubled])
    out = device(np.zeros(problem.x_shape, "f4"))
    tvm.compile(f, target.tvm_target)["k"](device(to_layout(dy, "NHWC")), device(w), out)
    np.testing.assert_allclose(from_layout(out.numpy(), "NHWC"), 2 * dx, atol=1e-3)

    updated = tirx.decl_buffer(problem.w_shape, "float32")  # an SGD step in place, fused

    def store_dw(o, i, kernel, acc):
        index = [o, i, *kernel]
        T.buffer_store(updated, updated[tuple(index)] - acc * T.float32(0.1), index)

    f = conv_weight_grad_primfunc(problem, None, target, "k", store_dw, [updated])
    out = device(w)
    tvm.compile(f, target.tvm_target)["k"](device(to_layout(x, "NHWC")), device(to_layout(dy, "NHWC")), out)
    np.testing.assert_allclose(out.numpy(), w - 0.1 * dw, atol=1e-3)


@pytest.mark.oracle
def test_agrees_with_torch():
    import torch

    problem = case(2, 12, 20, (9, 11), (3, 3), stride=(2, 1), padding=((2, 2), (1, 1)), dilation=(1, 2), groups=4)
    x, w, dy = arrays(problem)
    tx, tw = (torch.from_numpy(a).requires_grad_() for a in (x, w))
    y = torch.nn.functional.conv2d(tx, tw, None, (2, 1), (2, 1), (1, 2), 4)
    y.backward(torch.from_numpy(dy))
    expected = (y.detach().numpy(), tx.grad.numpy(), tw.grad.numpy())
    for op, array in zip(MAKERS, expected):
        np.testing.assert_allclose(run(problem, op, (x, w, dy)), array, rtol=1e-4, atol=1e-4)


def test_phases_cover_each_input_once():
    for problem in CASES:
        for axis, extent in zip(input_grad_phases(problem)[3 - len(problem.spatial):], problem.spatial):
            seen = sorted(p.first + p.step * q for p in axis for q in range(p.count))
            assert seen == list(range(extent))


def test_rows_are_cut_evenly():
    assert split_row(56, 12) == [(0, 12), (12, 12), (24, 12), (36, 12), (48, 8)]
    assert [size for _, size in split_row(30, 14)] == [10, 10, 10]


def test_proposals_fit_the_register_file():
    for spec, registers in (("cpu:avx512", 32), ("cpu:avx2", 16)):
        for problem in CASES:
            config = propose(problem, Target.parse(spec))
            assert config.pixels * config.vectors + config.vectors < registers


@pytest.mark.parametrize("error, change", [
    (ShapeError, {"groups": 3}), (ShapeError, {"kernel": (9, 9)}), (ShapeError, {"stride": (1,)}),
    (ShapeError, {"spatial": (8, 8, 8, 8)}), (AttributeValueError, {"dilation": (0, 1)}),
    (AttributeValueError, {"layout": "CHWN"}), (DTypeError, {"dtype": "int32"}),
])  # fmt: skip
def test_what_does_not_fit_is_refused(error, change):
    fields = {"batch": 1, "in_channels": 4, "out_channels": 8, "spatial": (8, 8), "kernel": (3, 3)}
    with pytest.raises(error):
        ConvProblem(**{**fields, **change})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("groups", [1, 8])
def test_an_epilogue_that_reads_what_is_convolved(dtype, groups):
    """conv(x) + x, forward and transposed: one buffer is both the operand and the residual."""
    rng = np.random.default_rng(0)
    x = td.asarray(rng.standard_normal((2, 8, 9, 7)).astype(np.float32)).astype(dtype)
    w = td.asarray(rng.standard_normal((8, 8 // groups, 3, 3)).astype(np.float32) * 0.2).astype(dtype)
    for conv in (td.conv, td.conv_transpose):
        def residual(x, w, conv=conv):
            return td.relu(conv(x, w, padding=1, groups=groups) + x)
        got, expected = (f(x, w).astype("float32").numpy() for f in (td.compile(residual), residual))
        np.testing.assert_allclose(got, expected, rtol=2e-2 if dtype == "bfloat16" else 1e-4, atol=2e-2)
