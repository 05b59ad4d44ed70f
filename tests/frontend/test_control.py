"""Branches, loops and random numbers: eager and traced agree, closures are operands, state is carried."""

from __future__ import annotations

import numpy as np
import pytest

import treadle as td

from .tools import assert_close, both, run_graph, traced

X = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def test_cond():
    w = td.nn.Parameter(np.ones(3, np.float32) * 3)
    seen = td.tensor(0.0, role="state")

    def fn(x, limit):
        def then(x, extra):
            seen.assign(seen + 1)
            return x * w + extra["a"], x.sum()

        return td.cond(x.sum() > limit, then, lambda x, extra: (x - w, limit * 1), x, {"a": limit})

    for limit in (np.float32(-100), np.float32(100)):
        both(fn, X, np.asarray(limit))
    assert seen.item() == 2
    graph = td.trace(fn, X, np.float32(0))
    (node,) = (n for n in graph.nodes if n.op.name == "cond")
    assert len(node.operands) == 1 + 2 + 3  # predicate, operands, and what the branches captured


def test_while_loop():
    step = td.nn.Parameter(np.float32(1.5))

    def fn(x):
        return td.while_loop(
            lambda s: s["i"] < 4, lambda s: {"i": s["i"] + 1, "x": s["x"] * step + x.mean()}, {"i": 0, "x": x}
        )

    result = both(fn, X)
    assert result["i"].item() == 4
    total = td.tensor(0.0, role="state")
    graph = td.trace(
        lambda n: td.while_loop(lambda i: i < n, lambda i: [total.assign(total + 2), i + 1][1], 0),
        np.int64(3),
    )
    assert run_graph(graph, np.int64(3)).item() == 3 and total.item() == 6


def test_scan():
    w = td.nn.Parameter(np.eye(3, dtype=np.float32) * 0.5)

    def fn(x, reverse=False):
        def body(h, x):
            h = {"h": td.tanh(h["h"] @ w + x)}
            return h, (h["h"], x.sum())

        return td.scan(body, {"h": td.zeros(3)}, x, reverse=reverse)

    state, (hs, sums) = both(fn, X)
    h = np.zeros(3, np.float32)
    for row in X:
        h = np.tanh(h * 0.5 + row)
    assert_close(state["h"], h, 1e-5)
    assert hs.shape == (5, 3) and sums.shape == (5,)
    assert_close(both(lambda x: fn(x, True), X)[1][1], X.sum(1), 1e-5)
    assert_close(both(lambda x: td.scan(lambda s, _: (s * 2, None), x, length=3), X), (X * 8, None))
    empty = both(lambda x: td.scan(lambda s, x: (s + x.sum(), x * 2), td.tensor(1.0), x), X[:0])
    assert empty[0].item() == 1 and empty[1].shape == (0, 3)


def test_nested_loops_capture_through_all_levels():
    w, outer_state = td.nn.Parameter(np.float32(0.5)), td.tensor(0.0, role="state")

    def fn(x):
        def outer(s, row):
            def inner(t, v):
                outer_state.assign(outer_state + 1)
                return t * w + v + s + x.mean(), None

            t, _ = td.scan(inner, td.tensor(0.0), row)
            return s + t, td.grad(lambda a: td.sin(a * w) * x.sum())(t)

        return td.scan(outer, td.tensor(1.0), x)

    both(fn, X)
    assert outer_state.item() == 30
    assert_close(traced(td.grad(lambda x: fn(x)[1].sum()), X), td.grad(lambda x: fn(x)[1].sum())(X), 1e-4)


@pytest.mark.parametrize("tracing", [False, True])
@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda x: td.cond(x, lambda: x, lambda: x), "scalar"),
        (lambda x: td.scan(lambda s, x: (s[0], x), x, x), "state"),
        (lambda x: td.scan(lambda s, x: ((s, s), x), x[0], x), "tree must stay"),
        (lambda x: td.scan(lambda s, x: s, x[0], x), "pair"),
        (lambda x: td.scan(lambda s, x: (s, x), x), "length"),
        (lambda x: td.scan(lambda s, x: (s, x), x, (x, x[:2])), "length 5"),
        (lambda x: td.while_loop(lambda s: s.sum() < 1e9, lambda s: s.astype("float64"), x), "float64|f64"),
        (lambda x: td.scan(lambda s, x: (s, x), x, x.sum()), "first axis"),
    ],
)
def test_loops_that_do_not_fit(fn, words, tracing):
    with pytest.raises(td.TreadleError, match=words) as caught:
        td.trace(fn, X) if tracing else fn(td.asarray(X))
    assert "test_control.py" in str(caught.value)


