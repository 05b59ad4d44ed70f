"""What compiled code and whoever calls it agree on: names, alignment, the layout of what is passed between them.

A module of its own because both halves need it: the compiler, and a process that only loads a saved program and that
should import little (`artifact.py`, `executable.py` and what they stand on: a test holds the list).
"""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np

ENTRY = "treadle_main"  # the function that a compiled program exports
PROFILE_HEADER = 4  # int64 words at the head of the profile slot: two timespecs
ALIGNMENT = 64  # of everything that has an address in the pointer table


@functools.cache
def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of a canonical dtype name, with ml_dtypes for what NumPy lacks (bfloat16, float8_*, int4...)."""
    extended = getattr(ml_dtypes, name, None)
    return np.dtype(name if extended is None else extended)


def aligned(nbytes: Any) -> Any:
    """`nbytes` rounded up to a whole number of cache lines."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
