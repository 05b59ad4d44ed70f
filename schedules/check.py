"""Checks of a lowered program: what must hold before memory is planned and a driver is made.

A failure here is a bug of lowering, never of the user; it is caught where it can still be named, since a wrong
address would show only as wrong numbers.
"""

from __future__ import annotations

from typing import Any

from ..ir.errors import VerifyError
from .program import (
    KINDS,
    Branch,
    Buffer,
    Copy,
    HostCall,
    KernelCall,
    Loop,
    LoopVar,
    Program,
    Step,
    View,
    While,
    accesses,
    buffer_of,
    children,
    walk,
)


def check_program(program: Program) -> None:
    """Raise VerifyError, naming step and buffer, if the program breaks a rule of program.py."""
    for buffer in _all_buffers(program):
        _check_buffer(buffer)
    if program.roles and len(program.roles) != len(program.inputs):
        raise VerifyError(f"{len(program.roles)} roles for {len(program.inputs)} inputs")
    _distinct("input", program.inputs)
    _distinct("output", program.outputs)
    inputs = {id(b) for b in program.inputs}
    written = {
        id(buffer.root) for step in walk(program.steps) for buffer, mode in accesses(step) if "w" in mode
    }
    for buffer in program.outputs:
        if buffer.kind != "output":
            raise VerifyError(f"output {buffer!r} has kind {buffer.kind!r}; copy it into an output buffer")
        if buffer.root.kind not in ("output", "input") or (buffer.root.kind == "input") != (
            id(buffer.root) in inputs
        ):
            raise VerifyError(f"output {buffer!r} may alias an input of the program, not {buffer.root!r}")
        if buffer.nbytes and id(buffer.root) not in written:
            raise VerifyError(f"output {buffer!r} is never written")
    names = [b.name for b in program.constants]
    if len(set(names)) != len(names):
        raise VerifyError("two constants have the same name; the saved file needs them distinct")
    _check_steps(program.steps, {})
    _check_order(program.steps)


def _distinct(kind: str, buffers: list[Buffer]) -> None:
    roots = [id(b.root) for b in buffers]
    if len(set(roots)) != len(roots):
        raise VerifyError(f"two {kind}s share one storage: {', '.join(map(repr, buffers))}")


def _all_buffers(program: Program) -> list[Buffer]:
    found = {id(b): b for b in [*program.inputs, *program.outputs]}
    for step in walk(program.steps):
        found.update((id(b), b) for b, _ in accesses(step))
    return list(found.values())


def _check_buffer(buffer: Buffer) -> None:
    if buffer.kind not in KINDS:
        raise VerifyError(f"{buffer!r} has kind {buffer.kind!r}; kinds are {', '.join(KINDS)}")
    if buffer.alias_of is not None and _is_more(buffer.nbytes, buffer.alias_of.nbytes):
        raise VerifyError(f"{buffer!r} is larger than the storage it takes over, {buffer.alias_of!r}")
    if buffer.kind == "constant" and buffer.alias_of is None:
        if buffer.data is None:
            raise VerifyError(f"constant {buffer!r} has no data")
        if buffer.data.shape != buffer.shape or buffer.data.dtype.name != buffer.dtype:
            found = f"{buffer.data.dtype.name}[{','.join(map(str, buffer.data.shape))}]"
            raise VerifyError(f"constant {buffer!r} holds {found}")


def _check_steps(steps: list[Step], extents: dict[int, Any]) -> None:
    """Arguments of every step: positions, kinds, and views within their buffers. `extents`: loop counters in scope."""
    for step in steps:
        if isinstance(step, (KernelCall, HostCall)):
            for position in (*step.reads, *step.writes):
                if not 0 <= position < len(step.args):
                    raise VerifyError(f"{step.label}: position {position} of {len(step.args)} arguments")
            for position in step.writes:
                root = buffer_of(step.args[position])
                if root is None or root.root.kind == "constant":
                    raise VerifyError(
                        f"{step.label}: argument {position} cannot be written: {step.args[position]!r}"
                    )
            for arg in step.args:
                _check_arg(arg, extents, step.label)
        elif isinstance(step, Copy):
            if step.src.nbytes != step.dst.nbytes:
                raise VerifyError(f"copy of {step.src!r} to {step.dst!r}: byte counts differ")
            _check_arg(step.src, extents, "copy")
            _check_arg(step.dst, extents, "copy")
        elif isinstance(step, (While, Branch)) and (step.pred.dtype != "bool" or step.pred.size != 1):
            raise VerifyError(f"predicate {step.pred!r} is not one bool")
        inner = dict(extents)
        if isinstance(step, (Loop, While)):
            inner[id(step.var)] = step.extent if isinstance(step, Loop) else None
        for body in children(step):
            _check_steps(body, inner)


def _check_arg(arg: object, extents: dict[int, Any], where: str) -> None:
    if isinstance(arg, LoopVar) and id(arg) not in extents:
        raise VerifyError(f"{where}: loop counter {arg!r} outside its loop")
    if not isinstance(arg, View):
        return
    low = high = arg.offset
    for term in arg.terms:
        if id(term.var) not in extents:
            raise VerifyError(f"{where}: loop counter {term.var!r} outside its loop, in {arg!r}")
        extent = extents[id(term.var)]
        if not all(isinstance(n, int) for n in (term.stride, extent or 0)):
            return  # known at run time
        if term.modulo is not None:
            first, last = 0, term.modulo - 1
        elif extent is None:
            return  # a while loop: no bound is known
        else:
            first, last = term.shift, term.shift + max(extent - 1, 0)
        ends = sorted((term.stride * first, term.stride * last))
        low, high = low + ends[0], high + ends[1]
    if _is_more(0, low) or _is_more(high + arg.size, arg.buffer.size):
        raise VerifyError(
            f"{where}: view {arg!r} reaches outside its buffer (elements {low} to {high + arg.size})"
        )


def _is_more(size: Any, other: Any) -> bool:
    """Whether one size exceeds another, as far as that is known here."""
    difference = size - other
    return isinstance(difference, int) and difference > 0


def _check_order(steps: list[Step]) -> None:
    """No step reads contents that an in-place update has already replaced.

    Only within one step list and what is nested in it: a carry's old name is legally read after its loop.
    """
    current: dict[int, Buffer] = {}  # root -> the name it was last written by, in this list

    def is_or_derives(buffer: Buffer | None, writer: Buffer) -> bool:
        while buffer is not None:
            if buffer is writer:
                return True
            buffer = buffer.alias_of
        return False

    for step in steps:
        reads = [(b, s) for s in walk([step]) for b, mode in accesses(s) if "r" in mode]
        for buffer, reader in reads:
            writer = current.get(id(buffer.root))
            if writer is not None and not is_or_derives(buffer, writer):
                label = getattr(reader, "label", "") or type(reader).__name__
                raise VerifyError(
                    f"{label} reads {buffer!r} after {writer!r} took over its storage; order it before"
                )
        if children(step):
            for body in children(step):
                _check_order(body)
            for inner in walk([step]):
                for buffer, mode in accesses(inner):
                    if "w" in mode:
                        current.pop(id(buffer.root), None)
            continue
        for buffer, mode in accesses(step):
            if "w" in mode:
                # A call that updates x in place under the name x makes x current; its alias is current by derivation.
                current[id(buffer.root)] = buffer
