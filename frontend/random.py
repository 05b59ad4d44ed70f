"""Random numbers from an explicit state: the same seed gives the same numbers, eagerly, compiled, on every machine.

A `Generator` holds a state tensor u64[2]: key and counter of Philox4x32-10 (Salmon et al., SC 2011), a pure function
from (key, counter) to four words. A draw of n words uses n/4 counters, and the counter then moves past them. In a
trace the draws get static offsets from the counter and the state moves once, at the end, by an assignment, so a
compiled step draws fresh numbers at every call, and a recomputed activation draws the same again.

`seed`, `uniform`, `normal`... use the default generator of the process.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..ir.dims import Dim
from ..ir.dtypes import as_dtype, float32, float64, int64
from ..ir.errors import AttributeValueError, DTypeError
from ..ir.location import user_location
from . import eager
from .dispatch import apply, as_tensor, cast, normalize_shape
from .functions_create import arange
from .functions_elementwise import cos, less, log, sqrt
from .functions_index import take
from .functions_reduce import argsort
from .recording import current_trace
from .tensor import Tensor


class Generator:
    """A stream of random numbers.

    Args:
        seed: a number that names the stream; equal seeds give equal streams.

    Attributes:
        state: the tensor u64[2] (key, counter); part of a checkpoint.
    """

    def __init__(self, seed: int = 0):
        self.state = Tensor(_initial(seed), role="state", name="rng")

    def seed(self, seed: int) -> None:
        """Starts the stream of a seed."""
        self.state.assign(_initial(seed))

    def bits(self, shape: Any) -> Tensor:
        """Uniform 32-bit words, uint32."""
        shape = normalize_shape(shape)
        builder = eager.builder()
        words: Tensor = apply("random_bits", self.state, offset=builder.offset(self.state), shape=shape)
        count = math.prod(shape)
        builder.advance(self.state, count if isinstance(count, Dim) else -(-count // 4))
        return words

    def uniform(self, shape: Any = (), low: Any = 0.0, high: Any = 1.0, dtype: Any = float32) -> Tensor:
        """Uniform on [low, high): 24 random bits in float32, 53 in float64, 8 to 11 in the 16-bit floats."""
        dtype = _floating(dtype)
        shape = normalize_shape(shape)
        u = self._unit(shape, dtype)
        if isinstance(low, (int, float)) and isinstance(high, (int, float)):
            if low == 0 and high == 1:
                return u
            return u * (high - low) + low
        return u * (as_tensor(high, dtype) - as_tensor(low, dtype)) + as_tensor(low, dtype)

    def _unit(self, shape: tuple[Any, ...], dtype: Any) -> Tensor:
        if dtype == float64:
            pair = cast(self.bits((2, *shape)), float64)
            high, low = pair[0], pair[1]
            return (apply("floor", high * 2.0**-5) * 2.0**26 + apply("floor", low * 2.0**-6)) * 2.0**-53
        digits = {"float32": 24, "bfloat16": 8, "float16": 11}[dtype]
        words = apply("right_shift", self.bits(shape), as_tensor(32 - digits, "uint32"))
        return cast(cast(words, float32) * 2.0**-digits, dtype)

    def normal(self, shape: Any = (), mean: Any = 0.0, std: Any = 1.0, dtype: Any = float32) -> Tensor:
        """Normal with the given mean and standard deviation (Box & Muller, 1958: one of the pair)."""
        dtype = _floating(dtype)
        shape = normalize_shape(shape)
        wide = float64 if dtype == float64 else float32
        radius = self._unit(shape, wide)
        angle = self._unit(shape, wide)
        # 1 - u lies in (0, 1]: its logarithm is finite
        z = cast(sqrt(log(1.0 - radius) * -2.0) * cos(angle * (2.0 * math.pi)), dtype)
        if isinstance(std, (int, float)) and std == 1 and isinstance(mean, (int, float)) and mean == 0:
            return z
        return z * std + mean

    def bernoulli(self, p: Any = 0.5, shape: Any = None) -> Tensor:
        """True with probability p (a number or a tensor), bool; the shape defaults to that of p."""
        shape = (p.shape if isinstance(p, Tensor) else ()) if shape is None else shape
        return less(self.uniform(shape), p)

    def randint(self, low: int, high: int, shape: Any = (), dtype: Any = int64) -> Tensor:
        """Integers in [low, high). The largest spread is 2**32; the bias is below spread / 2**64.

        Raises:
            AttributeValueError: the interval is empty or too wide.
        """
        dtype = as_dtype(dtype)
        spread = int(high) - int(low)
        if not dtype.is_integer:
            raise DTypeError(f"randint needs an integer dtype, got {dtype}", user_location())
        if not 1 <= spread <= 2**32:
            raise AttributeValueError(f"randint: [{low}, {high}) must hold between 1 and 2**32 integers",
                                      user_location())
        words = cast(self.bits((2, *normalize_shape(shape))), as_dtype("uint64"))
        # (high word * 2**32 + low word) * spread / 2**64, without a 128-bit product (Lemire, 2019)
        low_part = words[1] * spread >> 32
        picked = (words[0] * spread + low_part) >> 32
        return cast(cast(picked, int64) + int(low), dtype)

    def permutation(self, x: Any) -> Tensor:
        """The integers below x in random order, or the rows of the tensor x in random order."""
        count = int(x) if isinstance(x, int) else as_tensor(x).shape[0]
        if current_trace() is None:
            order = as_tensor(np.argsort(self.bits((count,)).numpy(), kind="stable").astype(np.int64))
        else:
            order = argsort(self.bits((count,)))
        return order if isinstance(x, int) else take(x, order, axis=0)

    def choice(self, x: Any, shape: Any = ()) -> Tensor:
        """Elements of the vector x (or integers below x), drawn with replacement."""
        values = arange(x) if isinstance(x, int) else as_tensor(x)
        return take(values, self.randint(0, values.shape[0], shape), axis=0)

    def numpy_generator(self) -> np.random.Generator:
        """A NumPy generator that continues this stream (for initialisers); moves the stream."""
        words = self.bits((4,)).numpy()
        return np.random.Generator(np.random.Philox(key=[int(words[0]) << 32 | int(words[1]),
                                                         int(words[2]) << 32 | int(words[3])]))


def _initial(seed: int) -> np.ndarray:
    return np.array([int(seed) % 2**64, 0], np.uint64)


def _floating(dtype: Any) -> Any:
    dtype = as_dtype(dtype)
    if dtype not in ("float64", "float32", "float16", "bfloat16"):
        raise DTypeError(f"random numbers come in floats of 16 to 64 bits, not {dtype}; cast them", user_location())
    return dtype


default = Generator(0)
"""The generator of the functions below."""


def default_generator() -> Generator:
    """The generator of the functions of this module."""
    return default


def seed(seed: int) -> None:
    """Starts the default generator's stream of a seed."""
    default.seed(seed)


def uniform(shape: Any = (), low: Any = 0.0, high: Any = 1.0, dtype: Any = float32) -> Tensor:
    """Uniform on [low, high)."""
    return default.uniform(shape, low, high, dtype)


def normal(shape: Any = (), mean: Any = 0.0, std: Any = 1.0, dtype: Any = float32) -> Tensor:
    """Normal with the given mean and standard deviation."""
    return default.normal(shape, mean, std, dtype)


def bernoulli(p: Any = 0.5, shape: Any = None) -> Tensor:
    """True with probability p, bool."""
    return default.bernoulli(p, shape)


def randint(low: int, high: int, shape: Any = (), dtype: Any = int64) -> Tensor:
    """Integers in [low, high)."""
    return default.randint(low, high, shape, dtype)


def permutation(x: Any) -> Tensor:
    """The integers below x, or the rows of x, in random order."""
    return default.permutation(x)


def choice(x: Any, shape: Any = ()) -> Tensor:
    """Elements of the vector x (or integers below x), drawn with replacement."""
    return default.choice(x, shape)


def numpy_generator() -> np.random.Generator:
    """A NumPy generator that continues the default stream."""
    return default.numpy_generator()
