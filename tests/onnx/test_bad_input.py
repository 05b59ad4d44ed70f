"""Models that are damaged, not valid or hostile: each is refused by an error of ours that names the node, at once."""

import os
import time

import numpy as np
import onnx
import pytest
from graphs import BOOL, F32, I64, NODE, graph, mlp, model
from onnx import TensorProto, helper, numpy_helper

import treadle as td

HUGE = 10**11


def check_refused(source, *parts, run=True):
    """The error of loading (and tracing) it, which comes within seconds and has all parts in its text."""
    started = time.process_time()
    with pytest.raises(td.OnnxError) as caught:
        module = td.onnx.load(source if isinstance(source, (bytes, str, os.PathLike)) else source.SerializeToString())
        if run:
            td.trace(module, *module.inputs)
    assert time.process_time() - started < 5
    for part in parts:
        assert part in str(caught.value), str(caught.value)


# Bytes --------------------------------------------------------------------------------------------------------------


def test_nothing():
    check_refused(b"", "no ONNX model")


def test_something_else():
    check_refused(b"PK\x03\x04 this is a zip file" * 40, "no ONNX model")


def test_a_missing_file(tmp_path):
    check_refused(tmp_path / "absent.onnx", "cannot read", "absent.onnx")


def test_a_folder(tmp_path):
    check_refused(tmp_path, "cannot read")


def test_no_source_at_all():
    with pytest.raises(td.OnnxError, match="path, bytes or a ModelProto"):
        td.onnx.load(3)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_truncated(share):
    data = mlp().SerializeToString()
    check_refused(data[: int(len(data) * share)])


# Graphs -------------------------------------------------------------------------------------------------------------


def test_a_cycle():
    nodes = [NODE("Add", ["x", "b"], ["a"], name="one"), NODE("Relu", ["a"], ["b"], name="two")]
    check_refused(model(nodes, [("x", F32, [2])], ["b"]), "Add node 'one'", "cycle")


def test_a_missing_initializer():
    check_refused(model([NODE("MatMul", ["x", "w"], ["y"], name="product")], [("x", F32, [2, 2])]),
                  "MatMul node 'product'", "'w'")


def test_a_missing_name_in_a_branch():
    branch = graph([NODE("Add", ["x", "nowhere"], ["z"], name="inner")], outputs=["z"])
    check_refused(model([NODE("If", ["c"], ["y"], name="choice", then_branch=branch, else_branch=branch)],
                        [("x", F32, [2]), ("c", BOOL, [])]), "If node 'choice'", "'nowhere'")


def test_an_output_that_nothing_computes():
    check_refused(model([NODE("Relu", ["x"], ["z"])], [("x", F32, [2])]), "'y'")


def test_a_name_computed_twice():
    check_refused(model([NODE("Relu", ["x"], ["y"], name="one"), NODE("Neg", ["x"], ["y"], name="two")],
                        [("x", F32, [2])]), "Neg node 'two'", "Relu node 'one'")


def test_wrong_shapes():
    check_refused(model([NODE("MatMul", ["x", "w"], ["y"], name="product")], [("x", F32, [2, 3])],
                        arrays={"w": np.ones((4, 5), "f")}), "MatMul node 'product'", "[2,3]", "[4,5]")


def test_wrong_types():
    check_refused(model([NODE("Conv", ["x", "w"], ["y"], name="filter")], [("x", I64, [1, 3, 8, 8])],
                        arrays={"w": np.ones((4, 3, 3, 3), "f")}), "Conv node 'filter'", "'x' and 'w'",
                  "int64 and float32")


def test_a_wrong_rank():
    check_refused(model([NODE("Conv", ["x", "w"], ["y"], name="filter")], [("x", F32, [3, 8])],
                        arrays={"w": np.ones((4, 3, 3, 3), "f")}), "Conv node 'filter'")


def test_an_attribute_of_the_wrong_type():
    check_refused(model([NODE("Concat", ["x", "x"], ["y"], name="join", axis="first")], [("x", F32, [2])]),
                  "Concat node 'join'")


def test_a_missing_attribute():
    check_refused(model([NODE("Concat", ["x", "x"], ["y"], name="join")], [("x", F32, [2])]), "Concat node 'join'")


def test_too_many_operands():
    check_refused(model([NODE("Relu", ["x", "x", "x"], ["y"], name="act")], [("x", F32, [2])]), "Relu node 'act'")


def test_a_function_that_calls_itself():
    again = helper.make_function("own", "again", ["a"], ["b"], [NODE("again", ["a"], ["b"], domain="own")],
                                 [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)])
    check_refused(model([NODE("again", ["x"], ["y"], domain="own", name="call")], [("x", F32, [2])], domains={"own": 1},
                        functions=[again]), "calls itself")


# Versions and domains -----------------------------------------------------------------------------------------------


def test_a_newer_opset():
    proto = model([NODE("Relu", ["x"], ["y"])], [("x", F32, [2])], opset=17)
    proto.opset_import[0].version = 999
    check_refused(proto, "opset 999", str(onnx.defs.onnx_opset_version()))


def test_a_newer_format():
    proto = model([NODE("Relu", ["x"], ["y"])], [("x", F32, [2])])
    proto.ir_version = 999
    check_refused(proto, "IR version 999")


def test_a_domain_that_is_not_imported():
    check_refused(model([NODE("Fancy", ["x"], ["y"], domain="com.acme", name="f")], [("x", F32, [2])]),
                  "com.acme.Fancy node 'f'", "does not import")


def test_a_custom_op():
    check_refused(model([NODE("Fancy", ["x"], ["y"], domain="com.acme", name="f")], [("x", F32, [2])],
                        domains={"com.acme": 1}), "com.acme.Fancy node 'f'", "no rule")


