"""When a group may write an output over one of its inputs."""

from __future__ import annotations

from ..ir.graph import Value
from .group import Group, NotAligned, Recorder, anchor_axes, is_reduction
from .loops import refine
from .loops_index import Axis, Index, flatten, unflatten
from .lower_slots import Host, Kernel
from .order import sources_of
from .rows_domain import analyse


def takes_over(group: Group, output: Value, source: Value) -> bool:
    """Whether the kernel may store `output` in the memory of `source`.

    It may if it does not read the source, or reads each element just where it stores it (all outputs of an element
    are computed before the first is stored).
    """
    last = group.nodes[-1]
    if last.op.has("regions"):
        return False
    if isinstance(last.op.slots.get("lower"), (Kernel, Host)):
        return not any(source in (v, *sources_of(v)) for v in group.inputs)
    if any(source in sources_of(v) for v in group.inputs):
        return False  # read under another name, somewhere else
    if source not in group.inputs:
        return True
    if source.type.size != output.type.size or source.dtype != output.dtype:
        return False
    if group.anchor is not None and source in group.anchor.operands:
        return False
    try:
        recorder, position = _accesses(group, output)
    except NotAligned:
        return False
    return all(a.position == position for a in recorder.accesses if a.value is source)


def _accesses(group: Group, output: Value) -> tuple[Recorder, Index]:
    """What a group reads, and where it stores the output."""
    if group.anchor is not None:
        result = group.anchor.result
        axes = anchor_axes(result)
        position = flatten(axes, result.shape)
        recorder = Recorder([n for n in group.nodes if n is not group.anchor], {result: axes})
    elif any(is_reduction(n) for n in group.nodes):
        domain = analyse(group.nodes, group.outputs)
        if not domain.is_full(output) and domain.rows != domain.size:
            # a row value is stored after its row was read; reads of a row-shaped source are at the row as well
            return domain.recorder, flatten(domain.row_index(output), output.shape)
        if domain.is_full(output) and domain.levels[output] < domain.passes:
            raise NotAligned(f"{output!r} is stored before the last pass over its row, which may read the source again")
        return domain.recorder, flatten(domain.full_index(output), output.shape)
    else:
        shape = refine([v.shape for v in group.outputs])
        position = flatten([Index.of(Axis(n)) for n in shape], shape)
        recorder = Recorder(group.nodes, {})
    for v in group.outputs:
        recorder.value(v, unflatten(position, v.shape))
    return recorder, position
