"""Convolutions and their gradients beside torch (oneDNN): GFLOP/s, and the ratio to torch's better memory format.

    python benchmarks/conv.py [--threads 2] [--rounds 7] [--layout NHWC] [--dtype float32] [--ops conv ...]
                              [--only "56 3x3" ...] [--variant '{"block": 128}' ...]

Ours and each memory format of torch run in processes of their own, on the same cores with the same number of threads.
They take turns, round after round, so that a noisy machine is noisy for all; a figure is the median of its rounds.
Ours packs its weights in every call, as a training step must. Torch allocates its results, so its malloc is told to
keep freed pages. On a machine that others use too, `--threads 1 --cpu-time --best` still tells something: the fastest
round by the process's own CPU time. A `--variant` replaces fields of the proposed ConvConfig, in one more column.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

LAYOUTS = ("NCHW", "NHWC")
OPS = ("conv", "conv_input_grad", "conv_weight_grad")


@dataclass(frozen=True)
class Case:
    """A square 2-D convolution: batch, image, channels, kernel, stride, padding, groups."""

    batch: int
    image: int
    channels_in: int
    channels_out: int
    kernel: int
    stride: int = 1
    groups: int = 1

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def flops(self) -> int:
        out = (self.image + 2 * self.padding - self.kernel) // self.stride + 1
        return 2 * self.batch * out**2 * self.channels_out * self.channels_in // self.groups * self.kernel**2

    def __str__(self) -> str:
        return (f"{self.batch}x{self.image} {self.channels_in}->{self.channels_out} {self.kernel}x{self.kernel}"
                f"{f'/{self.stride}' if self.stride > 1 else ''}{f' g{self.groups}' if self.groups > 1 else ''}")


CASES = [
    Case(8, 224, 3, 64, 7, 2),  # ResNet's stem
    Case(8, 56, 64, 64, 3), Case(8, 28, 128, 128, 3), Case(8, 14, 256, 256, 3), Case(8, 7, 512, 512, 3),
    Case(8, 56, 64, 128, 3, 2), Case(8, 28, 128, 256, 3, 2), Case(8, 14, 256, 512, 3, 2),
    Case(8, 56, 64, 256, 1), Case(8, 56, 256, 64, 1), Case(8, 28, 512, 128, 1), Case(8, 28, 128, 512, 1),
    Case(8, 14, 256, 1024, 1), Case(8, 14, 1024, 256, 1), Case(8, 7, 512, 2048, 1), Case(8, 7, 2048, 512, 1),
    Case(8, 56, 64, 128, 1, 2), Case(8, 56, 256, 512, 1, 2), Case(8, 14, 1024, 2048, 1, 2),
    Case(64, 28, 1, 16, 3), Case(64, 28, 16, 32, 3), Case(64, 14, 16, 32, 3),  # MNIST-sized networks
    Case(8, 56, 128, 128, 3, 1, 32), Case(8, 56, 144, 144, 3, 1, 144), Case(8, 28, 192, 192, 5, 2, 192),
]  # fmt: skip


def make_treadle(case: Case, op: str, options: dict) -> Callable[[], object]:
    import dataclasses

    import kernels
    import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
    import numpy as np

    from treadle.schedules import conv
    from treadle.schedules.conv_problem import ConvProblem, propose
    from treadle.schedules.target import Target

    target = Target.parse("cpu")
    problem = ConvProblem(case.batch, case.channels_in, case.channels_out, (case.image,) * 2, (case.kernel,) * 2,
                          (case.stride,) * 2, ((case.padding,) * 2,) * 2, groups=case.groups, dtype=options["dtype"],
                          layout=options["layout"])
    config = dataclasses.replace(propose(problem, target, op), **options["variant"])
    rng = np.random.default_rng(0)
    x, w, y = (kernels.aligned(rng.standard_normal(s, "f").astype(options["dtype"]))
               for s in (problem.x_shape, problem.w_shape, problem.y_shape))
    buffers = {"conv": [x, w, y], "conv_input_grad": [y, w, x], "conv_weight_grad": [x, y, w]}[op]
    function = getattr(conv, f"{op}_primfunc")(problem, config, target, "kernel")
    return kernels.kernel_call(function, target, buffers)


def make_torch(case: Case, op: str, options: dict) -> Callable[[], object]:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    order = torch.channels_last if options["layout"] == "NHWC" else torch.contiguous_format
    dtype = getattr(torch, options["dtype"])
    shape = (case.batch, case.channels_in, case.image, case.image)
    x = torch.randn(shape).to(dtype).to(memory_format=order)
    w = torch.randn(case.channels_out, case.channels_in // case.groups, case.kernel, case.kernel).to(dtype)
    w = w.to(memory_format=order)
    stride, padding, ones = ((n, n) for n in (case.stride, case.padding, 1))
    torch.set_grad_enabled(False)
    forward = lambda: torch.conv2d(x, w, None, stride, padding, ones, case.groups)  # noqa: E731
    if op == "conv":
        return forward
    dy = torch.randn_like(forward())
    wanted = (op == "conv_input_grad", op == "conv_weight_grad", False)
    return lambda: torch.ops.aten.convolution_backward(dy, x, w, None, stride, padding, ones, False, (0, 0),
                                                       case.groups, wanted)


def serve(cpu_time: bool) -> None:
    """The worker: prepares {"case", "op", "options"} or times {"calls": n}; answers with seconds per call."""
    call: Callable[[], object] = lambda: None  # noqa: E731
    clock = time.process_time if cpu_time else time.perf_counter
    for line in sys.stdin:
        order = json.loads(line)
        if "case" in order:
            make = make_torch if order["options"]["library"] == "torch" else make_treadle
            call = make(Case(*order["case"]), order["op"], order["options"])
        call()
        start = clock()
        for _ in range(order["calls"]):
            call()
        print(json.dumps((clock() - start) / order["calls"]), flush=True)


class Worker:
    """A library in a process of its own, pinned to the same cores as the others."""

    def __init__(self, options: dict, threads: int, flags: list[str]):
        count, keep = str(threads), str(1 << 34)
        env = {**os.environ, "TVM_NUM_THREADS": count, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count,
               "TREADLE_NUM_THREADS": count, "MALLOC_MMAP_THRESHOLD_": keep, "MALLOC_TRIM_THRESHOLD_": keep}
        cores = sorted(os.sched_getaffinity(0))[:threads]
        self.options = options
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", *flags], text=True, env=env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=lambda: os.sched_setaffinity(0, cores))

    def ask(self, **order: object) -> float:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return float(json.loads(self.process.stdout.readline()))

    def prepare(self, case: Case, op: str) -> int:
        """Calls that make a round long enough to time."""
        fields = (case.batch, case.image, case.channels_in, case.channels_out, case.kernel, case.stride, case.groups)
        self.ask(case=fields, op=op, options=self.options, calls=1)
        return max(1, min(200, int(0.02 / max(self.ask(calls=2), 1e-7))))

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def measure(case: Case, op: str, workers: dict[str, Worker], rounds: int, best: bool) -> dict[str, float]:
    """Column -> GFLOP/s."""
    calls = {name: worker.prepare(case, op) for name, worker in workers.items()}
    times: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            time.sleep(0.02)  # let the other libraries' threads fall asleep
            times[name].append(worker.ask(calls=calls[name]))
    choose = min if best else statistics.median
    return {name: case.flops / choose(t) / 1e9 for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layout", default="NHWC", choices=("NHWC", "NCHW"), help="of our kernels")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--ops", nargs="*", default=OPS, choices=OPS)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of the cases' names")
    parser.add_argument("--variant", nargs="*", default=[], help="JSON of ConvConfig fields to replace")
    parser.add_argument("--cpu-time", action="store_true", help="of the process, not wall-clock time")
    parser.add_argument("--best", action="store_true", help="fastest round, not the median: for a busy machine")
    args = parser.parse_args()
    if args.serve:
        return serve(args.cpu_time)
    ours = {"library": "treadle", "layout": args.layout, "dtype": args.dtype, "variant": {}}
    columns = {"treadle": ours, **{v: {**ours, "variant": json.loads(v)} for v in args.variant},
               **{f"torch {n.lower()}": {"library": "torch", "layout": n, "dtype": args.dtype} for n in LAYOUTS}}
    flags = ["--cpu-time"] if args.cpu_time else []
    workers = {name: Worker(options, args.threads, flags) for name, options in columns.items()}
    how = f"{'best' if args.best else 'median'} of {args.rounds}{', CPU time' if args.cpu_time else ''}"
    print(f"GFLOP/s, {args.dtype}, {args.threads} threads, {how}; ours reads {args.layout}")
    print("| op | case |", " | ".join(columns), "| ratio |\n|---|---|" + "---|" * (len(columns) + 1))
    for op in args.ops:
        for case in (c for c in CASES if any(part in str(c) for part in args.only)):
            rates = measure(case, op, workers, args.rounds, args.best)
            best = max(rate for name, rate in rates.items() if name.startswith("torch"))
            cells = [op, str(case), *(f"{rate:.0f}" for rate in rates.values()), f"{rates['treadle'] / best:.2f}"]
            print("|", " | ".join(cells), "|", flush=True)
    for worker in workers.values():
        worker.close()
    return None


if __name__ == "__main__":
    main()
