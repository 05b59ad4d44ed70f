"""Imports every op declaration, so that the registry is complete: `from . import ops`."""

from . import (
    ops_create,
    ops_elementwise,
    ops_linalg,
    ops_reduce,
    ops_shape,
)

__all__ = [
    "ops_create",
    "ops_elementwise",
    "ops_linalg",
    "ops_reduce",
    "ops_shape",
]
