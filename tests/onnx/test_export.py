"""`td.onnx.save`: models, functions, gradients and training steps, run in onnxruntime."""

import collections
import os

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime", reason="needs onnxruntime (the extra `test`)")

import onnxruntime  # noqa: E402
from export_tools import runtime  # noqa: E402

import treadle as td  # noqa: E402
from treadle import nn  # noqa: E402
from treadle.ir import interp  # noqa: E402
from treadle.ir.errors import ArgumentsError, OnnxError  # noqa: E402

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def ops(model):
    return collections.Counter(n.op_type for n in model.graph.node)


def shapes(values):
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def assert_agree(model, module, *arrays, tol=1e-5):
    """onnxruntime gives what the module gives."""
    results = module(*map(td.tensor, arrays))
    for got, want in zip(runtime(model, arrays), results if isinstance(results, tuple) else (results,), strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=tol, atol=tol)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.deep = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        x = self.pool(nn.functional.relu(self.norm(self.stem(x))))
        x = nn.functional.hardswish(self.deep(x))
        return self.head(self.drop(td.mean(x, axis=(2, 3))))


class Residual(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 1)
        self.groups = nn.GroupNorm(2, channels)

    def forward(self, x):
        return nn.functional.leaky_relu(x + self.groups(self.second(nn.functional.silu(self.norm(self.first(x))))))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32)
        self.norm = nn.LayerNorm(16)

    def forward(self, tokens):
        return self.norm(self.layer(self.table(tokens)))


class Sequence(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cells = kind(6, 5, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x):
        return self.cells(x)[0]


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4), nn.Softmax()), ("batch", 8), "float32",
            [(1, 8), (5, 8)]),
    "images": (Images, ("batch", 1, "height", "width"), "float32", [(2, 1, 28, 28), (1, 1, 31, 18)]),
    "residual": (Residual, ("batch", 8, "height", "width"), "float32", [(2, 8, 7, 9), (3, 8, 4, 4)]),
    "upsampling": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1),
                   ("batch", 3, "height", "width"), "float32", [(2, 3, 5, 6)]),
    "words": (Words, ("batch", "length"), "int64", [(2, 7), (1, 3)]),
    "lstm": (lambda: Sequence(nn.LSTM), ("batch", "length", 6), "float32", [(2, 9, 6), (3, 1, 6)]),
    "gru": (lambda: Sequence(nn.GRU), ("batch", "length", 6), "float32", [(2, 9, 6)]),
    "rnn": (lambda: Sequence(nn.RNN), ("batch", "length", 6), "float32", [(2, 9, 6)]),
}


@pytest.mark.parametrize("opset", [13, 20, 23])
@pytest.mark.parametrize("name", MODELS)
def test_models_with_dynamic_sizes(name, opset):
    make, shape, dtype, sizes = MODELS[name]
    module = make()
    model = td.onnx.to_model(module, td.spec(shape, dtype), opset=opset)
    (given,) = shapes(model.graph.input).values()
    assert given == list(shape) and list(shapes(model.graph.output).values())[0][0] == "batch"
    assert model.opset_import[0].version == opset
    parameters = {n for n, _ in module.named_parameters()}
    assert parameters <= {t.name for t in model.graph.initializer}
    module.eval()
    for size in sizes:
        array = normal(*size) if dtype == "float32" else RNG.integers(0, 50, size)
        assert_agree(model, module, array)


