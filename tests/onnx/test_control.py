"""`If`, `Loop`, `Scan`, sequences, and shapes that depend on data: compiled, and as the reference evaluator has it."""

import numpy as np
import onnx
import pytest
from graphs import BOOL, F32, I64, NODE, graph, model
from onnx.reference import ReferenceEvaluator

import treadle as td


def check(proto, *inputs, parts=None):
    """Compiled and eager against the reference evaluator, for several sets of inputs; gives the compiled function."""
    module = td.onnx.load(proto)
    compiled = td.compile(module)
    for given in inputs:
        expected = ReferenceEvaluator(proto).run(None, dict(zip(module.input_names, given)))
        for run in (compiled, module):
            results = run(*given)
            results = results if len(expected) > 1 else (results,)
            for result, wanted in zip(results, expected):
                assert_same(result, wanted)
    return compiled


def assert_same(result, wanted):
    if isinstance(wanted, list):
        assert len(result) == len(wanted)
        for one, other in zip(result, wanted):
            assert_same(one, other)
    else:
        assert result.shape == wanted.shape and result.dtype == wanted.dtype
        np.testing.assert_allclose(result.numpy(), wanted, rtol=1e-5, atol=1e-6)


def branches(then, otherwise):
    return {"then_branch": graph([then], outputs=["b"]), "else_branch": graph([otherwise], outputs=["b"])}


def body(nodes, state, collected=()):
    """A loop's body whose nodes compute `new_<name>` of each state from i, go and the state."""
    return graph(nodes, [("i", I64, []), ("go", BOOL, []), *[(s, F32, None) for s in state]],
                 ["on", *(f"new_{s}" for s in state), *collected])


GO_ON = NODE("Identity", ["go"], ["on"])
X = np.array([1, -2, 3], "f")
YES = np.array(True)


# If -----------------------------------------------------------------------------------------------------------------


def test_a_branch_that_data_chooses():
    proto = model([NODE("If", ["c"], ["y"], **branches(NODE("Add", ["x", "x"], ["b"]), NODE("Neg", ["x"], ["b"])))],
                  [("x", F32, [3]), ("c", BOOL, [])])
    compiled = check(proto, (X, YES), (X, np.array(False)))
    assert compiled.stats.compiles == 1
    graph = td.trace(compiled.fn, X, YES)
    assert [n.op.name for n in graph.nodes] == ["cond"]


def test_a_branch_that_is_known_is_all_that_is_left():
    nodes = [NODE("Shape", ["x"], ["s"]), NODE("Size", ["s"], ["r"]), NODE("Equal", ["r", "one"], ["c"]),
             NODE("If", ["c"], ["y"], **branches(NODE("Exp", ["x"], ["b"]), NODE("Squeeze", ["x", "z"], ["b"])))]
    proto = model(nodes, [("x", F32, [3])], arrays={"one": np.int64(1), "z": np.int64([0])})
    compiled = check(proto, (X,))
    assert [n.op.name for n in td.trace(compiled.fn, X).nodes] == ["exp"]


def test_branches_of_different_shapes():
    """The program is cut at the condition, and each branch is a program of its own."""
    wide = graph([NODE("Concat", ["x", "x"], ["b"], axis=0)], outputs=["b"])
    narrow = graph([NODE("Abs", ["n"], ["b"])], outputs=["b"])
    proto = model([NODE("Neg", ["x"], ["n"]), NODE("ReduceSum", ["n"], ["t"], keepdims=0),
                   NODE("Greater", ["t", "o"], ["c"]),
                   NODE("If", ["c"], ["b2"], then_branch=wide, else_branch=narrow),
                   NODE("Mul", ["b2", "two"], ["y"])],
                  [("x", F32, [3])], arrays={"o": np.float32(0), "two": np.float32(2)})
    check(proto, (X,), (-X,), (X,))


