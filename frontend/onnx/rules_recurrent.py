"""RNN, LSTM and GRU, on `scan`.

The products with the inputs do not depend on the state: they are one matrix product for all steps, outside the loop.
Where sequences have lengths of their own, a step beyond the end leaves the state as it is and gives zeros; going
backwards, that is what reversing each sequence within its length would give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...ir.dtypes import int64
from .. import functions as F
from ..control import scan
from ..dispatch import cast, constant
from ..nn import functional as N
from ..tensor import Tensor
from .node import OnnxNode
from .rules import onnx_rule
from .values import tensor

Activation = Callable[[Tensor], Tensor]
State = tuple[Tensor, ...]
Cell = Callable[[Tensor, State], State]

ACTIVATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "relu": lambda x, a, b: F.relu(x),
    "tanh": lambda x, a, b: F.tanh(x),
    "sigmoid": lambda x, a, b: F.sigmoid(x),
    "affine": lambda x, a, b: x * a + b,
    "leakyrelu": lambda x, a, b: N.leaky_relu(x, a),
    "thresholdedrelu": lambda x, a, b: F.where(x > a, x, constant(0, x.dtype)),
    "scaledtanh": lambda x, a, b: F.tanh(x * b) * a,
    "hardsigmoid": lambda x, a, b: F.clip(x * a + b, 0, 1),
    "elu": lambda x, a, b: N.elu(x, a),
    "softsign": lambda x, a, b: x / (1 + F.absolute(x)),
    "softplus": lambda x, a, b: F.softplus(x),
}
ALPHA = {"affine": 1.0, "leakyrelu": 0.01, "thresholdedrelu": 1.0, "scaledtanh": 1.0, "hardsigmoid": 0.2, "elu": 1.0}
BETA = {"affine": 0.0, "scaledtanh": 1.0, "hardsigmoid": 0.5}


def activations_of(node: OnnxNode, default: tuple[str, ...], directions: int) -> list[list[Activation]]:
    """The functions of each direction; alphas and betas are handed out in order to those that take one."""
    names = [str(n).lower() for n in node.attr("activations", None) or default * directions]
    if len(names) < len(default) * directions:
        names = names * directions
    alphas, betas = (list(node.attr(a, None) or []) for a in ("activation_alpha", "activation_beta"))
    made: list[Activation] = []
    for name in names:
        if name not in ACTIVATIONS:
            raise node.fail(f"the activation {name!r} is unknown; known are {', '.join(sorted(ACTIVATIONS))}")
        a = alphas.pop(0) if name in ALPHA and alphas else ALPHA.get(name, 0.0)
        b = betas.pop(0) if name in BETA and betas else BETA.get(name, 0.0)
        made.append(lambda x, f=ACTIVATIONS[name], a=a, b=b: f(x, a, b))  # type: ignore[misc]
    count = len(default)
    return [made[i * count:(i + 1) * count] for i in range(directions)]


class Layer:
    """What the three ops have in common: operands, directions, lengths, layout.

    Attributes:
        x: (steps, batch, inputs).
        gates: blocks of rows in the weights.
        w, r, b: (directions, gates * hidden, ...); b holds the biases of both products, or is None.
    """

    def __init__(self, node: OnnxNode, gates: int, x: Any, w: Any, r: Any, b: Any, lengths: Any):
        self.node, self.gates = node, gates
        self.batch_first = bool(node.attr("layout", 0))
        x = tensor(x)
        self.x = F.transpose(x, (1, 0, 2)) if self.batch_first else x
        self.w, self.r = tensor(w), tensor(r)
        self.b = None if b is None else tensor(b)
        self.hidden = self.r.shape[-1]
        mode = node.attr("direction", "forward")
        self.reverse = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}.get(mode, [])
        if len(self.reverse) != self.w.shape[0]:
            raise node.fail(f"direction {mode!r} does not fit the {self.w.shape[0]} directions of the weights "
                            f"{self.w.type}")
        self.limit = node.attr("clip", None)
        self.inside = None
        if lengths is not None:
            steps = F.reshape(F.arange(self.x.shape[0]), (self.x.shape[0], 1, 1))
            self.inside = steps < F.reshape(cast(tensor(lengths), int64), (1, self.x.shape[1], 1))

    def start(self, initial: Any) -> list[Tensor]:
        """The first state (batch, hidden) of each direction; zeros by default."""
        if initial is None:
            zeros = F.zeros((self.x.shape[1], self.hidden), self.x.dtype)
            return [zeros] * len(self.reverse)
        states = tensor(initial)
        return [states[:, d] if self.batch_first else states[d] for d in range(len(self.reverse))]

    def bias(self, direction: int) -> tuple[Any, Any]:
        """Of the product with the inputs and of that with the state."""
        if self.b is None:
            return None, None
        half = self.gates * self.hidden
        return self.b[direction, :half], self.b[direction, half:]

    def clipped(self, x: Tensor) -> Tensor:
        """What an activation takes."""
        return x if self.limit is None else F.clip(x, -self.limit, self.limit)

    def run(self, direction: int, cell: Cell, state: State, bias: Any) -> tuple[State, Tensor]:
        """The last state and the hidden states (steps, batch, hidden) of a direction."""
        projected = F.matmul(self.x, self.w[direction], transpose_y=True)
        projected = projected if bias is None else projected + bias

        def step(state: State, now: Any) -> tuple[State, Tensor]:
            if self.inside is None:
                new = cell(now, state)
                return new, new[0]
            x, inside = now
            new = tuple(F.where(inside, a, b) for a, b in zip(cell(x, state), state))
            return new, F.where(inside, new[0], constant(0, new[0].dtype))

        xs = projected if self.inside is None else (projected, self.inside)
        last, ys = scan(step, state, xs, reverse=self.reverse[direction])
        return last, ys

    def results(self, runs: list[tuple[State, Tensor]]) -> tuple[Tensor, ...]:
        """Y, then the last states, in the layout of the node."""
        ys = F.stack([y for _, y in runs], 2 if self.batch_first else 1)   # (steps, [dir], batch, [dir], hidden)
        ys = F.transpose(ys, (1, 0, 2, 3)) if self.batch_first else ys
        lasts = [F.stack([state[i] for state, _ in runs], 1 if self.batch_first else 0)
                 for i in range(len(runs[0][0]))]
        return (ys, *lasts)


@onnx_rule("RNN", weights=(1, 2, 3))
def rnn(node: OnnxNode, x: Any, w: Any, r: Any, b: Any = None, lengths: Any = None, h: Any = None) -> Any:
    """h' = f(W x + R h + b) (Elman, 1990)."""
    layer = Layer(node, 1, x, w, r, b, lengths)
    functions = activations_of(node, ("Tanh",), len(layer.reverse))
    starts = layer.start(h)

    def run(d: int) -> tuple[State, Tensor]:
        (f,), weight, (wb, rb) = functions[d], layer.r[d], layer.bias(d)

        def cell(x: Tensor, state: State) -> State:
            return (f(layer.clipped(x + F.matmul(state[0], weight, transpose_y=True))),)

        return layer.run(d, cell, (starts[d],), None if wb is None else wb + rb)

    return layer.results([run(d) for d in range(len(layer.reverse))])


