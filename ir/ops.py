"""Imports every op declaration, so that the registry is complete: `from . import ops`."""

from . import (
    ops_collective,
    ops_control,
    ops_conv,
    ops_create,
    ops_elementwise,
    ops_index,
    ops_linalg,
    ops_nn,
    ops_pool,
    ops_reduce,
    ops_remat,
    ops_shape,
    ops_size,
)

__all__ = [
    "ops_collective",
    "ops_control",
    "ops_conv",
    "ops_create",
    "ops_elementwise",
    "ops_index",
    "ops_linalg",
    "ops_nn",
    "ops_pool",
    "ops_reduce",
    "ops_remat",
    "ops_shape",
    "ops_size",
]
