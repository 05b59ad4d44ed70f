"""Fuzzing with a fixed budget and seed: mutated bytes of models never do worse than an error of ours, and random valid
graphs give what the reference evaluator of the `onnx` package gives."""

import random
import time
import warnings

import numpy as np
import onnx
import pytest
from graphs import BOOL, F32, I64, NODE, graph, mlp, model
from onnx.reference import ReferenceEvaluator

import treadle as td

MUTANTS = 250
SECONDS = 5
"""Of this process, that no mutant may take longer than."""


def convolutions():
    rng = np.random.default_rng(1)
    nodes = [NODE("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2], name="conv"),
             NODE("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"], name="norm"), NODE("Relu", ["n"], ["r"]),
             NODE("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]), NODE("Flatten", ["p"], ["f"]),
             NODE("Gemm", ["f", "g"], ["y"])]
    four = {k: rng.random(4).astype("f") + 1 for k in "sbmv"}
    return model(nodes, [("x", F32, ["n", 3, 8, 8])], [("y", F32, None)],
                 {"w": rng.standard_normal((4, 3, 3, 3)).astype("f"), **four, "g": np.ones((16, 2), "f")})


def control():
    double = graph([NODE("Add", ["x", "x"], ["a"])], outputs=["a"])
    square = graph([NODE("Mul", ["x", "x"], ["a"])], outputs=["a"])
    body = graph([NODE("Add", ["v", "x"], ["w"]), NODE("Identity", ["go"], ["on"]), NODE("Neg", ["w"], ["row"])],
                 [("i", I64, []), ("go", BOOL, []), ("v", F32, [3])], ["on", "w", "row"])
    nodes = [NODE("ReduceSum", ["x"], ["t"], keepdims=0), NODE("Greater", ["t", "o"], ["c"]),
             NODE("If", ["c"], ["b"], then_branch=double, else_branch=square, name="choice"),
             NODE("Loop", ["n", "", "b"], ["l", "rows"], body=body, name="loop"),
             NODE("Range", ["z", "n", "one"], ["k"]), NODE("Cast", ["k"], ["kf"], to=1),
             NODE("MatMul", ["kf", "rows"], ["y"])]
    return model(nodes, [("x", F32, [3])], ["y"],
                 {"o": np.float32(0), "n": np.int64(4), "z": np.int64(0), "one": np.int64(1)})


SEEDS = {"mlp": mlp, "convolutions": convolutions, "control": control}


def mutate(data, rng):
    """Some bits flipped, or a piece cut out, doubled, or overwritten."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at, kind = rng.randrange(len(data)), rng.randrange(5)
        if kind <= 1:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[at:at + rng.randrange(1, 9)]
        elif kind == 3:
            data[at:at] = data[at:at + rng.randrange(1, 9)]
        else:
            data[at] = rng.choice((0, 1, 127, 128, 255))
    return bytes(data)


NUMBERS = (-(2**63), -2, -1, 0, 1, 2, 3, 7, 100, 2**31, 2**40, 2**63 - 1)


def mutate_fields(data, rng):
    """A model that parses, with some of its fields changed: sizes, attributes, names, ops, types."""
    proto = onnx.ModelProto.FromString(data)
    nodes, tensors = list(proto.graph.node), list(proto.graph.initializer)
    nodes += [n for node in nodes for a in node.attribute for n in a.g.node]
    names = [n for node in nodes for n in (*node.input, *node.output)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        node, tensor, kind = rng.choice(nodes), rng.choice(tensors), rng.randrange(8)
        attributes = [a for a in node.attribute if a.type != a.GRAPH]
        if kind == 0 and node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice(names)
        elif kind == 1:
            node.op_type = rng.choice(nodes).op_type
        elif kind == 2 and attributes:
            attribute = rng.choice(attributes)
            attribute.i = rng.choice(NUMBERS)
            attribute.ints[:] = [rng.choice(NUMBERS) for _ in range(rng.randrange(4))]
        elif kind == 3:
            tensor.dims[:] = [abs(rng.choice(NUMBERS)) % 2**63 for _ in range(rng.randrange(4))]
        elif kind == 4 and tensor.data_type == I64:
            tensor.raw_data = np.full(len(tensor.raw_data) // 8, rng.choice(NUMBERS), np.int64).tobytes()
        elif kind == 5:
            tensor.data_type = rng.randrange(24)
        elif kind == 6:
            proto.opset_import[0].version = rng.randrange(1, 30)
        elif node.input:
            del node.input[rng.randrange(len(node.input))]
    return proto.SerializeToString()


def use(data):
    """Loads, checks, traces and runs eagerly: everything before machine code."""
    module = td.onnx.load(data, max_elements=10**6)
    td.onnx.check(module)
    td.trace(module, *module.inputs)
    sizes = [tuple(n if isinstance(n, int) else 2 for n in s.shape) for s in module.inputs]
    module(*(np.ones(shape, s.dtype.np) for shape, s in zip(sizes, module.inputs)))


@pytest.mark.parametrize("mutation", [mutate, mutate_fields])
@pytest.mark.parametrize("seed", SEEDS)
def test_mutants(seed, mutation):
    rng = random.Random(seed)
    data = SEEDS[seed]().SerializeToString()
    use(data)
    refused = 0
    for number in range(MUTANTS):
        started = time.process_time()
        mutant = mutation(data, rng)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # numbers that overflow
                use(mutant)
        except td.TreadleError as error:
            assert str(error)
            refused += 1
        took = time.process_time() - started
        assert took < SECONDS, f"mutant {number} took {took:.1f} s"
    assert MUTANTS // 10 < refused < MUTANTS


UNARY = ("Relu", "Neg", "Abs", "Tanh", "Sigmoid", "Exp", "Floor", "Softplus", "Erf", "Identity")
BINARY = ("Add", "Sub", "Mul", "Max", "Min")


class Grower:
    """A random valid graph over f32 tensors; shapes are kept track of to make the next node valid."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.nodes, self.arrays = [], {}
        self.shapes = {"x": (2, 3, 4), "z": (4,)}

    def add(self, op, operands, shape, **attributes):
        name = f"v{len(self.nodes)}"
        self.nodes.append(NODE(op, operands, [name], name=f"n{len(self.nodes)}", **attributes))
        self.shapes[name] = tuple(shape)

    def constant(self, array):
        name = f"c{len(self.arrays)}"
        self.arrays[name] = array
        return name

    def step(self):
        name = self.rng.choice(sorted(self.shapes))
        shape = self.shapes[name]
        kind = self.rng.choice((self.unary, self.binary, self.transpose, self.reshape, self.concat, self.reduce,
                                self.matmul, self.slice, self.softmax, self.gather, self.where, self.expand))
        kind(name, shape)

    def unary(self, x, shape):
        self.add(self.rng.choice(UNARY), [x], shape)

    def binary(self, x, shape):
        partners = [n for n, s in self.shapes.items() if s in (shape, shape[1:], shape[-1:]) and s]
        self.add(self.rng.choice(BINARY), [x, self.rng.choice(sorted(partners)) if partners else x], shape)

    def transpose(self, x, shape):
        perm = self.rng.sample(range(len(shape)), len(shape))
        self.add("Transpose", [x], [shape[p] for p in perm], perm=perm)

    def reshape(self, x, shape):
        size = int(np.prod(shape))
        first = self.rng.choice([d for d in range(1, size + 1) if size % d == 0])
        self.add("Reshape", [x, self.constant(np.int64([first, -1]))], (first, size // first))

    def concat(self, x, shape):
        axis = self.rng.randrange(len(shape))
        if np.prod(shape) < 200:
            self.add("Concat", [x, x], [2 * s if i == axis else s for i, s in enumerate(shape)], axis=axis)

    def reduce(self, x, shape):
        axis = self.rng.randrange(len(shape))
        if len(shape) > 1:
            self.add(self.rng.choice(("ReduceMean", "ReduceMax", "ReduceL2")), [x],
                     [s for i, s in enumerate(shape) if i != axis], axes=[axis], keepdims=0)

    def matmul(self, x, shape):
        if len(shape) >= 2:
            columns = self.rng.choice((1, 3, 5))
            weight = self.constant(self.numbers.standard_normal((shape[-1], columns)).astype("f") * 0.3)
            self.add("MatMul", [x, weight], (*shape[:-1], columns))

    def slice(self, x, shape):
        axis = self.rng.randrange(len(shape))
        bounds = [self.constant(np.int64([v])) for v in (-1, -shape[axis] - 1, axis, -1)]
        self.add("Slice", [x, *bounds], shape)

    def softmax(self, x, shape):
        self.add("Softmax", [x], shape, axis=self.rng.randrange(len(shape)))

    def gather(self, x, shape):
        axis = self.rng.randrange(len(shape))
        index = self.numbers.integers(-shape[axis], shape[axis], 2)
        self.add("Gather", [x, self.constant(index)], [2 if i == axis else s for i, s in enumerate(shape)], axis=axis)

    def where(self, x, shape):
        self.nodes.append(NODE("Greater", [x, self.constant(np.float32(0))], [f"b{len(self.nodes)}"]))
        self.add("Where", [f"b{len(self.nodes) - 1}", x, self.constant(np.float32(0.5))], shape)

    def expand(self, x, shape):
        if np.prod(shape) < 200:
            self.add("Expand", [x, self.constant(np.int64([2, *(1 for _ in shape)]))], (2, *shape))

    def model(self, steps):
        while len(self.nodes) < steps:
            self.step()
        outputs = [(n, F32, [None] * len(self.shapes[n])) for n in list(self.shapes)[-3:] if n not in ("x", "z")]
        return model(self.nodes, [("x", F32, ["a", 3, 4]), ("z", F32, [4])], outputs, self.arrays)


@pytest.mark.parametrize("seed", range(36))
def test_random_graphs(seed):
    grower = Grower(seed)
    proto = grower.model(14)
    onnx.checker.check_model(proto)
    given = [grower.numbers.standard_normal(grower.shapes[n]).astype("f") for n in "xz"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = ReferenceEvaluator(proto).run(None, dict(zip("xz", given)))
    results = td.onnx.backend.run_model(proto, given)
    for result, wanted in zip(results, expected):
        assert result.shape == wanted.shape and result.dtype == wanted.dtype
        np.testing.assert_allclose(result, wanted, rtol=2e-4, atol=1e-5)
