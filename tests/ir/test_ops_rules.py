"""What the type rules accept and refuse, symbolic sizes, costs, published vectors: what the op table does not show."""

import math

import numpy as np
import pytest
from optable.oracles_big import philox

from treadle.ir import decompose_rules as _rules  # noqa: F401
from treadle.ir import interp, special
from treadle.ir.builder import build, emit
from treadle.ir.dims import Dim
from treadle.ir.dtypes import as_dtype
from treadle.ir.errors import AttributeValueError, DTypeError, ShapeError, TreadleError
from treadle.ir.opdef import all_ops, op
from treadle.ir.ops_create import philox4x32
from treadle.ir.types import TensorType

B, S = Dim("batch"), Dim("seq")


def t(text):
    """A type from `f32[2,3]`."""
    dtype, sizes = text.rstrip("]").split("[")
    names = {"batch": B, "seq": S}
    return TensorType(tuple(names.get(s) or int(s) for s in sizes.split(",") if s), as_dtype(dtype))


def infer(name, *operands, **attrs):
    graph = build("g", lambda *xs: emit(name, *xs, **attrs), *map(t, operands))
    return tuple(map(str, graph.output_types))


F32, I64, F8 = as_dtype("float32"), as_dtype("int64"), as_dtype("float8_e4m3fn")
WINDOW = {"stride": (1,), "padding": ((0, 0),), "dilation": (1,)}

