"""From one PrimFunc to one object file with a plain C symbol.

TVM wraps every function for its packed calling convention: 64-byte alignment is assumed, each
argument's shape, dtype and strides are checked again, and a call costs over 100 ns. Inside a compiled program
all that is known already. So the pipeline below is TVM's own for CPUs with one step exchanged:
instead of `MakePackedAPI`, buffer parameters become raw pointers,

    int k_3f9c...(float* x, float* w, float* y)      // 0, or -1 with the error set in tvm_ffi

which a program's driver calls directly (2-4 ns) at any address. The compiler then assumes the alignment
of an element only: on x86 and ARM an unaligned vector access of aligned data costs nothing.

Each kernel is compiled in a module of its own. That is also what makes `tirx.noalias` safe: TVM 0.27 applies
the attribute of the last function of a module to all functions in it.
"""

from __future__ import annotations

import functools
import os
import tempfile
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.tirx import stmt as tir_stmt

from ..ir.errors import CompileError
from .bindings import bind_through_memory
from .llvm_bugs import selects_apart, suspicious, without_avx512
from .scratch import on_the_stack, set_aside
from .target import Target

# Part of every cache key: raise it when the same PrimFunc would give different machine code.
CODEGEN_VERSION = 6

# Extra options of the LLVM target for one kernel, e.g. {"fast-math-reassoc": True}: a PrimFunc attribute.
LLVM_OPTIONS = "treadle.llvm_options"

_KERNEL_CONVENTION = 2  # any value but 0 tells TVM that the signature is final


def on_cpu(body: Any) -> Any:
    """A statement with the device that TVM's builtins (workspace, packed calls) look for around them."""
    for key, value in (("device_type", 1), ("device_id", 0)):
        body = tir_stmt.AttrStmt("default", key, tirx.const(value, "int32"), body)
    return body


@tvm.transform.module_pass(opt_level=0, name="RawPointers")
def _raw_pointers(mod, _context):
    """Replace buffer parameters by pointers, and return 0 at the end."""
    lowered = {}
    for name, function in mod.functions.items():
        params, declarations = [], []
        for param in function.params:
            if tirx.buffer.is_buffer_var(param):
                pointer = tvm.ir.Var(f"{param.name}_ptr", tvm.ir.PointerType(param.ty.dtype, "global"))
                declarations.append(tir_stmt.DeclBuffer(param, data=pointer))
                params.append(pointer)
            else:
                params.append(param)
        # The return stays outside of the scope in which scratch is allocated: TVM frees it at that scope's end.
        body = tir_stmt.SeqStmt(
            [*declarations, on_cpu(function.body), tir_stmt.Return(tirx.const(0, "int32"))]
        )
        raw = tirx.PrimFunc(params, body, ret_type=tvm.ir.PrimType("int32"), attrs=function.attrs)
        lowered[name] = raw.with_attr("calling_conv", _KERNEL_CONVENTION)
    return tvm.IRModule(lowered)


@functools.cache
def _kernel_passes(sized: bool = False) -> tvm.ir.transform.Pass:
    """TVM 0.27's `default_s_tir_pipeline` without its GPU steps, and with raw pointers for the packed API.

    `AnnotateEntryFunc` is left out as well: it makes LLVM emit every kernel a second time as `__tvm_ffi_main`. So is
    `CompactBufferAllocation`: kernels allocate what they need, and it cuts off what is written through an address only.
    For a kernel with sizes that are parameters (`sized`), those passes are left out that only reason about bounds: it
    takes them minutes where numbers are unknown (a causal attention 57 + 8 + 7 s), and LLVM does what is left to do.
    """
    st, tx = s_tir.transform, tirx.transform

    def known(*passes: Any) -> tuple[Any, ...]:
        return () if sized else passes

    return tvm.ir.transform.Sequential(
        [
            st.CanonicalizeLoop(),
            st.LowerInitBlock(),
            st.PlanAndUpdateBufferAllocationLocation(),
            st.ConvertBlocksToOpaque(),
            st.LowerMatchBuffer(),
            *known(st.StmtSimplify()),
            st.AnnotateIrregularLoop(),
            st.LowerOpaqueBlock(),
            tx.FlattenBuffer(),
            tx.BF16ComputeLegalize(),
            tx.NarrowDataType(32),
            st.LoopPartition(),
            tx.VectorizeLoop(True),
            st.InjectDoubleBuffer(),
            tx.StorageRewrite(),
            *known(st.HoistIfThenElse()),
            tx.UnrollLoop(),
            *known(st.RenormalizeSplitPattern()),
            tx.StmtSimplify(),
            tx.RemoveNoOp(),
            st.RewriteUnsafeSelect(),
            tx.CommonSubexprElim(),
            tx.FP8ComputeLegalize(),
            _raw_pointers,
            tx.FP8StorageLegalize(),
            tx.BF16StorageLegalize(),
            bind_through_memory,
            set_aside,
            tx.LowerTVMBuiltin(),
            on_the_stack,
            tx.LowerIntrin(),
        ]
    )


