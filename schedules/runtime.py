"""The runtime library and its threads.

TVM keeps one pool of worker threads per Python thread. Left to itself it takes half of the cores, reads the
count only when a pool is made, and pins the workers AND the calling thread to cores 0..n-1, so that two processes on
one machine fight for the same cores. Here the count is explicit (`set_num_threads`; by default every core that this
process may use), holds for whichever Python thread runs a program, can be changed at any time, and nothing is pinned
unless TVM_BIND_THREADS=1 asks for it.

Only libtvm_runtime is needed to run, not the compiler: it is loaded without `import tvm` (0.7 s).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import os
import threading
from pathlib import Path
from typing import Any

from ..ir import config
from ..ir.errors import AttributeValueError, TreadleError

log = logging.getLogger("treadle.runtime")

_lock = threading.Lock()
_requested: int | None = None  # what set_num_threads said
_running: int | None = None  # what programs run with: settled by the first run, changed by set_num_threads
_thread = threading.local()  # .count: what this thread's pool is set to; .size: how many workers it has


class _PoolSettings:
    """TVM's settings of a pool: environment variables that it reads at the moment it makes or configures one."""

    def __init__(self, size: int):
        self.wanted = {
            "TVM_NUM_THREADS": str(size),
            "TVM_BIND_THREADS": os.environ.get("TVM_BIND_THREADS", "0"),
        }

    def __enter__(self) -> None:
        self.before = {name: os.environ.get(name) for name in self.wanted}
        os.environ.update(self.wanted)

    def __exit__(self, *_: object) -> None:
        for name, value in self.before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@functools.cache
def load_runtime() -> Any:
    """Load libtvm_runtime into the process (once) and return `tvm_ffi`.

    Raises:
        TreadleError: the package apache-tvm is not installed.
    """
    import tvm_ffi

    if tvm_ffi.get_global_func("runtime.NumThreads", allow_missing=True) is None:
        spec = importlib.util.find_spec("tvm")  # finds the package, does not run it
        found = (
            [Path(p) / "lib" / "libtvm_runtime.so" for p in (spec.submodule_search_locations or [])]
            if spec
            else []
        )
        library = next((path for path in found if path.exists()), None)
        if library is None:
            raise TreadleError(
                "libtvm_runtime.so was not found: install the package apache-tvm to run compiled programs"
            )
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    return tvm_ffi


@functools.cache
def available_cpus() -> int:
    """Cores that this process may use: its affinity mask, cut to the CPU quota of its container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, -(-int(quota) // int(period))))
    except (OSError, ValueError):
        pass
    return count


def get_num_threads() -> int:
    """Threads that a parallel kernel runs on: `set_num_threads`, else TREADLE_NUM_THREADS, else all available cores."""
    return _requested or config.get("TREADLE_NUM_THREADS") or available_cpus()


def set_num_threads(count: int) -> None:
    """Set the number of threads of every program run from now on, from any Python thread of this process.

    Raises:
        AttributeValueError: `count` is not a whole number >= 1.
    """
    global _requested, _running
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise AttributeValueError(f"set_num_threads({count!r}): give a whole number >= 1")
    _requested = _running = count


def prepare_thread() -> None:
    """Bring the calling Python thread's pool to its number of workers. Cheap when nothing changed."""
    if _running is None or getattr(_thread, "count", None) != _running:
        _configure()


def _configure() -> None:
    """Make or resize the pool. A pool cannot grow, so it is made with a worker per core; idle ones sleep."""
    global _running
    ffi = load_runtime()
    with _lock:
        count = _running = _running or get_num_threads()
        size = getattr(_thread, "size", None) or max(count, available_cpus())
        with _PoolSettings(size):
            ffi.get_global_func("runtime.NumThreads")()
            ffi.get_global_func("runtime.config_threadpool")(1, min(count, size))
        # TVM reads this at every parallel launch too, and runs serially where it finds 1 (its default on two cores)
        os.environ["TVM_NUM_THREADS"] = str(size)
        if count > size:
            log.warning(
                "this Python thread's pool was made with %d threads and cannot grow to %d", size, count
            )
        _thread.size, _thread.count = size, count