# op, operands, attributes, error, what the message holds
REFUSED = [
    ("exp", ["i32[3]"], {}, DTypeError, ["exp", "int32", "cast first"]),
    ("add", ["f32[3]", "f64[3]"], {}, DTypeError, ["f32[3]", "f64[3]", "cast"]),
    ("add", ["f32[3,2]", "f32[4]"], {}, ShapeError, ["[3, 2]", "[4]", "broadcast"]),
    ("add", ["f8e4m3[3]", "f8e4m3[3]"], {}, DTypeError, ["float8_e4m3fn", "cast"]),
    ("add", ["bool[3]", "bool[3]"], {}, DTypeError, ["bool[3]", "logical"]),
    ("add", ["f32[batch]", "f32[seq]"], {}, ShapeError, ["[batch]", "[seq]"]),
    ("div", ["i32[]", "i32[]"], {}, DTypeError, ["div", "int32", "cast first"]),
    ("bitwise_and", ["f32[]", "f32[]"], {}, DTypeError, ["float32"]),
    ("left_shift", ["bool[]", "bool[]"], {}, DTypeError, ["bool"]),
    ("logical_and", ["i32[]", "i32[]"], {}, DTypeError, ["bool", "int32"]),
    ("where", ["i32[]", "f32[]", "f32[]"], {}, DTypeError, ["condition", "i32[]"]),
    ("cast", ["f32[]"], {"dtype": "float32"}, AttributeValueError, ["DType", "float32"]),
    ("clip", ["u8[3]"], {"lo": -1}, AttributeValueError, ["-1", "uint8"]),
    ("clip", ["f32[3]"], {"lo": "a"}, AttributeValueError, ["'a'"]),
    ("reduce_sum", ["f32[2,3]"], {"axes": (2,)}, AttributeValueError, ["(2,)", "[0, 2)"]),
    ("reduce_sum", ["f32[2,3]"], {"axes": (1, 0)}, AttributeValueError, ["increasing"]),
    ("reduce_sum", ["f32[2,3]"], {"axes": [0]}, AttributeValueError, ["tuple"]),
    ("reduce_sum", ["f32[2,3]"], {"axes": (0,), "keepdims": 1}, AttributeValueError, ["keepdims"]),
    ("reduce_sum", ["f32[2,3]"], {}, AttributeValueError, ["axes"]),
    ("reduce_mean", ["i32[2]"], {"axes": (0,)}, DTypeError, ["int32"]),
    ("argmax", ["f32[0,2]"], {"axis": 0}, ShapeError, ["empty"]),
    ("reshape", ["f32[2,3]"], {"shape": (4,)}, ShapeError, ["f32[2,3]", "[4]", "6"]),
    ("reshape", ["f32[2,3]"], {"shape": (-1,)}, ShapeError, ["negative"]),
    ("transpose", ["f32[2,3]"], {"perm": (0, 0)}, AttributeValueError, ["(0, 0)"]),
    ("broadcast_to", ["f32[2]"], {"shape": (3,)}, ShapeError, ["f32[2]", "[3]"]),
    ("concat", ["f32[2,3]", "f32[2,4]"], {"axis": 0}, ShapeError, ["f32[2,3]", "f32[2,4]"]),
    ("slice", ["f32[4]"], {"starts": (1,), "limits": (5,), "strides": (1,)}, AttributeValueError, ["limit 5"]),
    ("slice", ["f32[4]"], {"starts": (1,), "limits": (2,), "strides": (0,)}, AttributeValueError, ["stride"]),
    ("pad", ["f32[2]"], {"low": (-2,), "high": (-1,), "interior": (0,)}, ShapeError, ["negative size"]),
    ("matmul", ["f32[2,3]", "f32[4,5]"], {}, ShapeError, ["f32[2,3]", "f32[4,5]", "3 and 4"]),
    ("matmul", ["f32[2,3]", "f32[3]"], {}, ShapeError, ["f32[3]", "2 dimensions"]),
    ("matmul", ["bf16[2,3]", "f32[3,2]"], {}, DTypeError, ["bf16[2,3]", "f32[3,2]"]),
    ("matmul", ["f8e4m3[2,3]", "f8e4m3[3,2]"], {}, DTypeError, ["out_dtype"]),
    ("matmul", ["f32[2,3]", "f32[3,2]"], {"out_dtype": I64}, DTypeError, ["int64"]),
    ("matmul", ["bool[2,3]", "bool[3,2]"], {}, DTypeError, ["bool"]),
    ("conv", ["f32[1,3,5]", "f32[4,2,3]"], WINDOW, ShapeError, ["3 channels", "takes 2"]),
    ("conv", ["f32[1,3,2]", "f32[4,3,3]"], WINDOW, ShapeError, ["window of 3", "axis of 2"]),
    ("conv", ["f32[1,3,5]", "f32[4,3,3]"], {**WINDOW, "stride": (0,)}, AttributeValueError, ["stride"]),
    ("conv", ["f32[1,3,5]", "f32[4,3,3]"], {**WINDOW, "padding": (1,)}, AttributeValueError, ["padding"]),
    ("conv", ["f32[1,4,5]", "f32[3,2,3]"], {**WINDOW, "groups": 2}, ShapeError, ["groups=2"]),
    ("conv_input_grad", ["f32[1,4,5]", "f32[4,3,3]"], {**WINDOW, "input_spatial": (9,)}, ShapeError, ["[9]", "[7]"]),
    ("max_pool", ["f32[1,3]"], {**WINDOW, "window": (2,)}, ShapeError, ["f32[1,3]"]),
    ("take", ["f32[3]", "f32[2]"], {"axis": 0}, DTypeError, ["integer", "f32[2]"]),
    ("take", ["f32[0]", "i64[2]"], {"axis": 0}, ShapeError, ["empty"]),
    ("scatter_add", ["f32[3]", "i64[2]", "f32[3]"], {"axis": 0}, ShapeError, ["f32[3]", "[2]"]),
    ("take_along_axis", ["f32[3,2]", "i64[3,3,1]"], {"axis": 0}, ShapeError, ["f32[3,2]", "i64[3,3,1]"]),
    ("gather_nd", ["f32[3,2]", "i64[4,3]"], {}, ShapeError, ["i64[4,3]", "1 to 2"]),
    ("dynamic_slice", ["f32[3]", "i64[1]"], {"sizes": (2,)}, ShapeError, ["scalar starts"]),
    ("dynamic_slice", ["f32[3]", "i64[]"], {"sizes": (4,)}, ShapeError, ["[4]", "f32[3]"]),
    ("top_k", ["f32[3]"], {"k": 4, "axis": 0}, AttributeValueError, ["4", "3 elements"]),
    ("softmax", ["f32[3]"], {"axis": -1}, AttributeValueError, ["-1"]),
    ("layer_norm", ["f32[2,3]", "f32[2]", "f32[3]"], {}, ShapeError, ["scale", "f32[2]", "[3]"]),
    ("group_norm", ["f32[2,3]", "f32[3]", "f32[3]"], {"groups": 2}, ShapeError, ["groups=2"]),
    ("attention", ["f32[2,3]", "f32[4,5]", "f32[4,2]"], {}, ShapeError, ["f32[2,3]", "f32[4,5]"]),
    ("attention", ["f32[2,3]", "f32[4,3]", "f32[4,2]", "f32[5]"], {}, ShapeError, ["mask", "f32[5]", "[2, 4]"]),
    ("attention", ["f32[2,3]", "f32[4,3]", "f32[4,2]", "i32[2,4]"], {}, DTypeError, ["mask", "i32[2,4]"]),
    ("cross_entropy", ["f32[2,3]", "i64[3]"], {}, ShapeError, ["i64[3]", "[2]"]),
    ("cross_entropy", ["f32[2,3]", "i64[2]"], {"label_smoothing": 2}, AttributeValueError, ["label_smoothing"]),
    ("constant", [], {"value": 3}, AttributeValueError, ["array"]),
    ("iota", [], {"shape": (), "axis": 0, "dtype": F32}, AttributeValueError, ["axis"]),
    ("random_bits", ["u32[2]"], {"shape": (3,)}, DTypeError, ["u64[2]", "u32[2]"]),
]


