"""Sizes that data decide: how many elements a mask selects, how many boxes are left.

Outside a trace such a size is an int. Inside it is a new symbolic size, whose value the compiled function counts and
then goes on with: one program (in phases, `ir.phases`) for every count. Equal counts of one trace are the same size, so
that `x[mask] * y[mask]` fits together.
"""

from __future__ import annotations

from typing import Any

from ..ir.cse import Numbering
from ..ir.dims import DataSize, Dim, Size
from ..ir.dtypes import bool_, int64
from ..ir.errors import TraceError
from ..ir.location import user_location
from .dispatch import apply, cast, constant
from .eager import builder
from .functions_elementwise import floor_divide, remainder
from .functions_reduce import count_nonzero
from .functions_shape import ravel, reshape
from .recording import Region, Trace
from .tensor import Tensor


class Counted:
    """The sizes that one trace has counted."""

    def __init__(self, trace: Trace):
        self.numbers = Numbering(trace.graph)
        self.sizes: dict[int, Size] = {}


def data_size(count: Tensor, what: str, most: Size | None = None) -> Size:
    """A size from an integer scalar: an int outside a trace, a new symbolic size inside.

    Args:
        count: how many; at least 0.
        what: what is counted, for messages.
        most: an upper bound, checked at run time.

    Raises:
        TraceError: inside the body of a loop or branch, where the shapes of its results would differ.
    """
    if not count.is_tracer:
        return int(count.numpy())
    trace = builder()
    if isinstance(trace, Region) or not isinstance(trace, Trace):
        raise TraceError(f"{what} decides a shape inside the body of a loop, a branch or a checkpoint, where every run "
                         "has to have the same shapes. Use instead: td.where, x.at[mask].set(value), td.top_k, or "
                         "compute it outside", user_location())
    value = trace.lift(count)
    counted = trace.counted = trace.counted or Counted(trace)
    number = counted.numbers.of(value)
    if number not in counted.sizes:
        size = _new_name(trace, len(counted.sizes))
        trace.emit("bind_size", (value,), {"size": size, "most": most, "what": what})
        counted.sizes[number] = size
    return counted.sizes[number]


def require_zero(count: Tensor, message: str) -> None:
    """At run time, an error with this message if the scalar is not 0: before anything uses a size that depends on it.

    Inside a trace only.
    """
    trace = builder()
    trace.emit("bind_size", (trace.lift(count),), {"size": _new_name(trace, 0), "most": 0, "what": message})


def _new_name(trace: Trace, number: int) -> Dim:
    taken = trace.graph.dims | {str(n.attrs["size"]) for n in trace.graph.nodes if n.op.name == "bind_size"}
    while f"count{number}" in taken:
        number += 1
    size = Dim.__new__(Dim)
    size._set({(DataSize(f"count{number}"),): 1})
    return size


def true_places(mask: Tensor, what: str = "the number of selected elements") -> Tensor:
    """The places of what is true in a mask (n,), in order: int64, as long as the data say."""
    mask = mask if mask.dtype.is_bool else cast(mask, bool_)
    result: Tensor = apply("true_places", mask, size=data_size(count_nonzero(mask), what, mask.shape[0]))
    return result


def true_indices(mask: Tensor, what: str = "the number of selected elements") -> list[Tensor]:
    """For a mask of any rank: one tensor per axis, the indices of what is true, in row-major order."""
    flat = true_places(ravel(mask), what)
    found: list[Tensor] = []
    rest: Any = flat
    for size in reversed(mask.shape[1:]):
        number = size_tensor(size)
        found.append(remainder(rest, number))
        rest = floor_divide(rest, number)
    return [*([rest] if mask.ndim else []), *reversed(found)]


def selected(x: Tensor, mask: Tensor) -> Tensor:
    """The slices of x (axes of the mask, *rest) where a traced mask holds: (count, *rest)."""
    flat = reshape(x, (mask.size, *x.shape[mask.ndim:]))
    places = true_places(ravel(mask), "the number of elements that a mask selects")
    result: Tensor = apply("take", flat, places, axis=0)
    return result


def size_tensor(size: Size) -> Tensor:
    """A size, perhaps a symbolic one, as an int64 scalar tensor."""
    if not isinstance(size, Dim):
        return constant(int(size), int64)
    result: Tensor = apply("size", of=size)
    return result


def is_data_size(size: Size) -> bool:
    """Whether data decide a size."""
    return isinstance(size, Dim) and any(isinstance(name, DataSize) for name in size.names)
