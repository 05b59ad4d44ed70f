"""The f32 functions against f64, in units in the last place, over the whole range of f32."""

import math
import warnings

import numpy as np
import pytest
from lowered import check, data, graph_of

from treadle.ir import special
from treadle.ir.builder import emit

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from treadle.schedules.build import build
    from treadle.schedules.lower import lower
    from treadle.schedules.math import BOUNDS

UNARY = sorted(set(BOUNDS) - {"pow", "hypot", "atan2"})
NUMPY = {"asin": np.arcsin, "acos": np.arccos, "atan": np.arctan, "asinh": np.arcsinh, "acosh": np.arccosh,
         "atanh": np.arctanh, "erf": special.erf, "erfc": special.erfc, "sigmoid": special.sigmoid,
         "softplus": special.softplus}
EDGES = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 0.5, -0.5, 1e-45, -1e-45, 1.17549435e-38, 88.7, 88.73,
                  -87.4, -103.97, -104.5, 3.4e38, -3.4e38, 1e38, 1e10, 16777216.0, 33554432.0, 33554434.0, 3.92, 10.06],
                 np.float32)


def arguments():
    """Floats from every binade, subnormals included; a dense set around zero; the edges."""
    spread = np.arange(0, 1 << 32, 40961, dtype=np.uint64).astype(np.uint32).view(np.float32)
    dense = np.concatenate([np.linspace(-12, 12, 8001), np.linspace(-110, 100, 8001), np.linspace(-1.01, 1.01, 8001)])
    return np.concatenate([spread, dense.astype(np.float32), EDGES])


def ulps(got, want):
    """Distance in units in the last place of `want` rounded to f32; infinite where one is NaN and the other is not."""
    with np.errstate(all="ignore"):
        rounded = want.astype(np.float32)
        unit = np.maximum(np.spacing(np.abs(rounded)), np.float32(1e-45)).astype(np.float64)
        distance = np.abs(got.astype(np.float64) - want) / np.where(np.isfinite(unit), unit, 1)
    same = (got == rounded) | (np.isnan(got) & np.isnan(want))
    near_top = np.isfinite(got) & np.isinf(rounded) & (np.abs(want) < 3.41e38)
    distance = np.where(same | near_top, 0, distance)
    return np.where(np.isnan(distance), math.inf, distance)


def worst(name, *xs):
    graph = graph_of(lambda *v: emit(name, *v), *(x.shape for x in xs))
    (got,) = build(lower(graph, "cpu"), "cpu").run(list(xs))
    with np.errstate(all="ignore"):
        function = NUMPY.get(name) or getattr(np, {"pow": "power", "atan2": "arctan2"}.get(name, name))
        want = np.asarray(function(*(x.astype(np.float64) for x in xs)))
    distance = ulps(got, want)
    i = int(np.argmax(distance))
    return distance[i], [float(x[i]) for x in xs], float(got[i]), float(want[i])


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_unary_function_within_its_bound(name):
    distance, x, got, want = worst(name, arguments())
    assert distance <= BOUNDS[name], f"{name}({x}) = {got}, not {want}: {distance} ulp"


@pytest.mark.parametrize("name", ["pow", "hypot", "atan2"])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_binary_function_within_its_bound(name):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(20000) * 3, np.exp(rng.uniform(-80, 80, 20000))]).astype(np.float32)
    y = np.concatenate([rng.standard_normal(20000) * 3, rng.uniform(-2, 2, 20000)]).astype(np.float32)
    y[::7] = np.round(y[::7])
    ex, ey = (g.ravel() for g in np.meshgrid(EDGES, EDGES))
    distance, at, got, want = worst(name, np.concatenate([x, ex]), np.concatenate([y, ey]))
    assert distance <= BOUNDS[name], f"{name}({at}) = {got}, not {want}: {distance} ulp"


def test_no_scalar_library_call_is_left_in_f32_loops():
    """The object code of a kernel of f32 functions refers to no function of libm."""
    from treadle.schedules.codegen import compile_kernel
    from treadle.schedules.target import Target

    graph = graph_of(lambda x: [emit(n, x) for n in UNARY], (256,))
    for call in lower(graph, "cpu").kernel_calls:
        code = compile_kernel(call.kernel, "k_test", Target.parse("cpu"))
        for symbol in (b"expf\0", b"logf\0", b"tanhf\0", b"sinf\0", b"erff\0", b"powf\0", b"fmaf\0"):
            assert b"\0" + symbol not in code


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [4, 8, 16, 64])
def test_signs_survive_a_selection_against_the_argument(dtype, size):
    """LLVM 22 miscompiles the merge of a bit select with a masked move; the functions avoid its pattern."""
    odd = ("tanh", "sinh", "asinh", "atan", "cbrt", "asin", "atanh")
    graph = graph_of(lambda m, x: [emit("where", m, x, emit(n, x)) for n in odd]
                     + [emit("where", m, emit(n, x), x) for n in odd], ((size,), "bool"), ((size,), dtype))
    mask, x = data(graph)
    check(graph, [mask, (np.tanh(x.astype(np.float32)) * 0.9).astype(x.dtype)])