@pytest.mark.parametrize(("name", "operands", "attrs", "error", "words"), REFUSED,
                         ids=[f"{r[0]}-{i}" for i, r in enumerate(REFUSED)])
def test_refused_with_a_message_that_helps(name, operands, attrs, error, words):
    with pytest.raises(error) as caught:
        infer(name, *operands, **attrs)
    message = str(caught.value)
    assert name in message and __file__ in message, "the message names the op and the user's line"
    for word in words:
        assert word in message, message


CONV2D = {"stride": (2, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1)}
SYMBOLIC = [
    ("add", ["f32[batch,3]", "f32[3]"], {}, "f32[batch,3]"),
    ("add", ["f32[batch,1]", "f32[1,seq]"], {}, "f32[batch,seq]"),
    ("reduce_sum", ["f32[batch,3]"], {"axes": (0,), "keepdims": True}, "f32[1,3]"),
    ("reshape", ["f32[batch,seq,3]"], {"shape": (B * S, 3)}, "f32[batch*seq,3]"),
    ("concat", ["f32[batch,3]", "f32[batch,3]"], {"axis": 0}, "f32[2*batch,3]"),
    ("concat", ["f32[batch,3]", "f32[2,3]"], {"axis": 0}, "f32[batch+2,3]"),
    ("slice", ["f32[batch,3]"], {"starts": (0, 1), "limits": (B, 3), "strides": (1, 1)}, "f32[batch,2]"),
    ("pad", ["f32[batch]"], {"low": (1,), "high": (0,), "interior": (1,)}, "f32[2*batch]"),
    ("matmul", ["f32[batch,seq,4]", "f32[batch,4,seq]"], {}, "f32[batch,seq,seq]"),
    ("conv", ["f32[batch,3,8,seq]", "f32[4,3,3,3]"], CONV2D, "f32[batch,4,4,seq]"),
    ("take", ["f32[9,4]", "i64[batch,seq]"], {"axis": 0}, "f32[batch,seq,4]"),
    ("layer_norm", ["f32[batch,4]", "f32[4]", "f32[4]"], {}, "f32[batch,4]"),
    ("attention", ["f32[batch,2,seq,4]"] * 3, {"causal": True}, "f32[batch,2,seq,4]"),
    ("cross_entropy", ["f32[batch,10]", "i64[batch]"], {}, "f32[batch]"),
    ("sort", ["f32[batch,4]"], {"axis": 0}, "f32[batch,4]"),
    ("iota", [], {"shape": (B, 2), "axis": 0, "dtype": I64}, "i64[batch,2]"),
    ("random_bits", ["u64[2]"], {"shape": (B, 2)}, "u32[batch,2]"),
]


@pytest.mark.parametrize(("name", "operands", "attrs", "result"), SYMBOLIC, ids=[r[0] for r in SYMBOLIC])
def test_symbolic_sizes(name, operands, attrs, result):
    assert infer(name, *operands, **attrs)[0] == result


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "layer_norm", "group_norm", "attention", "cross_entropy"])
def test_decompositions_take_symbolic_sizes(name):
    operands, attrs = {
        "layer_norm": (["f32[batch,4]", "f32[4]", "f32[4]"], {}),
        "group_norm": (["f32[batch,4,seq]", "f32[4]", "f32[4]"], {"groups": 2}),
        "attention": (["bf16[batch,2,seq,4]"] * 3, {"causal": True}),
        "cross_entropy": (["f32[batch,10]", "i64[batch]"], {"label_smoothing": 0.1, "ignore_index": -1}),
    }.get(name, (["f16[batch,seq]"], {"axis": 1}))
    types = list(map(t, operands))
    whole = build("whole", lambda *xs: emit(name, *xs, **attrs), *types)
    parts = build("parts", lambda *xs: op(name).slots["decompose"](*xs, **whole.nodes[0].attrs), *types)
    assert parts.output_types == whole.output_types
    sizes = {"batch": 3, "seq": 5}
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 9, s.shape) if s.dtype.is_integer else rng.normal(size=s.shape).astype(s.dtype.np)
              for s in (a.specialize(sizes) for a in types)]
    for x, y in zip(interp.run(parts, arrays), interp.run(whole, arrays)):
        np.testing.assert_allclose(x.astype(float), y.astype(float), rtol=2e-2, atol=2e-2)


