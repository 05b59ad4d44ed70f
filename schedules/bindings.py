"""A pass over lowered TIR: numbers that kernels bound to variables (`lower_slots.let`) pass through memory.

TVM's passes and its code generator replace a variable by what it is bound to, again and again, so that a chain of
bindings (a polynomial, an argument reduction) costs exponential time. A load stops them. So

    v = hide(expression)      becomes      slot[...] = expression;  v = slot[...]

with a slot on the stack, which LLVM turns back into a register. All other uses of `hide` go away here as well.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.tirx import stmt as tir_stmt

from .lower_slots import HIDE


def _is_hidden(expr: Any) -> bool:
    return isinstance(expr, tvm.ir.Call) and getattr(expr.op, "name", "") == HIDE


def _through_memory(bind: Any) -> Any:
    if not _is_hidden(bind.value):
        return bind
    value = bind.value.args[0]
    dtype = tvm.DataType(str(value.ty.dtype))
    lanes = dtype.lanes
    slot = tirx.decl_buffer((lanes,), str(dtype).split("x")[0], "slot")
    place = tirx.Ramp(0, 1, lanes) if lanes > 1 else tirx.const(0, "int32")
    return tir_stmt.SeqStmt([tir_stmt.AllocBuffer(slot), tir_stmt.BufferStore(slot, value, [place]),
                             tir_stmt.Bind(bind.var, tirx.BufferLoad(slot, [place]))])


def _revealed(call: Any) -> Any:
    return call.args[0] if _is_hidden(call) else call


@tvm.transform.module_pass(opt_level=0, name="BindThroughMemory")
def bind_through_memory(mod: Any, _context: Any) -> Any:
    """The pass; see the module's text."""
    changed = {}
    for name, function in mod.functions.items():
        body = tvm_ffi.structural_map(function.body, [(tirx.Bind, _through_memory), (tvm.ir.Call, _revealed)],
                                      order="pre")
        changed[name] = tirx.PrimFunc(function.params, body, ret_type=function.ret_type, attrs=function.attrs)
    return tvm.IRModule(changed)