def test_an_op_that_does_not_exist():
    check_refused(model([NODE("Rleu", ["x"], ["y"], name="typo")], [("x", F32, [2])]), "Rleu node 'typo'", "no rule")


# Stored tensors -----------------------------------------------------------------------------------------------------


def spoiled(change):
    proto = mlp()
    change(proto.graph.initializer[0])
    return proto


def test_too_few_bytes():
    check_refused(spoiled(lambda t: setattr(t, "raw_data", t.raw_data[:-3])), "'w1'", "96 bytes")


def test_a_negative_size():
    def change(tensor):
        tensor.dims[0] = -6
    check_refused(spoiled(change), "'w1'", "negative")


def test_an_unknown_element_type():
    check_refused(spoiled(lambda t: setattr(t, "data_type", 77)), "'w1'", "77")


def test_a_shape_of_billions():
    def change(tensor):
        tensor.dims[0] = HUGE
    check_refused(spoiled(change), "'w1'", "more than")


def test_an_input_of_billions():
    check_refused(model([NODE("Relu", ["x"], ["y"])], [("x", F32, [HUGE, 10])]), "'x'", "more than")


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("op", ["ConstantOfShape", "Expand", "Tile", "Range", "Pad", "MatMul"])
def test_results_of_billions(op, eager):
    """Refused before anything is allocated, traced or run at once."""
    arrays = {"s": np.int64([HUGE]), "o": np.int64(0), "n": np.int64(HUGE), "i": np.int64(1),
              "p": np.int64([0, HUGE]), "m": np.int64([10**6, 1])}
    operands = {"ConstantOfShape": ["s"], "Expand": ["x", "s"], "Tile": ["x", "s"], "Range": ["o", "n", "i"],
                "Pad": ["x", "p"], "MatMul": ["e", "t"]}
    nodes = [NODE("Reshape", ["x", "r"], ["c"]), NODE("Expand", ["c", "m"], ["e"]), NODE("Transpose", ["e"], ["t"])]
    nodes = [*(nodes if op == "MatMul" else ()), NODE(op, operands[op], ["y"], name="big")]
    arrays["r"] = np.int64([1, 1])
    used = {name for node in nodes for name in node.input}
    module = td.onnx.load(model(nodes, [("x", F32, [1])], arrays={k: v for k, v in arrays.items() if k in used}))
    with pytest.raises(td.OnnxError, match=f"{op} node 'big'.*more than"):
        module(np.ones(1, "f")) if eager else td.trace(module, td.spec((1,)))


# External data ------------------------------------------------------------------------------------------------------


def external(tmp_path, location, offset=0, length=None, size=96):
    """A model in a folder of its own whose first weight is in another file, and the path of that file."""
    folder = tmp_path / "model"
    folder.mkdir()
    proto = mlp()
    weight = proto.graph.initializer[0]
    data = weight.raw_data
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, entry in (("location", location), ("offset", offset), ("length", length)):
        if entry is not None:
            weight.external_data.add(key=key, value=str(entry))
    target = folder / location
    if not os.path.isabs(location):
        target.parent.resolve().mkdir(exist_ok=True)
        target.resolve().write_bytes((b"\0" * offset + data)[: offset + size])
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_external_data_is_read(tmp_path):
    module = td.onnx.load(external(tmp_path, "weights.bin", offset=64, length=96))
    x = np.ones((2, 4), "f")
    np.testing.assert_array_equal(module(x).numpy(), td.onnx.load(mlp())(x).numpy())


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/hostname", "a/../../outside.bin", ""])
def test_external_data_outside_the_folder(tmp_path, location):
    check_refused(external(tmp_path, location) if location else external_without_location(tmp_path), "'w1'", "outside")


def external_without_location(tmp_path):
    path = external(tmp_path, "weights.bin")
    proto = onnx.load(path, load_external_data=False)
    del proto.graph.initializer[0].external_data[:]
    path.write_bytes(proto.SerializeToString())
    return path


def test_external_data_behind_a_link(tmp_path):
    path = external(tmp_path, "weights.bin")
    (tmp_path / "secret").write_bytes(b"\0" * 96)
    (tmp_path / "model" / "weights.bin").unlink()
    (tmp_path / "model" / "weights.bin").symlink_to(tmp_path / "secret")
    check_refused(path, "'w1'", "outside")


def test_external_data_that_is_too_short(tmp_path):
    check_refused(external(tmp_path, "weights.bin", size=50), "'w1'", "50")


def test_external_data_with_a_wrong_entry(tmp_path):
    check_refused(external(tmp_path, "weights.bin", length="many"), "'w1'", "damaged")


def test_external_data_without_a_folder(tmp_path):
    check_refused(external(tmp_path, "weights.bin").read_bytes(), "'w1'", "from its path")


# Arguments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [(), (np.ones((2, 4), "f"),) * 2, (np.ones((2, 5), "f"),), (np.ones(4, "f"),),
                                  (np.ones((2, 4)),)])
def test_arguments_that_do_not_fit(args):
    with pytest.raises(td.ArgumentsError, match=r"x.*f32\[batch,4\]"):
        td.onnx.load(mlp())(*args)


def test_an_argument_of_an_unknown_name():
    with pytest.raises(td.ArgumentsError, match="no input 'z'"):
        td.onnx.load(mlp())(z=np.ones((2, 4), "f"))


def test_stored_strings_are_refused_by_name():
    proto = model([NODE("Add", ["x", "t"], ["y"], name="sum")], [("x", F32, [1])])
    proto.graph.initializer.append(numpy_helper.from_array(np.array(["a"], object), "t"))
    check_refused(proto, "Add node 'sum'")