def test_gradients_pass_a_branch():
    proto = model([NODE("If", ["c"], ["y"], **branches(NODE("Mul", ["x", "x"], ["b"]), NODE("Neg", ["x"], ["b"])))],
                  [("x", F32, [3]), ("c", BOOL, [])])
    module = td.onnx.load(proto)
    gradient = td.compile(td.grad(lambda x, c: td.sum(module(x, c))))
    np.testing.assert_allclose(gradient(X, YES).numpy(), 2 * X)
    np.testing.assert_allclose(gradient(X, np.array(False)).numpy(), [-1, -1, -1])


def test_weights_inside_branches_are_parameters():
    w = np.float32([1, 2, 3])
    then = graph([NODE("Mul", ["x", "inner"], ["b"])], outputs=["b"], arrays={"inner": w})
    otherwise = graph([NODE("Constant", [], ["bias"], value=onnx.numpy_helper.from_array(w)),
                       NODE("Add", ["x", "bias"], ["b"])], outputs=["b"])
    proto = model([NODE("If", ["c"], ["y"], then_branch=then, else_branch=otherwise)],
                  [("x", F32, [3]), ("c", BOOL, [])])
    module = check(proto, (X, YES), (X, ~YES)).fn
    assert {n for n, _ in module.named_parameters()} == {"inner", "bias"}
    td.sum(module(X, YES)).backward()
    np.testing.assert_array_equal(module.inner.grad.numpy(), X)
    module.bias.assign(w + 1)
    np.testing.assert_array_equal(td.compile(module)(X, ~YES).numpy(), X + w + 1)


# Loop ---------------------------------------------------------------------------------------------------------------


def test_a_loop_of_known_length_is_a_scan():
    nodes = [GO_ON, NODE("Cast", ["i"], ["f"], to=1), NODE("Add", ["v", "f"], ["new_v"]),
             NODE("Mul", ["new_v", "x"], ["r"])]
    proto = model([NODE("Loop", ["n", "yes", "x"], ["y", "rows"], body=body(nodes, ["v"], ["r"]))], [("x", F32, [3])],
                  ["y", "rows"], {"n": np.int64(5), "yes": YES})
    compiled = check(proto, (X,))
    assert "scan" in [n.op.name for n in td.trace(compiled.fn, X).nodes]
    gradient = td.grad(lambda x: td.sum(compiled.fn(x)[0] * x))(X).numpy()
    np.testing.assert_allclose(gradient, 2 * X + 10)


def test_a_loop_that_data_ends():
    nodes = [NODE("Add", ["v", "v"], ["new_v"]), NODE("ReduceMax", ["new_v"], ["m"], keepdims=0),
             NODE("Less", ["m", "limit"], ["on"])]
    proto = model([NODE("Loop", ["", "yes", "x"], ["y"], body=body(nodes, ["v"]))], [("x", F32, [3])],
                  arrays={"limit": np.float32(50), "yes": YES})
    compiled = check(proto, (X,), (X * 4,))
    assert compiled.stats.compiles == 1
    assert "while_loop" in [n.op.name for n in td.trace(compiled.fn, X).nodes]


def test_a_loop_that_collects_until_data_ends_it():
    nodes = [NODE("Add", ["v", "v"], ["new_v"]), NODE("ReduceMax", ["new_v"], ["m"], keepdims=0),
             NODE("Less", ["m", "limit"], ["on"]), NODE("Identity", ["v"], ["r"])]
    proto = model([NODE("Loop", ["n", "yes", "x"], ["y", "rows"], body=body(nodes, ["v"], ["r"])),
                   NODE("ReduceSum", ["rows", "zero"], ["t"], keepdims=0)], [("x", F32, [3])], ["y", "rows", "t"],
                  {"limit": np.float32(50), "yes": YES, "n": np.int64(100), "zero": np.int64([0])})
    compiled = check(proto, (X,), (X * 4,), (X,))
    assert len(compiled._stages) == 1


def test_a_count_that_data_gives():
    nodes = [GO_ON, NODE("Mul", ["v", "two"], ["new_v"]), NODE("Identity", ["new_v"], ["r"])]
    proto = model([NODE("Loop", ["n", "yes", "x"], ["y", "rows"], body=body(nodes, ["v"], ["r"]))],
                  [("x", F32, [3]), ("n", I64, [])], ["y", "rows"], {"two": np.float32(2), "yes": YES})
    check(proto, (X, np.int64(3)), (X, np.int64(1)))


