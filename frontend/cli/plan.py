"""`treadle plan MODEL TYPE... --devices 64 --memory 24GB`: lays a model out on a described cluster, offline.

MODEL is FILE.py:NAME (a `train_step`, a module, or a function of the batch that gives the loss), or an ONNX file: the
mean of its first floating-point output is then taken as the loss.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ...distributed.cost import Cluster, Link
from ...distributed.gantt import check_drawing, draw
from ...distributed.layouts import Layout, Machine
from ...distributed.pipeline import SCHEDULES, chart
from ...distributed.planner import Choices
from ...ir.errors import ArgumentsError
from ...ir.parse import parse_type
from ..measured import measure
from ..nn.module import Module
from ..parallel import ParallelStep
from ..planning import ModelPrices, Planned, plan_of, search
from ..pricing import Dims
from .inspect import resolve, rounded

UNITS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "m": 1e-3, "u": 1e-6, "n": 1e-9}
KINDS = {"B": "24GB", "B/s": "12GB/s", "s": "10us", "FLOPS": "1TFLOPS"}


@dataclass
class Request:
    """What the command line says; texts as they were given."""

    devices: int = 8
    memory: str = "24GB"
    bandwidth: str = "12GB/s"
    latency: str = "10us"
    per_host: int = 0
    flops: str = "1TFLOPS"
    memory_bandwidth: str = "100GB/s"
    optimizer: str = "adamw"
    amp: str = ""
    shard: list[str] = field(default_factory=list)
    tensor: str = ""
    pipe: str = ""
    micro: str = ""
    zero: str = ""
    schedule: str = ""
    recompute: str = ""
    measure: bool = False
    most: int = 5
    gantt: Path | None = None
    out: Path | None = None


def quantity(text: str, what: str, kind: str) -> float:
    """`24GB`, `12.5GB/s`, `10us`, `1TFLOPS` as bytes, bytes a second, seconds, operations a second.

    Raises:
        ArgumentsError: not a positive number with a unit of that kind.
    """
    number = r"([0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?)"
    match = re.fullmatch(number + r"\s*([kKMGTPmun]?)(B/s|B|s|FLOPS|FLOP/s)?", text.strip())
    unit = (match[3] or kind).replace("FLOP/s", "FLOPS") if match is not None else ""
    if match is None or not float(match[1]) > 0 or unit != kind:
        raise ArgumentsError(f"{what} is {text!r}; expected a number with a unit, such as {KINDS[kind]}")
    return float(match[1]) * UNITS[match[2]]


def cluster_of(request: Request) -> Cluster:
    """The described cluster.

    Raises:
        ArgumentsError: two bandwidths without the size of a host, or a quantity that is none.
    """
    bandwidths = [quantity(t, "--bandwidth", "B/s") for t in request.bandwidth.split(",")]
    latencies = [quantity(t, "--latency", "s") for t in request.latency.split(",")]
    count = max(len(bandwidths), len(latencies))
    if count > 2 or (count == 2) != (request.per_host > 1):
        raise ArgumentsError("give --devices-per-host and two bandwidths, inside a host and between hosts "
                             "(--bandwidth 600GB/s,25GB/s --devices-per-host 8), or one bandwidth and neither")
    near, far = Link(latencies[0], bandwidths[0]), Link(latencies[-1], bandwidths[-1])
    return Cluster(far, flops=quantity(request.flops, "--flops", "FLOPS"),
                   memory=quantity(request.memory_bandwidth, "--memory-bandwidth", "B/s"),
                   near=near if count == 2 else None, per_host=request.per_host)


def shard_patterns(texts: Sequence[str]) -> Mapping[str, Dims] | None:
    """`*.up.weight=tensor,-` as a pattern and what each dimension is split over.

    Raises:
        ArgumentsError: it does not read so.
    """
    found: dict[str, Dims] = {}
    for text in texts:
        pattern, eq, dims = text.partition("=")
        names = [d.strip() for d in dims.split(",")]
        if not eq or any(d not in ("tensor", "-") for d in names):
            raise ArgumentsError(f"--shard is {text!r}; expected PATTERN=DIMENSIONS, such as '*.up.weight=tensor,-'")
        found[pattern] = tuple(None if d == "-" else d for d in names)
    return found or None


def choices_of(request: Request) -> Choices:
    """What the search is narrowed to.

    Raises:
        ArgumentsError: no such ZeRO stage, schedule, or word.
    """
    def listed(text: str, what: str, allowed: Sequence[str]) -> list[str]:
        words = [w for w in text.split(",") if w]
        if wrong := [w for w in words if w not in allowed]:
            raise ArgumentsError(f"{what} is {', '.join(wrong)}; expected some of {', '.join(allowed)}")
        return words

    again = {"": (False, True), "yes": (True,), "no": (False,)}
    (word,) = [request.recompute] if request.recompute in again else listed(request.recompute, "--recompute",
                                                                            ["yes", "no"])
    def numbers(text: str, what: str) -> list[int] | None:
        if not re.fullmatch(r"([1-9][0-9]*(,|$))*", text):
            raise ArgumentsError(f"{what} is {text!r}; expected whole numbers with commas between, such as 1,2,4")
        return [int(n) for n in text.split(",")] if text else None

    return Choices(tensor=numbers(request.tensor, "--tensor"), pipe=numbers(request.pipe, "--pipe"),
                   micro=numbers(request.micro, "--micro"),
                   zero=[int(z) for z in listed(request.zero, "--zero", ["0", "1", "2", "3"])] or Choices().zero,
                   schedules=listed(request.schedule, "--schedule", SCHEDULES) or Choices().schedules,
                   recompute=again[word])


def load(what: str) -> tuple[Any, list[Module]]:
    """The model, and the modules of its file: a function's parameters have their names from there."""
    if Path(what).suffix == ".onnx":
        from ..onnx import load as load_onnx

        return load_onnx(what), []
    found = resolve(what)
    found = found.inner if isinstance(found, ParallelStep) else found
    module = sys.modules.get(Path(what.rpartition(":")[0]).stem)
    return found, [m for m in vars(module).values() if isinstance(m, Module)] if module is not None else []


