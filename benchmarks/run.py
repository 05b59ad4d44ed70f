"""`make bench`: Treadle beside torch and JAX on the same training steps, beside ONNX Runtime on real models.

    python benchmarks/run.py [CASE ...] [--threads N] [--rounds N] [--only NAME] [--json FILE]

Cases: mlp, resnet18, gpt2 (training steps); call (what a call of a compiled function costs); minilm-1, minilm-8 and so
on (the models of models.py in batches of 1 and 8: their first call, warm, is the start from a saved program, or of a
session; `onnx` names all of them); gemm, gemm-bf16 and conv (single kernels: scripts of their own, gemm.py and conv.py,
which take more options).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness
import models
import problems

# Comparisons of single kernels have scripts of their own.
SCRIPTS = {"gemm": ["gemm.py"], "gemm-bf16": ["gemm.py", "--dtype", "bfloat16"], "conv": ["conv.py"]}
CASES = (*problems.PROBLEMS, "call", *models.CASES, *SCRIPTS)
GROUPS = {"onnx": tuple(models.CASES)}
ROUNDS = {"mlp": 7, "resnet18": 5, "gpt2": 5, "call": 7}
STEPS = {"mlp": 20, "resnet18": 2, "gpt2": 2, "call": 2000}
DESCRIBE = {"mlp": "MLP 784-1024-1024-10, batch 256, AdamW, f32", "resnet18": "ResNet-18, 8 x 3 x 224 x 224, SGD, f32",
            "gpt2": "GPT-2 small, 1 x 256 tokens, AdamW, f32", "call": "x + 1 on 16 numbers: the cost of a call",
            **{case: models.describe(case) for case in models.CASES}}
KERNELS_SHOWN = 12


def milliseconds(seconds: float) -> str:
    """With three figures that count."""
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def table_of(case: str, results: list[harness.Result]) -> Table:
    """One row for each contender; ratios are the contender's figure over Treadle's (above 1: Treadle is ahead)."""
    table = Table(title=DESCRIBE[case], title_justify="left")
    for column in ("", "step, ms", "x", "memory, MB", "x", "first call, s: cold", "warm", "remark"):
        table.add_column(column, justify="left" if column in ("", "remark") else "right")
    ours = next((r for r in results if r.name == "treadle" and not r.failure), None)
    for r in results:
        ratio = f"{r.median / ours.median:.2f}" if ours and r.seconds else ""
        memory_ratio = f"{r.memory / ours.memory:.2f}" if ours and not math.isnan(r.memory) else ""
        megabytes = "" if math.isnan(r.memory) else f"{r.memory / 1e6:.0f}"
        table.add_row(r.name, milliseconds(r.median), ratio, megabytes, memory_ratio, f"{r.first_cold:.2f}",
                      f"{r.first_warm:.2f}", r.failure[:200])
    return table


def kernels_of(results: list[harness.Result]) -> Table | None:
    """Where Treadle's time goes."""
    ours = next((r for r in results if r.kernels), None)
    if ours is None or not ours.kernels:
        return None
    total = sum(row[1] for row in ours.kernels)
    table = Table(title=f"Treadle's kernels, {milliseconds(total)} ms in all", title_justify="left")
    for column in ("kernel", "ms", "share", "GFLOP/s"):
        table.add_column(column, justify="left" if column == "kernel" else "right", overflow="fold")
    for row in ours.kernels[:KERNELS_SHOWN]:
        table.add_row(str(row[0]), milliseconds(row[1]), f"{row[1] / total:.0%}", f"{row[2]:.0f}" if row[2] else "")
    return table


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all if none is named")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every contender")
    parser.add_argument("--rounds", type=int, default=0, help="turns of each contender")
    parser.add_argument("--only", action="append", help="a contender's name; may be repeated")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    options.cases = [case for name in options.cases for case in GROUPS.get(name, (name,))] or list(CASES)
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"unknown case {', '.join(sorted(unknown))}; there are {', '.join((*CASES, *GROUPS))}")
    known = dict.fromkeys(c.name for c in (*harness.CONTENDERS, *harness.ONNX_CONTENDERS))
    if unknown := set(options.only or ()) - set(known):
        parser.error(f"unknown contender {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return options


def run_script(case: str, threads: int) -> bool:
    """A comparison that is a script of its own; whether it ended well."""
    script, *rest = SCRIPTS[case]
    command = [sys.executable, str(harness.HERE / script), *rest, "--threads", str(threads)]
    return subprocess.run(command, check=False).returncode == 0


def contenders_of(case: str, only: list[str] | None, console: Console) -> list[harness.Contender]:
    """Who takes part in a case; names who is missing."""
    fitting = harness.ONNX_CONTENDERS if case in models.CASES else harness.CONTENDERS
    asked = [c for c in fitting if not only or c.name in only]
    present = [c for c in asked if importlib.util.find_spec(c.module) is not None]
    for absent in (c for c in asked if c not in present):
        console.print(f"{absent.name}: {absent.module} is not installed; `make bench` installs it")
    return present


def run_case(case: str, options: argparse.Namespace, console: Console) -> list[harness.Result]:
    """Measures a case and prints its tables."""
    if case in models.CASES and models.CASES[case][0].file is None:
        console.print(f"{case}: its model is not installed; `make bench` installs it")
        return []
    contenders = contenders_of(case, options.only, console)
    with console.status(case) as status:
        results = harness.compare(case, contenders, options.threads, options.rounds or ROUNDS.get(case, 5),
                                  STEPS.get(case, 10), lambda name: status.update(f"{case}: {name}"))
    console.print(table_of(case, results))
    if (kernels := kernels_of(results)) is not None:
        console.print(kernels)
    return results


def main() -> int:
    """Runs the cases asked for; the exit code is 1 if Treadle failed in one of them."""
    options = arguments()
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(f"{platform.processor() or platform.machine()}, {options.threads} threads, medians of "
                  "interleaved rounds; x: the contender's figure over Treadle's")
    report, failed = {}, []
    for case in options.cases:
        if case in SCRIPTS:
            failed += [] if run_script(case, options.threads) else [case]
            continue
        results = run_case(case, options, console)
        report[case] = [asdict(r) | {"median": r.median} for r in results]
        failed += [r.failure for r in results if r.name == "treadle" and r.failure]
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
