"""A pipeline over a slow wire: whether messages travel while its stages compute.

    python benchmarks/wire.py [--rate 500mbit] [--schedules gpipe,1f1b] [--steps 5] [--sleep]

Two ranks of one thread train in two network namespaces (of which root can make some) joined by a virtual wire, first
as fast as it is, then held to a rate. Of each run: the median step; what the programs of the busier rank take; how long
the messages need at this rate, both ways; and what the schedule comes to with these times, by
`treadle.distributed.pipeline.simulate`, if messages travel while stages compute, and if both devices stood still for
each. The last row of a schedule is without the thread that calls MPI while programs run (`distributed/progress.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.distributed.namespaces import Hosts, unavailable  # noqa: E402

LAYERS, WIDTH, ROWS, MICRO = 12, 1024, 1024, 8
BYTES = 4 * ROWS * WIDTH  # of a message
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def hold(hosts: Hosts, rate: str | None) -> None:
    """Both directions of the wire at a rate; None: as fast as it is."""
    for name, wire in zip((hosts.a, hosts.b), hosts.wires):
        subprocess.run(["tc", "-n", name, "qdisc", "del", "dev", wire, "root"], capture_output=True)
        if rate is not None:
            subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", wire, "root", "tbf", "rate", rate, "burst", "64kb",
                            "limit", "20mb"], check=True)


def measure(hosts: Hosts, kind: str, layers: int, steps: int, moving: bool) -> dict[str, Any]:
    """A job's figures."""
    numbers = (layers, WIDTH, ROWS, MICRO, steps, int(moving))
    done = hosts.launched(2, "--no-prefix", ROOT / "benchmarks" / "contenders" / "wire.py", kind, *map(str, numbers),
                          timeout=170, TREADLE_COMM_TIMEOUT="60", PYTHONWARNINGS="ignore")
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def simulated(kind: str, programs: float, hop: float) -> tuple[float, float]:
    """The schedule with uniform stages whose programs take so long in a step: messages under way meanwhile, and not."""
    from treadle.distributed.pipeline import schedule, simulate

    task, order = programs / MICRO / 3, schedule(kind, 2, MICRO)
    return (simulate(order, [task] * 2, [2 * task] * 2, hop).makespan,
            simulate(order, [task + hop] * 2, [2 * task + hop] * 2).makespan)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="500mbit", help="of the wire, as tc writes it")
    parser.add_argument("--schedules", default="gpipe,1f1b")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--sleep", action="store_true", help="programs sleep: whatever else the machine does")
    options = parser.parse_args()
    if (reason := unavailable()) is not None:
        print(f"no namespaces: {reason}")
        return 1
    rate = float(options.rate[:-4]) * UNITS[options.rate[-4:]]
    hop = 8 * BYTES / rate
    table = Table(title=f"Two stages, {MICRO} micro-batches, messages of {BYTES / 1e6:.1f} MB: milliseconds of a step",
                  title_justify="left")
    for column in ("schedule", "wire", "step", "programs", "messages", "meanwhile", "standing still"):
        table.add_column(column, justify="right")
    hosts = Hosts(Path(tempfile.mkdtemp()))
    try:
        hosts.make()
        for kind in options.schedules.split(","):
            for held, moving in ((None, True), (options.rate, True), (options.rate, False)):
                hold(hosts, held)
                found = measure(hosts, kind, 0 if options.sleep else LAYERS, options.steps, moving)
                programs = max(map(statistics.median, found["programs"]))
                wire = "as it is" if held is None else held + ("" if moving else ", no thread")
                row = (statistics.median(found["seconds"]), programs, 2 * MICRO * hop if held else 0.0,
                       *simulated(kind, programs, hop if held else 0.0))
                table.add_row(kind, wire, *(f"{1e3 * x:.0f}" for x in row))
    finally:
        hosts.remove()
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
