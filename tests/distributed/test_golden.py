"""The programs of a rank as text, for the ways in which models are split: what is pinned here is what a reviewer reads.

Each is also run: `check` compares all ranks together with one process.
"""

import pytest

from treadle.distributed import Mesh, Sharding
from treadle.ir.builder import build, emit
from treadle.ir.types import TensorType

from .test_partition import check

WINDOW = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1)}


def convs(x, up, down):
    """A residual block: the first convolution by output channels, the second by input channels, the batch over data."""
    return emit("conv", emit("relu", emit("conv", x, up, **WINDOW)), down, **WINDOW) + x


def lookup(table, tokens):
    """An embedding of which each rank has some rows."""
    return emit("take", table, tokens, axis=0)


def loss(x, table, labels):
    """Logits and cross-entropy over a split vocabulary: no rank has a whole row of logits."""
    return emit("cross_entropy", emit("matmul", x, table, transpose_y=True), labels)


def stream(x, scale, bias, up, down):
    """Half a transformer block whose residual stream is split along the sequence."""
    y = emit("layer_norm", emit("annotate", x, dims=("tensor", "")), scale, bias)
    y = emit("matmul", emit("tanh", emit("matmul", y, up)), down)
    return emit("annotate", x + y, dims=("tensor", ""))


def f64(*shape):
    return TensorType(shape, "float64")


TOKENS = TensorType((6,), "int64")
BOTH, TENSOR = {"data": 2, "tensor": 2}, {"tensor": 2}
BATCH, ROWS, COLUMNS = ("data", None, None, None), ("tensor", None), (None, "tensor")

CASES = {
    # name: (function, types, mesh, inputs, outputs)
    "convs": (convs, [f64(4, 3, 8, 8), f64(6, 3, 3, 3), f64(3, 6, 3, 3)], BOTH,
              {0: BATCH, 1: ("tensor", None, None, None), 2: (None, "tensor", None, None)}, {0: BATCH}),
    "lookup": (lookup, [f64(10, 4), TOKENS], TENSOR, {0: ROWS}, {}),
    "loss": (loss, [f64(6, 4), f64(10, 4), TOKENS], TENSOR, {1: ROWS}, {}),
    "stream": (stream, [f64(8, 4), f64(4), f64(4), f64(4, 8), f64(8, 4)], TENSOR,
                 {0: ROWS, 3: COLUMNS, 4: ROWS}, {0: ROWS}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_program_of_a_rank(name):
    function, types, mesh, inputs, outputs = CASES[name]
    graph = build(name, function, *types)
    made = check(graph, Mesh(mesh), {i: Sharding(d) for i, d in inputs.items()},
                 {i: Sharding(d) for i, d in outputs.items()})
    assert str(made.graph).strip() == GOLDEN[name].strip()


GOLDEN = {
    "convs": """
graph convs(%0: f64[2,3,8,8] data, %1: f64[3,3,3,3] data, %2: f64[3,3,3,3] data) -> (f64[2,3,8,8]) {
  %3 = conv(%0, %1) {stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1)} : f64[2,3,8,8]
  %4 = relu(%3) : f64[2,3,8,8]
  %5 = conv(%4, %2) {stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1)} : f64[2,3,8,8]
  %6 = all_reduce(%5) {axis="tensor", size=2} : f64[2,3,8,8]
  %7 = add(%6, %0) : f64[2,3,8,8]
  return %7
}
""",
    "lookup": """
graph lookup(%0: f64[5,4] data, %1: i64[6] data) -> (f64[6,4]) {
  %2 = clip(%1) {lo=0, hi=9} : i64[6]
  %3 = axis_index() {axis="tensor", size=2} : i64[]
  %4 = constant() {value=i64[] <5>} : i64[]
  %5 = mul(%3, %4) : i64[]
  %6 = sub(%2, %5) : i64[6]
  %7 = constant() {value=i64[] <0>} : i64[]
  %8 = constant() {value=i64[] <5>} : i64[]
  %9 = ge(%6, %7) : bool[6]
  %10 = lt(%6, %8) : bool[6]
  %11 = logical_and(%9, %10) : bool[6]
  %12 = take(%0, %6) : f64[6,4]
  %13 = reshape(%11) {shape=(6, 1)} : bool[6,1]
  %14 = constant() {value=f64[] <0.0>} : f64[]
  %15 = where(%13, %12, %14) : f64[6,4]
  %16 = all_reduce(%15) {axis="tensor", size=2} : f64[6,4]
  return %16
}
""",
    "loss": """
graph loss(%0: f64[6,4] data, %1: f64[5,4] data, %2: i64[6] data) -> (f64[6]) {
  %3 = matmul(%0, %1) {transpose_y=true} : f64[6,5]
  %4 = reduce_max(%3) {axes=(1,), keepdims=true} : f64[6,1]
  %5 = all_reduce(%4) {axis="tensor", size=2, reduce="max"} : f64[6,1]
  %6 = sub(%3, %5) : f64[6,5]
  %7 = exp(%6) : f64[6,5]
  %8 = reduce_sum(%7) {axes=(1,), keepdims=true} : f64[6,1]
  %9 = all_reduce(%8) {axis="tensor", size=2} : f64[6,1]
  %10 = log(%9) : f64[6,1]
  %11 = sub(%6, %10) : f64[6,5]
  %12 = reshape(%2) {shape=(6, 1)} : i64[6,1]
  %13 = clip(%12) {lo=0, hi=9} : i64[6,1]
  %14 = axis_index() {axis="tensor", size=2} : i64[]
  %15 = constant() {value=i64[] <5>} : i64[]
  %16 = mul(%14, %15) : i64[]
  %17 = sub(%13, %16) : i64[6,1]
  %18 = constant() {value=i64[] <0>} : i64[]
  %19 = constant() {value=i64[] <5>} : i64[]
  %20 = ge(%17, %18) : bool[6,1]
  %21 = lt(%17, %19) : bool[6,1]
  %22 = logical_and(%20, %21) : bool[6,1]
  %23 = take_along_axis(%11, %17) {axis=1} : f64[6,1]
  %24 = constant() {value=f64[] <0.0>} : f64[]
  %25 = where(%22, %23, %24) : f64[6,1]
  %26 = reshape(%25) {shape=(6,)} : f64[6]
  %27 = neg(%26) : f64[6]
  %28 = all_reduce(%27) {axis="tensor", size=2} : f64[6]
  return %28
}
""",
    "stream": """
graph stream(%0: f64[4,4] data, %1: f64[4] data, %2: f64[4] data, %3: f64[4,4] data, %4: f64[4,4] data) -> (f64[4,4]) {
  %5 = layer_norm(%0, %1, %2) : f64[4,4]
  %6 = all_gather(%5) {axis="tensor", size=2, dims=(0,)} : f64[8,4]
  %7 = matmul(%6, %3) : f64[8,4]
  %8 = tanh(%7) : f64[8,4]
  %9 = matmul(%8, %4) : f64[8,4]
  %10 = reduce_scatter(%9) {axis="tensor", size=2, dims=(0,)} : f64[4,4]
  %11 = add(%0, %10) : f64[4,4]
  return %11
}
""",
}
