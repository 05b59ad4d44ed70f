"""Ranks of a mesh beside one process with as many threads: throughput, and where the rest of it goes.

    python benchmarks/distributed.py [CASE ...] [--ranks 2] [--rounds 6] [--size small] [--json FILE]

Cases: zero1, tp, pp (a training step of GPT-2 small on 8 x 128 tokens, f32; `gpt2` names all three), dp, zero3;
messages, waiting (zero1 as if the ranks were on several hosts, sums sent while the backward pass runs, and not);
allreduce (sums called by a compiled program beside mpi4py's own call on equal buffers, from 4 bytes to 256 MB), short
(those up to 128 KB). With more ranks than cores (`short --ranks 4` on two) a sum waits for ranks that are not running.

Every rank has one thread, the one process as many as there are ranks, and both the same cores. They take turns, step
by step of a few, so that a noisy machine is noisy for both; figures are medians. Each case is one pair of jobs of its
own, since more do not fit the memory. `--size tiny` is for seeing that everything runs.

The itemised table: milliseconds of a step, the mean over the ranks. Kernels are what a rank computes; what that is
above the one process's is work done twice or done slower. Waiting is from when a rank comes to a collective until the
last one does, and for a message (`recv`, under a pipeline: the bubble). The rest of a collective moves and sums bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness

GROUPS = {"gpt2": ("zero1", "tp", "pp")}
SUMS = {"allreduce": 1 << 28, "short": 128 << 10}  # bytes of the longest
CASES = ("zero1", "tp", "pp", "dp", "zero3", "messages", "waiting", *SUMS)
STEPS = 2  # of a turn


def environment(threads: int) -> dict[str, str]:
    """The threads of each process; compiled code comes from the user's own cache."""
    count = str(threads)
    return {**os.environ, "OMP_NUM_THREADS": count, "TREADLE_NUM_THREADS": count, "PYTHONWARNINGS": "ignore"}


def start(stack: ExitStack, name: str, ranks: int, threads: int, script: str, *arguments: str) -> harness.Running:
    """A job of `ranks` processes, on as many cores as it has threads in all."""
    from treadle.distributed.launch import command

    run = [str(harness.HERE / "contenders" / script), *arguments]
    found = command(ranks, run) if ranks > 1 else [sys.executable, *run]
    process = harness.Running(name, found, environment(threads), ranks * threads)
    stack.callback(process.end)
    return process


def mean(values: Any) -> float:
    return statistics.fmean(values)


def itemised(case: str, one: dict[str, Any], ranks: list[dict[str, Any]], cores: int) -> Table:
    """Where the time of a step goes."""
    table = Table(title=f"{case}: milliseconds of a step, mean of the ranks", title_justify="left")
    for column in ("", "calls", "ms", "share"):
        table.add_column(column, justify="left" if not column else "right")
    step = mean(r["steps"] for r in ranks)

    def row(name: str, seconds: float, calls: float | str = "") -> None:
        table.add_row(name, f"{calls:g}" if calls != "" else "", f"{1e3 * seconds:.1f}", f"{seconds / step:.1%}")

    row("step", step)
    kernels, flops = mean(r["kernels"] for r in ranks), sum(r["flops"] for r in ranks)
    row("  kernels", kernels)
    row("    of which more than on one process", kernels - one["kernels"])
    for label in dict.fromkeys(label for r in ranks for label in r["moved"]):
        entries = [r["moved"].get(label, [0, 0.0, 0.0]) for r in ranks]
        calls, waited, rest = (mean(column) for column in zip(*entries))
        if waited + rest > 1e-5:
            row(f"  {label}: waiting", waited, calls)
            row(f"  {label}: moving", rest)
    row("  outside of programs", mean(r["outside"] for r in ranks))
    table.caption = f"the ranks compute {flops / one['flops'] - 1:+.2%} FLOPs of one process's; " \
                    f"its step {1e3 * one['steps']:.1f} ms, kernels {1e3 * one['kernels']:.1f} ms on {cores} cores"
    return table


def run_step(case: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measures a training step, prints its tables, gives the figures."""
    seconds: dict[str, list[float]] = {}
    with ExitStack() as stack:
        ranks = options.ranks
        both = [start(stack, "one process", 1, ranks, "ranks.py", case, str(ranks), options.size),
                start(stack, f"{ranks} ranks", ranks, 1, "ranks.py", case, "1", options.size)]
        losses = [process.ask("start")["losses"] for process in both]
        for _ in range(options.rounds):
            for process in both:
                time.sleep(harness.PAUSE)
                seconds.setdefault(process.name, []).extend(process.ask(f"round {STEPS}")["seconds"])
        (one,), spread = (process.ask(f"itemise {STEPS}")["ranks"] for process in both)
        memory = [process.ask("memory")["bytes"] for process in both]
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    first, second = medians.values()
    table = Table(title=f"{case}: {ranks} ranks of one thread, one process of {ranks} threads", title_justify="left")
    for column in ("", "step, ms", "throughput", "memory of a process, MB", "first losses"):
        table.add_column(column, justify="left" if not column else "right")
    for (name, median), own, loss in zip(medians.items(), memory, losses):
        table.add_row(name, f"{1e3 * median:.4g}", f"{first / median:.3f}", f"{max(own) / 1e6:.0f}",
                      ", ".join(f"{x:.5f}" for x in loss))
    console.print(table)
    console.print(itemised(case, one, spread, ranks))
    return {"seconds": seconds, "ratio": first / second, "one": one, "ranks": spread, "memory": memory,
            "losses": losses}


def run_sums(case: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Sums of many sizes."""
    with ExitStack() as stack:
        process = start(stack, case, options.ranks, 1, "sums.py", str(options.rounds), options.size, str(SUMS[case]))
        found: dict[str, Any] = process.ask("start")
    cores = len(os.sched_getaffinity(0))
    shared = f", which share {cores} cores" if options.ranks > cores else ""
    table = Table(title=f"all_reduce over {options.ranks} ranks{shared}, f32: microseconds", title_justify="left")
    for column in ("bytes", "mpi4py Allreduce", "compiled program", "ratio", "over messages", "ratio"):
        table.add_column(column, justify="right")
    for nbytes, raw, near, far in found["rows"]:
        table.add_row(f"{nbytes}", f"{1e6 * raw:.1f}", f"{1e6 * near:.1f}", f"{near / raw:.2f}", f"{1e6 * far:.1f}",
                      f"{far / raw:.2f}")
    console.print(table)
    return found


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join((*CASES, *GROUPS))}")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6, help="turns of each job")
    parser.add_argument("--size", choices=("small", "tiny"), default="small")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    options.cases = [c for name in options.cases or ("gpt2", "allreduce") for c in GROUPS.get(name, (name,))]
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"unknown case {', '.join(sorted(unknown))}; there are {', '.join((*CASES, *GROUPS))}")
    return options


def main() -> int:
    """Runs the cases; the exit code is 1 if one of them stopped."""
    options, report, code = arguments(), {}, 0
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores; medians of "
                  f"{options.rounds} interleaved turns")
    for case in options.cases:
        try:
            report[case] = (run_sums if case in SUMS else run_step)(case, options, console)
        except harness.ContenderFailed as error:
            console.print(f"{case}: {error}")
            code = 1
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    return code


if __name__ == "__main__":
    sys.exit(main())
