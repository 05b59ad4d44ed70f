"""A hypothesis strategy of random graphs, shared by the property tests.

Graphs are well typed by construction (only the builder makes nodes), finite in value for the inputs of
`arrays_for`, and mix dtypes, ranks, broadcasting, views, reductions and contractions.
"""

import numpy as np
from hypothesis import strategies as st

from treadle.ir import ops as _ops  # noqa: F401
from treadle.ir.builder import GraphBuilder, emit
from treadle.ir.types import TensorType

UNARY = ("neg", "abs", "exp", "tanh", "sin", "sigmoid", "square", "erf", "floor")
BINARY = ("add", "sub", "mul", "maximum", "minimum")
REDUCE = ("reduce_sum", "reduce_max", "reduce_mean", "reduce_min")
SIZES = (1, 2, 3, 5, 7)


def _elementwise(draw, values):
    x = draw(st.sampled_from(values))
    if draw(st.booleans()):
        y = emit("tanh", x)  # keeps repeated exp and square in range
        return emit(draw(st.sampled_from(UNARY)), y)
    partners = [v for v in values if v.dtype == x.dtype and _broadcasts(x.shape, v.shape)]
    return emit(draw(st.sampled_from(BINARY)), x, draw(st.sampled_from(partners)))


def _broadcasts(a, b):
    return all(m == n or 1 in (m, n) for m, n in zip(reversed(a), reversed(b)))


def _view(draw, values):
    x = draw(st.sampled_from(values))
    kind = draw(st.sampled_from(("transpose", "reshape", "slice", "pad", "reverse", "concat", "broadcast_to")))
    if kind == "transpose":
        return emit("transpose", x, perm=tuple(draw(st.permutations(range(x.rank)))))
    if kind == "reshape":
        return emit("reshape", x, shape=(1, int(x.type.size)) if draw(st.booleans()) else (int(x.type.size),))
    if kind == "broadcast_to":
        return emit("broadcast_to", x, shape=(2, *x.shape))
    if x.rank == 0:
        return emit("neg", x)
    axis = draw(st.integers(0, x.rank - 1))
    if kind == "reverse":
        return emit("reverse", x, axes=(axis,))
    if kind == "concat":
        return emit("concat", x, x, axis=axis)
    if kind == "pad":
        low = tuple(int(a == axis) for a in range(x.rank))
        return emit("pad", x, low=low, high=(0,) * x.rank, interior=(0,) * x.rank, value=0.0)
    step = draw(st.sampled_from((1, 2)))
    strides = tuple(step if a == axis else 1 for a in range(x.rank))
    return emit("slice", x, starts=(0,) * x.rank, limits=x.shape, strides=strides)


def _reduce(draw, values):
    x = draw(st.sampled_from(values))
    if x.rank == 0:
        return emit("neg", x)
    axes = tuple(sorted(draw(st.sets(st.integers(0, x.rank - 1), min_size=1))))
    return emit(draw(st.sampled_from(REDUCE)), x, axes=axes, keepdims=draw(st.booleans()))


def _contract(draw, values):
    x = draw(st.sampled_from(values))
    if x.rank < 2:
        return emit("neg", x)
    return emit("matmul", x, x, transpose_y=True) if draw(st.booleans()) else emit("softmax", x, axis=x.rank - 1)


@st.composite
def graphs(draw, max_nodes=12, dtypes=("float32", "float64"), sizes=SIZES):
    """A random graph of up to `max_nodes` steps over one to three inputs."""
    dtype = draw(st.sampled_from(dtypes))
    with GraphBuilder("random") as builder:
        values = [builder.input(TensorType(draw(st.lists(st.sampled_from(sizes), max_size=3)), dtype), f"x{i}")
                  for i in range(draw(st.integers(1, 3)))]
        for _ in range(draw(st.integers(1, max_nodes))):
            step = draw(st.sampled_from((_elementwise, _elementwise, _view, _reduce, _contract)))
            value = step(draw, values)
            if value.type.size <= 4096:
                values.append(value)
        outputs = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
        builder.output(*outputs)
    return builder.graph


def arrays_for(graph, seed=0):
    """Normal numbers of the types of a graph's inputs."""
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(v.shape)).astype(v.dtype.np) for v in graph.inputs]
