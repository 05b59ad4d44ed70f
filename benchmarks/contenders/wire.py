"""The ranks of wire.py: a pipeline of two hosts trains and says how long its steps take.

    wire.py SCHEDULE LAYERS WIDTH ROWS MICRO STEPS PROGRESS

The model is LAYERS square linear layers, so a micro-batch of ROWS rows hands on ROWS x WIDTH floats. With 0 layers the
programs sleep instead of computing, SLEEP seconds forwards and twice as long backwards, so that a busy machine does not
matter. PROGRESS 0: nobody calls MPI while a program runs. Rank 0 prints a JSON object: seconds of each step, and what
its programs and those of the other rank took in it.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

import treadle as td
from treadle.distributed import Mesh, progress
from treadle.distributed.comm import Job
from treadle.distributed.messages import Messages
from treadle.distributed.pipeline import schedule
from treadle.distributed.stage_run import Program, Runner, StageProgram
from treadle.ir.dtypes import as_dtype
from treadle.ir.types import TensorType
from treadle.schedules.executable import Executable

SLEEP = 0.1
computed = [0.0]  # seconds that programs took in the present step


class Deep(td.nn.Module):
    """Layers of one shape."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        self.layers = td.nn.ModuleList([td.nn.Linear(width, width) for _ in range(layers)])

    def forward(self, x):
        for layer in self.layers:
            x = td.tanh(layer(x))
        return x


class Sleeping:
    """Two stages whose programs sleep, in place of a training step."""

    def __init__(self, kind: str, width: int, rows: int, micro: int):
        self.job = Job(Mesh({"pipe": 2}))
        self.rank, self.micro = self.job.rank, micro
        messages = Messages(self.job.groups["pipe"], self.job.watch, "pipe" in self.job.apart)
        self.runner = Runner(schedule(kind, 2, micro)[self.rank], self.rank, 2, 2, micro, messages)
        kind_of = TensorType((rows, width), as_dtype("float32"))
        last, out = self.rank == 1, np.zeros((rows, width), np.float32)

        def sleep(seconds: float, result: np.ndarray) -> Program:
            def run(inputs: object) -> list[np.ndarray]:
                time.sleep(seconds)
                computed[0] += seconds
                return [result.copy()]

            return Program(run, [])

        ahead, behind = sleep(SLEEP, np.zeros(()) if last else out), sleep(2 * SLEEP, out)
        loss = TensorType((), as_dtype("float64"))
        self.programs = {self.rank: StageProgram(ahead, behind, behind, None, list, [kind_of] * last,
                                                 [loss if last else kind_of], [0] * last, [0], [], {})}

    def __call__(self, x: np.ndarray) -> None:
        self.runner.step([self.programs] * self.micro, [[]] * self.micro, [1 / self.micro] * self.micro)


def main() -> None:
    kind, numbers = sys.argv[1], list(map(int, sys.argv[2:]))
    layers, width, rows, micro, steps, moving = numbers
    if not moving:
        progress.Progress.of = lambda self, under_way: lambda: None  # type: ignore[method-assign]
    x = np.random.default_rng(0).standard_normal((micro * rows, width), np.float32)
    step = Sleeping(kind, width, rows, micro) if not layers else training(kind, layers, width, micro)
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


def training(kind: str, layers: int, width: int, micro: int) -> td.distributed.ParallelStep:
    """A training step whose programs are timed."""
    td.set_num_threads(1)
    td.random.seed(0)
    original = Executable.run

    def run(self: Executable, arrays: object) -> object:
        began = time.monotonic()
        found = original(self, arrays)
        computed[0] += time.monotonic() - began
        return found

    Executable.run = run  # type: ignore[method-assign]
    model = Deep(layers, width)
    inner = td.train_step(model, lambda model, x: td.mean(model(x) ** 2), td.optim.SGD(model.parameters(), lr=0.01),
                          accumulate=micro)
    return td.distributed.parallelize(inner, td.distributed.make_mesh({"pipe": 2}), td.distributed.Plan(schedule=kind))


if __name__ == "__main__":
    main()
