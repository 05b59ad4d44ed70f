"""Compiled functions with sizes that are open until they are called: one program for all of them."""

import numpy as np
import pytest

import treadle as td
from treadle import nn
from treadle.frontend import dynamic

RNG = np.random.default_rng(0)


def data(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def assert_close(got, want, tol=1e-4):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=tol, atol=tol)


W = data(40, 24)


def layer(x, y):
    return td.softmax(td.tanh(x @ td.tensor(W)), axis=-1) + y.sum(axis=0)


@pytest.fixture(scope="module")
def compiled():
    return td.compile(layer, dynamic={"x": ("batch", 40), "y": {0: "n"}})


def expected(x, y):
    z = np.tanh(x @ W)
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True) + y.sum(axis=0)


@pytest.mark.parametrize("batch, n", [(1, 1), (2, 3), (0, 4), (17, 2), (100, 9), (5, 0)])
def test_one_program_serves_every_size(compiled, batch, n):
    x, y = data(batch, 40), data(n, 24)
    assert_close(compiled(x, y).numpy(), expected(x, y))
    assert compiled.stats.compiles == 1


def test_what_does_not_fit_is_refused(compiled):
    for x, y, message in (
        (data(3, 41), data(2, 24), "declares"),
        (data(3, 40, 1), data(2, 24), "axes"),
    ):
        with pytest.raises(td.TreadleError, match=message):
            compiled(x, y)


def test_sizes_of_one_name_must_agree():
    f = td.compile(lambda x, y: x * y, dynamic={"x": ("n", 3), "y": ("n", 3)})
    assert_close(f(data(4, 3) * 0, data(4, 3)).numpy(), np.zeros((4, 3)))
    with pytest.raises(td.TreadleError, match="n = 4|n = 5|agree"):
        f(data(4, 3), data(5, 3))


def test_declarations_are_checked():
    for wrong in ({"z": ("n",)}, {"x": "n"}, {"x": ("n!", 3)}):
        with pytest.raises(td.TreadleError):
            td.compile(lambda x: x, dynamic=wrong)(data(3, 3))


