"""The ranks of a job, and what a script exchanges between them besides training steps.

    if td.distributed.is_main():
        print(loss)
    correct = td.distributed.all_reduce({"correct": right, "of": len(labels)})      # the sums over the ranks
    stop = td.distributed.broadcast(patience.is_over)                               # as rank 0 has it

All of these but `rank`, `world_size` and `is_main` are called by every rank, in the same order. On one process they
give back what they were given. They are for metrics and decisions, not for gradients: values are pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..distributed import Mesh, MeshError
from ..distributed.errors import DistributedError
from ..distributed.process import load_mpi, started_by_mpi
from ..distributed.values import exchange
from ..ir.errors import ArgumentsError, AttributeValueError
from ..ir.location import user_location
from . import tree
from .tensor import Tensor

REDUCTIONS: dict[str, Callable[..., Any]] = {"sum": np.sum, "mean": np.mean, "max": np.max, "min": np.min}


def world_size() -> int:
    """Processes of this job: 1 unless an MPI launcher started it."""
    return int(load_mpi().COMM_WORLD.size) if started_by_mpi() else 1


def rank() -> int:
    """This process's number in the job, from 0."""
    return int(load_mpi().COMM_WORLD.rank) if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is rank 0: the one that prints, and writes what only one should."""
    return rank() == 0


def make_mesh(axes: Mapping[str, int]) -> Mesh:
    """A mesh of this job's processes.

    Args:
        axes: name -> ranks along it, the axis that talks most last: its ranks are neighbours. One may be -1 and takes
            what the others leave. `{}` is one process.

    Raises:
        MeshError: the sizes do not multiply to the number of processes, or are no positive whole numbers.
        LaunchError: the process was started by an MPI launcher, and mpi4py is missing.
    """
    if not isinstance(axes, Mapping):
        Mesh(axes)  # says what is wrong
    world, sizes = world_size(), dict(axes)
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise MeshError(f"only one mesh axis may be -1, got {', '.join(open_axes)}")
    for name in open_axes:
        rest = Mesh({k: v for k, v in sizes.items() if k != name}).size
        if world % rest:
            raise MeshError(f"{world} processes do not divide into groups of {rest} ({sizes}); start a multiple of "
                            f"{rest}")
        sizes[name] = world // rest
    mesh = Mesh(sizes)
    mesh.check_world(world)
    return mesh


def barrier() -> None:
    """Waits until every rank is here.

    Raises:
        DistributedError: another rank failed, or does not come within TREADLE_COMM_TIMEOUT seconds.
    """
    all_gather(None, "barrier")


def all_gather(value: Any, what: str = "all_gather") -> list[Any]:
    """The values of all ranks, in the order of the ranks: numbers, strings, arrays, tensors, containers of them.

    Args:
        what: names the call in errors.

    Raises:
        ArgumentsError: the value cannot be pickled.
        DistributedError: another rank failed, does not come, or calls another of these functions.
    """
    leaves, structure = tree.flatten(value)
    hosted = tree.unflatten(structure, [x.numpy() if isinstance(x, Tensor) else x for x in leaves])
    return [hosted] if world_size() == 1 else exchange(what, hosted)


def broadcast(value: Any, root: int = 0) -> Any:
    """The value that rank `root` gave, on every rank; those of the others do not count. Tensors come as arrays.

    Raises:
        AttributeValueError: there is no such rank.
        As `all_gather`.
    """
    if isinstance(root, bool) or not isinstance(root, int) or not 0 <= root < world_size():
        raise AttributeValueError(f"broadcast: root is {root!r}; this job has the ranks 0 to {world_size() - 1}",
                                  user_location())
    return all_gather(value if rank() == root else None, f"broadcast from rank {root}")[root]


def all_reduce(value: Any, op: str = "sum") -> Any:
    """The sum (mean, max, min) over the ranks of each number or array in a container, the same bits on every rank.

    Args:
        value: a number, an array or tensor, or a dict, list or tuple of them; of one structure and one shape on every
            rank. Numbers come back as Python's, arrays and tensors as arrays.
        op: "sum", "mean", "max" or "min"; the mean is that of the ranks, each of which counts as much.

    Raises:
        AttributeValueError: there is no such `op`. ArgumentsError: something is neither number nor array.
        DistributedError: as `all_gather`, or the ranks gave values of different structures or shapes.
    """
    if op not in REDUCTIONS:
        raise AttributeValueError(f"all_reduce: op is {op!r}; expected {', '.join(REDUCTIONS)}", user_location())
    leaves, structure = tree.flatten(value)
    arrays = [np.asarray(x) for x in leaves]
    for x, array in zip(leaves, arrays):
        if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
            raise ArgumentsError(f"all_reduce: {x!r} is neither a number nor an array of numbers", user_location())
    found = all_gather((str(structure), arrays), f"all_reduce of {op}")
    kinds = [f"{text} of the shapes {', '.join(str(list(a.shape)) for a in own)}" for text, own in found]
    if others := [r for r, kind in enumerate(kinds) if kind != kinds[0]]:
        raise DistributedError(f"all_reduce: the ranks gave different things: rank 0 {kinds[0]}, rank {others[0]} "
                               f"{kinds[others[0]]}", user_location())
    made = [REDUCTIONS[op](np.stack(row), axis=0) for row in zip(*(own for _, own in found))]
    return tree.unflatten(structure, [m.item() if isinstance(x, (bool, int, float)) else np.asarray(m)
                                      for x, m in zip(leaves, made)])