def test_a_state_that_grows():
    """It has to be unrolled."""
    nodes = [GO_ON, NODE("Concat", ["v", "x"], ["new_v"], axis=0)]
    proto = model([NODE("Loop", ["n", "yes", "x"], ["y"], body=body(nodes, ["v"]))], [("x", F32, [3])],
                  arrays={"n": np.int64(3), "yes": YES})
    check(proto, (X,))


def test_a_state_that_grows_until_data_ends_it():
    nodes = [NODE("Concat", ["v", "x"], ["new_v"], axis=0), NODE("ReduceSum", ["new_v"], ["m"], keepdims=0),
             NODE("Less", ["m", "limit"], ["on"])]
    proto = model([NODE("Loop", ["", "yes", "x"], ["y"], body=body(nodes, ["v"]))], [("x", F32, [3])],
                  arrays={"limit": np.float32(7), "yes": YES})
    check(proto, (X,), (X * 3,))


def test_a_loop_without_a_condition():
    nodes = [GO_ON, NODE("Add", ["v", "v"], ["new_v"])]
    module = td.onnx.load(model([NODE("Loop", ["n", "", "x"], ["y"], body=body(nodes, ["v"]))], [("x", F32, [3])],
                                arrays={"n": np.int64(3)}))
    np.testing.assert_array_equal(td.compile(module)(X).numpy(), 8 * X)


def test_a_loop_that_never_runs():
    nodes = [GO_ON, NODE("Identity", ["v"], ["new_v"]), NODE("Neg", ["v"], ["r"])]
    proto = model([NODE("Loop", ["n", "yes", "x"], ["y", "rows"], body=body(nodes, ["v"], ["r"]))], [("x", F32, [3])],
                  ["y", "rows"], {"n": np.int64(0), "yes": YES})
    compiled = td.compile(td.onnx.load(proto))
    y, rows = compiled(X)
    np.testing.assert_array_equal(y.numpy(), X)
    assert rows.shape == (0, 3)


def test_loops_inside_branches_inside_loops():
    inner = body([NODE("Identity", ["go"], ["on"]), NODE("Add", ["w", "v"], ["new_w"])], ["w"])
    double = graph([NODE("Loop", ["n", "yes", "v"], ["b"], body=inner)], outputs=["b"])
    keep = graph([NODE("Identity", ["v"], ["b"])], outputs=["b"])
    nodes = [GO_ON, NODE("ReduceSum", ["v"], ["t"], keepdims=0), NODE("Greater", ["t", "limit"], ["c"]),
             NODE("If", ["c"], ["new_v"], then_branch=keep, else_branch=double)]
    proto = model([NODE("Loop", ["n", "yes", "x"], ["y"], body=body(nodes, ["v"]))], [("x", F32, [3])],
                  arrays={"n": np.int64(3), "limit": np.float32(20), "yes": YES})
    check(proto, (X,), (X * 5,))


# Scan ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("back", [0, 1])
@pytest.mark.parametrize("axis", [0, 1])
def test_scan(axis, back):
    step = graph([NODE("Add", ["s", "e"], ["t"]), NODE("Mul", ["t", "e"], ["r"])], [("s", F32, [2]), ("e", F32, [2])],
                 ["t", "r"])
    proto = model([NODE("Scan", ["s0", "xs"], ["y", "rows"], body=step, num_scan_inputs=1, scan_input_axes=[axis],
                        scan_input_directions=[back], scan_output_axes=[axis], scan_output_directions=[back])],
                  [("s0", F32, [2]), ("xs", F32, None)], ["y", "rows"])
    xs = np.arange(6, dtype="f").reshape((3, 2) if axis == 0 else (2, 3))
    module = td.onnx.load(proto)
    y, rows = td.compile(module)(np.ones(2, "f"), xs)
    state, expected = np.ones(2, "f"), []
    for e in (np.moveaxis(xs, axis, 0)[::-1] if back else np.moveaxis(xs, axis, 0)):
        state = state + e
        expected.append(state * e)
    np.testing.assert_allclose(y.numpy(), state)
    expected = np.stack(expected[::-1] if back else expected, axis)
    np.testing.assert_allclose(rows.numpy(), expected)