def _llvm_object(mod: tvm.IRModule, target: Any) -> bytes:
    """Machine code of a lowered module, as the bytes of an ELF object file. Runs with the GIL released."""
    compiled = tvm.get_global_func("target.build.llvm")(mod, target)
    handle, path = tempfile.mkstemp(prefix="treadle-", suffix=".o")
    os.close(handle)
    try:
        compiled.write_to_file(path)  # LLVM optimises and emits here
        with open(path, "rb") as file:
            return file.read()
    finally:
        os.unlink(path)


def _right_object(mod: tvm.IRModule, target: Any, spec: dict[str, Any]) -> bytes:
    """Machine code without the instructions that LLVM may have got wrong (see llvm_bugs.py)."""
    code = _llvm_object(mod, target)
    if suspicious(code):
        mod = selects_apart(mod)
        code = _llvm_object(mod, target)
    if suspicious(code):  # made of something else than a selection of ours
        if "llvm.x86.avx512" in str(mod):
            raise CompileError("LLVM miscompiles a masked VPTERNLOG in it, and it cannot do without AVX-512")
        narrow = tvm.target.Target(without_avx512(spec))
        code = _llvm_object(tirx.transform.BindTarget(narrow.with_host(narrow))(mod), narrow)
    return code


def compile_kernel(function: tirx.PrimFunc, symbol: str, target: Target) -> bytes:
    """Compile a scheduled PrimFunc to an object file that exports `symbol`.

    The function is any that TVM's CPU pipeline takes: blocks or bare loops, static shapes, row-major buffers.

    Raises:
        CompileError: TVM or LLVM rejects the function; the message holds their reason and the function's name.
    """
    options = function.attrs.get(LLVM_OPTIONS, None) if function.attrs else None
    spec = dict(target.llvm)
    if options is not None:
        spec.update({str(key): value for key, value in options.items()})
        function = function.without_attr(LLVM_OPTIONS)
    llvm = tvm.target.Target(spec)
    try:
        function = function.with_attr("global_symbol", symbol)
        mod = tirx.transform.BindTarget(llvm.with_host(llvm))(tvm.IRModule({symbol: function}))
        sized = not all(map(tirx.buffer.is_buffer_var, function.params))
        return _right_object(_kernel_passes(sized)(mod), llvm, spec)
    except Exception as error:  # TVM's errors have no base class of their own
        raise CompileError(f"kernel {symbol} could not be compiled for {target}: {error}") from error


def compile_host(function: tirx.PrimFunc, target: Target) -> bytes:
    """Compile a driver (see driver.py), which is in its final form but for TVM's builtins."""
    spec = dict(target.llvm) | {
        "opt-level": 1
    }  # straight-line calls: -O1 gives the same code in half the time
    llvm = tvm.target.Target(spec)
    symbol = str(function.attrs["global_symbol"])
    mod = tvm.IRModule({symbol: function.with_attr("target", llvm)})
    mod = tvm.ir.transform.Sequential([tirx.transform.LowerTVMBuiltin(), tirx.transform.LowerIntrin()])(mod)
    return _llvm_object(mod, llvm)
