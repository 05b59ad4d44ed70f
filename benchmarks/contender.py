"""What runs in a contender's own process, whatever the framework.

A contender is a script that calls `main(prepare)`. `prepare(case, threads)` builds the model (nothing compiled yet)
and returns `step() -> float`: one training step that gives the loss, or None for the case `call`, one call of a
compiled function that does next to nothing. The harness writes one command a line and reads one JSON object a line:

    start      the first steps, compilation included: {"first_s", "losses", "import_s"}
    round N    N steps: {"seconds": [...]}
    memory     peak resident bytes of a few steps above those before the model was made: {"bytes"}
    kernels    what the framework tells of its own kernels, most time first: {"kernels": [[name, seconds], ...]}
    end        leaves

Started with a third argument, `memory`, the process first compiles the case `call`, so that the libraries a framework
loads with its first compilation do not count as the model's memory.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Step = Callable[[], Any]
LOSSES = 3  # compared between contenders before any time is


def resident(field: str = "VmRSS") -> int:
    """Bytes from /proc/self/status: VmRSS now, VmHWM the highest since the last reset."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Sets VmHWM back to the bytes resident now (proc(5), clear_refs)."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


class Session:
    """The commands of one process."""

    def __init__(self, prepare: Callable[[str, int], Step], case: str, threads: int, imported: float, kernels: Any):
        if sys.argv[3:] == ["memory"]:
            warm = prepare("call", threads)
            warm()
            del warm
            gc.collect()
        self.base = resident()
        self.imported = imported
        self.kernels_of = kernels
        self.step = prepare(case, threads)

    def start(self) -> dict[str, Any]:
        started = time.perf_counter()
        losses = [self.step()]
        first = time.perf_counter() - started
        losses += [self.step() for _ in range(LOSSES - 1)]
        return {"first_s": first, "import_s": self.imported,
                "losses": None if losses[0] is None else [float(loss) for loss in losses]}

    def round(self, count: str) -> dict[str, Any]:
        seconds = []
        for _ in range(int(count)):
            started = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - started)
        return {"seconds": seconds}

    def memory(self) -> dict[str, Any]:
        gc.collect()
        reset_peak()
        for _ in range(3):
            self.step()
        return {"bytes": resident("VmHWM") - self.base}

    def kernels(self) -> dict[str, Any]:
        return {"kernels": self.kernels_of(self.step) if self.kernels_of else None}


def main(prepare: Callable[[str, int], Step], imported: float, kernels: Any = None) -> None:
    """Serves the harness until `end`; `python contender.py CASE THREADS`."""
    case, threads = sys.argv[1], int(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a framework prints must not stand between the replies
    session = Session(prepare, case, threads, imported, kernels)
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "end":
            return
        reply = getattr(session, command)(*arguments)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