# Random123's known answers, file kat_vectors: philox4x32 with 10 rounds (counter, key, output).
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_philox_gives_the_published_vectors(counter, key, output):
    counter, key, output = ([int(w, 16) for w in words.split()] for words in (counter, key, output))
    assert [int(w) for w in philox4x32(tuple(map(np.uint64, counter)), tuple(map(np.uint64, key)))] == output
    assert philox(counter, key) == output


def test_random_bits_do_not_depend_on_how_they_are_cut():
    state = np.array([7, 11], np.uint64)
    draw = op("random_bits").reference
    whole = draw(state, offset=0, shape=(40,))
    np.testing.assert_array_equal(whole[8:], draw(state, offset=2, shape=(32,)))
    np.testing.assert_array_equal(whole[20:], draw(state + np.array([0, 5], np.uint64), offset=0, shape=(20,)))


@pytest.mark.parametrize("name", ["erf", "erfc"])
def test_error_function_within_a_few_ulp(name):
    x = np.concatenate([np.linspace(-6, 26, 20001), np.linspace(-1e-3, 1e-3, 2001), [0.46875, 4.0, 27.0]])
    want = np.array([getattr(math, name)(v) for v in x])
    np.testing.assert_allclose(getattr(special, name)(x), want, rtol=1e-15, atol=1e-300)


@pytest.mark.parametrize(("name", "operands", "attrs", "flops"), [
    ("add", ["f32[3,1]", "f32[4]"], {}, 12),
    ("reduce_sum", ["f32[3,4]"], {"axes": (0,)}, 12),
    ("matmul", ["f32[3,4]", "f32[4,5]"], {}, 2 * 3 * 4 * 5),
    ("matmul", ["f32[2,4,3]", "f32[5,4]"], {"transpose_x": True, "transpose_y": True}, 2 * 2 * 3 * 4 * 5),
    ("conv", ["f32[2,4,8]", "f32[6,2,3]"], {**WINDOW, "groups": 2}, 2 * (2 * 6 * 6) * 2 * 3),
    ("conv_input_grad", ["f32[2,6,6]", "f32[6,2,3]"], {**WINDOW, "groups": 2, "input_spatial": (8,)},
     2 * (2 * 6 * 6) * 2 * 3),
    ("conv_weight_grad", ["f32[2,4,8]", "f32[2,6,6]"], {**WINDOW, "groups": 2, "kernel_spatial": (3,)},
     2 * (2 * 6 * 6) * 2 * 3),
    ("reshape", ["f32[2,3]"], {"shape": (6,)}, 0),
])
def test_flops(name, operands, attrs, flops):
    (node,) = build("g", lambda *xs: emit(name, *xs, **attrs), *map(t, operands)).nodes
    assert node.flops == flops
    assert node.nbytes >= 0


def test_costs_of_symbolic_shapes_are_symbolic():
    (node,) = build("g", lambda x, y: emit("matmul", x, y), t("f32[batch,4]"), t("f32[4,5]")).nodes
    assert node.flops == B * 40 and node.nbytes == B * 36 + 80


def test_every_op_says_what_it_does():
    for record in all_ops().values():
        assert record.doc.endswith("."), f"{record.name} has no doc"


BODY_ERRORS = [
    ("cond", {}, lambda x: (build("a", lambda p: p, x), build("b", lambda p: emit("cast", p, dtype=I64), x)), "else"),
    ("scan", {"n_carry": 1, "n_xs": 0, "length": 3},
     lambda x: (build("a", lambda p: emit("reshape", p, shape=(1, 3)), x),), "body"),
    ("while_loop", {"n_carry": 1}, lambda x: (build("a", lambda p: p, x), build("b", lambda p: p, x)), "bool scalar"),
]


@pytest.mark.parametrize(("name", "attrs", "regions", "word"), BODY_ERRORS, ids=[r[0] for r in BODY_ERRORS])
def test_regions_that_do_not_fit(name, attrs, regions, word):
    x = t("f32[3]")
    operands = [TensorType((), as_dtype("bool")), x] if name == "cond" else [x]
    with pytest.raises(TreadleError, match=word):
        build("g", lambda *xs: emit(name, *xs, regions=regions(x), **attrs), *operands)
