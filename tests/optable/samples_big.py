"""Samples of the ops with several operands of related shapes: contraction, windows, indexing, networks, control."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from treadle.ir.builder import build, emit
from treadle.ir.dtypes import as_dtype
from treadle.ir.graph import Graph

from .samples import Generator, Maker, Sample, types_of

# Contraction -----------------------------------------------------------------------------------------------------

MATMULS = [((), (), 1, 1, 1), ((), (), 3, 5, 7), ((), (), 1, 17, 1), ((2,), (2,), 3, 4, 5), ((2, 1), (3,), 2, 3, 4),
           ((), (3,), 2, 3, 4), ((2,), (), 3, 4, 5), ((0,), (0,), 2, 3, 4), ((), (), 0, 3, 4), ((), (), 2, 0, 3),
           ((), (), 33, 130, 67)]


def matmul_out(*out_dtypes: str | None) -> Generator:
    def matmul(make: Maker) -> Iterator[Sample]:
        for out in out_dtypes:
            for case, (lead_x, lead_y, m, k, n) in enumerate(MATMULS):
                for flags in range(4) if case in (1, 3, 10) else [case % 4]:
                    tx, ty = bool(flags & 1), bool(flags & 2)
                    x = make((*lead_x, k, m) if tx else (*lead_x, m, k), domain="small")
                    y = make((*lead_y, n, k) if ty else (*lead_y, k, n), domain="small")
                    yield Sample((x, y), {"transpose_x": tx, "transpose_y": ty,
                                          "out_dtype": out and as_dtype(out)})
    return matmul


# (batch, channels, outputs, spatial, kernel, stride, padding, dilation, groups)
CONVS: list[tuple[Any, ...]] = [
    (2, 3, 4, (7,), (3,), (1,), ((0, 0),), (1,), 1),
    (1, 4, 6, (9,), (2,), (3,), ((2, 1),), (2,), 2),
    (2, 3, 5, (7, 6), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1),
    (1, 4, 4, (5, 7), (3, 2), (2, 1), ((1, 0), (0, 2)), (1, 2), 4),
    (3, 6, 4, (6, 5), (1, 1), (2, 2), ((0, 0), (0, 0)), (1, 1), 2),
    (2, 4, 3, (4, 4), (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 1),
    (0, 3, 4, (5, 5), (3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), 1),
    (1, 2, 3, (4, 3, 5), (2, 3, 2), (1, 2, 1), ((0, 1), (1, 1), (0, 0)), (1, 1, 2), 1),
    (1, 3, 2, (8, 9), (3, 3), (3, 3), ((0, 0), (0, 0)), (1, 1), 1),
]
LARGE_CONV = (2, 16, 33, (17, 19), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1)


def in_both_layouts(*activations: int) -> Any:
    """Repeats every sample channels last; `activations` are the operands that have channels."""
    def decorate(samples: Any) -> Any:
        @functools.wraps(samples)
        def both(make: Maker) -> Iterator[Sample]:
            for sample in samples(make):
                yield sample
                if "channels_last" not in sample.attrs:
                    moved = tuple(np.moveaxis(x, 1, -1).copy() if i in activations else x
                                  for i, x in enumerate(sample.args))
                    yield dataclasses.replace(sample, args=moved, attrs={**sample.attrs, "channels_last": True})
        return both
    return decorate


def conv_cases() -> Iterator[tuple[Any, ...]]:
    """Shapes of x, w and y and the attributes of every case."""
    for batch, channels, outputs, spatial, kernel, stride, padding, dilation, groups in [*CONVS, LARGE_CONV]:
        out = tuple((n + lo + hi - d * (k - 1) - 1) // s + 1
                    for n, k, s, (lo, hi), d in zip(spatial, kernel, stride, padding, dilation))
        attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        yield (batch, channels, *spatial), (outputs, channels // groups, *kernel), (batch, outputs, *out), attrs


@in_both_layouts(0,)
def conv(make: Maker) -> Iterator[Sample]:
    for x, w, _, attrs in conv_cases():
        yield Sample((make(x, domain="small"), make(w, domain="small")), attrs)


@in_both_layouts(0,)
def conv_input_grad(make: Maker) -> Iterator[Sample]:
    for x, w, y, attrs in conv_cases():
        yield Sample((make(y, domain="small"), make(w, domain="small")), {"input_spatial": x[2:], **attrs})


@in_both_layouts(0, 1)
def conv_weight_grad(make: Maker) -> Iterator[Sample]:
    for x, w, y, attrs in conv_cases():
        yield Sample((make(x, domain="small"), make(y, domain="small")), {"kernel_spatial": w[2:], **attrs})


# (x, window, stride, padding, dilation)
POOLS: list[tuple[Any, ...]] = [
    ((2, 3, 7), (2,), (2,), ((0, 0),), (1,)),
    ((1, 2, 9), (3,), (1,), ((1, 1),), (2,)),
    ((2, 3, 7, 6), (2, 3), (2, 1), ((0, 1), (1, 0)), (1, 1)),
    ((2, 1, 6, 6), (3, 3), (3, 3), ((0, 0), (0, 0)), (1, 1)),
    ((0, 3, 5, 5), (2, 2), (1, 1), ((0, 0), (0, 0)), (1, 1)),
    ((1, 2, 4, 5, 3), (2, 2, 2), (1, 2, 1), ((0, 0), (1, 0), (0, 0)), (1, 1, 1)),
    ((2, 9, 33, 31), (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1)),
]


@in_both_layouts(0,)
def max_pool(make: Maker) -> Iterator[Sample]:
    for shape, window, stride, padding, dilation in POOLS:
        attrs = {"window": window, "stride": stride, "padding": padding, "dilation": dilation}
        yield Sample((make(shape, domain="distinct" if make.dtype.bits > 16 else "real"),), attrs)
    unit = {"window": (2,), "stride": (2,), "padding": ((0, 3),), "dilation": (1,)}
    yield Sample((make((1, 2, 7), domain="coarse"),), unit, "ties and windows of padding", smooth=False)
    if make.dtype.is_float:
        x = np.array([[[1, np.nan, -np.inf, -np.inf, 2, np.inf, np.nan]]]).astype(make.dtype.np)
        yield Sample((x,), unit, "extremes", smooth=False)


@in_both_layouts(0, 1)
def max_pool_grad(make: Maker) -> Iterator[Sample]:
    from treadle.ir.opdef import op
    plain = Maker(make.rng, as_dtype("float32"), "real")
    for sample in max_pool.__wrapped__(plain):
        y, index = op("max_pool").reference(*sample.args, **sample.attrs)
        yield Sample((make(y.shape), index), {"input_spatial": sample.args[0].shape[2:]})


def _average(shape: Any, window: Any, stride: Any, padding: Any, include: bool) -> dict[str, Any]:
    return {"window": window, "stride": stride, "padding": padding, "count_include_pad": include}


@in_both_layouts(0,)
def avg_pool(make: Maker) -> Iterator[Sample]:
    for shape, window, stride, padding, _ in POOLS:
        for include in (False, True):
            yield Sample((make(shape),), _average(shape, window, stride, padding, include))
    yield Sample((make((1, 1, 3)),), _average((1, 1, 3), (2,), (2,), ((0, 4),), False), "windows of padding")


@in_both_layouts(0,)
def avg_pool_grad(make: Maker) -> Iterator[Sample]:
    for sample in avg_pool.__wrapped__(Maker(make.rng, as_dtype("float32"), "real")):
        spatial = sample.args[0].shape[2:]
        out = sample.graph("avg_pool").outputs[0].shape
        yield Sample((make(out),), {"input_spatial": spatial, **sample.attrs})


# Indexing --------------------------------------------------------------------------------------------------------

TAKES = [((5,), (), 0), ((5,), (3,), 0), ((4, 3), (2, 3), 0), ((4, 3), (5,), 1), ((2, 5, 3), (2, 2), 1),
         ((4, 3), (0,), 0), ((4, 0), (3,), 0), ((67, 33), (130,), 0)]


def take(make: Maker) -> Iterator[Sample]:
    for i, (shape, index, axis) in enumerate(TAKES):
        dtype = ("int64", "int32", "uint8")[i % 3]
        outside = i % 2 == 1 and dtype != "uint8"
        yield Sample((make(shape), make.index(index, shape[axis], dtype, outside)), {"axis": axis},
                     "outside" if outside else "", smooth=not outside)


def scatter_add(make: Maker) -> Iterator[Sample]:
    for s in take(make):
        (x, index), axis = s.args, s.attrs["axis"]
        updates = make((*x.shape[:axis], *index.shape, *x.shape[axis + 1:]))
        yield Sample((x, index, updates), s.attrs, s.label, s.smooth)


ALONGS = [((5,), (3,), 0), ((4, 3), (2, 3), 0), ((4, 3), (4, 5), 1), ((2, 5, 3), (2, 7, 3), 1), ((4, 3), (0, 3), 0),
          ((33, 65), (33, 9), 1)]


def take_along_axis(make: Maker) -> Iterator[Sample]:
    for i, (shape, index, axis) in enumerate(ALONGS):
        outside = i % 2 == 1
        yield Sample((make(shape), make.index(index, shape[axis], ("int64", "int32")[i % 2], outside)),
                     {"axis": axis}, "outside" if outside else "", smooth=not outside)


def scatter_add_along_axis(make: Maker) -> Iterator[Sample]:
    for s in take_along_axis(make):
        yield Sample((*s.args, make(s.args[1].shape)), s.attrs, s.label, s.smooth)


GATHERS = [((5,), (3,), 1), ((4, 3), (2, 2), 2), ((4, 3), (5,), 1), ((2, 5, 3), (), 2), ((2, 5, 3), (4,), 3),
           ((4, 3), (0,), 2), ((17, 9, 33), (65,), 2)]


def gather_nd(make: Maker) -> Iterator[Sample]:
    for i, (shape, lead, depth) in enumerate(GATHERS):
        outside = i % 2 == 1
        index = np.stack([make.index(lead, shape[a], ("int64", "int32")[i % 2], outside) for a in range(depth)], -1)
        yield Sample((make(shape), index), {}, "outside" if outside else "", smooth=not outside)


def scatter_add_nd(make: Maker) -> Iterator[Sample]:
    for s in gather_nd(make):
        x, index = s.args
        yield Sample((x, index, make((*index.shape[:-1], *x.shape[index.shape[-1]:]))), {}, s.label, s.smooth)


def scatter_nd(make: Maker) -> Iterator[Sample]:
    """Distinct index vectors, where the gradient is defined, and repeated ones."""
    x = make((4, 3, 2))
    rows = make.rng.permutation(12)[:5]
    yield Sample((x, np.stack([rows // 3, rows % 3], -1), make((5, 2))))
    yield Sample((make((7,)), make.rng.permutation(7)[:3, None].astype("int32"), make((3,))))
    for s in scatter_add_nd(make):
        yield Sample(s.args, s.attrs, "repeated", smooth=False)


BLOCKS = [((), ()), ((5,), (2,)), ((4, 6), (3, 1)), ((2, 5, 3), (1, 5, 2)), ((4, 3), (0, 2)), ((33, 65), (9, 31))]


def dynamic_slice(make: Maker) -> Iterator[Sample]:
    for i, (shape, sizes) in enumerate(BLOCKS):
        starts = tuple(make.index((), n, ("int64", "int32")[i % 2], outside=True) for n in shape)
        yield Sample((make(shape), *starts), {"sizes": sizes})


def dynamic_update_slice(make: Maker) -> Iterator[Sample]:
    for s in dynamic_slice(make):
        yield Sample((s.args[0], make(s.attrs["sizes"]), *s.args[1:]), {})


def one_hot(make: Maker) -> Iterator[Sample]:
    for shape, depth, dtype in [((), 3, "float32"), ((4,), 5, "bool"), ((2, 3), 1, "int32"), ((0,), 3, "bfloat16"),
                                ((3,), 0, "float64"), ((33, 9), 17, "float32")]:
        yield Sample((make(shape, domain="small"),), {"depth": depth, "dtype": as_dtype(dtype)})


# Networks --------------------------------------------------------------------------------------------------------

def softmax(make: Maker) -> Iterator[Sample]:
    for shape, axis in [((7,), 0), ((3, 5), 0), ((3, 5), 1), ((2, 3, 4), 1), ((0, 3), 1), ((3, 0), 1), ((9, 129), 1)]:
        yield Sample((make(shape),), {"axis": axis})
    big = np.array([[100, -100, 0], [-np.inf, 1, 2], [60000, 60000, -60000]]).astype(make.dtype.np)
    yield Sample((big,), {"axis": 1}, "large", smooth=False)


def layer_norm(make: Maker) -> Iterator[Sample]:
    for shape, axes in [((7,), 1), ((3, 5), 1), ((2, 3, 5), 2), ((0, 3), 1), ((9, 129), 1), ((2, 3, 1), 2)]:
        tail = shape[len(shape) - axes:]
        yield Sample((make(shape), make(tail), make(tail)), {"axes": axes, "eps": 1e-3})


def rms_norm(make: Maker) -> Iterator[Sample]:
    for shape in [(7,), (3, 5), (2, 3, 5), (0, 3), (9, 129)]:
        yield Sample((make(shape), make(shape[-1:])), {"eps": 1e-3})


def group_norm(make: Maker) -> Iterator[Sample]:
    for shape, groups in [((3, 4), 2), ((2, 6, 5), 3), ((2, 6, 3, 4), 1), ((2, 3, 5), 3), ((0, 4, 3), 2),
                          ((2, 16, 9, 7), 4)]:
        yield Sample((make(shape), make(shape[1]), make(shape[1])), {"groups": groups, "eps": 1e-3})


def batch_norm(make: Maker) -> Iterator[Sample]:
    for shape in [(5, 3), (4, 3, 5), (2, 3, 4, 5), (2, 1, 3, 2, 2), (5, 0), (3, 17, 9, 11)]:
        yield Sample((make(shape), make(shape[1]), make(shape[1])), {"eps": 1e-3})


ATTENTIONS: list[tuple[Any, ...]] = [  # lead of q; of k and v; lengths; features; values; mask; scale; causal
    ((), (), 3, 3, 4, 4, None, None, False), ((2, 3), (2, 3), 5, 7, 4, 6, None, None, False),
    ((2, 3), (2, 3), 5, 5, 4, 4, None, None, True), ((2,), (2,), 3, 6, 5, 2, "bool", 0.3, False),
    ((2, 2), (2, 1), 4, 5, 3, 3, "add", None, False), ((2,), (2,), 6, 4, 3, 3, None, 0.5, True),
    ((1,), (1,), 5, 5, 3, 3, "bool", None, True), ((0,), (0,), 3, 3, 2, 2, None, None, True),
    ((2, 2), (2, 2), 33, 47, 16, 17, None, None, True), ((2,), (2,), 3, 4, 2, 2, "hidden", None, False),
]


def attention(make: Maker) -> Iterator[Sample]:
    for lead, lead_k, lq, lk, features, values, kind, scale, causal in ATTENTIONS:
        q, k, v = make((*lead, lq, features)), make((*lead_k, lk, features)), make((*lead_k, lk, values))
        mask: tuple[np.ndarray, ...] = ()
        if kind == "bool":
            seen = make.bools((lq, lk))
            seen[:, 0] = True
            mask = (seen,)
        elif kind == "hidden":  # one query sees nothing
            mask = (np.arange(lq)[:, None] != 1,)
        elif kind == "add":
            mask = (make((*lead[:1], *(1,) * (len(lead) - 1), lq, lk)),)
        yield Sample((q, k, v, *mask), {"scale": scale, "causal": causal}, kind or "")


def cross_entropy(make: Maker) -> Iterator[Sample]:
    for i, (shape, classes) in enumerate([((), 3), ((5,), 7), ((2, 3), 4), ((0,), 3), ((4,), 1), ((33,), 130)]):
        labels = make.index(shape, classes, ("int64", "int32")[i % 2])
        attrs = {"label_smoothing": (0.0, 0.1)[i % 2], "ignore_index": (None, -100, 1)[i % 3]}
        if attrs["ignore_index"] == -100:
            labels.reshape(-1)[::3] = -100
        yield Sample((make((*shape, classes)), labels), attrs)
    yield Sample((make((4, 3)), np.array([-1, 3, 5, 0])), {}, "labels outside")


# Creation --------------------------------------------------------------------------------------------------------

def constant(make: Maker) -> Iterator[Sample]:
    for shape in [(), (3,), (0, 2), (3, 5), (9, 33)]:
        yield Sample((), {"value": make(shape)})


def iota(make: Maker) -> Iterator[Sample]:
    for shape, axis in [((5,), 0), ((0,), 0), ((2, 3), 0), ((2, 3), 1), ((2, 0), 0), ((9, 33, 3), 1)]:
        yield Sample((), {"shape": shape, "axis": axis, "dtype": make.dtype})


def size(make: Maker) -> Iterator[Sample]:
    for number in (0, 7, 1 << 40):
        yield Sample((), {"of": number})


def true_places(make: Maker) -> Iterator[Sample]:
    for length, size in [(7, 3), (1, 1), (0, 0), (9, 0), (65, 70), (1000, 400)]:
        yield Sample((make.rng.random(length) < 0.5,), {"size": size})


def random_bits(make: Maker) -> Iterator[Sample]:
    for shape, offset in [((), 0), ((1,), 5), ((7,), 0), ((0,), 1), ((3, 5), 2**40), ((65, 33), 1)]:
        state = make.rng.integers(0, 2**64, 2, dtype=np.uint64)
        yield Sample((state,), {"shape": shape, "offset": offset})
    wrap = np.array([2**64 - 1, 2**64 - 2], np.uint64)
    yield Sample((wrap,), {"shape": (17,), "offset": 0}, "counter wraps")


# Control ---------------------------------------------------------------------------------------------------------

def region(fn: Any, *arrays: Any) -> Graph:
    return build("region", fn, *types_of(arrays))


def cond(make: Maker) -> Iterator[Sample]:
    for pred in (False, True):
        for shape in [(), (3, 5), (0,)]:
            x, y = make(shape), make(shape)
            yield Sample((np.array(pred), x, y), {}, regions=lambda x=x, y=y: (
                region(lambda a, b: (emit("sin", a) * b, a), x, y), region(lambda a, b: (a - b, b), x, y)))


def remat(make: Maker) -> Iterator[Sample]:
    for shape in [(), (3, 5), (0,)]:
        x, y = make(shape), make(shape)
        yield Sample((x, y), {}, regions=lambda x=x, y=y: (region(lambda a, b: (emit("sin", a) * b, a + b), x, y),))


def barrier(make: Maker) -> Iterator[Sample]:
    for shapes in [((),), ((3, 5), (0,)), ((7,), (2, 3), ())]:
        yield Sample(tuple(make(s) for s in shapes))


def while_loop(make: Maker) -> Iterator[Sample]:
    """x = sin(x) * c, n times: a run-time number of steps."""
    for steps, shape in [(0, (3,)), (1, ()), (5, (2, 3))]:
        args = (np.int64(0), make(shape, domain="small"), np.int64(steps), make(shape, domain="small"))
        arrays = tuple(map(np.asarray, args))
        yield Sample(arrays, {"n_carry": 2}, regions=lambda a=arrays: (
            region(lambda i, x, n, c: emit("lt", i, n), *a),
            region(lambda i, x, n, c: (i + 1, emit("sin", x) * c), *a)))


def scan(make: Maker) -> Iterator[Sample]:
    """h = tanh(h @ w + x[i]), y[i] = h * h."""
    for length, batch, width, reverse in [(0, 2, 3, False), (1, 1, 1, False), (4, 2, 3, False), (5, 3, 2, True)]:
        h, xs, w = make((batch, width)), make((length, batch, width)), make((width, width), domain="small")
        x = np.zeros((batch, width), xs.dtype)

        def body(h: Any, x: Any, w: Any) -> Any:
            new = emit("tanh", emit("matmul", h, w) + x)
            return new, emit("square", new)

        yield Sample((h, xs, w), {"n_carry": 1, "n_xs": 1, "length": length, "reverse": reverse},
                     regions=lambda h=h, x=x, w=w: (region(body, h, x, w),))


