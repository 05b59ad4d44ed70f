"""Shapes that data decide: post-processing as detectors and recognisers have it, against onnxruntime. One program."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto as T
from onnx import helper

import treadle as td

NODE = helper.make_node


def build(nodes, inputs, outputs, arrays, opset=17):
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info(*i) for i in inputs],
                              [helper.make_tensor_value_info(*o) for o in outputs],
                              [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def listed(results):
    return [r.numpy() for r in (results if isinstance(results, tuple) else (results,))]


def check(model, samples, tmp_path, compiles=1, eager=True, tol=1e-5):
    """Compiled, saved and loaded, exported, eager: as onnxruntime has it, for every sample."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [i.name for i in model.graph.input]
    module = td.onnx.load(model)
    compiled = td.compile(module)
    ways = [compiled]
    shapes = set()
    for i, sample in enumerate(samples):
        wants = session.run(None, dict(zip(names, sample)))
        shapes.add(tuple(w.shape for w in wants))
        compiled(*sample)
        if i == 0:
            compiled.save(tmp_path / "m.treadle")
            ways += [td.load(tmp_path / "m.treadle"), *([module] if eager else [])]
            td.onnx.save(module, tmp_path / "again.onnx", keep=False)
            again = onnxruntime.InferenceSession(tmp_path / "again.onnx", providers=["CPUExecutionProvider"])
        for got in (again.run(None, dict(zip(names, sample))), *(listed(way(*sample)) for way in ways)):
            for g, w in zip(got, wants, strict=True):
                assert (g.shape, g.dtype) == (w.shape, w.dtype)
                np.testing.assert_allclose(g, w, rtol=tol, atol=tol)
    assert len(shapes) > 2, "the samples have one answer"
    assert compiled.stats.compiles == compiles, compiled.stats.reasons
    return module, compiled


def signs(*shape):
    """Arrays of which different shares are positive, none and all of it too."""
    for seed, share in enumerate((0.5, 0.0, 1.0, 0.2, 0.8)):
        rng = np.random.default_rng((seed, *shape))
        yield (np.where(rng.random(shape) < share, 1, -1) * rng.uniform(0.5, 2, shape)).astype(np.float32)


# Real graphs ----------------------------------------------------------------------------------------------------

def detector(classes=3, stride=8):
    """YOLO's end: a head on an image, boxes from offsets, suppression, and what is kept gathered by class."""
    rng = np.random.default_rng(0)
    nodes = [
        NODE("Conv", ["image", "w", "b"], ["map"], strides=[stride, stride], kernel_shape=[stride, stride]),
        NODE("Shape", ["map"], ["s"]), NODE("Slice", ["s", "zero1", "two1"], ["nc"]),
        NODE("Concat", ["nc", "minus1"], ["flat"], axis=0), NODE("Reshape", ["map", "flat"], ["rows"]),
        NODE("Transpose", ["rows"], ["cells"], perm=[0, 2, 1]),
        NODE("Split", ["cells", "parts"], ["at", "size", "logits"], axis=2),
        NODE("Sigmoid", ["at"], ["centre"]), NODE("Exp", ["size"], ["extent"]),
        NODE("Mul", ["extent", "half"], ["h"]), NODE("Sub", ["centre", "h"], ["low"]),
        NODE("Add", ["centre", "h"], ["high"]), NODE("Concat", ["low", "high"], ["boxes"], axis=2),
        NODE("Sigmoid", ["logits"], ["p"]), NODE("Transpose", ["p"], ["scores"], perm=[0, 2, 1]),
        NODE("NonMaxSuppression", ["boxes", "scores", "most", "iou", "least"], ["kept"]),
        NODE("Gather", ["kept", "ic"], ["which"], axis=1), NODE("GatherND", ["boxes", "which"], ["found"]),
        NODE("GatherND", ["scores", "kept"], ["confidence"]), NODE("Gather", ["kept", "one"], ["label"], axis=1),
        NODE("ReduceSum", ["confidence", "zero1"], ["total"], keepdims=0),
    ]
    arrays = {"w": rng.standard_normal((4 + classes, 3, stride, stride), np.float32) * 0.3,
              "b": np.float32([0, 0, -0.5, -0.5, *[-0.8] * classes]), "zero1": [0], "two1": [2], "minus1": [-1],
              "parts": [2, 2, classes], "half": np.float32(0.5), "most": [5], "iou": np.float32([0.4]),
              "least": np.float32([0.6]), "ic": [0, 2], "one": 1}
    return build(nodes, [("image", T.FLOAT, ["n", 3, "h", "w"])], [
        ("found", T.FLOAT, ["k", 4]), ("confidence", T.FLOAT, ["k"]), ("label", T.INT64, ["k"]),
        ("total", T.FLOAT, [])], arrays)


