"""Searches how to lay a model out on a described cluster, offline and in seconds.

The candidates are all meshes data x tensor x pipe of the devices, all numbers of micro-batches, with and without
recomputation, the ZeRO stages, and the pipeline schedules. What a candidate's cut costs is said in `layouts.py`. A
chain of few units is cut in every possible way; of a longer one the cut whose slowest stage is fastest is found by
dynamic programming (as in `chain.py`), and then its bounds are moved while that makes the step faster.

Candidates are taken in the order of a lower bound on their time (below), and the search ends when no bound is below
the times already found. So it gives what trying everything would: a test compares it with brute force.

The bound: a stage that takes w for a micro-batch works m w, after the stages before it have run once forwards, and
before they run once backwards. If X is the whole time, w_s <= (X - w_0 - ... - w_{s-1}) / m, so the p stages together
do at most X (1 - (1 - 1/m)^p), which has to be all the work there is. With several stages on a device, and for what
follows the pipeline, only the average over the devices is used.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from ..ir.errors import AttributeValueError
from .layouts import Candidate, Chain, Costs, Layout, Machine, Unit, held_of

MOST_MICRO = 128  # micro-batches of a replica that are tried
MOST_CUTS = 3000  # so many are all tried
ROUNDS = 30  # in which bounds are moved
WORTHWHILE = 1.3  # moving bounds makes a step faster by less than this factor
TOGETHER = 3  # neighbouring bounds that move together
CHUNKS = (2, 3, 4)  # stages of a device that interleaving tries
SLACK = 1 - 1e-9  # rounding of bounds


class Prices(Protocol):
    """What a model costs on one device of a tensor group."""

    def units(self, tensor: int, examples: int, recompute: bool) -> Sequence[Unit] | None:
        """The units for micro-batches of so many examples; None if the tensor axis can split nothing."""


@dataclass(frozen=True)
class Choices:
    """What is searched; every field may be narrowed."""

    zero: Collection[int] = (0, 1, 2, 3)
    schedules: Collection[str] = ("gpipe", "1f1b", "interleaved")
    recompute: Collection[bool] = (False, True)
    tensor: Collection[int] | None = None
    pipe: Collection[int] | None = None
    micro: Collection[int] | None = None


@dataclass(frozen=True)
class Found:
    """The best layouts, fastest first; how many candidates there were, and how many had to be costed."""

    layouts: tuple[Layout, ...]
    candidates: int
    costed: int


def divisors(n: int) -> list[int]:
    """In increasing order."""
    return [i for i in range(1, n + 1) if n % i == 0]


def meshes(devices: int) -> Iterator[tuple[int, int, int]]:
    """Every (data, tensor, pipe) of so many devices."""
    for tensor in divisors(devices):
        for pipe in divisors(devices // tensor):
            yield devices // tensor // pipe, tensor, pipe


def axes_of(data: int, tensor: int, pipe: int, machine: Machine) -> list[tuple[tuple[str, int], ...]]:
    """Orders of the mesh axes. The tensor axis talks most and comes last; where hosts matter the other two have both
    orders."""
    orders = [("pipe", "data", "tensor")]
    if machine.cluster.near is not None and data > 1 and pipe > 1:
        orders.append(("data", "pipe", "tensor"))
    sizes = {"data": data, "tensor": tensor, "pipe": pipe}
    return [tuple((name, sizes[name]) for name in order) for order in orders]


def candidates(machine: Machine, batch: int, choices: Choices = Choices()) -> Iterator[Candidate]:
    """All of them, whatever the model."""
    for data, tensor, pipe in meshes(machine.devices):
        if batch % data or not _wanted(choices.tensor, tensor) or not _wanted(choices.pipe, pipe):
            continue
        stages = sorted(choices.zero) if data > 1 else [0]
        for micro in divisors(batch // data):
            if micro > MOST_MICRO or 1 < pipe > micro or not _wanted(choices.micro, micro):
                continue
            for axes, again, zero, (kind, chunks) in itertools.product(
                    axes_of(data, tensor, pipe, machine), sorted(choices.recompute), stages,
                    _schedules(pipe, micro, choices)):
                if micro == pipe == 1 and zero == 2 and 1 in choices.zero:
                    continue  # the same program as with ZeRO-1
                yield Candidate(axes, micro, batch // data // micro, again, zero, kind, chunks)


def _wanted(given: Collection[int] | None, value: int) -> bool:
    return given is None or value in given


def _schedules(pipe: int, micro: int, choices: Choices) -> list[tuple[str, int]]:
    if pipe == 1:
        return [("1f1b", 1)]
    found = [(kind, 1) for kind in ("1f1b", "gpipe") if kind in choices.schedules]
    if "interleaved" in choices.schedules and micro % pipe == 0:
        found += [("interleaved", chunks) for chunks in CHUNKS]
    return found


def lower_bound(costs: Costs) -> float:
    """Seconds that no cut of a candidate can be below."""
    c, chain, cluster = costs.candidate, costs.chain, costs.cluster
    totals = {n: chain.total(n) for n in ("parameters", "gradients", "states")}
    extra = (3 if c.recompute else 2) * totals["parameters"] * (costs.data - 1) / costs.data / \
        cluster.along("data").bandwidth if c.zero == 3 else 0.0
    sums = 0.0
    if not c.one_program:
        sums = 3 * totals["gradients"] / (costs.data if c.zero >= 2 else 1) / cluster.memory
        if c.zero >= 2:
            sums += totals["gradients"] * (costs.data - 1) / costs.data / cluster.along("data").bandwidth
    work = chain.total("forward") + chain.total("backward") + extra + sums
    mean = {n: np.array(v / costs.pipe) for n, v in totals.items()}
    after = float(costs.update(mean["parameters"], mean["gradients"], mean["states"]))
    if c.one_program:
        return (work + costs.exposed() + after) * SLACK
    if costs.data > 1:
        passes = {0: 2 * mean["gradients"], 1: mean["gradients"] + mean["parameters"], 2: mean["parameters"],
                  3: 0 * mean["gradients"]}[c.zero]
        after += float(passes) * (costs.data - 1) / costs.data / cluster.along("data").bandwidth
    filled = work
    if costs.pipe > 1 and c.chunks == 1:
        filled = work / (1 - (1 - 1 / c.micro) ** costs.pipe)
    return max(filled, work, c.micro * work / costs.pipe + after) * SLACK


def pace_bound(costs: Costs) -> float:
    """A bound that knows the layers: every micro-batch goes through the slowest stage, which can only be so fast."""
    return costs.candidate.micro * _pace(costs.chain, costs.candidate.stages) * SLACK


@functools.lru_cache(maxsize=4096)
def _pace(chain: Chain, stages: int) -> float:
    """Seconds of the slowest stage at best, for any use of memory and network."""
    edges = chain.before["forward"] + chain.before["backward"]
    at = np.arange(len(edges))
    seconds = np.where(at[None, :] > at[:, None], edges[None, :] - edges[:, None], np.inf)
    row = np.where(at == 0, 0.0, np.inf)
    for _ in range(stages):
        row = np.maximum(row[:, None], seconds).min(0)
    return float(row[-1]) if row[-1] < np.inf else 0.0


# Cuts ----------------------------------------------------------------------------------------------------------------


def every_cut(count: int, stages: int) -> np.ndarray:
    """All ways to cut so many units, (cuts, stages): the first unit of each stage."""
    inner = list(itertools.combinations(range(1, count), stages - 1))
    return np.array([(0, *bounds) for bounds in inner], int).reshape(len(inner), stages)


def best_cut(costs: Costs, memory: float, wanted: float = math.inf) -> tuple[int, ...] | None:
    """The fastest cut that fits in memory; of many cuts the one that moving bounds arrives at. None: nothing fits.

    `wanted`: seconds of a step that are of interest; of many cuts one that is far from it is left as it is.
    """
    count, stages = len(costs.chain.units), costs.candidate.stages
    if math.comb(count - 1, stages - 1) <= MOST_CUTS:
        found = _fastest(costs, every_cut(count, stages), memory)
        return None if found is None else found[1]
    _, start = balance(costs, memory)
    if start is None:
        return None
    best = _fastest(costs, np.array([start]), memory) or (math.inf, start)
    for _ in range(ROUNDS if best[0] == math.inf or best[0] < WORTHWHILE * wanted else 0):
        moved = _fastest(costs, _moved(best[1], count), memory)
        if moved is None or moved[0] >= best[0] * SLACK:
            break
        best = moved
    return best[1] if best[0] < math.inf else None


def _fastest(costs: Costs, cuts: np.ndarray, memory: float) -> tuple[float, tuple[int, ...]] | None:
    fits = costs.memory(costs.stages(cuts)).max(0) <= memory
    if not fits.any():
        return None
    cuts = cuts[fits]
    seconds = costs.seconds(cuts, costs.stages(cuts))
    k = int(seconds.argmin())
    return float(seconds[k]), tuple(cuts[k].tolist())


def _moved(bounds: Sequence[int], count: int) -> np.ndarray:
    """Cuts of which a short run of bounds has moved by a unit or two."""
    found = []
    for a in range(1, len(bounds)):
        for b in range(a, min(a + TOGETHER, len(bounds))):
            for by in (-2, -1, 1, 2):
                made = [*bounds[:a], *(x + by for x in bounds[a:b + 1]), *bounds[b + 1:]]
                if made[-1] < count and all(x < y for x, y in zip(made, made[1:])):
                    found.append(made)
    return np.array(found, int).reshape(-1, len(bounds))


def balance(costs: Costs, memory: float, least: bool = False) -> tuple[float, tuple[int, ...] | None]:
    """The cut whose slowest stage is fastest, of those whose stages fit; with `least`, whose fullest is smallest.

    Gives that stage's seconds, or bytes, too. Dynamic programming over (stages, units done), a whole column at a time.
    Where a device has several stages each may take its part of the memory.
    """
    count, stages = len(costs.chain.units), costs.candidate.stages
    if stages > count:
        return math.inf, None
    seconds, nbytes = _stage_tables(costs)
    row = np.full(count + 1, np.inf)
    row[0] = 0.0
    chosen = []
    for s in range(stages):
        table = nbytes[s] if least else np.where(nbytes[s] <= memory / costs.candidate.chunks, seconds, np.inf)
        worst = np.maximum(row[:, None], table)
        chosen.append(worst.argmin(0))
        row = worst.min(0)
    if not row[count] < np.inf:
        return math.inf, None
    bounds, end = [], count
    for s in reversed(range(stages)):
        end = int(chosen[s][end])
        bounds.append(end)
    return float(row[count]), tuple(reversed(bounds))


def _stage_tables(costs: Costs) -> tuple[np.ndarray, list[np.ndarray]]:
    """Seconds, and bytes for each stage, of every run of units [start, end]; infinite where end <= start."""
    count, c = len(costs.chain.units), costs.candidate
    alone = Costs(replace(c, axes=tuple((n, 1 if n == "pipe" else k) for n, k in c.axes), chunks=1), costs.chain,
                  costs.machine)
    starts, ends = np.meshgrid(np.arange(count + 1), np.arange(count + 1), indexing="ij")
    runs = {n: costs.chain.of(n, starts, ends) for n in costs.chain.before}
    runs["work"] = costs.chain.excess[c.zero == 3]
    again = alone.gathering(runs["parameters"])
    seconds = runs["forward"] + runs["backward"] + (3 if c.recompute else 2) * again
    out = np.concatenate([[0.0], costs.chain.output])
    sums = runs["gradients"] / (costs.data if c.zero >= 2 or c.zero and c.one_program else 1)
    static = runs["parameters"] / (costs.data if c.zero == 3 else 1) + sums + \
        runs["states"] / (costs.data if c.zero else 1) + runs["work"] + (2 * out if costs.pipe > 1 else 0.0)
    empty = ends <= starts
    from_order = [static + _held(costs, s) * runs["activations"] for s in range(c.stages)]
    return np.where(empty, np.inf, seconds), [np.where(empty, np.inf, x) for x in from_order]


def _held(costs: Costs, stage: int) -> float:
    """Micro-batches that a stage holds at most."""
    c = costs.candidate
    rows = held_of(c.schedule, costs.pipe, c.micro, c.chunks)[stage % costs.pipe]
    return float(rows[:, stage // costs.pipe].max())


# The search ----------------------------------------------------------------------------------------------------------


def plan(prices: Prices, machine: Machine, batch: int, most: int = 1, choices: Choices = Choices()) -> Found:
    """The `most` fastest layouts that fit.

    Args:
        batch: examples in a step; data x micro-batches divides it.

    Raises:
        AttributeValueError: no candidate at all, or nothing fits in memory: the message gives the least that would do.
    """
    if machine.devices < 1 or batch < 1:
        raise AttributeValueError("a plan needs at least one device and one example")
    waiting: list[tuple[float, int, Costs]] = []
    bounded: set[int] = set()  # whose slowest stage has been looked at
    for number, candidate in enumerate(candidates(machine, batch, choices)):
        units = prices.units(candidate.size("tensor"), candidate.examples, candidate.recompute)
        if units is not None and len(units) >= candidate.stages:
            costs = Costs(candidate, _chain(tuple(units)), machine)
            waiting.append((lower_bound(costs), number, costs))
    if not waiting:
        raise AttributeValueError(_nothing(machine, batch))
    heapq.heapify(waiting)
    everything = [costs for _, _, costs in waiting]
    found: list[Layout] = []
    costed = 0
    while waiting:
        bound, number, costs = heapq.heappop(waiting)
        if len(found) >= most and bound >= found[most - 1].seconds:
            break
        if costs.candidate.stages > 1 and number not in bounded:
            bounded.add(number)
            heapq.heappush(waiting, (max(bound, pace_bound(costs)), number, costs))
            continue
        costed += 1
        bounds = best_cut(costs, machine.memory, found[most - 1].seconds if len(found) >= most else math.inf)
        if bounds is not None:
            found.append(costs.layout(bounds))
            found.sort(key=lambda x: (x.seconds, x.nbytes))
    if not found:
        least, which = min((least_memory(c), i) for i, c in enumerate(everything))
        raise AttributeValueError(
            f"no layout on {machine.devices} devices fits in {machine.memory:,.0f} bytes each; the least that does is "
            f"{math.ceil(least):,} ({everything[which].candidate})")
    return Found(tuple(found[:most]), len(everything), costed)


_CHAINS: dict[tuple[Unit, ...], Chain] = {}


def _chain(units: tuple[Unit, ...]) -> Chain:
    if units not in _CHAINS:
        if len(_CHAINS) > 1000:
            _CHAINS.clear()
        _CHAINS[units] = Chain(units)
    return _CHAINS[units]


def _nothing(machine: Machine, batch: int) -> str:
    return (f"no mesh of {machine.devices} devices suits a batch of {batch} and this model: the data axis has to "
            "divide the batch, a pipeline needs a layer and a micro-batch for each stage, a tensor axis weights that "
            "divide. Take a batch that is a multiple of the devices, or fewer devices")


def least_memory(costs: Costs) -> float:
    """The smallest memory of a device with which some cut of a candidate fits."""
    count, stages = len(costs.chain.units), costs.candidate.stages
    if math.comb(count - 1, stages - 1) <= MOST_CUTS:
        cuts = every_cut(count, stages)
    else:
        _, found = balance(costs, math.inf, least=True)
        assert found is not None
        cuts = np.array([found])
    return float(costs.memory(costs.stages(cuts)).max(0).min())
