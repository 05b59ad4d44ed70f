"""A training step of GPT-2 on one process or, under mpiexec, on the ranks of a mesh: a contender of distributed.py.

    ranks.py CASE THREADS SIZE

Commands are those of contender.py and `itemise N`: where the time of N steps went, of every rank. The first rank reads
them and passes them on; the others look for them now and then, so that a job that is not measured takes no core.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
started = time.perf_counter()
import numpy as np  # noqa: E402

import treadle as td  # noqa: E402
from treadle.schedules.executable import Executable  # noqa: E402

imported = time.perf_counter() - started

import contender  # noqa: E402
from contenders.gpt2 import GPT2, Size, loss_of  # noqa: E402

IDLE = 0.01  # seconds between looks for a command


SIZES = {
    "small": Size(12, 768, 12, 50257, 50304, 128, 8),  # GPT-2 small
    "tiny": Size(2, 32, 2, 61, 64, 16, 8),  # to see that everything runs
}
BLOCK = {f"*.{name}.{part}": dims for dims, names, parts in (
    (("tensor",), ("q", "k", "v", "up"), ("bias",)),
    (("tensor", None), ("q", "k", "v", "up"), ("weight",)),
    ((None, "tensor"), ("proj", "down"), ("weight",)),
) for name in names for part in parts}


@dataclass(frozen=True)
class Case:
    """A way to spread the step over the ranks of one mesh axis."""

    describe: str
    axis: str
    plan: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    padded: bool = False
    environment: dict[str, str] = field(default_factory=dict)


MESSAGES = {"TREADLE_SHARED_MEMORY": "0"}  # as if every rank had a host of its own
CASES = {
    "dp": Case("data parallel", "data"),
    "zero1": Case("data parallel, ZeRO-1", "data", {"zero": 1}),
    "messages": Case("ZeRO-1 over messages, sent meanwhile", "data", {"zero": 1}, environment=MESSAGES),
    "waiting": Case("ZeRO-1 over messages, waited for", "data", {"zero": 1, "overlap": False}, environment=MESSAGES),
    "zero3": Case("data parallel, ZeRO-3", "data", {"zero": 3}),
    "tp": Case("tensor parallel", "tensor", {"shard": {**BLOCK, "wte.weight": ("tensor", None)}}, padded=True),
    "pp": Case("pipeline (ZB-H1), 8 micro-batches", "pipe", {"schedule": "zb-h1"}, accumulate=8),
}


class Runs:
    """Calls of compiled programs: when each began and ended, and its FLOPs."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float, float]] | None = None
        self.last: Any = None
        original, runs = Executable.run, self

        def run(self: Executable, arrays: Any) -> Any:
            began, self_and_arrays = time.monotonic(), (self, list(arrays))
            found = original(self, arrays)
            runs.last = self_and_arrays
            if runs.seen is not None:
                runs.seen.append((began, time.monotonic(), sum(k.flops for k in self.signature.kernels)))
            return found

        Executable.run = run  # type: ignore[method-assign]


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Seconds that two intervals share."""
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0]))


class Session(contender.Session):
    """One process of the job, or the only one."""

    def __init__(self, case: Case, threads: int, size: Size):
        os.environ.update(case.environment)
        td.set_num_threads(threads)
        td.random.seed(0)
        self.runs = Runs()
        self.base, self.imported, self.kernels_of = contender.resident(), imported, None
        model = GPT2(size, case.padded)
        model.wte.weight.assign(model.wte.weight * 0.02)
        inner = td.train_step(model, loss_of, td.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01),
                              accumulate=case.accumulate if td.distributed.world_size() > 1 else 1)
        parallel = None
        if td.distributed.world_size() > 1:
            mesh, plan = td.distributed.make_mesh({case.axis: -1}), td.distributed.Plan(**case.plan)
            parallel = td.distributed.parallelize(inner, mesh, plan)
        self.train, self.job = parallel or inner, parallel.job if parallel else None
        tokens = np.random.default_rng(1).integers(0, size.vocabulary, (size.batch, size.length + 1))
        x, y = (td.tensor(np.ascontiguousarray(t)) for t in (tokens[:, :-1], tokens[:, 1:]))
        self.step = lambda: self.train(x, y).item()

    def memory(self) -> dict[str, Any]:
        """Of every rank."""
        return {"bytes": self.all(super().memory()["bytes"])}

    def all(self, mine: Any) -> list[Any]:
        """Every rank's."""
        return self.job.gather_all(mine) if self.job else [mine]

    def round(self, count: str) -> dict[str, Any]:
        """Of the first rank; the steps hold the others to the same pace."""
        if self.job:
            self.job.barrier()
        return super().round(count)

    def itemise(self, count: str) -> dict[str, Any]:
        """Seconds of a step of each rank: {"steps", "kernels", "outside", "flops", "moved": {label: [calls, waiting,
        rest]}}. Waiting is until the last rank has come to the same call."""
        if self.job:
            self.job.barrier()
            self.job.watch.timeline = []
        self.runs.seen = []
        steps = sum(super().round(count)["seconds"])
        runs, self.runs.seen = self.runs.seen, None
        line: list[Any] = []
        if self.job:
            line, self.job.watch.timeline = self.job.watch.timeline, None
        lines = self.all(line)
        mine = lines[self.job.rank if self.job else 0]
        inside = sum(overlap(run, event[1:]) for event in mine for run in runs)
        took = sum(run[1] - run[0] for run in runs)
        n = int(count)
        found = {"steps": steps / n, "kernels": (took - inside) / n, "flops": sum(run[2] for run in runs) / n,
                 "moved": {k: [x / n for x in v] for k, v in moved(mine, lines).items()}}
        found["outside"] = found["steps"] - found["kernels"] - sum(v[1] + v[2] for v in found["moved"].values())
        return {"ranks": self.all(found)}


    def kernels(self) -> dict[str, Any]:
        """[name, seconds of a step, GFLOP/s] of each kernel of the last program (updates as it is measured)."""
        executable, arrays = self.runs.last
        together: dict[str, list[float]] = {}
        for of in executable.kernel_times(arrays, repeat=2):
            entry = together.setdefault(of.label, [0.0, 0.0])
            entry[0] += of.seconds
            entry[1] += of.flops * of.calls
        rows = [[label, spent, flops / spent / 1e9 if spent else 0.0] for label, (spent, flops) in together.items()]
        return {"kernels": sorted(rows, key=lambda row: -row[1])}