def test_a_detector_with_suppression(tmp_path):
    rng = np.random.default_rng(1)
    images = [(rng.standard_normal((n, 3, h, w)).astype(np.float32) * scale,)
              for n, h, w, scale in ((1, 32, 48, 1), (2, 32, 48, 2), (1, 64, 64, 0.05), (3, 40, 24, 1), (1, 64, 64, 1))]
    check(detector(), images, tmp_path, tol=1e-4)


def test_ctc_collapse(tmp_path):
    """Text from frames: the best class of each, repeats and blanks dropped, and the mean confidence of the rest."""
    nodes = [NODE("ArgMax", ["x"], ["best"], axis=1, keepdims=0),
             NODE("ReduceMax", ["x"], ["sure"], axes=[1], keepdims=0),
             NODE("Slice", ["best", "zero", "minus"], ["shifted"]),
             NODE("Concat", ["none", "shifted"], ["before"], axis=0),
             NODE("Equal", ["best", "before"], ["repeat"]), NODE("Equal", ["best", "blank"], ["silent"]),
             NODE("Or", ["repeat", "silent"], ["drop"]), NODE("Not", ["drop"], ["keep"]),
             NODE("Compress", ["best", "keep"], ["text"], axis=0), NODE("Compress", ["sure", "keep"], ["each"], axis=0),
             NODE("Exp", ["each"], ["odds"]), NODE("Shape", ["text"], ["length"]),
             NODE("NonZero", ["keep"], ["nz"]), NODE("Squeeze", ["nz", "zero"], ["frames"])]
    arrays = {"zero": [0], "minus": [-1], "none": [-1], "blank": 0}
    model = build(nodes, [("x", T.FLOAT, ["t", 5])], [("text", T.INT64, ["k"]), ("odds", T.FLOAT, ["k"]),
                  ("length", T.INT64, [1]), ("frames", T.INT64, ["k"])], arrays)
    samples = [(np.random.default_rng(t).standard_normal((t, 5)).astype(np.float32),) for t in (1, 3, 7, 20, 64)]
    check(model, samples, tmp_path)


# Op by op -------------------------------------------------------------------------------------------------------