def test_ops_of_a_high_level():
    found = ops(td.onnx.to_model(MODELS["mlp"][0](), td.spec(("n", 8))))
    assert found == {"Gemm": 2, "Gelu": 1, "Softmax": 1}
    found = ops(td.onnx.to_model(Images(), td.spec(("n", 1, 28, 28))))
    assert {k: found[k] for k in ("Conv", "BatchNormalization", "HardSwish", "MaxPool", "Gemm")} == {
        "Conv": 2, "BatchNormalization": 1, "HardSwish": 1, "MaxPool": 1, "Gemm": 1}
    assert not {"Add", "Sub", "Sqrt", "Reciprocal", "Mul"} & set(found)
    found = ops(td.onnx.to_model(Residual(), td.spec(("n", 8, 5, 5)), opset=21))
    assert found["GroupNormalization"] == found["LeakyRelu"] == 1
    found = ops(td.onnx.to_model(Words(), td.spec(("n", "m"), "int64")))
    assert found["Gather"] == 1 and found["LayerNormalization"] == 3 and not found["Clip"]
    found = ops(td.onnx.to_model(Words(), td.spec(("n", "m"), "int64"), opset=23))
    assert found["Attention"] == 1 and not found["Softmax"]


@pytest.mark.parametrize("activation", ["gelu", "elu", "selu", "leaky_relu", "hardsigmoid", "hardswish", "mish", "silu",
                                        "relu6", "softplus"])
@pytest.mark.parametrize("opset", [13, 20])
def test_activations(activation, opset):
    function = getattr(nn.functional, activation)
    model = td.onnx.to_model(function, td.spec(("n",)), opset=opset)
    assert_agree(model, function, np.linspace(-8, 8, 101, dtype=np.float32))
    assert len(model.graph.node) <= 8


def test_gelu_by_tanh():
    def function(x):
        return nn.functional.gelu(x, approximate="tanh")

    model = td.onnx.to_model(function, td.spec(("n",)))
    assert ops(model) == {"Gelu": 1}
    assert_agree(model, function, np.linspace(-5, 5, 33, dtype=np.float32))


def test_names():
    def both(x, pair):
        return {"sum": x + pair["left"], "product": x * pair["right"]}

    spec = td.spec((3,))
    model = td.onnx.to_model(both, spec, {"left": spec, "right": spec})
    assert list(shapes(model.graph.input)) == ["x", "pair_left", "pair_right"]
    assert list(shapes(model.graph.output)) == ["product", "sum"]
    model = td.onnx.to_model(lambda x: (x, x + 1), spec, input_names=["a"], output_names=["b", "c"])
    assert list(shapes(model.graph.input)) == ["a"] and list(shapes(model.graph.output)) == ["b", "c"]
    model = td.onnx.to_model(lambda x: (x, x + 1), spec)
    assert list(shapes(model.graph.output)) == ["output", "output_1"]
    with pytest.raises(ArgumentsError, match="2 outputs"):
        td.onnx.to_model(lambda x: (x, x + 1), spec, output_names=["b", "b"])


def test_sizes_are_computed_from_the_inputs():
    def mixed(x, y):
        flat = td.reshape(x, (x.shape[1], x.shape[0]))
        return td.concatenate([flat.T, x, y], axis=0), td.reshape(x, (-1,)), td.broadcast_to(y[:, :1], y.shape) * 2

    model = td.onnx.to_model(mixed, td.spec(("b", "c")), td.spec((2 * td.Dim("b") + 1, "c")))
    assert shapes(model.graph.output) == {"output": ["4*b+1", "c"], "output_1": ["b*c"], "output_2": ["2*b+1", "c"]}
    for b, c in ((2, 3), (1, 5)):
        assert_agree(model, mixed, normal(b, c), normal(2 * b + 1, c))
    with pytest.raises(OnnxError, match="does not follow from the shape of any input"):
        td.onnx.to_model(lambda x: td.reshape(x, (td.Dim("b"), td.Dim("c"))), td.spec((td.Dim("b") * td.Dim("c"),)))


