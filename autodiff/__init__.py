"""Differentiation of the IR, mixed precision, recomputation: graph in, graph out.

Importing the package fills the `vjp` slot of every op.
"""

from . import vjp_elementwise, vjp_matmul, vjp_reduce, vjp_shape
from .reverse import backward, grad_graph, vjp_graph

__all__ = ["backward", "grad_graph", "vjp_elementwise", "vjp_graph", "vjp_matmul", "vjp_reduce", "vjp_shape"]