POSITIVE = [NODE("Greater", ["x", "zero"], ["p"])]
CASES = {
    "nonzero": ([*POSITIVE, NODE("NonZero", ["p"], ["i"]), NODE("Transpose", ["i"], ["t"]),
                 NODE("GatherND", ["x", "t"], ["y"])], [("x", T.FLOAT, ["n", 4])],
                [("y", T.FLOAT, ["k"]), ("t", T.INT64, ["k", 2])], {"zero": np.float32(0)},
                [(x,) for n in (3, 6) for x in signs(n, 4)]),
    "unique": ([NODE("Unique", ["x"], ["u", "i", "v", "c"])], [("x", T.INT64, ["n"])],
               [("u", T.INT64, ["k"]), ("i", T.INT64, ["k"]), ("v", T.INT64, ["n"]), ("c", T.INT64, ["k"])], {},
               [(np.random.default_rng(n).integers(0, k, n),) for k in (1, 3, 50) for n in (1, 5, 20)]),
    "range": ([NODE("ReduceSum", ["x"], ["s"], keepdims=0), NODE("Range", ["one", "s", "two"], ["y"])],
              [("x", T.INT64, ["n"])], [("y", T.INT64, ["k"])], {"one": 1, "two": 2},
              [(np.array(v),) for v in ([1, 2], [3, 4, 5], [0], [-4])]),
    "range of floats": ([NODE("ReduceSum", ["x"], ["s"], keepdims=0), NODE("Range", ["s", "end", "step"], ["y"])],
                        [("x", T.FLOAT, ["n"])], [("y", T.FLOAT, ["k"])],
                        {"end": np.float32(-1.1), "step": np.float32(-0.5)},
                        [(np.array(v, "f4"),) for v in ([1, 2], [3, 4, 5], [0], [-4])]),
    "range of int32": ([NODE("ReduceSum", ["x"], ["s"], keepdims=0), NODE("Range", ["one", "s", "two"], ["y"])],
                       [("x", T.INT32, ["n"])], [("y", T.INT32, ["k"])], {"one": np.int32(1), "two": np.int32(2)},
                       [(np.array(v, np.int32),) for v in ([1, 2], [3, 4, 5], [0], [-4])]),
    "top k": ([NODE("ReduceSum", ["c"], ["k"]), NODE("TopK", ["x", "k"], ["v", "i"])],
              [("x", T.FLOAT, ["n", 9]), ("c", T.INT64, ["m"])],
              [("v", T.FLOAT, ["n", "k"]), ("i", T.INT64, ["n", "k"])], {},
              [(np.random.default_rng(0).integers(0, 5, (3, 9)).astype("f4"), np.array(v))
               for v in ([1], [3, 4], [0], [9])]),
    "reshape": ([NODE("ReduceMax", ["c"], ["k"]), NODE("Concat", ["k", "minus"], ["s"], axis=0),
                 NODE("Reshape", ["x", "s"], ["y"]), NODE("ReduceSum", ["y", "first"], ["z"], keepdims=0)],
                [("x", T.FLOAT, ["n"]), ("c", T.INT64, ["m"])], [("y", T.FLOAT, ["a", "b"]), ("z", T.FLOAT, ["b"])],
                {"minus": [-1], "first": [0]}, [(np.arange(12, dtype="f4"), np.array([1, v])) for v in (1, 2, 3, 12)]),
    "slice": ([NODE("ReduceMax", ["c"], ["k"]), NODE("Neg", ["k"], ["m"]), NODE("Slice", ["x", "b", "k", "b"], ["y"]),
               NODE("Slice", ["x", "k", "e", "b"], ["z"]), NODE("Slice", ["x", "m", "e", "b"], ["w"]),
               NODE("Slice", ["x", "e", "k", "b", "back"], ["v"])],
              [("x", T.FLOAT, ["n", 2]), ("c", T.INT64, ["m"])], [(n, T.FLOAT, [n, 2]) for n in "yzwv"],
              {"b": [0], "e": [2**60], "back": [-2]},
              [(np.arange(2 * n, dtype="f4").reshape(n, 2), np.array([-90, v])) for v in (0, 1, 3, 50, -2, -50)
               for n in (4, 7)]),
    "expand": ([NODE("ReduceMax", ["c"], ["k"]), NODE("Concat", ["k", "two"], ["s"], axis=0),
                NODE("Expand", ["x", "s"], ["e"]), NODE("ConstantOfShape", ["s"], ["o"]),
                NODE("Add", ["e", "o"], ["y"]), NODE("Tile", ["x", "s"], ["z"])],
               [("x", T.FLOAT, [1, 2]), ("c", T.INT64, ["m"])],
               [("y", T.FLOAT, ["a", 2]), ("z", T.FLOAT, ["b", 4])], {"two": [2]},
               [(np.ones((1, 2), "f4"), np.array([0, v])) for v in (0, 1, 3, 50)]),
    "split": ([NODE("ReduceMax", ["c"], ["k"]), NODE("Shape", ["x"], ["n"]), NODE("Sub", ["n", "k"], ["r"]),
               NODE("Concat", ["k", "r"], ["s"], axis=0), NODE("Split", ["x", "s"], ["y", "z"], axis=0)],
              [("x", T.FLOAT, ["n"]), ("c", T.INT64, ["m"])], [("y", T.FLOAT, ["a"]), ("z", T.FLOAT, ["b"])], {},
              [(np.arange(6, dtype="f4"), np.array([0, v])) for v in (0, 1, 3, 6)]),
    "one hot": ([NODE("ReduceMax", ["x"], ["k"]), NODE("Add", ["k", "one"], ["d"]),
                 NODE("OneHot", ["x", "d", "v"], ["y"])],
                [("x", T.INT64, ["n"])], [("y", T.FLOAT, ["n", "d"])], {"one": [1], "v": np.float32([0, 1])},
                [(np.array(v),) for v in ([0], [1, 2, 3], [7])]),
}


