"""The driver: one host function that runs a whole program by calling its kernels.

    int __tvm_ffi_treadle_main(void* self, TVMFFIAny* args, int num_args, TVMFFIAny* result)

It takes one argument, the address of a table of pointers (`Slots`): the arena, every input, every output
that is not an input's storage, every constant. Python fills the table; a call then costs the same for
three parameters or three hundred. Temps sit at fixed offsets of the arena (`plan.py`). Loops, whiles and branches of
the program are loops, whiles and branches here; nothing is interpreted at run time.

(A Relax VM executable was the first idea. Its bytecode has no loop but recursion, and it pays 0.2 us per
kernel and per argument where a direct call pays a few ns.)

With `profile=True` each kernel call is timed by the C library's monotonic clock, into one more slot.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import PrimType, Var
from tvm.script import tirx as T
from tvm.tirx import stmt as tir_stmt

from ..ir.rounds import ASIDE, DONE
from . import host
from .abi import ENTRY, PROFILE_HEADER
from .codegen import on_cpu
from .plan import MemoryPlan, Slots
from .program import (
    Arg,
    Branch,
    Buffer,
    Copy,
    HostCall,
    KernelCall,
    Loop,
    LoopVar,
    Program,
    SizeArg,
    Step,
    View,
    While,
    extent_of,
    runs,
    storage,
)
from .sizes import expression, variable

_ARG_VALUE = 15  # field of a TVMFFIAny: its value as a pointer
_INT64_ELEMENT = 17  # element of an array of int64
_CLOCK_MONOTONIC = 1


def build_driver(
    program: Program, plan: MemoryPlan, symbols: dict[int, str], profile: bool = False
) -> tuple[tirx.PrimFunc, list[Step]]:
    """The driver of a program as a TIR function in packed calling convention, and the steps it times, in the
    order of their cells in the profile slot (after the header: nanoseconds and count of each; none without `profile`).

    `symbols` maps the id of each kernel call's PrimFunc to the C symbol of its compiled form.
    """
    handle = T.handle().ty
    params = [
        Var("self", handle),
        Var("args", handle),
        Var("num_args", PrimType("int32")),
        Var("result", handle),
    ]
    emitter = _Emitter(plan, Slots.of(program), symbols, params[1], profile)
    body = tir_stmt.SeqStmt(
        [
            *emitter.prologue(),
            *(emitter.step(step) for step in program.steps if runs(step)),
            tir_stmt.Return(tirx.const(0, "int32")),
        ]
    )
    function = tirx.PrimFunc(params, on_cpu(body), ret_type=PrimType("int32"))
    function = function.with_attr("global_symbol", f"__tvm_ffi_{ENTRY}").with_attr("calling_conv", 1)
    return function, emitter.timed


def _int64(value: Any) -> Any:
    return tirx.const(value, "int64") if isinstance(value, int) else expression(value)


def _sequence(statements: list[Any]) -> Any:
    return (
        tir_stmt.SeqStmt(statements) if len(statements) > 1 else statements[0] if statements else _nothing()
    )


def _nothing() -> Any:
    return tir_stmt.Evaluate(tirx.const(0, "int32"))


class _Emitter:
    """Turns steps into TIR statements. Addresses are untyped handles: base pointer plus byte offset."""

    def __init__(self, plan: MemoryPlan, slots: Slots, symbols: dict[int, str], args: Any, profile: bool):
        self.plan, self.slots, self.symbols, self.args = plan, slots, symbols, args
        handle = T.handle().ty
        self.table, self.arena = Var("table", handle), Var("arena", handle)
        self.counters: dict[int, Any] = {}  # id(LoopVar) -> the expression of its value
        self.addresses: dict[int, Any] = {}  # id of a buffer, or view without loop counters -> its address
        self.timed: list[Step] = []
        self.times = None
        if profile:
            self.times = tirx.decl_buffer((1 << 30,), "int64", name="times")

    def prologue(self) -> list[Any]:
        handle = T.handle().ty
        found = [
            tir_stmt.Bind(self.table, T.tvm_struct_get(self.args, 0, _ARG_VALUE, handle)),
            tir_stmt.Bind(self.arena, self.slot(0)),
            *(tir_stmt.Bind(variable(name), self.cell(at)) for name, at in self.slots.sizes.items()),
        ]
        if self.times is not None:
            found.append(
                tir_stmt.DeclBuffer(self.times, data=self.typed(self.slot(self.slots.profile), "int64"))
            )
        return found

    # -- addresses ----------------------------------------------------------------------------------------

    def cell(self, index: int) -> Any:
        return T.tvm_struct_get(self.table, index, _INT64_ELEMENT, "int64")

    def slot(self, index: int) -> Any:
        return T.reinterpret(T.handle().ty, self.cell(index))

    def typed(self, address: Any, dtype: str) -> Any:
        return T.reinterpret(tvm.ir.PointerType(PrimType(dtype), "global"), address)

    def address(self, arg: Buffer | View) -> Any:
        """The address of a buffer or view, as a handle expression."""
        fixed = not (isinstance(arg, View) and arg.terms)
        found = self.addresses.get(id(arg)) if fixed else None
        if found is None:
            found = self.compute_address(arg)
            if fixed:
                self.addresses[id(arg)] = found
        return found

    def compute_address(self, arg: Buffer | View) -> Any:
        root = storage(arg).root
        slot = self.slots.index.get(id(root))
        base = self.arena if slot is None else self.slot(slot)
        if slot is None and id(root) in self.slots.temps:
            offset = self.cell(self.slots.temps[id(root)])
        else:
            offset = _int64(self.plan.offset(root) if slot is None else 0)
        if isinstance(arg, View):
            width = arg.buffer.itemsize
            offset = offset + _int64(arg.offset * width)
            for term in arg.terms:
                count = self.counters[id(term.var)] + _int64(term.shift)
                if term.modulo is not None:
                    count = tirx.truncmod(count, _int64(term.modulo))
                offset = offset + count * _int64(term.stride * width)
        if isinstance(offset, tirx.IntImm) and offset.value == 0:
            return base
        return T.handle_add_byte_offset(base, offset)

    def flag(self, buffer: Buffer) -> tuple[Any, Any]:
        """(declaration, condition): the bool in `buffer` as a fresh load."""
        cell = tirx.decl_buffer((1,), "uint8", name="flag")
        declared = tir_stmt.DeclBuffer(cell, data=self.typed(self.address(buffer), "uint8"))
        return declared, cell[0] != tirx.const(0, "uint8")

    # -- steps --------------------------------------------------------------------------------------------

    def steps(self, steps: list[Step]) -> Any:
        return _sequence([self.step(step) for step in steps if runs(step)])

    def step(self, step: Step) -> Any:
        statement = getattr(self, f"emit_{type(step).__name__}")(step)
        written = extent_of(step)
        return statement if isinstance(written, int) else tir_stmt.IfThenElse(
            expression(written) > _int64(0), statement, None)

    def emit_KernelCall(self, step: KernelCall) -> Any:
        call = T.call_extern("int32", self.symbols[id(step.kernel)], *(self.value(arg) for arg in step.args))
        failed = tir_stmt.Evaluate(T.tvm_throw_last_error())
        return self.timing(step, tir_stmt.IfThenElse(call != tirx.const(0, "int32"), failed, None))

    def value(self, arg: Arg) -> Any:
        if isinstance(arg, SizeArg):
            return variable(arg.name)
        return self.counters[id(arg)] if isinstance(arg, LoopVar) else self.address(arg)

    def emit_HostCall(self, step: HostCall) -> Any:
        values = [self.value(arg) for arg in step.args]
        numbers = [
            v if isinstance(a, LoopVar) else T.reinterpret("int64", v) for a, v in zip(step.args, values)
        ]
        number = self.cell(self.slots.functions[step.function])
        call = tir_stmt.Evaluate(T.call_packed(host.DISPATCH, number, _described(step), *numbers))
        return self.timing(step, call if step.kernel is None else self.by_itself(step, values, call))

    def by_itself(self, step: HostCall, values: list[Any], call: Any) -> Any:
        """With a record the kernel first; the call unless the record then says that all is done."""
        at = self.slots.records[step.function]
        stage = tirx.decl_buffer((1,), "int64", name="stage")
        kernel = T.call_extern("int32", self.symbols[id(step.kernel)], *values, self.slot(at))
        recorded = self.cell(at) != _int64(0)
        left = T.if_then_else(recorded, stage[0], _int64(ASIDE)) != _int64(DONE)
        return tir_stmt.SeqStmt(
            [
                tir_stmt.IfThenElse(recorded, tir_stmt.Evaluate(kernel), None),
                tir_stmt.DeclBuffer(stage, data=self.typed(self.slot(at), "int64")),
                tir_stmt.IfThenElse(left, call, None),
            ]
        )

    def emit_Copy(self, step: Copy) -> Any:
        source, target = self.address(step.src), self.address(step.dst)
        if tvm_ffi.structural_equal(source, target):
            return _nothing()
        call = T.call_extern("handle", "memcpy", target, source, _int64(step.dst.nbytes))
        return self.timing(step, tir_stmt.Evaluate(call))

    def emit_Loop(self, step: Loop) -> Any:
        counter = Var(step.var.name, PrimType("int64"))
        self.counters[id(step.var)] = counter
        return tir_stmt.For(
            counter, _int64(0), _int64(step.extent), tir_stmt.ForKind.SERIAL, self.steps(step.body)
        )

    def emit_While(self, step: While) -> Any:
        """`cell = 0; condition; while pred: body; cell += 1; condition`: the condition is laid down twice, since TIR
        tests at the head of the loop."""
        cell = tirx.decl_buffer((1,), "int64", name=step.var.name, scope="local")
        self.counters[id(step.var)] = cell[0]
        declared, holds = self.flag(step.pred)
        advance = tir_stmt.BufferStore(cell, cell[0] + _int64(1), [0])
        body = _sequence([self.steps(step.body), advance, self.steps(step.condition)])
        return tir_stmt.SeqStmt(
            [
                tir_stmt.AllocBuffer(cell),
                tir_stmt.BufferStore(cell, _int64(0), [0]),
                self.steps(step.condition),
                declared,
                tir_stmt.While(holds, body),
            ]
        )

    def emit_Branch(self, step: Branch) -> Any:
        declared, holds = self.flag(step.pred)
        orelse = self.steps(step.orelse) if step.orelse else None
        return tir_stmt.SeqStmt([declared, tir_stmt.IfThenElse(holds, self.steps(step.then), orelse)])

    # -- profile ------------------------------------------------------------------------------------------

    def timing(self, step: Step, statement: Any) -> Any:
        """In profile mode: the statement between two readings of the clock, added to the cell of its call site."""
        if self.times is None:
            return statement
        cell = PROFILE_HEADER + 2 * len(self.timed)
        self.timed.append(step)
        times, base = self.times, self.slot(self.slots.profile)

        def read(word: int) -> Any:
            place = T.handle_add_byte_offset(base, _int64(8 * word)) if word else base
            return tir_stmt.Evaluate(T.call_extern("int32", "clock_gettime", _CLOCK_MONOTONIC, place))

        elapsed = (times[2] - times[0]) * _int64(1_000_000_000) + times[3] - times[1]
        return tir_stmt.SeqStmt(
            [
                read(0),
                statement,
                read(2),
                tir_stmt.BufferStore(times, times[cell] + elapsed, [cell]),
                tir_stmt.BufferStore(times, times[cell + 1] + _int64(1), [cell + 1]),
            ]
        )


def _described(call: HostCall) -> str:
    """The arguments of a host call, as `host.py` reads them."""
    parts = []
    for i, arg in enumerate(call.args):
        if isinstance(arg, (LoopVar, SizeArg)):
            parts.append("i")
        else:
            parts.append(f"{'w' if i in call.writes else 'r'}:{arg.dtype}[{','.join(map(str, arg.shape))}]")
    return ";".join(parts)
