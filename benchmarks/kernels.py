"""One kernel of ours as a Python function, compiled as programs compile it."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def kernel_call(function: Any, target: Any, buffers: list[Any]) -> Callable[[], int]:
    """The PrimFunc on these arrays, which must stay where they are; the call costs under a microsecond."""
    from treadle.schedules.codegen import compile_kernel
    from treadle.schedules.link import SHARED, link
    from treadle.schedules.runtime import load_runtime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, SHARED)
        path.write_bytes(link({"kernel.o": compile_kernel(function, "kernel", target)}).files[SHARED])
        module = load_runtime().load_module(str(path))  # also tells the code where the runtime's functions are
        symbol = ctypes.CDLL(str(path)).kernel
    pointers = [ctypes.c_void_p(buffer.ctypes.data) for buffer in buffers]
    call = lambda: symbol(*pointers)  # noqa: E731
    call.alive = (module, buffers)  # type: ignore[attr-defined]
    return call


def aligned(array: Any) -> Any:
    """A copy that starts on a cache line, as arenas do."""
    import numpy as np

    room = np.empty(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start:start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
