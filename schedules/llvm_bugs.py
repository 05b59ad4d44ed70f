"""Machine code that the compiler is known to get wrong, and how a kernel is compiled that holds any.

LLVM before 23 mixes up two operand orders of VPTERNLOG (any function of three bits) where the instruction is masked
and reads memory: the truth tables of the orders 231 and 312 are exchanged (llvm/llvm-project issue 157929, pull request
209782). A selection between an operand and a bit select, `where(m, x, (x & C) | (y & ~C))`, is enough, and LLVM also
finds that form in code where nobody wrote it. So the emitted bytes are searched for such instructions, which are rare;
a kernel with one is compiled again with selections whose operands are hidden from the instruction selector.
"""

from __future__ import annotations

import re
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

_BYTES = [bytes([value]) for value in range(256)]


def _any_of(test: Any) -> bytes:
    return b"[" + b"".join(re.escape(byte) for value, byte in enumerate(_BYTES) if test(value)) + b"]"


# EVEX: 62, map 3, prefix 66, a length and a mask that is not k0 and merges; opcode 25; the last operand in memory.
_MASKED_TERNARY_LOGIC = re.compile(
    b"\x62" + _any_of(lambda b: b & 0x0F == 3) + _any_of(lambda b: b & 7 == 5)
    + _any_of(lambda b: b & 7 and not b & 0x80 and b & 0x60 != 0x60) + b"\x25" + _any_of(lambda b: b < 0xC0), re.DOTALL)


def suspicious(code: bytes) -> bool:
    """Whether machine code holds an instruction that may be one of the wrong ones."""
    return _MASKED_TERNARY_LOGIC.search(code) is not None


def _apart(value: Any) -> Any:
    """The value behind a fence: no instruction is merged across it, and it costs none itself."""
    dtype = str(value.ty.dtype)
    element, _, lanes = dtype.partition("x")
    if isinstance(value, (tirx.IntImm, tirx.FloatImm, tirx.Broadcast)) or not element.endswith(("32", "64")):
        return value
    floating = f"float{element[-2:]}" + (f"x{lanes}" if lanes else "")
    bits = value if dtype == floating else tirx.reinterpret(floating, value)
    fenced = tirx.call_llvm_pure_intrin(floating, "llvm.arithmetic.fence", bits)
    return fenced if dtype == floating else tirx.reinterpret(dtype, fenced)


def _select_apart(select: Any) -> Any:
    return tirx.Select(select.condition, _apart(select.true_value), _apart(select.false_value))


@tvm.transform.module_pass(opt_level=0, name="SelectsApart")
def selects_apart(mod: Any, _context: Any) -> Any:
    """Fences around the operands of all selections."""
    changed = {}
    for name, function in mod.functions.items():
        body = tvm_ffi.structural_map(function.body, [(tirx.Select, _select_apart)], order="post")
        changed[name] = tirx.PrimFunc(function.params, body, ret_type=function.ret_type, attrs=function.attrs)
    return tvm.IRModule(changed)


def without_avx512(spec: dict[str, Any]) -> dict[str, Any]:
    """A target that has no masked instructions at all."""
    features = [feature for feature in spec.get("mattr", []) if not feature[1:].startswith("avx512")]
    return spec | {"mattr": [*features, "-avx512f"]}
