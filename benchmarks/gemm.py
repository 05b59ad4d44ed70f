"""Matrix products beside torch (MKL, oneDNN) and JAX (XLA): GFLOP/s and ratios, packing included.

    python benchmarks/gemm.py --dtype float32 [--threads 2] [--rounds 7] [--only 1x1024 tn]

Each library runs in a process of its own, on the same cores with the same number of threads. They take turns, round
after round, so that a noisy machine is noisy for all; a figure is the median of its rounds. Ours is the direct call
of one compiled kernel; the peers are called through their Python API.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

FORMS = {"nn": (False, False), "nt": (False, True), "tn": (True, False), "tt": (True, True)}
SQUARE = [(1152, 1024, 1024), (2048, 2048, 2048), (576, 3072, 768), (197, 768, 768), (128, 384, 1536), (1, 1024, 1024)]
GPT2 = [
    ((), 256, 50257, 768, "nt"), ((), 256, 768, 50257, "nn"), ((), 50257, 768, 256, "tn"),  # logits and their gradients
    ((), 256, 2304, 768, "nn"), ((), 256, 3072, 768, "nn"), ((), 256, 768, 3072, "nn"),
    ((12,), 256, 256, 64, "nt"), ((12,), 256, 64, 256, "nn"),  # attention
]


@dataclass(frozen=True)
class Case:
    batch: tuple[int, ...]
    m: int
    n: int
    k: int
    form: str
    dtype: str

    @property
    def flops(self) -> int:
        return 2 * math.prod(self.batch) * self.m * self.n * self.k

    def __str__(self) -> str:
        return "x".join(map(str, (*self.batch, self.m, self.n, self.k))) + " " + self.form

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        ta, tb = FORMS[self.form]
        return ((*self.batch, *((self.k, self.m) if ta else (self.m, self.k))),
                (*self.batch, *((self.n, self.k) if tb else (self.k, self.n))))


def cases(dtype: str) -> list[Case]:
    return [Case((), m, n, k, form, dtype) for m, n, k in SQUARE for form in FORMS] + [Case(*g, dtype) for g in GPT2]


# One maker per library: a Case -> a function that multiplies once and waits for the result.


def make_treadle(case: Case, threads: int) -> Callable[[], object]:
    import kernels
    import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
    import numpy as np

    from treadle.schedules.gemm import GemmProblem, gemm_primfunc
    from treadle.schedules.target import Target

    target = Target.parse("cpu")
    problem = GemmProblem(case.m, case.n, case.k, *FORMS[case.form], case.batch, case.batch, case.dtype, case.dtype,
                          case.dtype)
    rng = np.random.default_rng(0)
    shapes = (*case.shapes(), problem.shape_c)
    buffers = [kernels.aligned(rng.standard_normal(s, "f").astype(case.dtype)) for s in shapes]
    return kernels.kernel_call(gemm_primfunc(problem, None, target), target, buffers)


def make_torch(case: Case, threads: int) -> Callable[[], object]:
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    a, b = (torch.randn(shape).to(getattr(torch, case.dtype)) for shape in case.shapes())
    ta, tb = FORMS[case.form]
    a, b = (a.mT if ta else a), (b.mT if tb else b)
    c = torch.empty((*case.batch, case.m, case.n), dtype=a.dtype)
    return lambda: torch.matmul(a, b, out=c)


def make_jax(case: Case, threads: int) -> Callable[[], object]:
    import jax
    import jax.numpy as jnp

    ta, tb = FORMS[case.form]
    a, b = (jax.random.normal(jax.random.key(i), s, getattr(jnp, case.dtype)) for i, s in enumerate(case.shapes()))
    multiply = jax.jit(lambda a, b: jnp.matmul(a.mT if ta else a, b.mT if tb else b))
    return lambda: multiply(a, b).block_until_ready()


MAKERS = {"treadle": make_treadle, "torch": make_torch, "jax": make_jax}


def serve(library: str, threads: int, clock: str) -> None:
    """The worker: reads {"case": ...} to prepare, {"calls": n} to time n calls; answers with each call's seconds."""
    call: Callable[[], object] = lambda: None  # noqa: E731
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    for line in sys.stdin:
        order = json.loads(line)
        if "case" in order:
            call = MAKERS[library](Case(tuple(order["case"][0]), *order["case"][1:]), threads)
            call()
        times = []
        for _ in range(order["calls"]):
            start = now()
            call()
            times.append(now() - start)
        print(json.dumps(times), flush=True)


class Worker:
    """A library in a process of its own, pinned to the same cores as the others."""

    def __init__(self, library: str, threads: int, clock: str):
        count = str(threads)
        env = {**os.environ, "TVM_NUM_THREADS": count, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count,
               "TREADLE_NUM_THREADS": count, "JAX_PLATFORMS": "cpu",
               "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen=true intra_op_parallelism_threads={count}"}
        cores = sorted(os.sched_getaffinity(0))[:threads]
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", library, "--threads", count, "--clock", clock], text=True, env=env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=lambda: os.sched_setaffinity(0, cores))

    def ask(self, **order: object) -> list[float]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return list(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def measure(case: Case, workers: dict[str, Worker], rounds: int, statistic: str) -> dict[str, float]:
    """Library -> seconds of one product: the median of its rounds' medians, or the best call of all."""
    pick = {"median": statistics.median, "best": min}[statistic]
    calls = {}
    for name, worker in workers.items():
        fields = (case.batch, case.m, case.n, case.k, case.form, case.dtype)
        worker.ask(case=fields, calls=1)
        calls[name] = max(1, min(2000, int(0.03 / max(min(worker.ask(calls=3)), 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            time.sleep(0.01)  # let the other libraries' threads fall asleep
            worker.ask(calls=2)
            times[name].append(pick(worker.ask(calls=calls[name])))
    return {name: pick(values) for name, values in times.items()}


def geomean(values: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--statistic", default="median", choices=["median", "best"],
                        help="best: the fastest call, for a machine that others use too")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"],
                        help="cpu: processor time; with --threads 1, what others run on the machine hardly shows")
    parser.add_argument("--only", nargs="*", default=[], help="cases whose name holds one of these")
    parser.add_argument("--serve", choices=list(MAKERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.threads, args.clock)
        return
    workers = {name: Worker(name, args.threads, args.clock) for name in MAKERS}
    peers = [name for name in workers if name != "treadle"]
    print(f"{args.dtype}, {args.threads} threads, {args.statistic} of {args.rounds} rounds, GFLOP/s\n")
    print(f"{'batch x M x N x K':24}" + "".join(f"{name:>10}" for name in workers) + "   of best   of torch")
    ratios: dict[str, list[float]] = {"best": [], "torch": []}
    for case in cases(args.dtype):
        if args.only and not any(word in str(case) for word in args.only):
            continue
        seconds = measure(case, workers, args.rounds, args.statistic)
        ratios["best"].append(min(seconds[name] for name in peers) / seconds["treadle"])
        ratios["torch"].append(seconds["torch"] / seconds["treadle"])
        rates = "".join(f"{case.flops / seconds[name] / 1e9:10.1f}" for name in workers)
        print(f"{case!s:24}{rates}{ratios['best'][-1]:10.2f}{ratios['torch'][-1]:11.2f}", flush=True)
    print(f"{'geometric mean':{24 + 10 * len(workers)}}{geomean(ratios['best']):10.2f}{geomean(ratios['torch']):11.2f}")
    for worker in workers.values():
        worker.close()


if __name__ == "__main__":
    main()
