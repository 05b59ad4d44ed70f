"""The parent's side of the comparison: contenders in their own processes, rounds interleaved, medians, ratios.

A machine's speed drifts while a benchmark runs, so the contenders take turns: a round of one, a round of the next,
and so on several times, and what is compared is each one's median over all its rounds. All are held to the same
number of threads and to the same cores.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAUSE = 0.3  # seconds between turns, until the last one's worker threads have stopped spinning
LOSS_FLOOR = 1e-6  # absolute: a detector gives next to nothing where nothing is
LOSS_TOLERANCE = 2e-3  # relative; three steps of f32 arithmetic in another order stay well within


@dataclass(frozen=True)
class Contender:
    """A framework in one of its modes."""

    name: str
    script: str
    module: str  # what must be importable
    environment: dict[str, str] = field(default_factory=dict)


CONTENDERS = (
    Contender("treadle", "with_treadle.py", "treadle"),
    Contender("torch eager", "with_torch.py", "torch"),
    Contender("torch.compile", "with_torch.py", "torch", {"TREADLE_BENCH_COMPILE": "1"}),
    Contender("jax jit", "with_jax.py", "jax"),
)
ONNX_CONTENDERS = (CONTENDERS[0], Contender("onnxruntime", "with_onnxruntime.py", "onnxruntime"))


class ContenderFailed(Exception):
    """A contender's process ended or answered nonsense; the text is the end of what it wrote."""


class Running:
    """A contender's process and the conversation with it (see contender.py)."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], cores: int):
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
                                        text=True, env=environment, preexec_fn=lambda: pin(cores))

    def ask(self, command: str) -> dict[str, Any]:
        """One command, one reply."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            code = self.process.wait(10)
            self.errors.seek(0)
            last = self.errors.read().strip().splitlines()[-3:] or [f"exit code {code}, without a word"]
            raise ContenderFailed(f"{self.name} stopped at `{command}`: " + " | ".join(last)) from None

    def end(self) -> None:
        """Lets the process leave, and sees to it."""
        with contextlib.suppress(BrokenPipeError):
            if self.process.stdin:
                self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        self.errors.close()


def pin(cores: int) -> None:
    """Runs in the child: the first `cores` cores this process may use."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def environment(contender: Contender, threads: int, caches: Path) -> dict[str, str]:
    """Equal threads, and caches of compiled code in the folder given: a new folder is a cold start."""
    own = {
        "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TREADLE_NUM_THREADS": str(threads),
        "TREADLE_CACHE_DIR": str(caches / "treadle"), "TORCHINDUCTOR_CACHE_DIR": str(caches / "torch"),
        "JAX_COMPILATION_CACHE_DIR": str(caches / "jax"),
        "PYTHONPYCACHEPREFIX": str(caches / "python"), "PYTHONDONTWRITEBYTECODE": "",
        "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen=true intra_op_parallelism_threads={threads}",
        # On some machines these name an older kernel for NumPy's sake; no contender should inherit that.
        "PYTHONWARNINGS": "ignore",
    }
    return {**os.environ, **own, **contender.environment}


@dataclass
class Result:
    """What was measured of one contender on one case."""

    name: str
    first_cold: float = float("nan")
    first_warm: float = float("nan")
    memory: float = float("nan")
    seconds: list[float] = field(default_factory=list)
    losses: list[float] | None = None
    kernels: list[list[Any]] | None = None
    failure: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else float("nan")


@contextlib.contextmanager
def running(contender: Contender, case: str, threads: int, caches: Path, mode: str = "") -> Iterator[Running]:
    """A contender's process for as long as the block."""
    command = [sys.executable, str(HERE / "contenders" / contender.script), case, str(threads), mode]
    process = Running(contender.name, command, environment(contender, threads, caches), threads)
    try:
        yield process
    finally:
        process.end()


def start_cold(contender: Contender, case: str, threads: int, caches: Path, result: Result) -> None:
    """The first step with nothing compiled yet; its compiled code stays in the folder for the next process."""
    with running(contender, case, threads, caches) as process:
        reply = process.ask("start")
        result.first_cold, result.losses = reply["first_s"], reply["losses"]


def measure_memory(contender: Contender, case: str, threads: int, caches: Path, result: Result) -> None:
    """In a process of its own, warm, so that no compiler's leavings count."""
    if case != "call":
        with running(contender, case, threads, caches, "memory") as process:
            process.ask("start")
            result.memory = process.ask("memory")["bytes"]


def take_turns(processes: dict[str, Running], results: dict[str, Result], rounds: int, steps: int,
               progress: Any) -> None:
    """The interleaved rounds. A contender that stops is out, and the others go on."""
    for _ in range(rounds):
        for name, process in list(processes.items()):
            time.sleep(PAUSE)
            try:
                process.ask("round 1")  # wakes its threads and caches up again
                results[name].seconds += process.ask(f"round {steps}")["seconds"]
            except ContenderFailed as error:
                results[name].failure = str(error)
                del processes[name]
            progress(name)


def compare(case: str, contenders: list[Contender], threads: int, rounds: int, steps: int,
            progress: Any = lambda name: None) -> list[Result]:
    """Measures every contender on one case. A contender that fails has its reason in `failure`."""
    results = {contender.name: Result(contender.name) for contender in contenders}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        processes: dict[str, Running] = {}
        for contender in contenders:
            result, caches = results[contender.name], Path(folder) / contender.name.replace(" ", "-")
            try:
                start_cold(contender, case, threads, caches, result)
                process = stack.enter_context(running(contender, case, threads, caches))
                result.first_warm = process.ask("start")["first_s"]
                processes[contender.name] = process
            except ContenderFailed as error:
                result.failure = str(error)
            progress(contender.name)
        take_turns(processes, results, rounds, steps, progress)
        for name, process in processes.items():
            results[name].kernels = process.ask("kernels")["kernels"]
            process.end()
        for contender in contenders:
            if contender.name in processes:
                caches = Path(folder) / contender.name.replace(" ", "-")
                try:
                    measure_memory(contender, case, threads, caches, results[contender.name])
                except ContenderFailed as error:
                    results[contender.name].failure = str(error)
    check_equal_maths(case, list(results.values()))
    return list(results.values())


def check_equal_maths(case: str, results: list[Result]) -> None:
    """Marks a contender whose first losses are not the others' (their median): its time compares with nothing."""
    measured = [r for r in results if r.losses]
    if len(measured) < 2:
        return
    middle = [statistics.median(column) for column in zip(*(r.losses for r in measured if r.losses), strict=True)]
    for r in measured:
        assert r.losses is not None
        if any(not abs(a - b) <= LOSS_TOLERANCE * abs(b) + LOSS_FLOOR for a, b in zip(r.losses, middle, strict=True)):
            r.failure = f"{case}: its losses {r.losses} are not the others' {middle}"
