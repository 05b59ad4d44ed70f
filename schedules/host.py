"""Python functions that a compiled program calls: a user's op that is no kernel, a collective over MPI.

A driver passes raw addresses and one string that describes them ("r:float32[4,2];w:float32[8];i"); the adapter
below turns them into NumPy arrays over the program's own memory, without a copy.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..ir.errors import RegistryError
from .abi import numpy_dtype
from .runtime import load_runtime

PREFIX = "treadle.host."
_records: dict[str, np.ndarray | None] = {}
KEPT = 256  # combinations of addresses for which a binding function's answer is kept


def register_host_function(name: str, function: Callable[..., Any], binds: bool = False,
                           record: np.ndarray | None = None) -> None:
    """Let programs call `function` by the name that a `HostCall` gives.

    It receives the call's arguments in order: a NumPy array for each buffer (read-only unless the call writes it), an
    int for a loop counter. The arrays are the program's memory and hold only until the function returns. An exception
    that it raises ends the run and reaches the caller. Registering a name again replaces the function.

    A function that `binds` gives another one, without arguments, which is what every call with the same arguments runs:
    preparations are then made once, as the temporaries of a program lie at the same addresses in each run.

    `record`: memory by which programs can do the call by themselves, as `ir/rounds.py` describes; where they do not get
    it done they call the function.
    """
    kept: dict[tuple[Any, ...], Callable[[], Any]] = {}

    def binding(*key: Any) -> None:
        run = kept.get(key)
        if run is None:
            if len(kept) >= KEPT:
                kept.clear()
            description, *addresses = key
            run = kept[key] = function(*(value(address) for value, address in zip(_converters(description), addresses)))
        run()

    def adapter(description: str, *addresses: int) -> None:
        function(*(value(address) for value, address in zip(_converters(description), addresses)))

    load_runtime().register_global_func(PREFIX + name, binding if binds else adapter, override=True)
    _records[name] = record


def record_of(name: str) -> np.ndarray | None:
    """What a host function was registered with."""
    return _records.get(name)


def check_registered(names: list[str]) -> None:
    """Raise RegistryError if a program needs host functions that this process has not registered."""
    missing = [name for name in names if load_runtime().get_global_func(PREFIX + name, allow_missing=True) is None]
    if missing:
        raise RegistryError(
            f"the program calls host functions that are not registered here: {', '.join(missing)}; import what defines "
            "them, or call register_host_function, before it is built or loaded"
        )


@functools.lru_cache(maxsize=1024)
def _converters(description: str) -> list[Callable[[int], Any]]:
    return [_converter(part) for part in description.split(";") if part]


def _converter(part: str) -> Callable[[int], Any]:
    if part == "i":
        return int
    mode, _, described = part.partition(":")
    name, _, extents = described.rstrip("]").partition("[")
    dtype, shape = numpy_dtype(name), tuple(int(n) for n in extents.split(",") if n)
    nbytes = math.prod(shape) * dtype.itemsize

    def array(address: int) -> np.ndarray:
        if not nbytes:
            return np.empty(shape, dtype)
        memory = memoryview((ctypes.c_char * nbytes).from_address(address))
        found = np.frombuffer(memory, dtype).reshape(shape)
        found.flags.writeable = mode == "w"
        return found

    return array
