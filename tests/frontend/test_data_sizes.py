"""Shapes that data decide: `x[mask]` and `nonzero` in traced functions. One compilation serves every count."""

import subprocess
import sys

import numpy as np
import pytest

import treadle as td
from treadle.ir import interp
from treadle.ir.dims import DataSize
from treadle.ir.parse import parse
from treadle.ir.phases import split
from treadle.ir.verify import verify

X = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
SHARES = (0.0, 1.0, 0.5, 0.1, 0.9)  # of what a mask selects


def inputs(shape=(6, 5)):
    """Arrays of which different numbers of elements are positive."""
    for seed, share in enumerate(SHARES):
        rng = np.random.default_rng(seed)
        yield np.where(rng.random(shape) < share, 1, -1).astype(np.float32) * rng.uniform(0.5, 2, shape).astype("f4")


@pytest.mark.parametrize(("fn", "expected"), [
    (lambda x: x[x > 0] * 2, lambda x: x[x > 0] * 2),
    (lambda x: td.nonzero(x > 0), lambda x: np.nonzero(x > 0)),
    (lambda x: td.sum(x[x > 0] * x[x > 0]), lambda x: np.sum(x[x > 0] ** 2)),      # equal counts are one size
    (lambda x: x[td.sum(x, axis=1) > 0], lambda x: x[x.sum(1) > 0]),
    (lambda x: x[td.sum(x, axis=1) > 0, 2], lambda x: x[x.sum(1) > 0, 2]),
    (lambda x: x[:, x[0] > 0], lambda x: x[:, x[0] > 0]),
    (lambda x: td.sort(x[x > 0])[::-1], lambda x: np.sort(x[x > 0])[::-1]),
    (lambda x: x.at[x > 0].set(x[x > 0] * 3), lambda x: np.where(x > 0, x * 3, x)),
    (lambda x: td.concatenate([x[x > 0], x[x < 0]]), lambda x: np.concatenate([x[x > 0], x[x < 0]])),
    (lambda x: (lambda y: y[y < 1.5])(x[x > 0]), lambda x: x[(x > 0) & (x < 1.5)]),   # a count after a count
    (lambda x: td.softmax(td.outer(x[x > 0], x[0]), axis=-1),
     lambda x: np.exp(np.outer(x[x > 0], x[0])) / np.exp(np.outer(x[x > 0], x[0])).sum(-1, keepdims=True)),
])
def test_one_program_for_every_count(fn, expected):
    f = td.compile(fn)
    for x in inputs():
        got, want = f(x), expected(x)
        for g, w in zip(got if isinstance(got, tuple) else (got,), want if isinstance(want, tuple) else (want,)):
            assert g.shape == np.shape(w)
            np.testing.assert_allclose(g.numpy(), w, rtol=2e-5, atol=1e-6)
    assert f.stats.compiles == 1


def test_the_graph_is_plain_ir():
    graph = td.trace(lambda x: x[x > 0], td.spec(("n", 5)))
    verify(graph)
    assert parse(str(graph)) == graph
    (out,) = graph.outputs
    assert isinstance(next(iter(out.shape[0].names)), DataSize)
    np.testing.assert_array_equal(interp.run(graph, [X])[0], X[X > 0])
    phases = split(graph)
    assert len(phases.phases) == 2
    for phase in phases.phases:
        verify(phase.graph)


def test_other_sizes_are_open_too():
    f = td.compile(lambda x, w: x[td.sum(x, axis=1) > 0] @ w, dynamic={"x": ("n", 5)})
    w = np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32)
    for n in (1, 6, 40, 0):
        for x in inputs((n, 5)):
            np.testing.assert_allclose(f(x, w).numpy(), x[x.sum(1) > 0] @ w, rtol=1e-4, atol=1e-5)
    assert f.stats.compiles == 1


