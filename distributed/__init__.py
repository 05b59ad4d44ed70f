"""Partitions graphs over the ranks of a mesh and runs them together.

    graph --propagate, solve--> a sharding for every value --partition--> the program of each rank, with collectives

Importing the package fills the slot `shard` of every op. MPI is imported when a job is joined (comm.py), not before.
"""

from ..ir import ops as _declared  # a rule fills a slot of a record that exists
from . import shard_elementwise, shard_index, shard_linalg, shard_nn, shard_shape
from .mesh import Mesh, MeshError
from .sharding import Sharding

RULES = (shard_elementwise, shard_index, shard_linalg, shard_nn, shard_shape)

__all__ = ["RULES", "Mesh", "MeshError", "Sharding"]