def moved(mine: list[Any], lines: list[list[Any]]) -> dict[str, list[float]]:
    """label -> [calls, seconds of waiting for the last, seconds of the rest], of this rank's timeline.

    What all ranks do equally often they do together. Of messages only the receiver's time is known: that is waiting.
    """
    begun = [begins(line) for line in lines]
    found: dict[str, list[float]] = {}
    count: dict[str, int] = {}
    for label, began, ended in mine:
        k = count[label] = count.get(label, -1) + 1
        others = [of.get(label, []) for of in begun]
        message = label.startswith("recv")
        last = max(of[k] for of in others) if all(len(of) == len(others[0]) for of in others) else began
        entry = found.setdefault("recv" if message else label, [0, 0.0, 0.0])
        waited = ended - began if message else min(ended, max(began, last)) - began
        entry[0] += 1
        entry[1] += waited
        entry[2] += ended - began - waited
    return found


def begins(line: list[Any]) -> dict[str, list[float]]:
    """label -> when each op of that label began."""
    found: dict[str, list[float]] = {}
    for label, began, _ in line:
        found.setdefault(label, []).append(began)
    return found


def commands(job: Any) -> Any:
    """Lines of the standard input of the first rank, on every rank."""
    while True:
        data = np.zeros(80, np.uint8)
        if job is None or job.rank == 0:
            line = (sys.stdin.readline() or "end").strip()
            data[:len(line)] = np.frombuffer(line.encode(), np.uint8)
        if job is not None:
            request = job.world.Ibcast(data, 0)
            while not request.Test():
                time.sleep(IDLE)
        yield bytes(data).rstrip(b"\0").decode()


def main() -> None:
    case, threads, size = CASES[sys.argv[1]], int(sys.argv[2]), SIZES[sys.argv[3]]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    session = Session(case, threads, size)
    for line in commands(session.job):
        command, *arguments = line.split()
        if command == "end":
            return
        reply = getattr(session, command)(*arguments)
        if session.job is None or session.job.rank == 0:
            replies.write(json.dumps(reply) + "\n")
            replies.flush()


if __name__ == "__main__":
    main()
