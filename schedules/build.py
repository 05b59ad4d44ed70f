"""From a program to an executable: kernels compiled once each, a driver, one library.

Equal kernels (by structural hash, whatever their names) are compiled once per program and once per machine; the
cache on disk keeps their objects and also the linked library of the whole program, so a warm start compiles and links
nothing. Kernels compile in parallel threads: TVM and LLVM run without the GIL.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

from ..ir.errors import TreadleError
from .abi import ENTRY
from .cache import Cache, cache, digest
from .check import check_program
from .executable import BuildStats, Executable
from .faults import fault
from .ffi import import_tvm
from .link import SHARED, Library, link, linker, load
from .plan import MemoryPlan, Slots, live_intervals, plan_memory
from .program import HostCall, KernelCall, Program, Step
from .runtime import available_cpus
from .signature import KernelInfo, Signature, TempInfo, TensorInfo
from .target import Target

import_tvm()  # this module is imported to compile

log = logging.getLogger("treadle.build")

Progress = Callable[[int, int, str], None]


def build(program: Program, target: Target | str = "cpu", progress: Progress | None = None) -> Executable:
    """Compile a program into an executable.

    `progress(done, total, label)` is called from this thread, once before the work and after each compiled object;
    not at all when everything is cached. `executable.stats` tells what was compiled.

    A program for a CPU that this machine is not (another instruction set, another architecture) can be saved, and
    raises TargetError only when it is run.

    Raises:
        CompileError: a kernel cannot be compiled.
        TargetError: the target is not for CPUs.
    """
    target = Target.parse(target)
    check_program(program)
    plan = plan_memory(program)
    library, stats, _ = _library(program, plan, target, progress)
    executable = Executable(
        _signature(program, plan, target),
        library,
        {b.name: b.data for b in program.constants if b.data is not None},
        plan=plan,
    )
    executable.stats = stats
    executable.profile_builder = lambda: _profiled(program, plan, target)
    if target.runnable_here():
        executable.prepare()
    else:
        log.info("%s is for %s: it can be saved here, not run", program.name, target)
    log.info(
        "%s: %d kernels (%d compiled), arena %.1f MB",
        program.name,
        stats.kernels,
        stats.compiled,
        plan.arena_bytes / 1e6,
    )
    return executable


def kernel_key(function: Any, target: Target) -> str:
    """What names a kernel's object file: structure, target and versions, not the function's name."""
    import tvm
    import tvm_ffi

    from .codegen import CODEGEN_VERSION

    structure = tvm_ffi.structural_hash(function.without_attr("global_symbol"))
    return digest("kernel", structure, target.fingerprint, tvm.__version__, CODEGEN_VERSION)


def _library(
    program: Program, plan: MemoryPlan, target: Target, progress: Progress | None, profile: bool = False
) -> tuple[Library, BuildStats, list[Step]]:
    """The program's machine code, from the cache as far as possible, and the steps that a profile times."""
    import tvm_ffi

    from .driver import build_driver

    keys: dict[int, str] = {}
    kernels: dict[str, KernelCall | HostCall] = {}  # the first call of each
    for call in program.compiled_calls:
        if id(call.kernel) not in keys:
            key = keys[id(call.kernel)] = f"k_{kernel_key(call.kernel, target)}"
            kernels.setdefault(key, call)
    try:
        driver, timed = build_driver(program, plan, keys, profile)
    except TreadleError:
        raise
    except Exception as error:
        raise fault(f"the host function of {program.name}", None, error) from error
    driver_key = digest("driver", tvm_ffi.structural_hash(driver), target.fingerprint, *sorted(kernels))
    store, name = cache(), f"{driver_key}.so"
    native = target.arch == Target.parse("cpu").arch  # the linker knows its own architecture only
    data = store.get(name) if native and linker() else None
    if data is not None:
        return Library({SHARED: data}), BuildStats(len(kernels), 0, True, name), timed
    objects, compiled = _objects(kernels, (f"d_{driver_key}", driver), target, store, progress)
    library = link(objects) if native else Library(objects)
    kept = name if native and SHARED in library.files else None
    if kept:
        store.put(name, library.files[SHARED])
    return library, BuildStats(len(kernels), compiled, False, kept), timed