def test_branches_that_differ():
    for branch, words in ((lambda x: (x, x), "different trees"), (lambda x: x[0], "different types")):
        with pytest.raises(td.TreadleError, match=words):
            td.trace(lambda x: td.cond(x.sum() > 0, lambda x: x, branch, x), X)  # noqa: B023


# Random numbers ------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_numbers_everywhere():
    def fn(x):
        def body(s, x):
            return s + td.random.normal(), td.random.uniform(x.shape) * x

        return (
            td.random.normal((2, 2)),
            td.scan(body, td.tensor(0.0), x),
            td.random.bernoulli(0.5, (7,)),
            td.random.randint(0, 9, (3,)),
        )

    td.random.seed(7)
    first = fn(td.asarray(X))
    state = td.random.default_generator().state.numpy()
    second = fn(td.asarray(X))
    assert not np.array_equal(first[0].numpy(), second[0].numpy())
    td.random.seed(7)
    graph = td.trace(fn, X)
    assert_close(run_graph(graph, X), first)
    assert (td.random.default_generator().state.numpy() == state).all()
    assert_close(run_graph(graph, X), second)


def test_known_words():
    """Philox4x32-10 with key 0 and counter 0: the test vector of Salmon et al."""
    words = td.random.Generator(0) if hasattr(td.random, "Generator") else None
    assert [hex(w) for w in words.bits((4,)).tolist()] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_distributions(dtype):
    gen = td.random.Generator(3)
    u = gen.uniform((20000,), -1, 3, dtype).astype("float64").numpy()
    assert u.min() >= -1 and u.max() <= 3 and abs(u.mean() - 1) < 0.03 and abs(u.var() - 16 / 12) < 0.05
    n = gen.normal((20000,), 2.0, 0.5, dtype).astype("float64").numpy()
    assert abs(n.mean() - 2) < 0.02 and abs(n.std() - 0.5) < 0.02 and np.isfinite(n).all()
    assert gen.uniform((3,), dtype=dtype).dtype == dtype


def test_integers_and_choices():
    gen = td.random.Generator(4)
    r = gen.randint(-3, 5, (8000,), "int16")
    assert (
        r.dtype == "int16" and set(r.tolist()) == set(range(-3, 5)) and np.bincount(r.numpy() + 3).min() > 850
    )
    assert sorted(gen.permutation(50).tolist()) == list(range(50))
    assert sorted(gen.permutation(td.asarray(X))[:, 0].tolist()) == sorted(X[:, 0].tolist())
    assert set(gen.choice(td.tensor([1.0, 5.0]), (40,)).tolist()) == {1.0, 5.0}
    assert (
        set(gen.bernoulli(td.tensor([0.0, 1.0])).tolist()) == {False, True}
        and 0.2 < gen.bernoulli(0.3, (4000,)).mean().item() < 0.4
    )
    low, high = td.tensor([0.0, 10.0]), td.tensor([1.0, 20.0])
    assert gen.uniform((2,), low, high)[1] >= 10
    a, b = gen.numpy_generator().random(3), gen.numpy_generator().random(3)
    assert not np.array_equal(a, b)
    with td.no_grad():
        traced(lambda: td.random.permutation(4))
    for wrong in (
        lambda: gen.randint(3, 3),
        lambda: gen.randint(0, 2, dtype="float32"),
        lambda: gen.uniform(dtype="int8"),
    ):
        with pytest.raises(td.TreadleError):
            wrong()


def test_symbolic_draws():
    graph = td.trace(lambda x: x * td.random.bernoulli(0.5, x.shape), td.spec(("n", 3)))
    assert run_graph(graph, X).shape == X.shape
