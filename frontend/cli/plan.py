"""`treadle plan FILE.py:NAME TYPE... --devices 64 --memory 24GB`: lays a model out on a described cluster, offline."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ...distributed.cost import Cluster, Link
from ...distributed.gantt import pixels, write_png
from ...distributed.pipeline import chart
from ...distributed.planner import Layout, Machine, merged, plan
from ...distributed.stages import chain_of
from ...ir.errors import ArgumentsError
from ...ir.parse import parse_type
from ...ir.passes import TIDY
from ...ir.pipeline import Pipeline
from .inspect import graph_of, resolve, rounded

UNITS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "m": 1e-3, "u": 1e-6, "n": 1e-9}
MOST_LAYERS = 96


def quantity(text: str, what: str) -> float:
    """`24GB`, `12.5GB/s`, `10us`, `1TFLOPS` as bytes, bytes a second, seconds, operations a second.

    Raises:
        ArgumentsError: not a positive number with a known unit.
    """
    match = re.fullmatch(r"([0-9.]+(?:e-?[0-9]+)?)\s*([kKMGTPmun]?)(B/s|B|s|FLOPS|FLOP/s)?", text.strip())
    if match is None or not float(match[1]) > 0:
        raise ArgumentsError(f"{what} is {text!r}; expected a number with a unit, such as 24GB, 12GB/s, 10us, 1TFLOPS")
    return float(match[1]) * UNITS[match[2]]


def show(console: Console, what: str, inputs: list[str], devices: int, memory: str, bandwidth: str, latency: str,
         flops: str, memory_bandwidth: str, most: int, picture: Path | None) -> None:
    """Prints the best layouts (`micro`: micro-batches, `again`: recomputation), and the pipeline of the best."""
    fn, types = resolve(what), [parse_type(t) for t in inputs]
    if not types or not types[0].rank:
        raise ArgumentsError("give the type of a whole batch for each tensor, such as i64[64,1024]: it is split")
    graph = Pipeline(list(TIDY)).run(graph_of(what, fn, types, grad=False))
    cluster = Cluster(Link(quantity(latency, "--latency"), quantity(bandwidth, "--bandwidth")),
                      flops=quantity(flops, "--flops"), memory=quantity(memory_bandwidth, "--memory-bandwidth"))
    layers = merged(chain_of(graph, range(len(types)), cluster).layers, MOST_LAYERS)
    batch = int(types[0].shape[0])
    found = plan(layers, Machine(devices, quantity(memory, "--memory"), cluster), batch)
    console.print(f"{what}: {len(layers)} layers, {rounded(sum(x.parameters for x in layers) / 4)}B of parameters, "
                  f"batch {batch}, {devices} devices; {len(found)} layouts fit in memory")
    console.print(_table(found[:most]))
    best = found[0]
    console.print(f"the best: {best}")
    console.print(best.cut.show(layers), highlight=False)
    if best.pipe > 1:
        console.print(chart(best.played, best.pipe, min(console.width - 8, 120)), highlight=False, markup=False)
    if picture is not None:
        write_png(picture, pixels(best.played, best.pipe))
        console.print(f"drawn in {picture}")


def duration(seconds: float) -> str:
    """12.3 ms, or 4.56 s."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _table(layouts: list[Layout]) -> Table:
    table = Table(title="layouts, the fastest first", title_justify="left")
    for name in ("data", "tensor", "pipe", "micro", "again", "step", "bubble", "memory", "sent"):
        table.add_column(name, justify="right")
    for x in layouts:
        table.add_row(*map(str, (x.data, x.tensor, x.pipe, x.micro)), "yes" if x.recompute else "no",
                      duration(x.seconds), f"{x.bubble:.1%}", f"{rounded(x.nbytes)}B", f"{rounded(x.sent)}B")
    return table
