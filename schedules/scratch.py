"""A pass over lowered TIR: a kernel's small scratch buffers live on the stack.

TVM puts scratch on the stack only if it has "global" scope and is below 1 KB. The rest it takes from a pool per thread,
by a call for each buffer, down to each row of a register tile, and in pages: a small product spent more time there
than on its numbers.

`LowerTVMBuiltin` is what makes those calls. So `set_aside` hides the buffers that fit the stack from it, and
`on_the_stack` declares them again afterwards; LLVM then also sees that nothing else points to them.
"""

from __future__ import annotations

import math
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.tirx import stmt as tir_stmt

STACK_BYTES = 128 << 10  # per function; threads have 8 MB on Linux, 512 KB at least elsewhere
_MARK = "treadle_on_the_stack"


def _size(buffer: Any) -> int:
    """Bytes of a buffer, or 0 if its shape is not constant."""
    if not all(isinstance(extent, (int, tirx.IntImm)) for extent in buffer.shape):
        return 0
    dtype = tvm.DataType(str(buffer.dtype))
    return math.prod(int(extent) for extent in buffer.shape) * dtype.lanes * -(-dtype.bits // 8)


def _chosen(body: Any) -> set[Any]:
    """The smallest scratch buffers that fit the stack together."""
    found: list[Any] = []
    tvm_ffi.structural_walk(body, [(tir_stmt.AllocBuffer, lambda node: found.append(node.buffer))])
    chosen, left = set(), STACK_BYTES
    for buffer in sorted((b for b in found if _size(b)), key=_size):
        left -= _size(buffer)
        if left >= 0:
            chosen.add(buffer)
    return chosen


def _mapped(mod: Any, rules: Any) -> Any:
    changed = {}
    for name, function in mod.functions.items():
        body = tvm_ffi.structural_map(function.body, rules(function.body), order="post")
        changed[name] = tirx.PrimFunc(function.params, body, ret_type=function.ret_type, attrs=function.attrs)
    return tvm.IRModule(changed)


@tvm.transform.module_pass(opt_level=0, name="SetScratchAside")
def set_aside(mod: Any, _context: Any) -> Any:
    """Allocations that go to the stack become declarations that TVM has no rule for."""
    def rules(body: Any) -> Any:
        chosen = _chosen(body)

        def declare(node: Any) -> Any:
            if node.buffer not in chosen:
                return node
            return tir_stmt.DeclBuffer(node.buffer, data=tirx.call_extern("handle", _MARK))
        return [(tir_stmt.AllocBuffer, declare)]
    return _mapped(mod, rules)


@tvm.transform.module_pass(opt_level=0, name="ScratchOnTheStack")
def on_the_stack(mod: Any, _context: Any) -> Any:
    """What `set_aside` marked is allocated, where LLVM's code generator makes it part of the stack frame."""
    def allocate(node: Any) -> Any:
        data = getattr(node, "data", None)
        marked = isinstance(data, tvm.ir.Call) and len(data.args) and getattr(data.args[0], "value", None) == _MARK
        return tir_stmt.AllocBuffer(node.buffer) if marked else node
    return _mapped(mod, lambda body: [(tir_stmt.DeclBuffer, allocate)])