def check_files(request: Request) -> None:
    """That what is found can be written, before it is searched.

    Raises:
        ArgumentsError: a folder is missing, or matplotlib.
    """
    for option, path in (("--out", request.out), ("--gantt", request.gantt)):
        if path is not None and not path.parent.is_dir():
            raise ArgumentsError(f"{option} is {str(path)!r}, but there is no folder {str(path.parent)!r}")
    if request.gantt is not None:
        check_drawing()


def show(console: Console, what: str, inputs: list[str], request: Request) -> list[Layout]:
    """Searches, and prints the best layouts, and stages and pipeline of the best.

    Raises:
        ArgumentsError: something on the command line is wrong; AttributeValueError: nothing fits.
    """
    check_files(request)
    cluster, choices, shard = cluster_of(request), choices_of(request), shard_patterns(request.shard)
    memory = quantity(request.memory, "--memory", "B")
    thing, modules = load(what)
    model = Planned.of(thing, [parse_type(t) for t in inputs], modules, request.optimizer, request.amp or None)
    started = time.perf_counter()
    prices = ModelPrices(model, cluster, shard, measure(model, cluster) if request.measure else None)
    found = search(prices, Machine(request.devices, memory, cluster), request.most, choices)
    best = found.layouts[0]
    whole = sum(float(p.nbytes) for p in model.traced(model.batch)[0].captures.values() if p.role == "parameter")
    console.print(f"{what}: {len(model.traced(model.batch)[1].layers)} layers, {rounded(whole)}B of parameters; batch "
                  f"{model.batch} on {request.devices} devices", highlight=False, soft_wrap=True)
    console.print(f"{found.candidates} layouts, {found.costed} of them costed, the others cannot be faster: "
                  f"{time.perf_counter() - started:.1f} s", highlight=False)
    console.print(layouts_table(found.layouts))
    console.print(f"the best: {best.candidate}", highlight=False, soft_wrap=True)
    console.print(stages_table(best))
    if best.candidate.size("pipe") > 1:
        console.print(chart(best.played, best.candidate.size("pipe"), min(console.width - 8, 120)), highlight=False,
                      markup=False)
    if request.out is not None:
        plan_of(model, prices, best).save(request.out)
        console.print(f"written to {request.out}: td.distributed.parallelize(td.train_step(..., accumulate="
                      f"{best.candidate.micro}), plan=td.distributed.Plan.load({str(request.out)!r}))", highlight=False,
                      soft_wrap=True)
    if request.gantt is not None:
        draw(request.gantt, best.played, best.candidate.size("pipe"), str(best.candidate))
        console.print(f"drawn in {request.gantt}", highlight=False, soft_wrap=True)
    return list(found.layouts)


def duration(seconds: float) -> str:
    """12.3 ms, or 4.56 s."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def layouts_table(layouts: Sequence[Layout]) -> Table:
    """One row a layout."""
    table = Table(title="layouts, the fastest first (mesh: ranks along pipe, data, tensor; neighbours along the last)",
                  title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("mesh", "schedule", "micro", "zero", "again", "step", "bubble", "memory", "sent"):
        table.add_column(name, justify="left" if name == "schedule" else "right", no_wrap=True)
    for x in layouts:
        c = x.candidate
        kind = "" if c.size("pipe") == 1 else c.schedule if c.chunks == 1 else f"{c.schedule} {c.chunks}"
        table.add_row(" ".join(f"{axis[0]}{size}" for axis, size in c.axes), kind, str(c.micro), str(c.zero),
                      "yes" if c.recompute else "no", duration(x.seconds), f"{x.bubble:.1%}", f"{rounded(x.nbytes)}B",
                      f"{rounded(x.sent)}B")
    return table


def stages_table(layout: Layout) -> Table:
    """One row a stage: where the model is cut."""
    table = Table(title="stages: time of a micro-batch, memory of the device", title_justify="left", box=SIMPLE_HEAD,
                  padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("stage", "layers", "from", "to", "time", "parameters", "memory"):
        table.add_column(name, justify="left" if name in ("from", "to") else "right")
    ends = (*layout.cut[1:], sum(u.layers for u in layout.units))
    for s, (units, (seconds, nbytes)) in enumerate(zip(layout.runs(), layout.stages)):
        table.add_row(str(s), f"{layout.cut[s]}-{ends[s] - 1}", units[0].name, units[-1].name, duration(seconds),
                      f"{rounded(layout.parameters(s))}B", f"{rounded(nbytes)}B")
    return table
