"""Recurrent layers on `td.scan`: the loop is one op of the IR, whatever the sequence length.

Weights, names and gate order are torch's (`weight_ih_l0`, `weight_hh_l0`, ...; LSTM gates i, f, g, o;
GRU gates r, z, n), so its checkpoints load. The products of the inputs with `weight_ih` do not depend on
the state: they are one matrix product for all steps, outside the loop.
"""

from __future__ import annotations

import math
from typing import Any

from ...ir.errors import AttributeValueError, ShapeError
from .. import functions as F
from ..control import scan
from ..tensor import Tensor
from . import functional, init
from .layers import parameter
from .module import Module


class _Recurrent(Module):
    gates = 0
    states = 1  # tensors in the state: 1 (h) or 2 (h, c)

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
                 batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False):
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.batch_first, self.dropout, self.bidirectional = batch_first, dropout, bidirectional
        self.bias = bias
        bound = 1.0 / math.sqrt(hidden_size)
        draw = init.uniform(-bound, bound)
        rows = self.gates * hidden_size
        for layer, direction in self._cells():
            size = input_size if layer == 0 else hidden_size * self.directions
            suffix = self._suffix(layer, direction)
            setattr(self, f"weight_ih_{suffix}", parameter((rows, size), draw))
            setattr(self, f"weight_hh_{suffix}", parameter((rows, hidden_size), draw))
            for name in ("bias_ih", "bias_hh"):
                self.register_parameter(f"{name}_{suffix}", parameter((rows,), draw) if bias else None)

    @property
    def directions(self) -> int:
        """1, or 2 if bidirectional."""
        return 2 if self.bidirectional else 1

    def _cells(self) -> list[tuple[int, int]]:
        return [(layer, d) for layer in range(self.num_layers) for d in range(self.directions)]

    @staticmethod
    def _suffix(layer: int, direction: int) -> str:
        return f"l{layer}" + ("_reverse" if direction else "")

    def cell(self, x: Tensor, state: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """The next state from the projected input (N, gates * H) and the state."""
        raise AttributeValueError(f"{type(self).__name__} must define cell")

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Runs the layers over a sequence.

        Args:
            x: (L, N, input_size), or (N, L, input_size) with batch_first.
            state: initial state (num_layers * directions, N, H), zeros by default; a pair (h, c) for an LSTM.

        Returns:
            The last layer's hidden states (L, N, directions * H) (or batch first), and the final state.
        """
        if x.ndim != 3 or x.shape[2] != self.input_size:
            layout = "(N, L" if self.batch_first else "(L, N"
            raise ShapeError(f"{type(self).__name__} takes {layout}, {self.input_size}), got {x.shape}")
        if self.batch_first:
            x = F.transpose(x, (1, 0, 2))
        initial = self._initial_state(x, state)
        finals: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = functional.dropout(x, self.dropout, self.training)
            outputs = []
            for direction in range(self.directions):
                start = tuple(part[layer * self.directions + direction] for part in initial)
                final, y = self._run(x, start, self._suffix(layer, direction), reverse=direction == 1)
                finals.append(final)
                outputs.append(y)
            x = outputs[0] if len(outputs) == 1 else F.concatenate(outputs, axis=-1)
        last = tuple(F.stack([final[i] for final in finals], axis=0) for i in range(self.states))
        y = F.transpose(x, (1, 0, 2)) if self.batch_first else x
        return y, last if self.states > 1 else last[0]

    def _initial_state(self, x: Tensor, state: Any) -> tuple[Tensor, ...]:
        shape = (self.num_layers * self.directions, x.shape[1], self.hidden_size)
        if state is None:
            return tuple(F.zeros(shape, dtype=x.dtype) for _ in range(self.states))
        parts = tuple(state) if self.states > 1 else (state,)
        for part in parts:
            if tuple(part.shape) != shape:
                raise ShapeError(f"{type(self).__name__}: the initial state must be {shape}, got {part.shape}")
        return parts

    def _run(self, x: Tensor, start: tuple[Tensor, ...], suffix: str,
             reverse: bool) -> tuple[tuple[Tensor, ...], Tensor]:
        weight = getattr(self, f"weight_hh_{suffix}")
        bias = getattr(self, f"bias_hh_{suffix}")
        projected = functional.linear(x, getattr(self, f"weight_ih_{suffix}"), getattr(self, f"bias_ih_{suffix}"))

        def step(state: tuple[Tensor, ...], x_t: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            new = self.cell(x_t, state, weight, bias)
            return new, new[0]

        return scan(step, start, projected, reverse=reverse)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"


class RNN(_Recurrent):
    """h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu (Elman 1990)."""

    gates = 1

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh",
                 **options: Any):
        if nonlinearity not in ("tanh", "relu"):
            raise AttributeValueError(f'RNN: nonlinearity is "tanh" or "relu", not {nonlinearity!r}')
        super().__init__(input_size, hidden_size, num_layers, **options)
        self.nonlinearity = nonlinearity

    def cell(self, x: Tensor, state: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        summed = x + functional.linear(state[0], weight, bias)
        return (F.tanh(summed) if self.nonlinearity == "tanh" else functional.relu(summed),)


class LSTM(_Recurrent):
    """Long short-term memory (Hochreiter & Schmidhuber 1997; with forget gates, Gers et al. 2000)."""

    gates, states = 4, 2

    def cell(self, x: Tensor, state: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        h, c = state
        i, f, g, o = F.split(x + functional.linear(h, weight, bias), 4, axis=-1)
        c = F.sigmoid(f) * c + F.sigmoid(i) * F.tanh(g)
        return F.sigmoid(o) * F.tanh(c), c


class GRU(_Recurrent):
    """Gated recurrent unit (Cho et al. 2014), the variant with the reset gate after the product."""

    gates = 3

    def cell(self, x: Tensor, state: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        (h,) = state
        xr, xz, xn = F.split(x, 3, axis=-1)
        hr, hz, hn = F.split(functional.linear(h, weight, bias), 3, axis=-1)
        z = F.sigmoid(xz + hz)
        n = F.tanh(xn + F.sigmoid(xr + hr) * hn)
        return (n + z * (h - n),)