def test_gradients_flow_through_what_is_selected():
    def loss(x, w):
        return td.sum(td.square(td.tanh(x @ w)[td.sum(x, axis=1) > 0]))

    f = td.compile(td.value_and_grad(loss, (0, 1)))
    w = np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32)
    for x in inputs():
        t = np.tanh(x @ w)
        slope = np.where(x.sum(1, keepdims=True) > 0, 2 * t * (1 - t * t), 0)  # of the loss by x @ w
        got, (dx, dw) = f(x, w)
        np.testing.assert_allclose(got.numpy(), np.sum(t[x.sum(1) > 0] ** 2), rtol=1e-4)
        np.testing.assert_allclose(dx.numpy(), slope @ w.T, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(dw.numpy(), x.T @ slope, rtol=1e-4, atol=1e-5)
    assert f.stats.compiles == 1


def test_finite_differences_and_second_order():
    x = X.astype(np.float64)
    way = np.random.default_rng(2).standard_normal(x.shape)

    def f(x):
        return td.sum(td.exp(x[x > 0.3]) * td.sin(x[x > 0.3]))

    slope = td.compile(lambda x: td.sum(td.grad(f)(x) * way))
    curve = td.compile(td.grad(lambda x: td.sum(td.grad(f)(x) * way)))
    step, inside = 1e-6, td.compile(f)
    np.testing.assert_allclose(float(slope(x)), (float(inside(x + step * way)) - float(inside(x - step * way))) / 2e-6,
                               rtol=1e-6)
    np.testing.assert_allclose(float(td.sum(curve(x) * way)),
                               (float(slope(x + step * way)) - float(slope(x - step * way))) / 2e-6, rtol=1e-5)


def test_a_training_step_on_what_a_mask_selects():
    def model(seed):
        td.random.seed(seed)
        return td.nn.Sequential(td.nn.Linear(5, 4), td.nn.ReLU(), td.nn.Linear(4, 1))

    def loss(net, x, keep):
        return td.mean(td.square(net(x)[keep] - 1))

    ours, eager = model(0), model(0)
    step = td.train_step(ours, loss, td.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9), dynamic={
        "x": {0: "n"}, "keep": {0: "n"}})
    opt = td.optim.SGD(eager.parameters(), lr=0.1, momentum=0.9)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x, keep = rng.standard_normal((8 + seed, 5)).astype(np.float32), rng.random(8 + seed) < 0.6
        want = loss(eager, td.asarray(x), td.asarray(keep))
        opt.zero_grad()
        want.backward()
        opt.step()
        np.testing.assert_allclose(float(step(x, keep)), float(want), rtol=1e-5)
    for a, b in zip(ours.parameters(), eager.parameters()):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-4, atol=1e-6)
    assert step.stats.compiles == 1


def test_saved_and_loaded_without_a_compiler(tmp_path):
    net = td.nn.Linear(5, 3)
    for freeze in (False, True):
        f = td.compile(lambda x: {"rows": net(x[td.sum(x, axis=1) > 0]), "n": td.nonzero(x > 0)[0]}, freeze=freeze,
                       dynamic={"x": ("n", 5)})
        f(X)
        f.save(tmp_path / "f.treadle")
        again = td.load(tmp_path / "f.treadle")
        for x in (X, *inputs((9, 5))):
            for key, value in f(x).items():
                np.testing.assert_array_equal(again(x)[key].numpy(), value.numpy())
    np.save(tmp_path / "x.npy", X)
    code = ("import sys, numpy as np, treadle as td\n"
            "y = td.load(sys.argv[1] + '/f.treadle')(np.load(sys.argv[1] + '/x.npy'))\n"
            "assert 'tvm' not in sys.modules\nprint(y['rows'].shape[0])")
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(out.stdout) == (X.sum(1) > 0).sum()


def test_a_damaged_phase_is_refused(tmp_path):
    f = td.compile(lambda x: x[x > 0])
    f(X)
    f.save(tmp_path / "f.treadle")
    data = bytearray((tmp_path / "f.treadle").read_bytes())
    at = data.index(b"phase1/code") + 400
    data[at] ^= 1
    (tmp_path / "f.treadle").write_bytes(data)
    with pytest.raises(td.ArtifactError, match="damaged"):
        td.load(tmp_path / "f.treadle")


@pytest.mark.parametrize(("fn", "words"), [
    (lambda x: td.scan(lambda c, row: (c + td.sum(row[row > 0]), c), td.zeros(()), x), "body of a loop"),
    (lambda x: x[x > 0] + x[x < 1], "broadcast"),
])
def test_what_cannot_be_is_said_while_tracing(fn, words):
    with pytest.raises(td.TreadleError, match=words):
        td.compile(fn)(X)


def test_negative_indices_count_from_the_end_of_an_open_axis():
    f = td.compile(lambda x, i: (x[i], td.take(x, i, 0), td.take_along_axis(x, i[:, None], 0)), dynamic={"x": ("n", 5)})
    for n in (4, 7):
        x, i = np.arange(n * 5, dtype=np.float32).reshape(n, 5), np.array([-1, 0, -n, 2])
        for got in f(x, i):
            np.testing.assert_array_equal(got.numpy()[:, 0], x[i, 0])
    assert f.stats.compiles == 1