@onnx_rule("LSTM", weights=(1, 2, 3, 7))
def lstm(node: OnnxNode, x: Any, w: Any, r: Any, b: Any = None, lengths: Any = None, h: Any = None, c: Any = None,
         p: Any = None) -> Any:
    """Gates i, o, f, c (Hochreiter & Schmidhuber, 1997); peepholes if there are some (Gers & Schmidhuber, 2000)."""
    layer = Layer(node, 4, x, w, r, b, lengths)
    functions = activations_of(node, ("Sigmoid", "Tanh", "Tanh"), len(layer.reverse))
    hs, cs = layer.start(h), layer.start(c)
    coupled = bool(node.attr("input_forget", 0))

    def run(d: int) -> tuple[State, Tensor]:
        (f, g, last), weight, (wb, rb) = functions[d], layer.r[d], layer.bias(d)
        peep = [None] * 3 if p is None else F.split(tensor(p)[d], 3)

        def gate(x: Tensor, peephole: Any, state: Tensor, function: Activation) -> Tensor:
            return function(layer.clipped(x if peephole is None else x + peephole * state))

        def cell(x: Tensor, state: State) -> State:
            hidden, memory = state
            i, o, forget, new = F.split(x + F.matmul(hidden, weight, transpose_y=True), 4, axis=-1)
            i = gate(i, peep[0], memory, f)
            forget = 1 - i if coupled else gate(forget, peep[2], memory, f)
            memory = forget * memory + i * g(layer.clipped(new))
            return gate(o, peep[1], memory, f) * last(memory), memory

        return layer.run(d, cell, (hs[d], cs[d]), None if wb is None else wb + rb)

    return layer.results([run(d) for d in range(len(layer.reverse))])


@onnx_rule("GRU", weights=(1, 2, 3))
def gru(node: OnnxNode, x: Any, w: Any, r: Any, b: Any = None, lengths: Any = None, h: Any = None) -> Any:
    """Gates z, r, h (Cho et al., 2014); the reset comes before or after the product with the state."""
    layer = Layer(node, 3, x, w, r, b, lengths)
    functions = activations_of(node, ("Sigmoid", "Tanh"), len(layer.reverse))
    starts, size = layer.start(h), layer.hidden
    late = bool(node.attr("linear_before_reset", 0))

    def run(d: int) -> tuple[State, Tensor]:
        (f, g), weight, (wb, rb) = functions[d], layer.r[d], layer.bias(d)
        gates, candidate = weight[:2 * size], weight[2 * size:]

        def early(x: Tensor, state: State) -> State:
            (hidden,) = state
            both = x[:, :2 * size] + F.matmul(hidden, gates, transpose_y=True)
            z, reset = F.split(f(layer.clipped(both)), 2, axis=-1)
            new = g(layer.clipped(x[:, 2 * size:] + F.matmul(reset * hidden, candidate, transpose_y=True)))
            return (new + z * (hidden - new),)

        def lately(x: Tensor, state: State) -> State:
            (hidden,) = state
            product = F.matmul(hidden, weight, transpose_y=True)
            product = product if rb is None else product + rb
            z, reset = F.split(f(layer.clipped(x[:, :2 * size] + product[:, :2 * size])), 2, axis=-1)
            new = g(layer.clipped(x[:, 2 * size:] + reset * product[:, 2 * size:]))
            return (new + z * (hidden - new),)

        bias = wb if wb is None or late else wb + rb
        return layer.run(d, lately if late else early, (starts[d],), bias)

    return layer.results([run(d) for d in range(len(layer.reverse))])
