"""Small Python values of every rank, everywhere: what a script exchanges besides its training steps.

One exchange serves all of them, and carries what it is for. So ranks that do not call the same function are told so,
instead of waiting for each other or taking one value for another.
"""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np

from ..ir import config
from ..ir.errors import ArgumentsError
from .errors import DistributedError
from .process import join


class _State:
    """The communicator of these messages, made at the first."""

    comm: Any = None


def exchange(what: str, value: Any) -> list[Any]:
    """The value of each rank, in the order of the ranks; called by all of them, with the same `what`.

    Raises:
        ArgumentsError: the value cannot be pickled.
        DistributedError: another rank failed, did not come, or exchanges something else.
    """
    try:
        data = np.frombuffer(pickle.dumps((what, value)), np.uint8)
    except Exception as error:  # whatever a class's own pickling raises
        raise ArgumentsError(f"{what}: {type(value).__name__} cannot be sent to other ranks ({error}); give numbers, "
                             "arrays, strings, and containers of them") from error
    watch = join(config.get("TREADLE_COMM_TIMEOUT"))
    watch.enter(what)
    if _State.comm is None:
        made, request = watch.control.Idup()
        watch.wait(request)
        _State.comm = made
    comm = _State.comm
    sizes = np.empty(comm.size, np.int64)
    watch.wait(comm.Iallgather(np.array([data.size], np.int64), sizes))
    into = np.empty(int(sizes.sum()), np.uint8)
    starts = np.cumsum(sizes) - sizes
    watch.wait(comm.Iallgatherv(data.copy(), [into, sizes, starts, watch.mpi.BYTE]))
    found = [pickle.loads(bytes(into[s:s + n])) for s, n in zip(starts, sizes)]
    if others := [rank for rank, (name, _) in enumerate(found) if name != found[0][0]]:
        raise DistributedError(f"the ranks exchange different things: rank 0 is in {found[0][0]}, rank {others[0]} in "
                               f"{found[others[0]][0]}. Every rank has to call these functions, in the same order")
    watch.leave()
    return [value for _, value in found]
