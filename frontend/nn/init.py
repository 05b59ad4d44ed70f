"""Initialisers: functions from a shape to a NumPy array, drawn from `td.random`'s seed.

`kaiming_uniform()` and so on make an initialiser; `init(shape, dtype)` draws, `init.later(shape, dtype)` takes its
place in the random stream and draws when it is asked, the whole or a part. Fans follow torch: the first dimension of a
weight is the output, the second the input, the rest the receptive field.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...ir.dtypes import as_dtype
from ...ir.errors import ShapeError
from ...ir.types import TensorType
from .. import random
from ..pending import everything

Initializer = Callable[..., np.ndarray]


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """(fan in, fan out) of a weight of shape (out, in, *field)."""
    if len(shape) < 2:
        raise ShapeError(f"an initialiser by fan needs a weight of rank >= 2, got shape {tuple(shape)}")
    field = math.prod(shape[2:])
    return shape[1] * field, shape[0] * field


Draw = Callable[[np.random.Generator, tuple[int, ...], tuple[int, ...]], Any]
"""(generator, shape to draw, shape of the whole tensor) -> array."""
CHUNK = 1 << 18  # elements that are drawn at a time


@dataclass(frozen=True)
class Drawing:
    """Numbers to be drawn: a `pending.Source`.

    `by_rows`: rows can be drawn one after the other, so a part costs the memory of a part. `blank`: a row of zeros.
    """

    draw: Draw
    state: Mapping[str, Any]
    type: TensorType
    by_rows: bool
    blank: int | None

    def part(self, place: tuple[slice, ...]) -> np.ndarray:
        """The elements of a part."""
        rng = np.random.Generator(np.random.Philox(0))
        rng.bit_generator.state = self.state
        shape, dtype = tuple(map(int, self.type.shape)), self.type.dtype.np
        if not self.by_rows or not shape:
            return np.asarray(self.draw(rng, shape, shape)).astype(dtype)[place]
        into = np.empty([s.stop - s.start for s in place], dtype)
        first, last = place[0].start, place[0].stop
        step = max(1, CHUNK // max(1, math.prod(shape[1:])))
        for start in range(0, last, step):
            stop = min(start + step, last)
            rows = np.asarray(self.draw(rng, (stop - start, *shape[1:]), shape))
            if self.blank is not None and start <= self.blank < stop:
                rows[self.blank - start] = 0
            low = max(start, first)
            if low < stop:
                kept = (slice(low - start, None), *place[1:])
                into[low - first:stop - first] = rows[kept]
        return into


@dataclass(frozen=True)
class _Drawn:
    """An initialiser."""

    draw: Draw
    by_rows: bool = True
    blank: int | None = None

    def __call__(self, shape: Sequence[int], dtype: Any = "float32") -> np.ndarray:
        drawing = self.later(shape, dtype)
        return drawing.part(everything(drawing.type))

    def later(self, shape: Sequence[int], dtype: Any = "float32") -> Drawing:
        """The same numbers when they are asked for."""
        state = random.numpy_generator().bit_generator.state
        return Drawing(self.draw, state, TensorType(tuple(shape), as_dtype(dtype)), self.by_rows, self.blank)


def constant(value: float) -> Initializer:
    """Every element `value`."""
    return _Drawn(lambda rng, shape, whole: np.full(shape, value))


def uniform(low: float = 0.0, high: float = 1.0) -> Initializer:
    """Uniform on [low, high)."""
    return _Drawn(lambda rng, shape, whole: low + (high - low) * rng.random(shape, np.float32))


def normal(mean: float = 0.0, std: float = 1.0, blank: int | None = None) -> Initializer:
    """Normal with the given mean and standard deviation; the row `blank` is zero."""
    return _Drawn(lambda rng, shape, whole: mean + std * rng.standard_normal(shape, np.float32), blank=blank)


def truncated_normal(mean: float = 0.0, std: float = 1.0, low: float = -2.0, high: float = 2.0) -> Initializer:
    """Normal, redrawn until within [low, high] (absolute bounds, as torch's trunc_normal_)."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...], whole: tuple[int, ...]) -> np.ndarray:
        x = mean + std * rng.standard_normal(shape, np.float32)
        while (outside := (x < low) | (x > high)).any():
            x[outside] = mean + std * rng.standard_normal(int(outside.sum()), np.float32)
        return x

    return _Drawn(draw, by_rows=False)


def xavier_uniform(gain: float = 1.0) -> Initializer:
    """Uniform with variance gain² · 2 / (fan in + fan out) (Glorot & Bengio 2010)."""
    return _by_fan(lambda fan_in, fan_out: gain * math.sqrt(6.0 / (fan_in + fan_out)), flat=True)


def xavier_normal(gain: float = 1.0) -> Initializer:
    """Normal with variance gain² · 2 / (fan in + fan out) (Glorot & Bengio 2010)."""
    return _by_fan(lambda fan_in, fan_out: gain * math.sqrt(2.0 / (fan_in + fan_out)), flat=False)


def kaiming_uniform(gain: float = math.sqrt(2.0), fan: str = "in") -> Initializer:
    """Uniform with variance gain² / fan; gain √2 suits ReLU (He et al. 2015)."""
    return _by_fan(lambda *both: gain * math.sqrt(3.0 / both[fan == "out"]), flat=True)


def kaiming_normal(gain: float = math.sqrt(2.0), fan: str = "in") -> Initializer:
    """Normal with variance gain² / fan; gain √2 suits ReLU (He et al. 2015)."""
    return _by_fan(lambda *both: gain / math.sqrt(both[fan == "out"]), flat=False)


he_uniform, he_normal = kaiming_uniform, kaiming_normal


def _by_fan(spread: Callable[[int, int], float], flat: bool) -> Initializer:
    def draw(rng: np.random.Generator, shape: tuple[int, ...], whole: tuple[int, ...]) -> np.ndarray:
        width = spread(*fans(whole))
        return width * (2.0 * rng.random(shape, np.float32) - 1.0 if flat else rng.standard_normal(shape, np.float32))

    return _Drawn(draw)


def orthogonal(gain: float = 1.0) -> Initializer:
    """A random (semi-)orthogonal matrix of the flattened weight (Saxe, McClelland & Ganguli 2014)."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...], whole: tuple[int, ...]) -> np.ndarray:
        fans(shape)  # refuses vectors
        rows, columns = shape[0], math.prod(shape[1:])
        q, r = np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))
        q = q * np.sign(np.diagonal(r))  # makes the distribution uniform over orthogonal matrices
        return gain * (q if rows >= columns else q.T).reshape(shape)

    return _Drawn(draw, by_rows=False)
