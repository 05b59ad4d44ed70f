"""Differentiation of the IR, mixed precision, recomputation: graph in, graph out.

Importing the package fills the slots `vjp` and `amp` of every op.
"""

from . import (
    amp,
    remat,
    vjp_collective,
    vjp_control,
    vjp_conv,
    vjp_elementwise,
    vjp_index,
    vjp_matmul,
    vjp_nn,
    vjp_reduce,
    vjp_shape,
)
from .reverse import backward, grad_graph, vjp_graph

RULES = (amp, remat, vjp_collective, vjp_control, vjp_conv, vjp_elementwise, vjp_index, vjp_matmul, vjp_nn, vjp_reduce,
         vjp_shape)

__all__ = ["RULES", "backward", "grad_graph", "vjp_graph"]
