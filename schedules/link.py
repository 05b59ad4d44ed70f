"""Joining object files into something that can be called.

Where a linker is on the PATH (`ld`, or another that takes its options; no compiler is needed) the objects become one
shared library: it loads in under a millisecond, debuggers and `perf` see its symbols. Where there is none, they stay
objects and LLVM's ORC JIT (package apache-tvm-ffi-orcjit) links them in memory, in some ten milliseconds.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from ..ir.errors import CompileError
from .cache import default_directory
from .runtime import load_runtime

log = logging.getLogger("treadle.build")

LINKERS = ("ld", "ld.lld", "ld.gold", "mold")
_OPTIONS = ("-shared", "-Bsymbolic", "-S", "-z", "noexecstack", "-z", "relro", "--build-id=none")
SHARED = "program.so"


class Library(NamedTuple):
    """Machine code as named files: one "program.so", or objects."""

    files: dict[str, bytes]


@functools.cache
def linker() -> str | None:
    """The path of a linker, or None."""
    return next((found for found in map(shutil.which, LINKERS) if found), None)


def link(objects: dict[str, bytes]) -> Library:
    """Link named objects. Without a linker, or if it fails, the result holds the objects themselves."""
    program = linker()
    if program is None:
        log.info("no linker on the PATH: object files are linked in memory by ORC JIT")
        return Library(dict(objects))
    with tempfile.TemporaryDirectory(prefix="treadle-") as folder:
        for name, data in objects.items():
            Path(folder, name).write_bytes(data)
        # The names go through a response file: hundreds of kernels would overflow a command line.
        Path(folder, "objects.txt").write_text("\n".join(objects))
        command = [program, *_OPTIONS, "-o", SHARED, "@objects.txt"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            log.warning("%s failed, objects are linked in memory instead: %s", program, done.stderr.strip())
            return Library(dict(objects))
        return Library({SHARED: Path(folder, SHARED).read_bytes()})


def load(library: Library) -> Any:
    """The library as a `tvm_ffi.Module`.

    Raises:
        CompileError: neither the dynamic loader nor ORC JIT accepts it; the message holds their reason.
    """
    ffi = load_runtime()
    try:
        if SHARED not in library.files:
            return _session().load_module(list(library.files.values()))
        return _load_shared(ffi, library.files[SHARED])
    except (RuntimeError, OSError, ValueError) as error:
        raise CompileError(f"the compiled program cannot be loaded: {error}") from error


def _load_shared(ffi: Any, data: bytes) -> Any:
    """Load a shared library from memory: through a file that is gone again at once (its mapping stays).

    A file that others can reach is never mapped: truncating it would kill this process. And the name has to be
    new each time, since the dynamic loader takes a known name for a known library.
    """
    try:
        return _load_through(ffi, data, tempfile.gettempdir())
    except (RuntimeError, OSError) as error:  # mounted noexec, or full
        folder = str(default_directory())
        log.info("cannot load a library from %s (%s), trying %s", tempfile.gettempdir(), error, folder)
        return _load_through(ffi, data, folder)


def _load_through(ffi: Any, data: bytes, folder: str) -> Any:
    handle, path = tempfile.mkstemp(prefix="treadle-", suffix=".so", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        return ffi.load_module(path)
    finally:
        os.unlink(path)


@functools.cache
def _session() -> Any:
    try:
        from tvm_ffi_orcjit import ExecutionSession
    except ImportError as error:
        raise CompileError(
            "there is no linker on this machine, and the package that does without one is missing: "
            "pip install apache-tvm-ffi-orcjit (or install binutils)"
        ) from error
    return ExecutionSession()