# Shapes that depend on data -----------------------------------------------------------------------------------------


def test_nonzero_and_what_follows():
    nodes = [NODE("Greater", ["x", "zero"], ["p"]), NODE("NonZero", ["p"], ["i"]), NODE("Transpose", ["i"], ["t"]),
             NODE("GatherND", ["x", "t"], ["g"]), NODE("ReduceSum", ["g"], ["s"], keepdims=0),
             NODE("Exp", ["g"], ["y"])]
    proto = model(nodes, [("x", F32, [2, 3])], ["i", "s", "y"], {"zero": np.float32(0)})
    rng = np.random.default_rng(0)
    inputs = [(rng.standard_normal((2, 3)).astype("f"),) for _ in range(4)]
    compiled = check(proto, *inputs, inputs[0])
    assert compiled.stats.compiles == 1  # whatever the count: see test_data_sizes


def test_compress_and_unique():
    nodes = [NODE("Compress", ["x", "c"], ["a"], axis=0), NODE("Unique", ["a"], ["u", "", "back", "n"])]
    proto = model(nodes, [("x", F32, [5]), ("c", BOOL, [5])], ["u", "back", "n"])
    x = np.array([3, 1, 3, 2, 1], "f")
    check(proto, (x, np.array([1, 1, 1, 0, 1], bool)), (x, np.array([1, 0, 0, 1, 0], bool)))


def test_a_trace_says_where_data_decide_how_it_looks():
    nodes = [NODE("ReduceSum", ["x", "axis"], ["y"], name="sum")]
    module = td.onnx.load(model([NODE("ReduceMax", ["a"], ["axis"], name="where"), *nodes],
                                [("x", F32, [4, 4]), ("a", I64, [2])]))
    with pytest.raises(td.OnnxError, match="ReduceSum node 'sum'.*Compile the model itself"):
        td.trace(module, td.spec((4, 4)), td.spec((2,), "int64"))


def test_a_cut_keeps_parameters_live():
    w = np.float32([2, 3])
    proto = model([NODE("Mul", ["x", "w"], ["p"]), NODE("NonZero", ["p"], ["i"]), NODE("Mul", ["p", "w"], ["y"])],
                  [("x", F32, [2])], ["i", "y"], {"w": w})
    module = td.onnx.load(proto)
    compiled = td.compile(module)
    np.testing.assert_array_equal(compiled(np.ones(2, "f"))[1].numpy(), w * w)
    module.w.assign(w + 1)
    np.testing.assert_array_equal(compiled(np.ones(2, "f"))[1].numpy(), (w + 1) ** 2)


# Sequences ----------------------------------------------------------------------------------------------------------


def test_sequences():
    nodes = [NODE("SplitToSequence", ["x", "one"], ["s"], axis=0), NODE("SequenceAt", ["s", "last"], ["e"]),
             NODE("SequenceInsert", ["s", "e", "zero"], ["t"]), NODE("SequenceErase", ["t", "one"], ["u"]),
             NODE("SequenceLength", ["u"], ["n"]), NODE("ConcatFromSequence", ["u"], ["y"], axis=0)]
    proto = model(nodes, [("x", F32, [3, 2])], ["y", "n"],
                  {"one": np.int64(1), "last": np.int64(-1), "zero": np.int64(0)})
    check(proto, (np.arange(6, dtype="f").reshape(3, 2),))


def test_a_position_outside_a_sequence():
    proto = model([NODE("SequenceConstruct", ["x"], ["s"]), NODE("SequenceAt", ["s", "p"], ["y"], name="at")],
                  [("x", F32, [3])], arrays={"p": np.int64(4)})
    with pytest.raises(td.OnnxError, match="SequenceAt node 'at'.*position 4"):
        td.onnx.load(proto)(X)