def _objects(
    kernels: dict[str, KernelCall | HostCall], driver: tuple[str, Any], target: Target, store: Cache,
    progress: Progress | None
) -> tuple[dict[str, bytes], int]:
    """Object files of all kernels and the driver, the missing ones compiled in parallel; how many were."""
    from .codegen import compile_host, compile_kernel

    objects: dict[str, bytes] = {}
    todo: dict[str, Callable[[], bytes]] = {}
    for symbol, call in kernels.items():
        data = store.get(f"{symbol[2:]}.o")
        if data is not None:
            objects[f"{symbol}.o"] = data
        else:
            todo[symbol] = functools.partial(compile_kernel, call.kernel, symbol, target)
    todo[driver[0]] = functools.partial(compile_host, driver[1], target)

    def work(symbol: str) -> bytes:
        try:
            data = todo[symbol]()
        except TreadleError as error:
            call = kernels.get(symbol)
            if call is None or call.origin is None:
                raise
            raise fault(f"the kernel {call.label}", call.origin, error.__cause__ or error) from error
        except Exception as error:
            raise fault("the host function of a program", None, error) from error
        if symbol in kernels:
            store.put(f"{symbol[2:]}.o", data)
        return data

    labels = {symbol: _label(kernels[symbol].kernel if symbol in kernels else None, symbol) for symbol in todo}
    for symbol, data in _in_parallel(work, labels, progress).items():
        objects[f"{symbol}.o"] = data
    return dict(sorted(objects.items())), len(todo) - 1


def _label(function: Any, symbol: str) -> str:
    name = function.attrs.get("global_symbol", None) if function is not None and function.attrs else None
    return str(name or ("driver" if function is None else symbol))


def _in_parallel(
    work: Callable[[str], bytes], labels: dict[str, str], progress: Progress | None
) -> dict[str, bytes]:
    """{name: work(name)}, on a thread per core. The first error, or Ctrl-C, cancels what has not begun."""
    report = progress or (lambda done, total, label: None)
    report(0, len(labels), "")
    pool = ThreadPoolExecutor(
        max_workers=min(available_cpus(), len(labels)), thread_name_prefix="treadle-compile"
    )
    futures: dict[Future, str] = {}
    try:
        futures.update((pool.submit(work, name), name) for name in labels)
        pending, done_count = set(futures), 0
        while pending:
            done, pending = wait(
                pending, return_when=FIRST_EXCEPTION if progress is None else "FIRST_COMPLETED"
            )
            for future in done:
                future.result()  # raises what the work raised
                done_count += 1
                report(done_count, len(labels), labels[futures[future]])
        return {name: future.result() for future, name in futures.items()}
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _signature(program: Program, plan: MemoryPlan, target: Target) -> Signature:
    aliases, slots = program.aliases, Slots.of(program)
    roles = program.roles or ["data"] * len(program.inputs)
    return Signature(
        name=program.name,
        target=target.name,
        arch=target.arch,
        features=sorted(target.features),
        inputs=[TensorInfo(b.name, b.shape, b.dtype, role) for b, role in zip(program.inputs, roles)],
        outputs=[
            TensorInfo(b.name, b.shape, b.dtype, alias=aliases.get(i)) for i, b in enumerate(program.outputs)
        ],
        constants=[TensorInfo(b.name, b.shape, b.dtype) for b in program.constants],
        arena_bytes=plan.arena_bytes,
        slots=slots.count,
        host_functions=program.host_functions,
        kernels=[KernelInfo(call.label, call.flops) for call in program.kernel_calls],
        meta=program.meta if program.sizes else {**program.meta, "at_peak": plan.at_peak},
        sizes=program.sizes,
        temps=[TempInfo(t.buffer.shape, t.buffer.itemsize, t.first, t.last) for t in live_intervals(program)]
        if program.sizes
        else [],
        checks=program.checks,
        recorded=program.recorded,
    )


def _profiled(program: Program, plan: MemoryPlan, target: Target) -> tuple[Any, list[tuple[str, float]]]:
    """The profiling twin of a program's entry, and (label, flops) of each step that it times."""
    library, _, timed = _library(program, plan, target, None, profile=True)
    described = [
        (getattr(s, "label", "") or type(s).__name__.lower(), getattr(s, "flops", 0.0)) for s in timed
    ]
    return load(library)[ENTRY], described
