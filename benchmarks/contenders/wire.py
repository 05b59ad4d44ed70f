"""The ranks of wire.py: a pipeline of two hosts trains and says how long its steps take.

    wire.py SCHEDULE LAYERS WIDTH ROWS MICRO STEPS PROGRESS

The model is LAYERS square linear layers, so a micro-batch of ROWS rows hands on ROWS x WIDTH floats. PROGRESS 0: nobody
calls MPI while a program runs. Rank 0 prints a JSON object: seconds of each step, and what its programs and those of
the other rank took in it.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

import treadle as td
from treadle.distributed import progress
from treadle.schedules.executable import Executable


class Deep(td.nn.Module):
    """Layers of one shape."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        self.layers = td.nn.ModuleList([td.nn.Linear(width, width) for _ in range(layers)])

    def forward(self, x):
        for layer in self.layers:
            x = td.tanh(layer(x))
        return x


def main() -> None:
    kind, numbers = sys.argv[1], list(map(int, sys.argv[2:]))
    layers, width, rows, micro, steps, moving = numbers
    if not moving:
        progress.Progress.of = lambda self, under_way: lambda: None  # type: ignore[method-assign]
    td.set_num_threads(1)
    td.random.seed(0)
    computed, original = [0.0], Executable.run

    def run(self: Executable, arrays: object) -> object:
        began = time.monotonic()
        found = original(self, arrays)
        computed[0] += time.monotonic() - began
        return found

    Executable.run = run  # type: ignore[method-assign]
    model = Deep(layers, width)
    inner = td.train_step(model, lambda model, x: td.mean(model(x) ** 2), td.optim.SGD(model.parameters(), lr=0.01),
                          accumulate=micro)
    step = td.distributed.parallelize(inner, td.distributed.make_mesh({"pipe": 2}), td.distributed.Plan(schedule=kind))
    x = np.random.default_rng(0).standard_normal((micro * rows, width), np.float32)
    seconds, programs = [], []
    for _ in range(steps + 2):
        step.job.barrier()
        computed[0], began = 0.0, time.monotonic()
        step(x)
        seconds.append(time.monotonic() - began)
        programs.append(computed[0])
    programs = step.job.gather_all(programs[2:])
    if step.rank == 0:
        print(json.dumps({"seconds": seconds[2:], "programs": programs}), flush=True)


if __name__ == "__main__":
    main()
