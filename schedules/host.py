"""Python functions that a compiled program calls: a user's op that is no kernel, a collective over MPI.

A driver passes raw addresses and one string that describes them ("r:float32[4,2];w:float32[8];i"); the adapter
below turns them into NumPy arrays over the program's own memory, without a copy.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..ir.errors import RegistryError
from .abi import numpy_dtype
from .runtime import load_runtime

DISPATCH = "treadle.host"  # what programs call: with the number of a host function, the string, the addresses
KEPT = 256  # combinations of addresses for which a binding function's answer is kept


class HostFunction:
    """A registered function: `call(description, *addresses)`, what it was registered with, and its number here."""

    numbers = itertools.count(1)

    def __init__(self, call: Callable[..., None], record: np.ndarray | None):
        self.call, self.record, self.number = call, record, next(self.numbers)


_registered: dict[str, HostFunction] = {}
_numbered: weakref.WeakValueDictionary[int, HostFunction] = weakref.WeakValueDictionary()


def register_host_function(name: str, function: Callable[..., Any], binds: bool = False,
                           record: np.ndarray | None = None) -> None:
    """Let programs call `function` by the name that a `HostCall` gives.

    It receives the call's arguments in order: a NumPy array for each buffer (read-only unless the call writes it), an
    int for a loop counter. The arrays are the program's memory and hold only until the function returns. An exception
    that it raises ends the run and reaches the caller. Registering a name again replaces the function for programs that
    are built or loaded from then on.

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

    found = _registered[name] = HostFunction(binding if binds else adapter, record)
    _numbered[found.number] = found


def resolve(names: Sequence[str]) -> list[HostFunction]:
    """The functions of these names, for a program, which keeps them.

    Raises:
        RegistryError: this process has not registered one of them.
    """
    missing = [name for name in names if name not in _registered]
    if missing:
        raise RegistryError(
            f"the program calls host functions that are not registered here: {', '.join(missing)}; import what defines "
            "them, or call register_host_function, before it is built or loaded"
        )
    if names:
        _offer()
    return [_registered[name] for name in names]


@functools.cache
def _offer() -> None:
    """Let programs call by number."""
    load_runtime().register_global_func(DISPATCH, lambda number, *key: _numbered[number].call(*key), override=True)


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