@pytest.mark.parametrize("name", CASES)
def test_one_program(name, tmp_path):
    nodes, inputs, outputs, arrays, samples = CASES[name]
    check(build(nodes, inputs, outputs, arrays), samples, tmp_path)


def looped(count):
    """s, s + x, s + 2x... as often as data say; the last and all of them."""
    value = helper.make_tensor_value_info
    body = helper.make_graph([NODE("Add", ["s", "x"], ["t"]), NODE("Identity", ["t"], ["row"]),
                              NODE("Identity", ["go"], ["on"])], "body",
                             [value("i", T.INT64, []), value("go", T.BOOL, []), value("s", T.FLOAT, [2])],
                             [value("on", T.BOOL, []), value("t", T.FLOAT, [2]), value("row", T.FLOAT, [2])])
    return build([*count, NODE("Loop", ["k", "yes", "zeros"], ["last", "rows"], body=body)],
                 [("c", T.INT64, ["n"]), ("x", T.FLOAT, [2])], [("last", T.FLOAT, [2]), ("rows", T.FLOAT, ["k", 2])],
                 {"yes": True, "zeros": np.zeros(2, "f4")})


@pytest.mark.parametrize("count", [
    [NODE("ReduceSum", ["c"], ["k"], keepdims=0)],
    [NODE("NonZero", ["c"], ["nz"]), NODE("Size", ["nz"], ["k"])],  # a size that data decide
], ids=["computed", "counted"])
def test_a_loop_with_a_computed_trip_count(count, tmp_path):
    samples = [(np.array(v), np.float32([1, 2])) for v in ([0], [1, 2, 3], [7], [1, 0])]
    module, _ = check(looped(count), samples, tmp_path)
    grad = td.compile(td.grad(lambda x, c: td.sum(module(c, x)[1] * module(c, x)[0])))
    for c in ([1, 2], [3, 0]):
        n = sum(c) if count[0].op_type == "ReduceSum" else np.count_nonzero(c)
        want = 2 * n * (n * (n + 1) / 2) * np.float32([1, 2])  # of n x * sum(1..n) x
        np.testing.assert_allclose(grad(np.float32([1, 2]), np.array(c)).numpy(), want, rtol=1e-5)


# Training ---------------------------------------------------------------------------------------------------------

def test_gradients_flow_through_the_count(tmp_path):
    """What NonZero and Compress pick is differentiable, their number is not: against the derivatives by hand."""
    nodes = [NODE("MatMul", ["x", "w"], ["h"]), NODE("Greater", ["h", "zero"], ["p"]), NODE("NonZero", ["p"], ["i"]),
             NODE("Transpose", ["i"], ["t"]), NODE("GatherND", ["h", "t"], ["a"]), NODE("ReduceMax", ["x"], ["m"],
             axes=[1], keepdims=0), NODE("Greater", ["m", "zero"], ["q"]), NODE("Compress", ["h", "q"], ["b"], axis=0),
             NODE("MatMul", ["b", "v"], ["c"])]
    rng = np.random.default_rng(0)
    arrays = {"w": rng.standard_normal((4, 3)), "v": rng.standard_normal((3, 2)), "zero": np.float64(0)}
    model = build(nodes, [("x", T.DOUBLE, ["n", 4])], [("a", T.DOUBLE, ["k"]), ("c", T.DOUBLE, ["l", 2])], arrays)
    module = td.onnx.load(model)

    def loss(module, x):
        a, c = module(x)
        return td.sum(td.square(a)) + td.sum(td.sin(c))

    step = td.train_step(module, loss, td.optim.SGD([module.w, module.v], lr=0.01),
                         dynamic={"x": {0: "n"}})
    w, v = arrays["w"].copy(), arrays["v"].copy()
    for x in (s.astype(np.float64) for n in (3, 6) for s in signs(n, 4)):
        h, rows = x @ w, x.max(1, keepdims=True) > 0
        turn = np.cos(h @ v) * rows
        value = (h[h > 0] ** 2).sum() + (np.sin(h @ v) * rows).sum()
        np.testing.assert_allclose(float(step(x)), value, rtol=1e-9, atol=1e-12)
        w, v = w - 0.01 * x.T @ (2 * h * (h > 0) + turn @ v.T), v - 0.01 * h.T @ turn
        np.testing.assert_allclose(module.w.numpy(), w, rtol=1e-9)
        np.testing.assert_allclose(module.v.numpy(), v, rtol=1e-9)
    assert step.stats.compiles == 1