def test_formulas():
    f = td.compile(lambda x: x.reshape((x.shape[0] // 4, 4)).sum(axis=1), dynamic={"x": ("4*n",)})
    for n in (4, 8, 40):
        x = data(n)
        assert_close(f(x).numpy(), x.reshape(-1, 4).sum(axis=1))
    assert f.stats.compiles == 1
    with pytest.raises(td.TreadleError):
        f(data(7))


def test_containers_and_static_arguments():
    f = td.compile(lambda xs, scale: [x * scale for x in xs], dynamic={"xs": {0: "n"}})
    for n in (1, 5):
        a, b = data(n, 2), data(n, 3)
        got = f([a, b], 2)
        assert_close(got[0].numpy(), 2 * a)
        assert_close(got[1].numpy(), 2 * b)
    assert f.stats.compiles == 1
    f([data(2, 2), data(2, 3)], 3)
    assert f.stats.compiles == 2


def test_specialising(compiled):
    x, y = data(8, 40), data(2, 24)
    fixed = compiled.specialize(batch=8)
    assert_close(fixed(x, y).numpy(), expected(x, y))
    assert_close(fixed(x, data(5, 24) * 0).numpy(), expected(x, np.zeros((5, 24))))
    assert fixed.stats.compiles == 1
    with pytest.raises(td.TreadleError):
        fixed(x[:3], y)
    each = td.compile(layer, dynamic={"x": {0: "b"}}, specialize=True)
    each(x, y)
    each(x[:4], y)
    assert each.stats.compiles == 2


def test_graphs_are_open_where_they_are_symbolic():
    graph = td.trace(layer, td.spec(("b", 40)), td.spec(("n", 24)))
    f = td.compile(graph)
    for b in (1, 6):
        x, y = data(b, 40), data(3, 24)
        assert_close(f(x, y).numpy(), expected(x, y))
    assert f.stats.compiles == 1
    g = td.compile(graph).specialize(b=6)
    assert_close(g(x, y).numpy(), expected(x, y))


def test_saved_programs_stay_open(compiled, tmp_path):
    compiled(data(3, 40), data(3, 24))
    compiled.save(tmp_path / "f.td")
    loaded = td.load(tmp_path / "f.td")
    for b in (1, 3, 50):
        x, y = data(b, 40), data(b + 1, 24)
        assert_close(loaded(x, y).numpy(), expected(x, y))
    with pytest.raises(td.TreadleError):
        loaded(data(3, 41), data(3, 24))


class Encoder(nn.Module):
    def __init__(self, width=32, heads=2):
        super().__init__()
        self.embed, self.heads = nn.Embedding(50, width), heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, ids, mask):
        batch, seq = ids.shape
        x = self.embed(ids)

        def split(t):
            return t.reshape((batch, seq, self.heads, -1)).transpose((0, 2, 1, 3))

        seen = (mask != 0).reshape((batch, 1, 1, seq))
        y = td.attention(split(self.q(x)), split(self.k(x)), split(self.v(x)), seen)
        x = self.norm(x + self.out(y.transpose((0, 2, 1, 3)).reshape((batch, seq, -1))))
        x = x + self.down(nn.functional.gelu(self.up(x)))
        weight = mask.astype("float32").reshape((batch, seq, 1))
        return (x * weight).sum(axis=1) / weight.sum(axis=1)


def test_an_encoder():
    model = Encoder()
    sizes = ("batch", "seq")
    f = td.compile(model, dynamic={"ids": sizes, "mask": sizes})
    for batch, seq in ((1, 1), (1, 16), (3, 7), (2, 40), (5, 33)):
        ids, mask = RNG.integers(0, 50, (batch, seq)), np.ones((batch, seq), np.int64)
        mask[:, max(seq - 2, 1):] = 0
        with td.no_grad():
            want = model(td.tensor(ids), td.tensor(mask)).numpy()
        assert_close(f(ids, mask).numpy(), want, 2e-4)
    assert f.stats.compiles == 1


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.norm, self.b, self.c = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 24, 1)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        x = td.maximum(self.norm(self.a(x)), 0.0)
        x = td.max_pool(td.maximum(self.b(x), 0.0), 2)
        return self.head(self.c(x).mean(axis=(2, 3)))


def test_a_network_for_images():
    model = Images().eval()
    f = td.compile(model, dynamic={"x": ("batch", 3, "height", "width")})
    for batch, height, width in ((1, 8, 8), (2, 15, 22), (3, 33, 9)):
        x = data(batch, 3, height, width)
        with td.no_grad():
            want = model(td.tensor(x)).numpy()
        assert_close(f(x).numpy(), want, 2e-4)
    assert f.stats.compiles == 1


def test_gradients():
    def loss(w, x):
        return (td.tanh(x @ w) ** 2.0).mean()

    f = td.compile(td.value_and_grad(loss), dynamic={"x": {0: "batch"}})
    static = td.compile(td.value_and_grad(loss))
    w = data(24, 40)
    for batch in (1, 3, 50):
        x = data(batch, 24)
        for got, want in zip(f(w, x), static(w, x)):
            assert_close(got.numpy(), want.numpy())
    assert f.stats.compiles == 1


def test_scans():
    def run(x, h):
        return td.scan(lambda carry, row: (td.tanh(carry + row), carry * 2.0), h, x)

    f, static = (td.compile(run, dynamic=d) for d in ({"x": ("time", "batch", 4), "h": ("batch", 4)}, None))
    for time, batch in ((1, 1), (5, 2), (12, 3)):
        x, h = data(time, batch, 4), data(batch, 4)
        for got, want in zip(f(x, h), static(x, h)):
            assert_close(got.numpy(), want.numpy())
    assert f.stats.compiles == 1


def test_patterns_are_tried_from_the_weakest():
    tried = list(dynamic.patterns({"batch": 3, "h": 48, "w": 100}))
    assert tried[0] == {} and tried[1] == {"h": td.Dim("h") * 16, "w": td.Dim("w") * 4} and tried[2] == {"h": 48}
    assert dynamic.fits(tried[1], {"batch": 1, "h": 32, "w": 8}) and not dynamic.fits(tried[1], {"h": 31, "w": 8})


def steps(model_of, loss, batches, dynamic, **options):
    """Parameters after the same steps with open sizes, and without; how often the first compiled."""
    found = []
    for given in (dynamic, None):
        td.random.seed(0)
        model = model_of()
        opt = td.optim.SGD(model.parameters(), lr=0.05)
        step = td.train_step(model, loss, opt, dynamic=given, **options)
        losses = [float(step(*batch).numpy()) for batch in batches]
        found.append((losses, [p.numpy().copy() for p in model.parameters()], step.stats.compiles))
    return found


def mean_square(model, x, y):
    return ((model(x) - y) ** 2.0).mean()


def cross_entropy(model, x, y):
    return nn.functional.cross_entropy(model(x), y)


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.1}, {"amp": "bfloat16"}])
def test_training_steps_of_any_batch(options):
    def model():
        return nn.Sequential(nn.Linear(20, 33), nn.LayerNorm(33), nn.Linear(33, 7))

    batches = [(data(n, 20), data(n, 7)) for n in (4, 1, 9, 64)]
    opened, static = steps(model, mean_square, batches, {"x": {0: "batch"}, "y": {0: "batch"}}, **options)
    assert opened[2] == 1 and static[2] == 4
    tol = 2e-2 if "amp" in options else 1e-4
    assert_close(opened[0], static[0], tol)
    for a, b in zip(opened[1], static[1]):
        assert_close(a, b, tol)


def test_training_steps_on_images_of_any_size():
    batches = [(data(n, 3, h, w), RNG.integers(0, 10, n)) for n, h, w in ((2, 8, 8), (1, 12, 10), (5, 9, 16))]
    opened, static = steps(Images, cross_entropy, batches, {"x": ("n", 3, "h", "w"), "y": ("n",)})
    assert opened[2] == 1
    assert_close(opened[0], static[0], 1e-3)
    for a, b in zip(opened[1], static[1]):
        assert_close(a, b, 2e-3)
