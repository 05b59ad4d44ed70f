"""Every function against NumPy's of the same meaning, eagerly and traced."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import treadle as td

from .tools import assert_close, both

rng = np.random.default_rng(0)
X = rng.uniform(-2, 2, (3, 4)).astype(np.float32)
P = rng.uniform(0.1, 0.9, (3, 4)).astype(np.float32)
I = rng.integers(-5, 6, (3, 4)).astype(np.int32)
F = np.array([np.nan, np.inf, -np.inf, 1.0], np.float32)

UNARY = (
    "abs absolute ceil cos cosh exp exp2 expm1 floor negative positive round sign sin sinh square tan tanh trunc asinh "
    "cbrt isnan isinf isfinite arcsinh logical_not"
).split()
IN_UNIT = "arccos arcsin arctan arctanh acos asin atan atanh log log2 log10 log1p sqrt reciprocal".split()
BINARY = (
    "add subtract multiply divide maximum minimum arctan2 atan2 hypot equal not_equal less less_equal greater "
    "greater_equal remainder mod fmod floor_divide copysign logical_and logical_or logical_xor"
).split()


@pytest.mark.parametrize("name", UNARY + IN_UNIT)
def test_unary(name):
    x = P if name in IN_UNIT else X
    expected = getattr(np, name)(x)
    assert_close(both(getattr(td, name), x), expected, 2e-6)
    if name not in IN_UNIT and name not in ("isnan", "isinf", "isfinite"):
        result = both(getattr(td, name), I)
        assert_close(result.astype("float64"), np.asarray(getattr(np, name)(I), np.float64), 2e-6)


@pytest.mark.parametrize("name", BINARY)
def test_binary(name):
    assert_close(both(getattr(td, name), X, X[1] + 0.25), getattr(np, name)(X, X[1] + np.float32(0.25)))


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda x: td.arccosh(x + 3), np.arccosh(X + 3)),
        (td.rsqrt, None),
        (td.erf, np.vectorize(math.erf)(X)),
        (td.erfc, np.vectorize(math.erfc)(X)),
        (td.sigmoid, 1 / (1 + np.exp(-X))),
        (td.softplus, np.log1p(np.exp(X))),
        (td.relu, np.maximum(X, 0)),
        (lambda x: td.clip(x, -1, 0.5), X.clip(-1, 0.5)),
        (lambda x: td.clip(x, min=0), X.clip(0)),
        (lambda x: td.clip(x, td.zeros(4), None), X.clip(0)),
        (lambda x: x.clip(max=td.tensor(0.5)), X.clip(None, 0.5)),
        (lambda x: td.where(x > 0, x, 0), np.where(X > 0, X, 0)),
        (lambda x: td.round(x, 1), X.round(1)),
        (lambda x: td.power(2.0, x), 2.0**X),
        (lambda x: td.isclose(x, x + 1e-9), np.ones_like(X, bool)),
        (lambda x: td.astype(x, "int32"), X.astype(np.int32)),
        (lambda x: x.astype(bool), X.astype(bool)),
        (lambda x: td.softmax(x, 0), np.exp(X) / np.exp(X).sum(0)),
        (lambda x: td.log_softmax(x), None),
        (lambda x: td.stop_gradient(x), X),
        (lambda x: td.nan_to_num(td.log(x - x)), np.nan_to_num(np.full_like(X, -np.inf))),
    ],
)
def test_elementwise_extras(fn, expected):
    x = P if expected is None else X
    if expected is None:
        expected = (1 / np.sqrt(P)) if fn is td.rsqrt else P - np.log(np.exp(P).sum(-1, keepdims=True))
    assert_close(both(fn, x), np.asarray(expected, fn(td.asarray(x)).numpy().dtype), 2e-6)


def test_not_a_number_and_infinity():
    assert td.isnan(F).tolist() == [True, False, False, False]
    assert td.nan_to_num(F, nan=1.0, posinf=2.0, neginf=3.0).tolist() == [1, 2, 3, 1]
    assert td.isclose(td.tensor(F), td.tensor(F), equal_nan=True).all()
    assert td.maximum(td.tensor(F), 0.0).isnan()[0]
    assert np.isnan(td.median(td.tensor(F)).item())
    with pytest.raises(td.TreadleError, match="needs a bound"):
        td.clip(X)


@pytest.mark.parametrize("axis", [None, 0, -1, (0, 1), ()])
@pytest.mark.parametrize("name", "sum prod mean max min any all var std count_nonzero ptp".split())
def test_reductions(name, axis):
    if axis == () and name == "count_nonzero":
        return
    for keepdims in (False, True):
        for x in (X, I):
            given_x = x != 0 if name in ("any", "all") else x
            expected = getattr(np, name)(given_x, axis=axis, keepdims=keepdims)
            result = both(lambda t: getattr(td, name)(t, axis=axis, keepdims=keepdims), given_x)  # noqa: B023
            wanted = result.numpy().dtype if name in ("mean", "var", "std") else np.asarray(expected).dtype
            assert_close(result, np.asarray(expected, wanted), 3e-6)


def test_reduction_options():
    assert_close(both(lambda x: td.var(x, 1, ddof=1), X), X.var(1, ddof=1))
    assert_close(both(lambda x: td.std(x, correction=1), X), X.std(ddof=1))
    assert_close(both(lambda x: td.logsumexp(x, 0), X), np.log(np.exp(X).sum(0)))
    for order in (1, 2, 3, 0, np.inf, -np.inf):
        assert_close(
            both(lambda x, order=order: td.norm(x, order, axis=1), X),
            np.linalg.norm(X, order, axis=1).astype(np.float32),
        )
    assert td.sum(I, dtype="float64").dtype == "float64" and td.mean(X, dtype="float64").dtype == "float64"
    for axis in (None, 0, 1):
        assert_close(both(lambda x: td.argmax(x, axis), X), np.asarray(X.argmax(axis)))  # noqa: B023
        assert_close(both(lambda x: td.argmin(x, axis, keepdims=True), X), X.argmin(axis, keepdims=True))  # noqa: B023
        assert_close(both(lambda x: td.cumsum(x, axis), X), X.cumsum(axis), 3e-6)  # noqa: B023
        assert_close(both(lambda x: td.cumprod(x, axis), X), X.cumprod(axis))  # noqa: B023
        assert_close(both(lambda x: td.median(x, axis, keepdims=True), X), np.median(X, axis, keepdims=True))  # noqa: B023
        assert_close(both(lambda x: td.median(x, axis), I), np.asarray(np.median(I, axis), np.float32))  # noqa: B023
    for wrong in (lambda: td.sum(X, 2), lambda: td.sum(X, (0, 0)), lambda: td.sum(X, 1.5)):
        with pytest.raises(td.TreadleError, match="axis"):
            wrong()


def test_order():
    for axis in (0, 1):
        assert_close(both(lambda x: td.sort(x, axis), X), np.sort(X, axis))  # noqa: B023
        assert_close(both(lambda x: td.argsort(x, axis), I), np.argsort(I, axis, kind="stable"))  # noqa: B023
    assert_close(both(lambda x: td.sort(x, descending=True), X), -np.sort(-X))
    values, indices = both(lambda x: td.top_k(x, 2), X)
    assert_close(values, -np.sort(-X)[:, :2])
    assert_close(np.take_along_axis(X, indices.numpy(), 1), values)
    assert_close(both(lambda x: td.top_k(x, 1, axis=0, largest=False)[0], X), X.min(0, keepdims=True))


CREATED = [
    (lambda: td.zeros((2, 3)), np.zeros((2, 3), "f4")),
    (lambda: td.ones(3, "int8"), np.ones(3, "i1")),
    (lambda: td.full((2,), 7), np.full(2, 7)),
    (lambda: td.full((), 1.5, "float64"), np.full((), 1.5)),
    (lambda: td.full((2,), td.tensor(2.0)), np.full(2, 2, "f4")),
    (lambda: td.arange(5), np.arange(5)),
    (lambda: td.arange(2, 8, 3), np.arange(2, 8, 3)),
    (lambda: td.arange(5, 0, -2), np.arange(5, 0, -2)),
    (lambda: td.arange(0.0, 1.0, 0.25), np.arange(0, 1, 0.25, "f4")),
    (lambda: td.arange(0), np.arange(0)),
    (lambda: td.arange(3, dtype="bfloat16").astype("float32"), np.arange(3, dtype="f4")),
    (lambda: td.linspace(0, 1, 7), np.linspace(0, 1, 7, dtype="f4")),
    (lambda: td.linspace(1, 0, 4, endpoint=False), np.linspace(1, 0, 4, False, dtype="f4")),
    (lambda: td.eye(3), np.eye(3, dtype="f4")),
    (lambda: td.eye(2, 4, 1, "int32"), np.eye(2, 4, 1, "i4")),
    (lambda: td.tril(X), np.tril(X)),
    (lambda: td.triu(X, 1), np.triu(X, 1)),
    (lambda: td.tri(3, 4, -1), np.tri(3, 4, -1, "f4")),
    (lambda: td.tril(X > 0, -1), np.tril(X > 0, -1)),
    (lambda: td.zeros_like(I), np.zeros_like(I)),
    (lambda: td.ones_like(X, dtype="bool"), np.ones_like(X, bool)),
    (lambda: td.full_like(I, 4), np.full_like(I, 4)),
    (lambda: td.diag(X[0]), np.diag(X[0])),
    (lambda: td.diag(X[0], -2), np.diag(X[0], -2)),
    (lambda: td.diag(X[0], 1), np.diag(X[0], 1)),
    (lambda: td.diag(X), np.diag(X)),
    (lambda: td.diag(X, 2), np.diag(X, 2)),
    (lambda: td.diag(X, -1), np.diag(X, -1)),
    (lambda: td.diag(X, 9), np.diag(X, 9)),
    (lambda: td.meshgrid(X[0], X[:2, 0]), list(np.meshgrid(X[0], X[:2, 0]))),
    (lambda: td.meshgrid(X[0], X[:2, 0], indexing="ij"), list(np.meshgrid(X[0], X[:2, 0], indexing="ij"))),
    (lambda: td.one_hot([0, 2, 5], 3), np.array([[1, 0, 0], [0, 0, 1], [0, 0, 0]], "f4")),
    (lambda: td.one_hot(td.tensor([1]), 2, "bool"), np.array([[False, True]])),
]


@pytest.mark.parametrize("case", range(len(CREATED)))
def test_creation(case):
    fn, expected = CREATED[case]
    assert_close(both(fn), expected)


MOVED = [
    (lambda x: td.reshape(x, (2, -1)), lambda x: x.reshape(2, -1)),
    (lambda x: x.reshape(4, 3), lambda x: x.reshape(4, 3)),
    (lambda x: td.ravel(x), np.ravel),
    (lambda x: x.flatten(0, 1), np.ravel),
    (lambda x: td.transpose(x), np.transpose),
    (lambda x: x.transpose(1, 0), lambda x: x.T),
    (lambda x: td.permute_dims(x, (1, 0)), lambda x: x.T),
    (lambda x: td.swapaxes(x, 0, -1), lambda x: x.swapaxes(0, -1)),
    (lambda x: x.mT, lambda x: x.T),
    (lambda x: td.moveaxis(x[None], (0, 1), (-1, 0)), lambda x: np.moveaxis(x[None], (0, 1), (-1, 0))),
    (lambda x: td.squeeze(x[None, :, None]), lambda x: x),
    (lambda x: td.squeeze(x[None], 0), lambda x: x),
    (lambda x: td.expand_dims(x, (0, -1)), lambda x: np.expand_dims(x, (0, -1))),
    (lambda x: x.unsqueeze(1), lambda x: x[:, None]),
    (lambda x: td.broadcast_to(x, (2, 3, 4)), lambda x: np.broadcast_to(x, (2, 3, 4))),
    (lambda x: td.broadcast_arrays(x, x[:1]), lambda x: list(np.broadcast_arrays(x, x[:1]))),
    (lambda x: td.concatenate([x, x[:1]]), lambda x: np.concatenate([x, x[:1]])),
    (lambda x: td.concatenate([x, x], axis=None), lambda x: np.concatenate([x, x], axis=None)),
    (lambda x: td.stack([x, x], -1), lambda x: np.stack([x, x], -1)),
    (lambda x: td.stack(x), lambda x: x),
    (lambda x: td.hstack([x, x]), lambda x: np.hstack([x, x])),
    (lambda x: td.vstack([x[0], x[1]]), lambda x: np.vstack([x[0], x[1]])),
    (lambda x: td.split(x, 2, 1), lambda x: np.split(x, 2, 1)),
    (lambda x: td.split(x, [1, -1], 1), lambda x: np.split(x, [1, -1], 1)),
    (lambda x: td.chunk(x, 3, 1), lambda x: np.split(x, [2], 1)),
    (lambda x: td.unstack(x), list),
    (lambda x: td.tile(x, (2, 1, 3)), lambda x: np.tile(x, (2, 1, 3))),
    (lambda x: td.tile(x, 2), lambda x: np.tile(x, 2)),
    (lambda x: td.repeat(x, 2, 1), lambda x: np.repeat(x, 2, 1)),
    (lambda x: x.repeat(2), lambda x: x.repeat(2)),
    (lambda x: td.repeat(x, [1, 0, 2], 0), lambda x: np.repeat(x, [1, 0, 2], 0)),
    (lambda x: td.flip(x), np.flip),
    (lambda x: td.flip(x, 1), lambda x: np.flip(x, 1)),
    (lambda x: td.roll(x, 1), lambda x: np.roll(x, 1)),
    (lambda x: td.roll(x, (1, -2), (0, 1)), lambda x: np.roll(x, (1, -2), (0, 1))),
    (lambda x: td.pad(x, 1), lambda x: np.pad(x, 1)),
    (
        lambda x: td.pad(x, ((0, 1), (2, 0)), constant_values=3),
        lambda x: np.pad(x, ((0, 1), (2, 0)), constant_values=3),
    ),
    *[
        (lambda x, m=m: td.pad(x, ((2, 1), (0, 2)), m), lambda x, m=m: np.pad(x, ((2, 1), (0, 2)), m))
        for m in ("edge", "reflect", "symmetric", "wrap")
    ],
]


@pytest.mark.parametrize("case", range(len(MOVED)))
def test_moving(case):
    fn, expected = MOVED[case]
    assert_close(both(fn, X), expected(X))


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda: td.reshape(X, (5, -1)), "does not divide"),
        (lambda: td.reshape(X, (-1, -1)), "only one"),
        (lambda: td.reshape(X, (5, 2)), "12 elements"),
        (lambda: td.transpose(X, (0, 0)), "once"),
        (lambda: td.squeeze(X, 0), "size 3"),
        (lambda: td.concatenate([]), "at least one"),
        (lambda: td.concatenate([X, I[:, :2]]), "differ"),
        (lambda: td.stack([X, X[0]]), "differ in shape"),
        (lambda: td.split(X, 5), "equal parts"),
        (lambda: td.pad(X, -1), "pad_width"),
        (lambda: td.pad(X, 1, "odd"), "mode"),
        (lambda: td.arange(0, 1, 0), "step"),
        (lambda: td.matmul(X, X), r"f32\[3,4\]"),
        (lambda: td.matmul(X, 2.0), "at least one axis"),
        (lambda: td.add(X, np.ones(3)), "broadcast"),
        (lambda: td.zeros((-1,)), "negative"),
        (lambda: td.zeros("ab"), "no shape"),
        (lambda: td.meshgrid(X[0], indexing="no"), "indexing"),
        (lambda: td.tril(X[0]), "two axes"),
        (lambda: td.take(X, [0.5]), "integer"),
        (lambda: td.einsum("ij,jk->ik", X), "names 2 operands"),
        (lambda: td.einsum("ijk->i", X), "does not fit"),
        (lambda: td.einsum("ij->k", X), "output"),
        (lambda: td.einsum("i1->i", X), "something else"),
        (lambda: td.einsum("ij,ij->i", X, X.T), "stands for"),
        (lambda: td.tensordot(X, X, 1), "do not fit"),
        (lambda: td.conv(X, X), "three axes"),
        (lambda: td.conv(X[None], X[None], stride=(1, 2)), "stride"),
    ],
)
def test_errors_say_what_and_where(fn, words):
    with pytest.raises(td.TreadleError, match=words) as caught:
        fn()
    assert "test_functions.py" in str(caught.value)


A, B = rng.normal(size=(2, 3, 4)).astype("f4"), rng.normal(size=(2, 4, 5)).astype("f4")


def test_products():
    for fn in (
        lambda m, a, b: m.matmul(a, b),
        lambda m, a, b: m.matmul(a[0], b),
        lambda m, a, b: m.matmul(a[0, 0], b[0]),
        lambda m, a, b: m.matmul(a, b[0, :, 0]),
        lambda m, a, b: m.dot(a[0, 0], b[0, :, 0]),
        lambda m, a, b: m.dot(a, b),
        lambda m, a, b: m.dot(a, b[0]),
        lambda m, a, b: m.outer(a[0, 0], b[0, 0]),
        lambda m, a, b: m.vdot(a, a),
        lambda m, a, b: m.inner(a, a[0]),
        lambda m, a, b: m.tensordot(a, b, axes=((2,), (1,))),
        lambda m, a, b: m.dot(a, 2.0),
        lambda m, a, b: m.tensordot(a, a, axes=3),
        lambda m, a, b: m.tensordot(a[0, 0], b[0, 0], axes=0),
    ):
        expected = np.asarray(fn(np, A, B))
        assert_close(both(lambda a, b: fn(td, a, b), A, B), expected.astype("f4"), 1e-5)  # noqa: B023
    assert_close(td.matmul(A[0], A[1], transpose_y=True), A[0] @ A[1].T, 1e-5)
    assert (
        td.matmul(td.ones((2, 3), "bfloat16"), td.ones((3, 2), "bfloat16"), out_dtype="float32").dtype
        == "float32"
    )
    assert_close(td.trace_of(A[:, :3, :3]), np.trace(A[:, :3, :3], axis1=1, axis2=2), 1e-5)


EINSUMS = [
    "ij->ji",
    "ij->",
    "ij->j",
    "ii",
    "ii->i",
    "ij,jk",
    "ij,jk->ki",
    "ij,kj->ik",
    "bij,bjk->bik",
    "bhqd,bhkd->bhqk",
    "bqhd,bkhd->bhqk",
    "i,j->ij",
    "i,i->",
    "i,i->i",
    "ij,ij->i",
    "ij,j",
    "...ij,...jk->...ik",
    "...i->...",
    "ab,bc,cd->ad",
    "ab,bc,cd,de->ea",
    "ijk,jil->kl",
    "aab,bcc->ac",
    "ij,kl->",
    "bi,bj->bij",
    "a...,...b->...ab",
    "iji->j",
    "ij,->ij",
]


@pytest.mark.parametrize("text", EINSUMS)
def test_einsum(text):
    sizes = dict(zip("abcdehijklq", (2, 3, 4, 5, 2, 3, 3, 4, 2, 3, 4)))
    ranks = {"...ij": (5, 3, 4), "...jk": (1, 4, 2), "...i": (2, 5, 3), "a...": (2, 5, 1), "...b": (1, 4, 3)}
    terms = text.replace(" ", "").split("->")[0].split(",")
    arrays = [rng.normal(size=ranks.get(t) or tuple(sizes[c] for c in t)) for t in terms]
    assert_close(both(lambda *xs: td.einsum(text, *xs), *arrays), np.asarray(np.einsum(text, *arrays)), 1e-9)


@given(st.data())
def test_einsum_on_random_terms(data):
    labels = "abcd"
    terms = data.draw(st.lists(st.text(labels, min_size=0, max_size=3), min_size=1, max_size=3))
    used = sorted(set("".join(terms)))
    output = "".join(
        data.draw(st.permutations(data.draw(st.lists(st.sampled_from(used), unique=True)) if used else []))
    )
    sizes = {c: data.draw(st.integers(1, 3)) for c in labels}
    arrays = [np.random.default_rng(1).normal(size=tuple(sizes[c] for c in t)) for t in terms]
    text = ",".join(terms) + "->" + output
    assert_close(td.einsum(text, *map(td.asarray, arrays)), np.asarray(np.einsum(text, *arrays)), 1e-9)


def test_einsum_moves_nothing_where_flags_do():
    q, k = np.ones((2, 3, 4, 5), "f4"), np.ones((2, 3, 6, 5), "f4")
    graph = td.trace(lambda q, k: td.einsum("bhqd,bhkd->bhqk", q, k), q, k)
    assert "transpose" not in [n.op.name for n in graph.nodes]
    assert [n.attrs["transpose_y"] for n in graph.nodes if n.op.name == "matmul"] == [True]


def test_windows():
    x, w = rng.normal(size=(2, 4, 6, 7)).astype("f4"), rng.normal(size=(6, 2, 3, 2)).astype("f4")
    y = both(
        lambda x, w: td.conv(x, w, stride=(2, 1), padding=((1, 0), (2, 1)), dilation=(1, 2), groups=2), x, w
    )
    assert y.shape == (2, 6, 3, 8)
    back = td.conv_transpose(y, w, stride=(2, 1), padding=((1, 0), (2, 1)), dilation=(1, 2), groups=2)
    assert back.shape == x.shape
    inner = (y * y).sum()  # <conv x, y> = <x, conv_transpose y>
    assert_close((td.asarray(x) * back).sum(), inner, 1e-3)
    assert_close(both(lambda x: td.max_pool(x, 2), x), x[:, :, :, :6].reshape(2, 4, 3, 2, 3, 2).max((3, 5)))
    assert_close(
        both(lambda x: td.avg_pool(x, (2, 3), stride=(2, 3)), x),
        x[:, :, :, :6].reshape(2, 4, 3, 2, 2, 3).mean((3, 5), dtype="f4"),
    )
    assert td.avg_pool(td.ones((1, 1, 2, 2)), 2, 1, 1, count_include_pad=False).numpy().min() == 1
    with pytest.raises(td.TreadleError, match="output_padding"):
        td.conv_transpose(y, w, output_padding=1, groups=2)


def test_norms_attention_and_loss():
    x = rng.normal(size=(2, 4, 6)).astype("f4")
    scale, bias = rng.normal(size=6).astype("f4"), rng.normal(size=6).astype("f4")
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    assert_close(both(lambda x, s, b: td.layer_norm(x, s, b), x, scale, bias), normal * scale + bias, 1e-5)
    assert_close(
        both(lambda x, s: td.rms_norm(x, s), x, scale),
        x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale,
        1e-5,
    )
    y, mean, variance = both(lambda x: td.batch_norm(x, td.ones(4), td.zeros(4)), x)
    assert_close((mean, variance), (x.mean((0, 2)), x.var((0, 2))), 1e-5)
    assert abs(y.numpy().mean((0, 2))).max() < 1e-5
    assert_close(td.group_norm(x, td.ones(4), td.zeros(4), groups=1).numpy().mean((1, 2)), np.zeros(2, "f4"), 1e-5)
    scores = x @ x.transpose(0, 2, 1) / np.float32(np.sqrt(6))
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    assert_close(both(lambda x: td.attention(x, x, x), x), weights @ x, 1e-5)
    assert_close(td.attention(x, x, x, mask=td.tri(4, dtype="bool")), td.attention(x, x, x, causal=True), 1e-6)
    labels = np.array([[0, 5, 2, 1], [3, 3, -1, 0]])
    logp = x - np.log(np.exp(x).sum(-1, keepdims=True))
    picked = -np.take_along_axis(logp, labels.clip(0)[..., None], -1)[..., 0]
    assert_close(
        both(lambda x, y: td.cross_entropy(x, y, ignore_index=-1), x, labels),
        np.where(labels < 0, 0, picked).astype("f4"),
        1e-5,
    )
    with pytest.raises(td.TreadleError, match="integer"):
        td.cross_entropy(x, x[..., 0])


def test_every_public_function_is_documented():
    bare = [name for name in td.frontend.functions.__all__ if not getattr(td, name).__doc__]
    assert not bare
    assert all(getattr(td.Tensor, name).__doc__ for name in td.frontend.methods.METHODS)
