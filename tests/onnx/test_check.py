"""`td.onnx.check` and `treadle onnx check`: everything that stands in the way, by name."""

import numpy as np
import onnx
from graphs import F32, NODE, graph, mlp, model
from typer.testing import CliRunner

import treadle as td
from treadle.frontend.cli import app


def three_problems():
    inner = graph([NODE("Hidden", ["x"], ["b"], domain="com.acme", name="deep")], outputs=["b"])
    plain = graph([NODE("Neg", ["x"], ["b"])], outputs=["b"])
    nodes = [NODE("Fancy", ["x"], ["a"], domain="com.acme", name="first"), NODE("Relu", ["a"], ["r"]),
             NODE("MatMul", ["x", "w"], ["m"], name="shapes"), NODE("ReduceSum", ["x"], ["t"], keepdims=0),
             NODE("Greater", ["t", "o"], ["c"]),
             NODE("If", ["c"], ["y"], then_branch=inner, else_branch=plain, name="choice")]
    return model(nodes, [("x", F32, [2, 3])], ["y", "r", "m"], {"w": np.ones((5, 4), "f"), "o": np.float32(0)},
                 domains={"com.acme": 1})


def test_all_problems_at_once():
    report = td.onnx.check(three_problems())
    text = str(report)
    assert not report.ok and len(report.problems) == 3
    for name in ("com.acme.Fancy node 'first'", "com.acme.Hidden node 'deep'", "MatMul node 'shapes'"):
        assert name in text


def test_a_model_without_problems():
    report = td.onnx.check(mlp(), train=True)
    assert report.ok and report.nodes == 10 and not report.frozen and "all supported" in str(report)


def test_what_blocks_a_gradient():
    nodes = [NODE("MatMul", ["x", "w1"], ["a"]), NODE("Round", ["a"], ["r"], name="rounding"),
             NODE("MatMul", ["r", "w2"], ["b"]), NODE("MatMul", ["x", "w3"], ["c"]),
             NODE("ArgMax", ["c"], ["i"], axis=1, name="choice"), NODE("Cast", ["i"], ["f"], to=1),
             NODE("Add", ["b", "f"], ["y"])]
    w = {k: np.ones(s, "f") for k, s in (("w1", (3, 4)), ("w2", (4, 2)), ("w3", (3, 2)))}
    report = td.onnx.check(model(nodes, [("x", F32, [2, 3])], arrays=w), train=True)
    assert report.frozen == ["w1", "w3"]
    assert {p.node for p in report.problems} == {"Round node 'rounding'", "ArgMax node 'choice'"}
    assert td.onnx.check(model(nodes, [("x", F32, [2, 3])], arrays=w)).ok


def test_where_a_model_is_cut():
    report = td.onnx.check(model([NODE("NonZero", ["x"], ["y"], name="where")], [("x", F32, [4])]))
    assert report.ok and "NonZero node 'where'" in str(report.notes[0])


def test_the_command(tmp_path):
    good, bad = tmp_path / "good.onnx", tmp_path / "bad.onnx"
    onnx.save(mlp(), good)
    onnx.save(three_problems(), bad)
    runner = CliRunner()
    result = runner.invoke(app, ["onnx", "check", str(good), "--train"])
    assert result.exit_code == 0 and "every parameter has a gradient" in result.output
    result = runner.invoke(app, ["onnx", "check", str(bad)])
    assert result.exit_code == 1 and "3 problems" in result.output and "'deep'" in result.output
