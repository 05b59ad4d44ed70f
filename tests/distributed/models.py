"""Small graphs of models for the tests of partitioning: a GPT block by block, and a convolutional net."""

import numpy as np

from treadle.autodiff import grad_graph
from treadle.distributed import Sharding
from treadle.ir.builder import GraphBuilder, emit
from treadle.ir.dtypes import as_dtype
from treadle.ir.types import TensorType

F64 = as_dtype("float64")


class Inputs:
    """Declares the inputs of a graph, and how they are to lie."""

    def __init__(self, builder):
        self.builder, self.names, self.shardings = builder, [], {}

    def add(self, name, shape, dims=None, role="parameter", dtype="float64"):
        value = self.builder.input(TensorType(shape, as_dtype(dtype)), name, role)
        if dims is not None:
            self.shardings[len(self.names)] = Sharding(dims)
        self.names.append(name)
        return value


def reshape(x, *shape):
    return emit("reshape", x, shape=shape)


def heads(x, count):
    batch, seq, width = x.shape
    return emit("transpose", reshape(x, batch, seq, count, width // count), perm=(0, 2, 1, 3))


def part(x, i, width):
    return emit("slice", x, starts=(0, 0, i * width), limits=(*x.shape[:2], (i + 1) * width), strides=(1, 1, 1))


def linear(x, w, b=None):
    y = emit("matmul", x, w)
    return y if b is None else y + b


def norm(inputs, name, x, width, whole):
    scale, bias = (inputs.add(f"{name}.{part}", (width,), whole) for part in ("scale", "bias"))
    return emit("layer_norm", x, scale, bias)


def gpt(batch=4, seq=8, width=8, count=2, layers=1, vocab=12, tensor=None, data=None, sequence=False,
        vocabulary=False, fused=False):
    """The loss of a small GPT, with the shardings that its annotations ask for: (graph, {input: Sharding}).

    Only weights (column, row) and the batch are annotated; with `sequence` also the residual stream.
    """
    with GraphBuilder("gpt") as builder:
        inputs = Inputs(builder)
        col, row = ((None, tensor), (tensor, None)) if tensor else ((None, None), (None, None))
        tokens = inputs.add("tokens", (batch, seq), (data, None), "data", "int64")
        labels = inputs.add("labels", (batch, seq), (data, None), "data", "int64")
        table = inputs.add("embedding", (vocab, width), (tensor if vocabulary else None, None))
        x = emit("take", table, tokens, axis=0) + inputs.add("positions", (seq, width), (None, None))
        for i in range(layers):
            x = stream(x, tensor, sequence)
            y = norm(inputs, f"{i}.norm1", x, width, (None,))
            if fused:  # one projection, then parts, then heads, as GPT-2's
                blocks = f"{tensor}:3" if tensor else None
                y = linear(y, inputs.add(f"{i}.qkv", (width, 3 * width), (None, blocks)),
                           inputs.add(f"{i}.qkv.bias", (3 * width,), (blocks,)))
                q, k, v = (heads(part(y, j, width), count) for j in range(3))
            else:
                q, k, v = (heads(linear(y, inputs.add(f"{i}.{n}", (width, width), col)), count) for n in "qkv")
            y = emit("transpose", emit("attention", q, k, v, causal=True), perm=(0, 2, 1, 3))
            y = linear(reshape(y, batch, seq, width), inputs.add(f"{i}.out", (width, width), row))
            x = stream(x + (y + inputs.add(f"{i}.out.bias", (width,), (None,))), tensor, sequence)
            y = norm(inputs, f"{i}.norm2", x, width, (None,))
            y = linear(y, inputs.add(f"{i}.up", (width, 4 * width), col),
                       inputs.add(f"{i}.up.bias", (4 * width,), (tensor,)))
            y = linear(emit("tanh", y), inputs.add(f"{i}.down", (4 * width, width), row))
            x = x + (y + inputs.add(f"{i}.down.bias", (width,), (None,)))
        x = norm(inputs, "norm", stream(x, tensor, sequence), width, (None,))
        logits = emit("matmul", x, table, transpose_y=True)
        loss = emit("cross_entropy", reshape(logits, batch * seq, vocab), reshape(labels, batch * seq))
        builder.output(emit("reduce_mean", loss, axes=(0,)))
    return builder.graph, inputs.shardings


def stream(x, tensor, sequence):
    return emit("annotate", x, dims=("", tensor, "")) if sequence else x


def convnet(batch=4, channels=4, size=6, classes=4, data=None, tensor=None):
    """A residual net with batch norm: (graph, shardings)."""
    window = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1)}
    with GraphBuilder("convnet") as builder:
        inputs = Inputs(builder)
        x = inputs.add("images", (batch, 3, size, size), (data, None, None, None), "data")
        labels = inputs.add("labels", (batch,), (data,), "data", "int64")
        x = emit("conv", x, inputs.add("stem", (channels, 3, 3, 3), (None,) * 4), **window)
        y = x
        for i, dims in enumerate(((tensor, None, None, None), (None, tensor, None, None))):
            y = emit("conv", y, inputs.add(f"conv{i}", (channels, channels, 3, 3), dims), **window)
            own = (tensor,) if i == 0 else (None,)
            y, _, _ = emit("batch_norm", y, inputs.add(f"norm{i}.scale", (channels,), own),
                           inputs.add(f"norm{i}.bias", (channels,), own))
            y = emit("relu", y)
        y, _ = emit("max_pool", x + y, window=(2, 2), stride=(2, 2), padding=((0, 0), (0, 0)), dilation=(1, 1))
        y = emit("reduce_mean", y, axes=(2, 3))
        logits = linear(y, inputs.add("head", (channels, classes), (None, None)))
        builder.output(emit("reduce_mean", emit("cross_entropy", logits, labels), axes=(0,)))
    return builder.graph, inputs.shardings


def with_gradients(graph, shardings):
    """Loss and the gradient of every parameter; gradients lie as their parameters."""
    wrt = [i for i, role in enumerate(graph.roles) if role == "parameter"]
    made = grad_graph(graph, wrt)
    return made, {k + 1: shardings[i] for k, i in enumerate(wrt) if i in shardings}


def arrays_of(graph, seed=0, limit=4):
    """Inputs for a graph: normal numbers, small whole ones."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, limit, v.shape).astype(v.dtype.np) if v.dtype.is_integer
            else np.asarray(rng.standard_normal(v.shape) * 0.5).astype(v.dtype.np) for v in graph.inputs]
