"""How tensors become messages: packed so that one call of MPI moves a bucket, unpacked into the program's memory.

A tensor whose parts lie one after the other (split along its first dimension) is sent from where it is and received
where it belongs; other splits, and buckets of several tensors, are copied once into a message and once out of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

WIDENED = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")  # MPI has no arithmetic for these: summed in f32


def leading(shape: Sequence[int], dim: int) -> bool:
    """Whether parts along a dimension lie one after the other."""
    return math.prod(shape[:dim]) == 1


def flat(array: np.ndarray) -> np.ndarray:
    """A view of a contiguous array as one row."""
    return array.reshape(-1)


def as_bytes(array: np.ndarray) -> np.ndarray:
    """The array's memory as bytes: moving needs no dtype."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def cut(array: np.ndarray, dim: int, ranks: int) -> list[np.ndarray]:
    """Views of the equal parts along a dimension."""
    size = array.shape[dim] // ranks
    return [array[(slice(None),) * dim + (slice(r * size, (r + 1) * size),)] for r in range(ranks)]


def summed_as(dtype: np.dtype) -> np.dtype:
    """The dtype in which MPI adds such elements."""
    if dtype.name in WIDENED:
        return np.dtype(np.float32)
    return np.dtype(np.uint8) if dtype == np.bool_ else dtype


def pack(row: np.ndarray, arrays: Sequence[np.ndarray]) -> None:
    """The elements of arrays (or views of them), one after the other, into a row, in its dtype."""
    start = 0
    for array in arrays:
        row[start:start + array.size].reshape(array.shape)[...] = array
        start += array.size


def deal(row: np.ndarray, outs: Sequence[np.ndarray]) -> None:
    """The reverse of `pack`."""
    start = 0
    for out in outs:
        out[...] = row[start:start + out.size].reshape(out.shape)
        start += out.size
