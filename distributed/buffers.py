"""How tensors become messages: packed so that one call of MPI moves a bucket, unpacked into the program's memory.

A tensor whose parts lie one after the other (split along its first dimension) is sent from where it is and received
where it belongs; only other splits, and buckets of several tensors, are copied.
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


def reducible(array: np.ndarray) -> np.ndarray:
    """The array in a dtype that MPI can add; the same array where it can."""
    if array.dtype.name in WIDENED:
        return array.astype(np.float32)
    return array.astype(np.uint8) if array.dtype == np.bool_ else array


def join(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """A bucket: one row of all elements; of a single array, the array itself."""
    rows = [flat(reducible(np.ascontiguousarray(a))) for a in arrays]
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def deal(row: np.ndarray, outs: Sequence[np.ndarray]) -> None:
    """The elements of a bucket back into arrays, in order."""
    start = 0
    for out in outs:
        out[...] = row[start:start + out.size].reshape(out.shape).astype(out.dtype, copy=False)
        start += out.size


def cut_for(arrays: Sequence[np.ndarray], dims: Sequence[int], ranks: int) -> np.ndarray:
    """(ranks, elements): what of all tensors goes to each rank, each tensor cut along its dimension."""
    rows = [np.stack(np.split(reducible(a), ranks, dim)).reshape(ranks, -1) for a, dim in zip(arrays, dims)]
    return rows[0] if len(rows) == 1 else np.concatenate(rows, 1)


def joined_from(rows: np.ndarray, outs: Sequence[np.ndarray], dims: Sequence[int]) -> None:
    """The reverse for gathered parts: rows[i] holds rank i's part of every tensor; joined along their dimensions."""
    ranks, start = len(rows), 0
    for out, dim in zip(outs, dims):
        size = out.size // ranks
        shape = (*out.shape[:dim], out.shape[dim] // ranks, *out.shape[dim + 1:])
        out[...] = np.concatenate([r.reshape(shape) for r in rows[:, start:start + size]], dim)
        start += size
