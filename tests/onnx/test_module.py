"""Imported models as modules: names, parameters, symbolic sizes, eager and compiled, gradients, functions."""

import numpy as np
import onnx
import pytest
from graphs import F32, I64, NODE, mlp, model
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

import treadle as td


def assert_close(result, expected, tol=1e-5):
    array = result.numpy() if isinstance(result, td.Tensor) else result
    np.testing.assert_allclose(array, expected, rtol=tol, atol=tol)


def oracle(proto, **given):
    return ReferenceEvaluator(proto).run(None, given)


def test_names_and_kinds():
    module = td.onnx.load(mlp())
    assert [n for n, _ in module.named_parameters()] == ["w1", "b1", "w2"]
    assert set(module.constants) == {"zero", "axes", "rest"}
    assert module.input_names == ["x"] and module.output_names == ["y"]
    assert str(module.inputs[0]) == "f32[batch,4]"
    assert not module.training
    assert "x: f32[batch,4] -> y" in repr(module)


def test_bytes_paths_and_protos(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(mlp(), path)
    x = np.ones((2, 4), "f")
    results = [td.onnx.load(source)(x).numpy() for source in (mlp(), mlp().SerializeToString(), path, str(path))]
    for result in results:
        np.testing.assert_array_equal(result, results[0])


def test_eager_compiled_and_traced_agree():
    proto = mlp()
    module = td.onnx.load(proto)
    compiled = td.compile(module)
    for rows in (1, 3, 8):
        x = np.random.default_rng(rows).standard_normal((rows, 4)).astype("f")
        (expected,) = oracle(proto, x=x)
        assert_close(module(x), expected)
        assert_close(compiled(x), expected)
        assert_close(compiled(x=x), expected)
    assert compiled.stats.compiles == 1  # the batch is open
    graph = td.trace(module, *module.inputs)
    assert graph.dims == {"batch"} and td.ir.parse(str(graph)) == graph


def test_inputs_keep_their_names_in_the_graph():
    proto = model([NODE("Add", ["input.1", "mask"], ["y"])], [("input.1", F32, [2]), ("mask", F32, [2])])
    module = td.onnx.load(proto)
    assert [v.name for v in td.trace(module, *module.inputs).inputs] == ["input.1", "mask"]
    assert_close(td.compile(module)(**{"input.1": np.ones(2, "f"), "mask": np.ones(2, "f")}), [2, 2])


def test_shape_arithmetic_leaves_no_trace():
    module = td.onnx.load(mlp())
    graph = td.trace(module, *module.inputs)
    assert {n.op.name for n in graph.nodes}.isdisjoint({"take", "concat", "gather_nd", "iota"})


def test_gradients_against_finite_differences():
    module = td.onnx.load(mlp()).to("float64")
    x = np.random.default_rng(5).standard_normal((3, 4))
    proto_x = td.tensor(x, dtype="float64")
    module.inputs[0] = td.spec(("batch", 4), "float64", "x")
    target = np.array([0, 2, 4])

    def loss():
        return -td.mean(td.log(td.take_along_axis(module(proto_x), target[:, None], axis=1)))

    loss().backward()
    rng = np.random.default_rng(6)
    for name, parameter in module.named_parameters():
        direction, values = rng.standard_normal(parameter.shape), parameter.numpy()
        eps = 1e-6
        ends = []
        for sign in (1, -1):
            parameter.assign(values + sign * eps * direction)
            ends.append(loss().item())
        parameter.assign(values)
        expected = (ends[0] - ends[1]) / (2 * eps)
        assert abs((parameter.grad.numpy() * direction).sum() - expected) < 1e-6 * max(1, abs(expected)), name


def test_training_changes_the_parameters():
    module = td.onnx.load(mlp())
    optimizer = td.optim.AdamW(module.parameters(), lr=0.05)
    step = td.train_step(module, lambda m, x, y: -td.mean(td.log(td.take_along_axis(m(x), y, axis=1))), optimizer)
    x = np.random.default_rng(0).standard_normal((8, 4)).astype("f")
    y = np.arange(8)[:, None] % 5
    losses = [step(x, y).item() for _ in range(20)]
    assert losses[-1] < losses[0] * 0.9


def test_constant_nodes_that_are_weights():
    w = np.random.default_rng(0).standard_normal((4, 3)).astype("f")
    constant = NODE("Constant", [], ["weights"], value=onnx.numpy_helper.from_array(w))
    module = td.onnx.load(model([constant, NODE("MatMul", ["x", "weights"], ["y"])], [("x", F32, [2, 4])]))
    assert [n for n, _ in module.named_parameters()] == ["weights"]


def test_statistics_are_buffers():
    four = {k: np.ones(4, "f") for k in "sbmv"}
    module = td.onnx.load(model([NODE("BatchNormalization", ["x", *"sbmv"], ["y"])], [("x", F32, [2, 4, 3])],
                                arrays=four))
    assert {n for n, _ in module.named_parameters()} == {"s", "b"}
    assert {n for n, _ in module.named_buffers()} == {"m", "v"}


def test_a_scalar_of_the_formula_is_no_parameter():
    proto = model([NODE("Mul", ["x", "half"], ["y"])], [("x", F32, [2])], arrays={"half": np.float32(0.5)})
    module = td.onnx.load(proto)
    assert not list(module.parameters()) and module.constants["half"] == 0.5


def test_an_input_with_a_default():
    proto = model([NODE("Add", ["x", "b"], ["y"])], [("x", F32, [2]), ("b", F32, [2])],
                  arrays={"b": np.ones(2, "f")})
    module = td.compile(td.onnx.load(proto))
    x = np.zeros(2, "f")
    assert_close(module(x), [1, 1])
    assert_close(module(x, b=np.full(2, 7, "f")), [7, 7])


def test_an_input_that_decides_a_shape():
    module = td.onnx.load(model([NODE("Reshape", ["x", "s"], ["y"])], [("x", F32, ["n"]), ("s", I64, [2])]))
    assert module.static_inputs == {"s"}
    compiled = td.compile(module)
    x = np.arange(6, dtype="f")
    for shape in ([2, 3], [3, -1], [2, 3]):
        expected = x.reshape(shape)
        assert_close(module(x, np.array(shape)), expected)
        assert_close(compiled(x, np.array(shape)), expected)
        assert_close(compiled(x, shape), expected)
    assert compiled.stats.compiles == 2


def test_model_local_functions():
    scale = helper.make_function(
        "own", "Scale", ["a"], ["b"],
        [helper.make_node("Constant", [], ["f"]), NODE("Mul", ["a", "f"], ["b"])], [helper.make_opsetid("", 17)],
        ["by"])
    scale.node[0].attribute.add(name="value_float", ref_attr_name="by", type=onnx.AttributeProto.FLOAT)
    twice = helper.make_function("own", "Twice", ["a"], ["b"], [
        NODE("Scale", ["a"], ["m"], domain="own", by=3.0), NODE("Scale", ["m"], ["b"], domain="own", by=2.0)],
        [helper.make_opsetid("own", 1)])
    proto = model([NODE("Twice", ["x"], ["y"], domain="own")], [("x", F32, [3])], domains={"own": 1},
                  functions=[scale, twice])
    x = np.arange(3, dtype="f")
    assert_close(td.compile(td.onnx.load(proto))(x), 6 * x)


def test_a_body_of_the_standard_where_there_is_no_rule(monkeypatch):
    from treadle.frontend.onnx import run

    find = run.find_rule
    monkeypatch.setattr(run, "find_rule", lambda op, *rest: None if op == "Softplus" else find(op, *rest))
    proto = model([NODE("Softplus", ["x"], ["y"])], [("x", F32, [3])], opset=18)
    x = np.array([-1, 0, 2], "f")
    assert_close(td.onnx.load(proto)(x), oracle(proto, x=x)[0])


def test_several_outputs_and_unused_ones():
    proto = model([NODE("Split", ["x"], ["a", "", "b"], axis=0, num_outputs=3)], [("x", F32, [6, 2])],
                  [("b", F32, [2, 2]), ("a", F32, [2, 2])], opset=18)
    x = np.arange(12, dtype="f").reshape(6, 2)
    b, a = td.compile(td.onnx.load(proto))(x)
    assert_close(a, x[:2])
    assert_close(b, x[4:])


@pytest.mark.parametrize("kind", ["FLOAT16", "BFLOAT16", "DOUBLE"])
def test_weights_of_other_types(kind):
    dtype = helper.tensor_dtype_to_np_dtype(getattr(TensorProto, kind))
    w = np.arange(6).reshape(3, 2).astype(dtype)
    proto = model([NODE("MatMul", ["x", "w"], ["y"])], [("x", getattr(TensorProto, kind), [2, 3])], arrays={"w": w})
    x = np.ones((2, 3), dtype)
    result = td.compile(td.onnx.load(proto))(x).numpy()
    assert result.dtype == dtype
    assert_close(result.astype("f"), (x.astype("f") @ w.astype("f")))


def test_the_backend_runs_single_nodes():
    node = NODE("Gemm", ["a", "b", ""], ["y"], transB=1)
    a, b = np.ones((2, 3), "f"), np.arange(12, dtype="f").reshape(4, 3)
    (y,) = td.onnx.backend.run_node(node, [a, b])
    assert_close(y, a @ b.T)
    assert td.onnx.backend.supports_device("CPU") and not td.onnx.backend.supports_device("CUDA")
    assert td.onnx.backend.is_compatible(mlp())


def test_importing_treadle_imports_no_onnx():
    import subprocess
    import sys

    code = "import sys, treadle as td; assert 'onnx' not in sys.modules; td.onnx.load; assert 'onnx' in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
