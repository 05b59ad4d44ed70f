"""Initialisers: functions from a shape to a NumPy array, drawn from `td.random`'s seed.

`kaiming_uniform()` and so on make an initialiser; `init(shape, dtype)` draws. Fans follow torch: the
first dimension of a weight is the output, the second the input, the rest the receptive field.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...ir.dtypes import as_dtype
from ...ir.errors import ShapeError
from .. import random

Initializer = Callable[..., np.ndarray]


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """(fan in, fan out) of a weight of shape (out, in, *field)."""
    if len(shape) < 2:
        raise ShapeError(f"an initialiser by fan needs a weight of rank >= 2, got shape {tuple(shape)}")
    field = math.prod(shape[2:])
    return shape[1] * field, shape[0] * field


def _initializer(draw: Callable[[np.random.Generator, tuple[int, ...]], Any]) -> Initializer:
    def init(shape: Sequence[int], dtype: Any = "float32") -> np.ndarray:
        return np.asarray(draw(random.numpy_generator(), tuple(shape))).astype(as_dtype(dtype).np)

    return init


def constant(value: float) -> Initializer:
    """Every element `value`."""
    return _initializer(lambda rng, shape: np.full(shape, value))


def uniform(low: float = 0.0, high: float = 1.0) -> Initializer:
    """Uniform on [low, high)."""
    return _initializer(lambda rng, shape: low + (high - low) * rng.random(shape, np.float32))


def normal(mean: float = 0.0, std: float = 1.0) -> Initializer:
    """Normal with the given mean and standard deviation."""
    return _initializer(lambda rng, shape: mean + std * rng.standard_normal(shape, np.float32))


def truncated_normal(mean: float = 0.0, std: float = 1.0, low: float = -2.0, high: float = 2.0) -> Initializer:
    """Normal, redrawn until within [low, high] (absolute bounds, as torch's trunc_normal_)."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        x = mean + std * rng.standard_normal(shape, np.float32)
        while (outside := (x < low) | (x > high)).any():
            x[outside] = mean + std * rng.standard_normal(int(outside.sum()), np.float32)
        return x

    return _initializer(draw)


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
    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        width = spread(*fans(shape))
        return width * (2.0 * rng.random(shape, np.float32) - 1.0 if flat else rng.standard_normal(shape, np.float32))

    return _initializer(draw)


def orthogonal(gain: float = 1.0) -> Initializer:
    """A random (semi-)orthogonal matrix of the flattened weight (Saxe, McClelland & Ganguli 2014)."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        fans(shape)  # refuses vectors
        rows, columns = shape[0], math.prod(shape[1:])
        q, r = np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))
        q = q * np.sign(np.diagonal(r))  # makes the distribution uniform over orthogonal matrices
        return gain * (q if rows >= columns else q.T).reshape(shape)

    return _initializer(draw)