# Where it ends ------------------------------------------------------------------------------------------------------

def test_a_shape_that_does_not_fit_is_an_error_at_run_time():
    nodes, inputs, outputs, arrays, _ = CASES["reshape"]
    f = td.compile(td.onnx.load(build(nodes, inputs, outputs, arrays)))
    f(np.arange(12, dtype="f4"), np.array([1, 3]))
    with pytest.raises(td.ShapeError, match="Reshape node 'y'"):
        f(np.arange(12, dtype="f4"), np.array([1, 5]))
    assert f.stats.compiles == 1


def test_sizes_that_cannot_be_open_are_compiled_one_by_one(caplog):
    """Two masks have as many elements only for some inputs: no program can add them for all."""
    nodes = [NODE("Greater", ["x", "zero"], ["p"]), NODE("Less", ["x", "zero"], ["q"]),
             NODE("Compress", ["x", "p"], ["a"]), NODE("Compress", ["x", "q"], ["b"]), NODE("Add", ["a", "b"], ["y"])]
    f = td.compile(td.onnx.load(build(nodes, [("x", T.FLOAT, ["n"])], [("y", T.FLOAT, ["k"])],
                                      {"zero": np.float32(0)})))
    for x in ([1, -2], [1, 2, -1, -5], [3, -2]):
        x = np.float32(x)
        np.testing.assert_array_equal(f(x).numpy(), x[x > 0] + x[x < 0])
    assert "compiled for each of the sizes that data decide" in caplog.text and "broadcast" in caplog.text
    with pytest.raises(td.CompileError, match="Compress node 'a'"):
        f.save("/nonexistent")


def test_answers_that_are_no_sizes_cut_the_model(tmp_path):
    """An axis that data decide: a program for each; sizes stay open in every part."""
    nodes = [NODE("Greater", ["x", "zero"], ["p"]), NODE("Compress", ["x", "p"], ["y"], axis=0),
             NODE("ReduceMax", ["c"], ["axis"]), NODE("ReduceSum", ["m", "axis"], ["s"], keepdims=0),
             NODE("Shape", ["y"], ["n"]), NODE("Expand", ["y", "n"], ["z"])]
    model = build(nodes, [("x", T.FLOAT, ["n"]), ("m", T.FLOAT, ["r", "r"]), ("c", T.INT64, ["l"])],
                  [("z", T.FLOAT, ["k"]), ("s", T.FLOAT, ["r"])], {"zero": np.float32(0)})
    f = td.compile(td.onnx.load(model))
    for n in (2, 5, 9):
        for axis in (0, 1):
            x, m = np.arange(n, dtype="f4") - 1, np.arange(n * n, dtype="f4").reshape(n, n)
            z, s = f(x, m, np.array([axis, 0]))
            np.testing.assert_array_equal(z.numpy(), x[x > 0])
            np.testing.assert_array_equal(s.numpy(), m.sum(axis))
    assert f.stats.compiles == 3


def test_a_count_of_billions_is_refused_before_it_is_allocated():
    nodes, inputs, outputs, arrays, _ = CASES["range"]
    f = td.compile(td.onnx.load(build(nodes, inputs, outputs, arrays)))
    assert f(np.array([7])).shape == (3,)
    with pytest.raises(td.ShapeError, match="Range node 'y'.*is 500000000000; expected 0 to 2147483648"):
        f(np.array([10**12]))


def test_an_error_is_not_preceded_by_warnings(caplog):
    model = build([NODE("MatMul", ["x", "w"], ["y"])], [("x", T.FLOAT, ["n", 3])], [("y", T.FLOAT, ["n", 2])],
                  {"w": np.zeros((4, 2), "f4")})
    with pytest.raises(td.OnnxError, match="inner sizes"):
        td.compile(td.onnx.load(model))(np.ones((2, 3), "f4"))
    assert not caplog.text
