"""What can be wrong with a plan, said when it is made, and when it meets a mesh and a model."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..ir.errors import AttributeValueError
from .mesh import Mesh, MeshError
from .pipeline import SCHEDULES
from .sharding import Sharding

if TYPE_CHECKING:
    from .plans import Plan


def _whole(x: Any, least: int) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= least


def _axis(x: Any) -> bool:
    return x is None or isinstance(x, str) and x.isidentifier()


def _axes(x: Any) -> bool:
    return _axis(x) or isinstance(x, (tuple, list)) and len(x) > 0 and all(_axis(a) and a is not None for a in x)


WHOLE = "a whole number of at least 1"
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "data": (_axes, "the name of a mesh axis, several in a tuple, or None"),
    "zero_over": (_axes, "one of the axes `data`, several in a tuple, or None"),
    "pipe": (_axis, "the name of a mesh axis, or None"),
    "zero": (lambda x: _whole(x, 0) and x <= 3, "a ZeRO stage: 0 (off), 1, 2 or 3"),
    "schedule": (lambda x: x in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
    "chunks": (lambda x: _whole(x, 1), WHOLE),
    "bucket_bytes": (lambda x: _whole(x, 1), f"bytes, {WHOLE}"),
    "weight": (lambda x: x is None or callable(x), "a function of the batch, or None"),
    "reduce_dtype": (lambda x: x in (None, "bfloat16", "float16"), "'bfloat16', 'float16' or None"),
    "memory": (lambda x: x is None or isinstance(x, (int, float)) and x > 0 and not math.isnan(x),
               "a positive number of bytes, or None"),
    "accumulate": (lambda x: x is None or _whole(x, 1), f"{WHOLE}, or None"),
    "cut": (lambda x: x is None or isinstance(x, Sequence) and all(_whole(i, 0) for i in x), "whole numbers, or None"),
    "mesh": (lambda x: x is None or isinstance(x, Mapping), "axes and their ranks, such as {'data': 2}, or None"),
    "shard": (lambda x: isinstance(x, Mapping), "patterns of parameter names with a mesh axis or None for each "
                                                "dimension, such as {'*.up.weight': ('tensor', None)}"),
}


def check_fields(plan: Plan) -> None:
    """That each field is of its kind.

    Raises:
        AttributeValueError: it is not; the message names it and says what is expected.
        MeshError: `mesh` is none, or an entry of `shard` is no axis with a number of blocks.
    """
    for name, (fits, expected) in FIELDS.items():
        value = getattr(plan, name)
        if not fits(value):
            raise AttributeValueError(f"Plan: {name} is {value!r}; expected {expected}")
    if plan.chunks > 1 and plan.schedule != "interleaved":
        raise AttributeValueError(f"Plan: chunks is {plan.chunks}, but the schedule {plan.schedule!r} has one stage on "
                                  "each device; use schedule='interleaved', or chunks=1")
    if plan.mesh is not None:
        Mesh(plan.mesh)
    for pattern, dims in plan.shard.items():
        entries = [] if isinstance(dims, str) or not isinstance(dims, Sequence) else [
            part for entry in dims for part in (entry if isinstance(entry, (tuple, list)) else (entry,))]
        if not isinstance(pattern, str) or not entries or not all(e is None or isinstance(e, str) for e in entries):
            raise AttributeValueError(f"Plan: shard has {pattern!r}: {dims!r}; expected for each dimension of the "
                                      "parameter a mesh axis, several, or None, such as ('tensor', None)")
        Sharding(tuple(dims))


def check_fit(plan: Plan, mesh: Mesh, names: Sequence[str]) -> None:
    """That a plan fits the mesh and the model.

    Raises:
        MeshError: it names an axis that is not there, or a pattern decides over no parameter.
    """
    for pattern, dims in plan.shard.items():
        for axis in Sharding(tuple(dims)).split_axes if mesh.size > 1 else ():
            if axis not in mesh:
                raise MeshError(f"the plan splits {pattern!r} over the mesh axis {axis!r}, which this mesh has not: it "
                                f"is {mesh}. Give the mesh that axis ({axis!r}: 1 leaves these parameters whole), or "
                                "leave the pattern out")
    if plan.zero and mesh.size > 1 and not plan.zero_axes(mesh):
        over = "" if plan.zero_over is None else f" that is also in zero_over, {plan.zero_over!r},"
        raise MeshError(f"ZeRO needs the batch's axis {plan.data!r}{over} in the mesh, which is {mesh}: add it, or say "
                        "Plan(data=...) which it is")
    if plan.pipe in mesh and not (plan.data is None or isinstance(plan.data, str)):
        raise MeshError(f"under a pipeline the batch is split over one mesh axis, not {plan.data!r}: give the mesh one "
                        "axis for data, or leave the pipeline out")
    first: dict[str, str] = {}
    for pattern in plan.shard:
        found = fnmatch.filter(names, pattern)
        if not found:
            some = ", ".join(list(names)[:8])
            raise MeshError(f"the plan's pattern {pattern!r} matches no parameter; there are: {some}...")
        if all(name in first for name in found):
            raise MeshError(f"the plan's pattern {pattern!r} decides over no parameter: {first[found[0]]!r} stands in "
                            f"front of it and matches {found[0]}, too, and the first match counts. Put the narrower "
                            "pattern first")
        for name in found:
            first.setdefault(name, pattern)
