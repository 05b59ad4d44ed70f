"""Passes on small graphs: the text before and after, and that a pass keeps the reference's answer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.ir.builder import GraphBuilder, build, emit
from treadle.ir.cse import merge
from treadle.ir.dce import sweep
from treadle.ir.decompose import decompose, erase
from treadle.ir.hashing import graph_hash
from treadle.ir.interp import run
from treadle.ir.loops import merge_scans
from treadle.ir.order import hoist_updates
from treadle.ir.parse import parse
from treadle.ir.passes import FINISH, TIDY
from treadle.ir.pipeline import Pipeline
from treadle.ir.simplify import simplify
from treadle.ir.types import TensorType
from treadle.ir.verify import verify

from .graphs import arrays_for, graphs

SPECIALS = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 2.5])


def body(text):
    """The text of a graph `main(%x: f32[2,3], ...)` from its lines."""
    return "\n".join(line.strip() for line in text.strip().splitlines())


def lines(graph):
    return body(str(graph))


def check_rewrite(before, after, run_pass):
    """The pass turns the first text into the second, and the answer stays the same."""
    graph = parse(before)
    result = run_pass(graph).graph
    verify(result)
    assert lines(result) == body(after)
    arrays = arrays_for(graph)
    for a, b in zip(run(graph, arrays), run(result, arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert lines(graph) == body(before), "a pass must not modify the graph it is given"


def f32(*shape):
    return TensorType(shape, "float32")


SIMPLIFICATIONS = {
    "arithmetic with neutral elements": ("""
        graph main(%x: f32[2,3] data) -> (f32[2,3]) {
          %0 = constant() {value=f32[] <1.0>} : f32[]
          %1 = mul(%0, %x) : f32[2,3]
          %2 = constant() {value=f32[] <0.0>} : f32[]
          %3 = broadcast_to(%2) {shape=(2, 3)} : f32[2,3]
          %4 = add(%1, %3) : f32[2,3]
          %5 = neg(%4) : f32[2,3]
          %6 = neg(%5) : f32[2,3]
          return %6
        }""", """
        graph main(%x: f32[2,3] data) -> (f32[2,3]) {
          return %x
        }"""),
    "powers": ("""
        graph main(%x: f32[3] data) -> (f32[3], f32[3]) {
          %0 = constant() {value=f32[] <2.0>} : f32[]
          %1 = pow(%x, %0) : f32[3]
          %2 = constant() {value=f32[] <8.0>} : f32[]
          %3 = div(%x, %2) : f32[3]
          return %1, %3
        }""", """
        graph main(%x: f32[3] data) -> (f32[3], f32[3]) {
          %0 = square(%x) : f32[3]
          %1 = constant() {value=f32[] <0.125>} : f32[]
          %2 = mul(%x, %1) : f32[3]
          return %0, %2
        }"""),
    "a transpose becomes a flag": ("""
        graph main(%x: f32[4,2,3] data, %w: f32[5,3] parameter) -> (f32[4,2,5]) {
          %0 = transpose(%w) {perm=(1, 0)} : f32[3,5]
          %1 = matmul(%x, %0) : f32[4,2,5]
          return %1
        }""", """
        graph main(%x: f32[4,2,3] data, %w: f32[5,3] parameter) -> (f32[4,2,5]) {
          %0 = matmul(%x, %w) {transpose_y=true} : f32[4,2,5]
          return %0
        }"""),
    "broadcasts are dropped or done last": ("""
        graph main(%x: f32[2,3] data, %b: f32[3] parameter) -> (f32[2,3], f32[2,3]) {
          %0 = broadcast_to(%b) {shape=(2, 3)} : f32[2,3]
          %1 = add(%x, %0) : f32[2,3]
          %2 = exp(%0) : f32[2,3]
          return %1, %2
        }""", """
        graph main(%x: f32[2,3] data, %b: f32[3] parameter) -> (f32[2,3], f32[2,3]) {
          %0 = add(%x, %b) : f32[2,3]
          %1 = exp(%b) : f32[3]
          %2 = broadcast_to(%1) {shape=(2, 3)} : f32[2,3]
          return %0, %2
        }"""),
    "the gradient of a split is a join": ("""
        graph main(%a: f32[2,1] data, %b: f32[2,2] data, %c: f32[2,3] data) -> (f32[2,6]) {
          %0 = pad(%c) {low=(0, 3), high=(0, 0), interior=(0, 0)} : f32[2,6]
          %1 = pad(%b) {low=(0, 1), high=(0, 3), interior=(0, 0)} : f32[2,6]
          %2 = add(%0, %1) : f32[2,6]
          %3 = pad(%a) {low=(0, 0), high=(0, 5), interior=(0, 0)} : f32[2,6]
          %4 = add(%2, %3) : f32[2,6]
          return %4
        }""", """
        graph main(%a: f32[2,1] data, %b: f32[2,2] data, %c: f32[2,3] data) -> (f32[2,6]) {
          %0 = concat(%a, %b, %c) {axis=1} : f32[2,6]
          return %0
        }"""),
    "views collapse": ("""
        graph main(%x: f32[2,3,4] data) -> (f32[4,6], f32[3,2], f32[2,1,4]) {
          %0 = transpose(%x) {perm=(2, 0, 1)} : f32[4,2,3]
          %1 = reshape(%0) {shape=(8, 3)} : f32[8,3]
          %2 = reshape(%1) {shape=(4, 6)} : f32[4,6]
          %3 = transpose(%0) {perm=(2, 1, 0)} : f32[3,2,4]
          %4 = slice(%3) {starts=(0, 0, 1), limits=(3, 2, 3), strides=(1, 1, 1)} : f32[3,2,2]
          %5 = slice(%4) {starts=(0, 0, 1), limits=(3, 2, 2), strides=(1, 1, 1)} : f32[3,2,1]
          %6 = reshape(%5) {shape=(3, 2)} : f32[3,2]
          %7 = slice(%x) {starts=(0, 0, 0), limits=(2, 2, 4), strides=(1, 1, 1)} : f32[2,2,4]
          %8 = slice(%x) {starts=(0, 2, 0), limits=(2, 3, 4), strides=(1, 1, 1)} : f32[2,1,4]
          %9 = concat(%7, %8) {axis=1} : f32[2,3,4]
          %10 = slice(%9) {starts=(0, 2, 0), limits=(2, 3, 4), strides=(1, 1, 1)} : f32[2,1,4]
          return %2, %6, %10
        }""", """
        graph main(%x: f32[2,3,4] data) -> (f32[4,6], f32[3,2], f32[2,1,4]) {
          %0 = transpose(%x) {perm=(2, 0, 1)} : f32[4,2,3]
          %1 = reshape(%0) {shape=(4, 6)} : f32[4,6]
          %2 = transpose(%x) {perm=(1, 0, 2)} : f32[3,2,4]
          %3 = slice(%2) {starts=(0, 0, 2), limits=(3, 2, 3), strides=(1, 1, 1)} : f32[3,2,1]
          %4 = reshape(%3) {shape=(3, 2)} : f32[3,2]
          %5 = slice(%x) {starts=(0, 2, 0), limits=(2, 3, 4), strides=(1, 1, 1)} : f32[2,1,4]
          return %1, %4, %5
        }"""),
    "sums into a scatter": ("""
        graph main(%x: f32[4,2] data, %u: f32[1,2] data) -> (f32[4,2]) {
          %0 = constant() {value=i64[1] <3>} : i64[1]
          %1 = constant() {value=f32[] <0.0>} : f32[]
          %2 = broadcast_to(%1) {shape=(4, 2)} : f32[4,2]
          %3 = scatter_add(%2, %0, %u) : f32[4,2]
          %4 = add(%3, %x) : f32[4,2]
          return %4
        }""", """
        graph main(%x: f32[4,2] data, %u: f32[1,2] data) -> (f32[4,2]) {
          %0 = constant() {value=i64[1] <3>} : i64[1]
          %1 = scatter_add(%x, %0, %u) : f32[4,2]
          return %1
        }"""),
    "data moves in the narrower dtype": ("""
        graph main(%x: f32[2,3] data, %y: bf16[2,3] data) -> (bf16[6], f32[3,2]) {
          %0 = reshape(%x) {shape=(6,)} : f32[6]
          %1 = cast(%0) {dtype=dtype bf16} : bf16[6]
          %2 = cast(%y) {dtype=dtype f32} : f32[2,3]
          %3 = transpose(%2) {perm=(1, 0)} : f32[3,2]
          return %1, %3
        }""", """
        graph main(%x: f32[2,3] data, %y: bf16[2,3] data) -> (bf16[6], f32[3,2]) {
          %0 = cast(%x) {dtype=dtype bf16} : bf16[2,3]
          %1 = reshape(%0) {shape=(6,)} : bf16[6]
          %2 = transpose(%y) {perm=(1, 0)} : bf16[3,2]
          %3 = cast(%2) {dtype=dtype f32} : f32[3,2]
          return %1, %3
        }"""),
    "casts": ("""
        graph main(%x: bf16[2] data, %y: f32[2] data) -> (bf16[2], f64[2], f32[2]) {
          %0 = cast(%x) {dtype=dtype f32} : f32[2]
          %1 = cast(%0) {dtype=dtype bf16} : bf16[2]
          %2 = cast(%0) {dtype=dtype f64} : f64[2]
          %3 = cast(%y) {dtype=dtype bf16} : bf16[2]
          %4 = cast(%3) {dtype=dtype f32} : f32[2]
          return %1, %2, %4
        }""", """
        graph main(%x: bf16[2] data, %y: f32[2] data) -> (bf16[2], f64[2], f32[2]) {
          %0 = cast(%x) {dtype=dtype f64} : f64[2]
          %1 = cast(%y) {dtype=dtype bf16} : bf16[2]
          %2 = cast(%1) {dtype=dtype f32} : f32[2]
          return %x, %0, %2
        }"""),
    "constants fold": ("""
        graph main(%x: f32[2] data) -> (f32[2]) {
          %0 = constant() {value=f32[2] <1.0, 4.0>} : f32[2]
          %1 = sqrt(%0) : f32[2]
          %2 = constant() {value=f32[] <3.0>} : f32[]
          %3 = mul(%1, %2) : f32[2]
          %4 = add(%3, %x) : f32[2]
          return %4
        }""", """
        graph main(%x: f32[2] data) -> (f32[2]) {
          %0 = constant() {value=f32[2] <3.0, 6.0>} : f32[2]
          %1 = add(%0, %x) : f32[2]
          return %1
        }"""),
    "a branch that is known": ("""
        graph main(%x: f32[2] data) -> (f32[2]) {
          %0 = constant() {value=bool[] <true>} : bool[]
          %1 = cond(%0, %x) [
            graph then(%x: f32[2] data) -> (f32[2]) {
              %0 = exp(%x) : f32[2]
              return %0
            }
            graph else(%x: f32[2] data) -> (f32[2]) {
              return %x
            }
          ] : f32[2]
          return %1
        }""", """
        graph main(%x: f32[2] data) -> (f32[2]) {
          %0 = exp(%x) : f32[2]
          return %0
        }"""),
}


@pytest.mark.parametrize("name", SIMPLIFICATIONS)
def test_simplify(name):
    check_rewrite(*SIMPLIFICATIONS[name], simplify)


def test_what_is_not_simplified():
    """x - x, 0 * x and x / x are NaN for some x; a float reduction is not reordered; stop_gradient is kept."""
    def keep(x):
        zero = emit("constant", value=np.zeros((), np.float32))
        return [x - x, x * zero, x / x, emit("stop_gradient", x), emit("exp", emit("log", x))]
    graph = build("main", keep, f32(3))
    assert not simplify(graph).changed


UNARY_CASES = {
    "x * 1": lambda x: x * 1.0, "x * -1": lambda x: x * -1.0, "x + 0": lambda x: x + 0.0, "x - 0": lambda x: x - 0.0,
    "0 - x": lambda x: 0.0 - x, "x / 4": lambda x: x / 4.0, "x / -1": lambda x: x / -1.0,
    "x ** 0": lambda x: x ** 0.0, "x ** 1": lambda x: x ** 1.0, "x ** 2": lambda x: x ** 2.0,
    "x ** 3": lambda x: x ** 3.0, "x ** -1": lambda x: x ** -1.0,
    "(-x)(-x)": lambda x: -x * -x, "-x * 3": lambda x: -x * 3.0, "x - -x": lambda x: x - -x, "-x + x": lambda x: -x + x,
    "|-x|": lambda x: emit("abs", -x), "(-x)^2": lambda x: emit("square", -x),
    "max(x, x)": lambda x: emit("maximum", x, x), "sum of one": lambda x: emit("reduce_sum", x, axes=()),
    "logsumexp of one": lambda x: emit("logsumexp", emit("reshape", x, shape=(8, 1)), axes=(1,)),
    "where same": lambda x: emit("where", emit("isnan", x), x, x),
}


@pytest.mark.parametrize("name", UNARY_CASES)
def test_special_values_survive(name):
    """NaN and infinities; the sign of a zero may change."""
    graph = build("main", UNARY_CASES[name], f32(8))
    result = simplify(graph)
    assert result.changed
    (expected,), (actual,) = run(graph, [SPECIALS.astype(np.float32)]), run(result.graph, [SPECIALS.astype(np.float32)])
    np.testing.assert_array_equal(actual, expected)


def same_answers(graph, result):
    verify(result)
    arrays = arrays_for(graph)
    for a, b in zip(run(graph, arrays), run(result, arrays), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        scale = max(1.0, float(np.max(np.abs(a), initial=0))) if np.isfinite(a).all() else 1.0
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6 * scale)


@given(graphs(max_nodes=20), st.sampled_from([simplify, merge, sweep, decompose]))
@settings(max_examples=150)
def test_passes_keep_the_answer(graph, run_pass):
    before = str(graph)
    result = run_pass(graph)
    assert result.changed == (result.graph is not graph)
    assert str(graph) == before
    same_answers(graph, result.graph)


@given(graphs(max_nodes=20))
@settings(max_examples=40)
def test_simplify_settles(graph):
    once = simplify(graph).graph
    assert str(simplify(merge(once).graph).graph) == str(merge(once).graph) or len(
        simplify(merge(once).graph).graph.nodes) < len(once.nodes)


def test_cse():
    def twice(x, y):
        a, b = emit("add", x, y), emit("add", y, x)
        return [emit("exp", a) * emit("exp", b), x - y, y - x]
    graph = build("main", twice, f32(3), f32(3))
    result = merge(graph)
    assert [n.op.name for n in result.graph.nodes] == ["add", "exp", "mul", "sub", "sub"]
    assert result.stats == {"merged": 2}
    same_answers(graph, result.graph)


def test_cse_merges_equal_random_bits_only():
    def draw(state):
        return [emit("random_bits", state, offset=o, shape=(4,)) for o in (0, 0, 4)]
    result = merge(build("main", draw, TensorType((2,), "uint64")))
    assert len(result.graph.nodes) == 2


def test_cse_tells_attributes_apart():
    """1 and True, 0.0 and -0.0 are equal to Python."""
    def consts(x):
        return [emit("constant", value=np.array(v, np.float32)) for v in (0.0, -0.0, 0.0)]
    assert len(merge(build("main", consts, f32(1))).graph.nodes) == 2


def test_dce_keeps_outputs_and_aliases():
    with GraphBuilder("main") as b:
        x, w = b.input(f32(2), "x"), b.input(f32(2), "w", role="parameter")
        emit("exp", x)
        b.output(x)
        b.output(w * 2.0, alias=w)
    result = sweep(b.graph)
    assert [n.op.name for n in result.graph.nodes] == ["constant", "mul"]
    assert result.graph.aliases == {1: 1} and len(result.graph.inputs) == 2


def loop_body():
    """(a, b, dead; x, unused; w) -> (a + x, b + a, dead * 2; a * w, b, x)"""
    def body(a, b, dead, x, unused, w):
        return [a + x, b + a, dead * 2.0, a * w, b, x]
    return build("body", body, *[f32(2)] * 6)


@pytest.mark.parametrize("wanted, shape", [
    ((0,), (1, 1, 2)), ((1,), (2, 1, 3)), ((3,), (1, 1, 3)), ((5,), (0, 1, 1)), ((2, 4), (3, 1, 4)),
    ((0, 1, 2, 3, 4, 5), (3, 1, 5)),
])
def test_dce_narrows_scan(wanted, shape):
    """(carries, xs, operands) that are left when only some results are wanted."""
    def loop(a, b, dead, x, unused, w):
        results = emit("scan", a, b, dead, x, unused, w, regions=(loop_body(),), n_carry=3, n_xs=2, length=3)
        return [results[i] for i in wanted]
    graph = build("main", loop, *[f32(2)] * 3, f32(3, 2), f32(3, 2), f32(2))
    result = sweep(graph).graph
    (scan,) = result.nodes
    assert (scan.attrs["n_carry"], scan.attrs["n_xs"], len(scan.operands)) == shape
    same_answers(graph, result)


def test_dce_narrows_while_loop_and_cond():
    limit = build("c", lambda i, x, y, k: emit("lt", i, k), *[f32()] * 4)
    step = build("b", lambda i, x, y, k: [i + 1.0, x * 2.0, y + x], *[f32()] * 4)

    def loop(x, y):
        i, k = (emit("constant", value=np.array(v, np.float32)) for v in (0, 3))
        return emit("while_loop", i, x, y, k, regions=(limit, step), n_carry=3)[1]
    graph = build("main", loop, f32(), f32())
    result = sweep(graph).graph
    assert result.nodes[-1].attrs["n_carry"] == 2 and len(result.nodes[-1].operands) == 3
    same_answers(graph, result)
    branches = tuple(build(n, lambda x, y, z: [x + y, z * 2.0], *[f32(2)] * 3) for n in ("then", "else"))
    graph = build("main", lambda p, x, y, z: emit("cond", p, x, y, z, regions=branches)[1],
                  TensorType((), "bool"), *[f32(2)] * 3)
    result = sweep(graph).graph
    assert len(result.nodes[-1].operands) == 2 and len(result.nodes[-1].regions[0].nodes) == 2
    same_answers(graph, result)


def test_equal_scans_merge_and_their_extra_results_join():
    def first(h, x, w):
        out = emit("tanh", h * w + x)
        return [out, out]

    def second(h, x, w):
        scaled = w * h
        out = emit("tanh", scaled + x)
        return [out, scaled, out, h]

    def other(h, x, w):
        return [emit("sin", h * w + x), h]

    def loops(h, x, w):
        results = [emit("scan", h, x, w, regions=(build("b", f, *[f32(2)] * 3),), n_carry=1, n_xs=1, length=3)
                   for f in (first, second, other)]
        shifted = results[0][0] + 1.0
        return [shifted, *results[0], *results[1], *results[2]]
    graph = build("main", loops, f32(2), f32(3, 2), f32(2))
    result = merge_scans(graph)
    scans = [n for n in result.graph.nodes if n.op.name == "scan"]
    assert result.stats == {"merged": 1} and len(scans) == 2
    assert len(scans[0].results) == 4 and len(scans[0].regions[0].nodes) == 3
    same_answers(graph, result.graph)
    assert not merge_scans(result.graph).changed


def test_fixed_carries_become_constants():
    body = build("b", lambda h, w, x: [h * w + x, w, w], *[f32(2)] * 3)
    graph = build("main", lambda h, w, x: list(emit("scan", h, w, x, regions=(body,), n_carry=2, n_xs=1, length=3)),
                  f32(2), f32(2), f32(3, 2))
    result = simplify(graph).graph
    (scan,) = result.nodes
    assert scan.attrs["n_carry"] == 1 and result.outputs[1] is result.inputs[1]
    same_answers(graph, result)


def test_decompose_by_predicate():
    graph = build("main", lambda x: emit("softmax", emit("log_softmax", x, axis=0), axis=1), f32(3, 4))
    result = decompose(graph, lambda n: n.op.name == "log_softmax")
    assert "softmax" in {n.op.name for n in result.graph.nodes} and result.stats == {"log_softmax": 1}
    same_answers(graph, result.graph)


def test_markers_are_erased_last():
    graph = build("main", lambda x: [emit("stop_gradient", emit("exp", emit("barrier", x))), emit("exp", x)], f32(3))
    assert len(merge(graph).graph.nodes) == 4
    result = erase(graph)
    assert [n.op.name for n in result.graph.nodes] == ["exp", "exp"]
    assert result.stats == {"barrier": 1, "stop_gradient": 1}
    same_answers(graph, result.graph)


@given(graphs(max_nodes=20))
@settings(max_examples=60)
def test_the_standard_pipeline_keeps_the_answer(graph):
    result = Pipeline([*TIDY, *FINISH]).run(graph)
    same_answers(graph, result)
    assert len(result.nodes) <= len(graph.nodes)


def test_hashes():
    def f(x, y):
        return emit("tanh", emit("matmul", x, y)) * 2.0
    a, b = build("first", f, f32(2, 3), f32(3, 4)), build("second", f, f32(2, 3), f32(3, 4))
    a.inputs[0].name = "other"
    assert graph_hash(a) == graph_hash(b)
    assert graph_hash(a) != graph_hash(build("first", f, f32(2, 3), f32(3, 5)))
    assert graph_hash(a) != graph_hash(build("first", lambda x, y: emit("tanh", emit("matmul", x, y)) * 3.0,
                                             f32(2, 3), f32(3, 4)))


@given(graphs())
@settings(max_examples=30)
def test_equal_text_hashes_alike(graph):
    assert graph_hash(parse(str(graph))) == graph_hash(graph)


def test_updates_run_as_soon_as_their_gradient_is_there():
    with GraphBuilder("step") as b:
        x, rate = b.input(f32(4), "x"), b.input(f32(), "rate", role="scalar")
        w = [b.input(f32(4), f"w{i}", role="parameter") for i in range(3)]
        grads = [emit("cumsum", x + v, axis=0) for v in w]
        norm = emit("reduce_sum", emit("cumprod", w[2], axis=0), axes=(0,))
        step = rate * 2.0
        for v, g in zip(w, grads):
            b.output(v - g * step, alias=v)
        b.output(norm)
    result = hoist_updates(b.graph)
    verify(result.graph)
    assert [n.op.name for n in result.graph.nodes] == [
        "constant", "mul",                       # scalars first
        "add", "cumsum", "mul", "sub",           # each gradient, and its update
        "add", "cumsum", "mul", "sub",
        "add", "cumsum", "cumprod", "mul", "sub",  # w2 is read once more before it is overwritten
        "reduce_sum"]
    same_answers(b.graph, result.graph)
    assert not hoist_updates(result.graph).changed


def test_updates_that_read_each_other_stay_together():
    with GraphBuilder("step") as b:
        m, v = (b.input(f32(4), n, role="state") for n in "mv")
        g = emit("cumsum", m, axis=0)
        late = emit("cumsum", g, axis=0)
        b.output(m + g, alias=m)
        b.output(v + m * late, alias=v)  # reads the old m, so m must not be overwritten earlier
    result = hoist_updates(b.graph)
    assert [n.op.name for n in result.graph.nodes] == ["cumsum", "cumsum", "add", "mul", "add"]
    same_answers(b.graph, result.graph)
