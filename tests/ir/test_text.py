"""The text form: golden text, round trips, and programs that must be refused."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

from treadle.ir import ops as _ops  # noqa: F401
from treadle.ir.builder import GraphBuilder, emit
from treadle.ir.dims import Dim
from treadle.ir.errors import ParseError
from treadle.ir.interp import run
from treadle.ir.parse import parse
from treadle.ir.text import attr_text
from treadle.ir.types import TensorType
from treadle.ir.verify import verify

from .graphs import arrays_for, graphs

MLP = """graph main(%x: f32[8,784] data, %w: f32[784,10] parameter) -> (f32[8,1], f32[784,10]) {
  %0 = matmul(%x, %w) : f32[8,10]
  %1 = reduce_max(%0) {axes=(1,), keepdims=true} : f32[8,1]
  %2 = constant() {value=f32[] <0.5>} : f32[]
  %3 = mul(%w, %2) : f32[784,10]
  return %1, %3 -> %w
}"""


def test_golden_text():
    with GraphBuilder() as b:
        x = b.input(TensorType((8, 784), "float32"), "x")
        w = b.input(TensorType((784, 10), "float32"), "w", role="parameter")
        b.output(emit("reduce_max", emit("matmul", x, w), axes=(1,), keepdims=True))
        b.output(w * 0.5, alias=w)
    assert str(b.graph) == MLP
    assert parse(MLP) == b.graph


@settings(max_examples=100, deadline=None)
@given(graphs())
def test_random_graphs_round_trip(graph):
    verify(graph)
    again = parse(str(graph))
    verify(again)
    assert again == graph and str(again) == str(graph)
    for a, b in zip(run(graph, arrays_for(graph)), run(again, arrays_for(graph)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("array", [
    np.array([1.5, -0.0, np.inf, -np.inf, np.nan, 1e-45, 0.1], np.float32),
    np.array(0.1, ml_dtypes.bfloat16), np.array([[1, -7]], ml_dtypes.int4), np.array([True, False]),
    np.array([2**64 - 1], np.uint64), np.zeros((0, 3), np.float16), np.arange(40, dtype=np.float64).reshape(5, 8),
    np.linspace(-1, 1, 99, dtype=np.float32).astype(ml_dtypes.bfloat16),
], ids=str)
def test_constants_keep_every_bit(array):
    with GraphBuilder() as b:
        b.output(emit("constant", value=array))
    (out,) = run(parse(str(b.graph)), [])
    assert out.dtype == array.dtype and out.shape == array.shape
    assert out.tobytes() == array.tobytes()


def test_symbolic_sizes_round_trip():
    batch, seq = Dim("batch"), Dim("seq")
    with GraphBuilder() as b:
        x = b.input(TensorType((batch, 2 * seq + 1, (seq + 1) // 2, 8), "float32"), "x")
        b.output(emit("reshape", x, shape=(batch * (2 * seq + 1), (seq + 1) // 2, 8)))
    assert parse(str(b.graph)) == b.graph
    assert parse(str(b.graph)).inputs[0].shape == x.shape


def test_string_attributes_are_escaped():
    assert attr_text('a"b\\c\nd') == '"a\\"b\\\\c\\nd"'


def test_names_are_unique_and_printable():
    with GraphBuilder() as b:
        b.input(TensorType((), "float32"), "layer.0/weight")
        b.input(TensorType((), "float32"), "layer.0/weight")
        b.input(TensorType((), "float32"), "7")
        b.output(*b.graph.inputs)
    assert parse(str(b.graph)) == b.graph


@pytest.mark.parametrize("old, new, message", [
    ("matmul(%x, %w)", "matmul(%x, %y)", "line 2, column 19: %y is not defined"),
    ("%1 = reduce", "%0 = reduce", "%0 is defined twice"),
    ("matmul(", "matmol(", "there is no op 'matmol'"),
    ("axes=(1,)", "axes=(5,)", "line 3"),
    ("{axes=(1,), ", "{axis=(1,), ", "has no attribute axis"),
    (": f32[8,10]", ": f32[8,11]", "gives f32[8,10], the text claims f32[8,11]"),
    ("f32[] <0.5>", "f32[2] <0.5>", "needs 2 elements, found 1"),
    ("-> %w", "-> %0", "can only take over the storage of an input"),
    ("784,10] parameter", "784,10] weights", "'weights' is not a role"),
    ("(f32[8,1], f32[784,10])", "(f32[8,1])", "claims the outputs"),
    ("f32[8,784]", "f33[8,784]", "not a supported dtype"),
    ("return", "@", "unexpected character '@'"),
    ("}", "} trailing", "text after the graph"),
])
def test_programs_that_are_refused(old, new, message):
    text = MLP[::-1].replace(old[::-1], new[::-1], 1)[::-1] if old == "}" else MLP.replace(old, new, 1)
    with pytest.raises(ParseError) as error:
        parse(text)
    assert message in str(error.value)


def test_truncated_text_is_refused_at_every_length():
    for end in range(0, len(MLP) - 1, 7):
        with pytest.raises(ParseError):
            parse(MLP[:end])