def test_gradients():
    def loss(x, w):
        return td.sum(td.tanh(x @ w) ** 2)

    model = td.onnx.to_model(td.grad(loss, argnums=(0, 1)), td.spec(("n", 3)), td.spec((3, 4)))
    assert_agree(model, td.grad(loss, argnums=(0, 1)), normal(5, 3), normal(3, 4))

    def pooled(x, w):
        y = td.max_pool(td.conv(x, w, stride=2, padding=1, groups=2), 2)
        return td.sum(td.avg_pool(y, 2, padding=1, count_include_pad=False) ** 2)

    gradient = td.grad(pooled, argnums=(0, 1))
    arrays = normal(2, 4, 12, 11), normal(6, 2, 3, 3)
    assert_agree(td.onnx.to_model(gradient, td.spec(("n", 4, 12, 11)), td.spec((6, 2, 3, 3))), gradient, *arrays)
    assert_agree(td.onnx.to_model(gradient, td.spec((2, 4, "h", "w")), td.spec((6, 2, 3, 3))), gradient, *arrays)


def test_control_flow():
    def steps(x, limit):
        total, count = td.while_loop(lambda c: (c[1] < limit) & (td.sum(c[0]) < 100), lambda c: (c[0] * 2, c[1] + 1),
                                     (x, td.zeros((), "int64")))
        return td.cond(count > 3, lambda v: v - 1, lambda v: v + 1, total), count

    model = td.onnx.to_model(steps, td.spec(("n",)), td.spec((), "int64"))
    assert ops(model)["Loop"] == ops(model)["If"] == 1
    for limit in (0, 3, 9):
        assert_agree(model, steps, normal(4) + 1, np.array(limit))

    def running(xs):
        return td.scan(lambda c, x: (c + x, c * x), td.zeros((3,)), xs, reverse=True)

    model = td.onnx.to_model(lambda xs: tuple(running(xs)), td.spec(("t", 3)))
    assert_agree(model, lambda xs: tuple(running(xs)), normal(5, 3))


def test_indices_are_clamped_where_the_graph_computes_them():
    def lookup(table, index):
        return td.take(table, index, axis=0), td.take(table, index * 2, axis=0)

    given = td.spec((5, 3)), td.spec((4,), "int64")
    table = normal(5, 3)
    assert ops(td.onnx.to_model(lookup, *given))["Clip"] == 1
    assert ops(td.onnx.to_model(lookup, *given, clamp=True))["Clip"] == 2
    assert ops(td.onnx.to_model(lookup, *given, clamp=False))["Clip"] == 0
    model = td.onnx.to_model(lookup, *given)
    first, second = runtime(model, [table, np.array([0, 1, 2, 4])])
    np.testing.assert_array_equal(first, table[[0, 1, 2, 4]])
    np.testing.assert_array_equal(second, table[[0, 2, 4, 4]])
    model = td.onnx.to_model(lambda table, scores: td.take(table, td.argmax(scores, axis=-1), axis=0),
                             td.spec((7, 3)), td.spec(("n", 7)))
    assert ops(model) == {"ArgMax": 1, "Gather": 1}


@pytest.mark.parametrize("optimizer", [lambda p: td.optim.AdamW(p, lr=1e-2),
                                       lambda p: td.optim.SGD(p, lr=0.1, momentum=0.9)], ids=["adamw", "sgd"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_steps_in_onnxruntime(optimizer, accumulate):
    """Three steps with dropout, batch statistics and clipping: losses and parameters are Treadle's."""
    model = Images()
    step = td.train_step(model, lambda m, x, y: nn.functional.cross_entropy(m(x), y), optimizer(model.parameters()),
                         clip_norm=1.0, accumulate=accumulate)
    x, y = normal(8, 1, 12, 12), RNG.integers(0, 10, 8)
    proto = td.onnx.to_model(step, x, y)
    assert all(f"{n}.new" in shapes(proto.graph.output) for n, _ in model.named_parameters())
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    stored = {t.name for t in proto.graph.initializer}
    data = [i.name for i in proto.graph.input if i.name not in stored]
    state = {}
    for _ in range(3):
        numbers = step._scalars()
        feeds = dict(zip(data, [x, y, *(np.asarray(numbers[n]) for n in sorted(numbers))], strict=True))
        found = dict(zip(shapes(proto.graph.output), session.run(None, {**feeds, **state})))
        state = {name[:-4]: value for name, value in found.items() if name.endswith(".new")}
        np.testing.assert_allclose(found["output"], step(x, y).numpy(), rtol=1e-5)
    for name, parameter in model.named_parameters():
        if name != "stem.bias":  # normalised away: its gradient is rounding, which AdamW scales up
            np.testing.assert_allclose(state[name], parameter.numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_training_step_with_an_open_batch():
    """Loops, lookups and dropout, forward and backward; the oracle is the reference interpreter."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(20, 8), nn.Linear(16, 20)
            self.cells = nn.LSTM(8, 8, num_layers=2, batch_first=True, dropout=0.2, bidirectional=True)

        def forward(self, tokens):
            return self.head(self.cells(self.table(tokens))[0])

    model = Net()
    step = td.train_step(model, lambda m, x, y: nn.functional.cross_entropy(m(x), y),
                         td.optim.SGD(model.parameters(), lr=0.1))
    spec = td.spec(("batch", 7), "int64")
    proto, graph = td.onnx.to_model(step, spec, spec), step.trace(spec, spec)
    assert ops(proto)["Scan"] >= 6
    stored = {t.name for t in proto.graph.initializer}
    data = [i.name for i in proto.graph.input if i.name not in stored]
    numbers = [np.asarray(n) for _, n in sorted(step._scalars().items())]
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    captures = graph.meta["captures"]
    for batch in (1, 6):
        arrays = [RNG.integers(0, 20, (batch, 7)), RNG.integers(0, 20, (batch, 7)), *numbers]
        given = iter(arrays)
        every = [captures[i].numpy() if i in captures else next(given) for i in range(len(graph.inputs))]
        for got, want in zip(session.run(None, dict(zip(data, arrays, strict=True))), interp.run(graph, every)):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_random_numbers_are_the_same_elsewhere():
    def noisy(x):
        return x + td.random.normal(x.shape)

    td.random.seed(7)
    model = td.onnx.to_model(noisy, td.spec((1000,)))
    got = runtime(model, [np.zeros(1000, np.float32)])[0]
    td.random.seed(7)
    np.testing.assert_allclose(got, noisy(td.zeros((1000,))).numpy(), rtol=1e-5, atol=1e-6)
    with pytest.raises(OnnxError, match="bitwise.*opset=18"):
        td.onnx.to_model(noisy, td.spec((1000,)), opset=17)


def test_mode_is_chosen_and_put_back():
    model = Images().train()
    model.stem.eval()
    assert "Dropout" not in ops(td.onnx.to_model(model, td.spec((1, 1, 12, 12))))
    assert model.training and not model.stem.training and model.norm.training
    assert ops(td.onnx.to_model(model, td.spec((1, 1, 12, 12)), train=True))["BitwiseXor"]


def test_adapters_apart_and_merged():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    td.finetune.add_lora(model, "*", rank=2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora.b"):
            parameter.assign(td.tensor(normal(*parameter.shape)))
    apart = td.onnx.to_model(model, td.spec(("n", 6)))
    folded = td.onnx.to_model(model, td.spec(("n", 6)), merge=True)
    assert {"0.weight", "0.weight.lora.a", "0.weight.lora.b"} <= {t.name for t in apart.graph.initializer}
    assert {t.name for t in folded.graph.initializer} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert ops(folded) == {"Gemm": 2, "Relu": 1}
    x = normal(3, 6)
    assert_agree(apart, model, x)
    assert_agree(folded, model, x)
    assert len(list(model.named_parameters())) == 8  # the model itself is as it was


def test_graphs_and_compiled_functions():
    def double(x):
        return x * 2

    graph = td.trace(double, td.spec(("n",)))
    assert td.onnx.to_model(graph) == td.onnx.to_model(td.compile(double), td.spec(("n",)))
    with pytest.raises(ArgumentsError, match="without specs"):
        td.onnx.to_model(graph, td.spec(("n",)))


def test_an_op_of_ones_own():
    """By its decomposition, or by a rule in the slot `onnx`."""
    swish = td.plugins.register_op("export_swish", "x", infer=lambda x: x, reference=lambda x: x / (1 + np.exp(-x)),
                                   decompose=lambda x: x * td.sigmoid(x))
    try:
        assert ops(td.onnx.to_model(swish, td.spec(("n",)))) == {"Sigmoid": 1, "Mul": 1}
        td.ir.opdef.fill("onnx", "export_swish", lambda out, node, x: out.op("Mul", x, out.op("HardSigmoid", x)))
        assert ops(td.onnx.to_model(swish, td.spec(("n",)))) == {"HardSigmoid": 1, "Mul": 1}
    finally:
        td.plugins.unregister_op("export_swish")
    lost = td.plugins.register_op("export_lost", "x", infer=lambda x: x, reference=lambda x: x)
    try:
        with pytest.raises(OnnxError, match="neither an ONNX rule nor a decomposition"):
            td.onnx.to_model(lost, td.spec(("n",)))
    finally:
        td.plugins.unregister_op("export_lost")


def test_what_an_opset_cannot_say_is_refused():
    cases = [(lambda x: x.astype("bfloat16"), 12, "13"), (lambda x: x.astype("float8_e4m3fn"), 18, "19"),
             (td.grad(lambda x: td.sum(td.take(x, td.tensor([1, 1]), axis=0))), 15, "16")]
    for function, opset, since in cases:
        with pytest.raises(OnnxError, match=f"opset={since} or above") as caught:
            td.onnx.to_model(function, td.spec((4,)), opset=opset)
        assert f"opset {opset}" in str(caught.value)
        td.onnx.to_model(function, td.spec((4,)), opset=int(since))
    for opset in (10, 99, "20", True):
        with pytest.raises(OnnxError, match="writes opsets 11 to"):
            td.onnx.to_model(lambda x: x, td.spec((4,)), opset=opset)


def test_what_is_no_model_is_refused():
    with pytest.raises(ArgumentsError, match="takes a module, a function or a graph"):
        td.onnx.to_model(3)
    with pytest.raises(ArgumentsError, match="td.spec"):
        td.onnx.to_model(nn.Linear(2, 3))
    with pytest.raises(ArgumentsError, match="imported module"):
        td.onnx.to_model(nn.Linear(2, 3), td.spec((1, 2)), keep=True)


# Files -----------------------------------------------------------------------------------------------------------

def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    model = nn.Linear(4, 3)
    td.onnx.save(model, path, td.spec(("n", 4)), metadata={"made": "here"})
    before = path.read_bytes()
    assert {p.key: p.value for p in onnx.load(path).metadata_props} == {"made": "here"}
    with pytest.raises(OnnxError):
        td.onnx.save(lambda x: x.astype("int4"), path, td.spec(("n", 4)))

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OnnxError, match="No space left"):
        td.onnx.save(model, path, td.spec(("n", 4)))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.onnx"]
    with pytest.raises(OnnxError, match="cannot be written"):
        td.onnx.save(model, tmp_path / "absent" / "model.onnx", td.spec(("n", 4)))


def test_weights_in_a_file_of_their_own(tmp_path):
    path = tmp_path / "model.onnx"
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    td.onnx.save(model, path, td.spec(("n", 64)), external_data=True)
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "model.onnx.data"] and path.stat().st_size < 2000
    x = normal(5, 64)
    session = onnxruntime.InferenceSession(str(path))
    np.testing.assert_allclose(session.run(None, {session.get_inputs()[0].name: x})[0], model(td.tensor(x)).numpy(),
                               rtol=1e-5, atol=1e-5)
    again = td.onnx.load(path)
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in model.named_parameters()}
    np.testing.assert_allclose(again(td.tensor(x)).numpy(), model(td.tensor(x)).numpy(), rtol=1e-5, atol=1e-5)


def test_equal_models_give_equal_files(tmp_path):
    model = Images()
    for name in ("a", "b"):
        td.onnx.save(model, tmp_path / name, td.spec(("n", 1, "h", "w")))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
