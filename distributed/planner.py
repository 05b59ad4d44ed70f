"""Searches how to lay a model out on a described cluster, offline and in seconds.

The candidates are all meshes data x tensor x pipe of the devices, all numbers of micro-batches, with and without
recomputation, the ZeRO stages, and the pipeline schedules. What a candidate's cut costs is said in `layouts.py`. A
chain of few units is cut in every possible way; of a longer one the cut whose slowest stage is fastest is found by
dynamic programming (as in `chain.py`), and then its bounds are moved while that makes the step faster.

Candidates are taken in the order of a lower bound on their time, which is made better step by step as a candidate
comes up; the search ends when no bound is below the times already found. So it gives what trying everything would: a
test compares it with brute force. The first bounds need no prices but those of few ranks along the tensor axis: what
these cost more than their part of one rank's work, more ranks cost at least. So a size of the tensor axis is priced
only if it may pay.

The bound by all the work: a stage that takes w for a micro-batch works m w, after the stages before it have run once
forwards, and before they run once backwards. If X is the whole time, w_s <= (X - w_0 - ... - w_{s-1}) / m, so the p
stages together do at most X (1 - (1 - 1/m)^p), which has to be all the work there is. With several stages on a device,
where gradients of weights wait, and for what follows the pipeline, only the average over the devices is used.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..ir.errors import AttributeValueError
from .layouts import Candidate, Chain, Costs, Layout, Machine, Unit
from .pipeline import stash_bound

MOST_MICRO = 128  # micro-batches of a replica that are tried
MOST_CUTS = 3000  # so many are all tried
ROUNDS = 30  # in which bounds are moved
WORTHWHILE = 1.2  # moving bounds makes a step faster by less than this factor
TOGETHER = 3  # neighbouring bounds that move together
CHUNKS = (2, 3, 4)  # stages of a device that interleaving tries
SLACK = 1 - 1e-9  # rounding of bounds
ROUGH = 0.95  # of bounds that do not know the very programs
AT_ONCE = 64  # cuts that are played together, those of the lowest bounds first


class Prices(Protocol):
    """What a model costs on one device of a tensor group.

    What it costs beyond its part of what one rank does (communication, what is not split) does not become less with
    more ranks; recomputation makes nothing faster.
    """

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
    found = [(kind, 1) for kind in ("1f1b", "gpipe", "zb-h1") if kind in choices.schedules]
    if "interleaved" in choices.schedules and micro % pipe == 0:
        found += [("interleaved", chunks) for chunks in CHUNKS]
    return found


def lower_bound(costs: Costs) -> float:
    """Seconds that no cut of a candidate can be below."""
    c, totals = costs.candidate, costs.chain.totals
    found = _work_bound(costs, totals["forward"] + totals["backward"], 1)
    if c.one_program:
        found += costs.exposed() * SLACK
    return found


def _work_bound(costs: Costs, work: float, split: int) -> float:
    """The bound of so many seconds of work, and of parameters that are `split` in so many parts besides."""
    c, cluster = costs.candidate, costs.cluster
    p, g, o = (costs.chain.totals[n] / split for n in ("parameters", "gradients", "states"))
    part, share = (costs.data - 1) / costs.data / cluster.along("data").bandwidth, costs.data if c.zero else 1
    if c.zero == 3:
        work += (3 if c.recompute else 2) * p * part
    if not c.one_program:
        work += 3 * g / (costs.data if c.zero >= 2 else 1) / cluster.memory + (g * part if c.zero >= 2 else 0.0)
    after = (2 * p + g + 2 * o) / costs.pipe / share / cluster.memory
    if c.one_program:
        return (work + after) * SLACK
    after += (2 * g, g + p, p, 0.0)[c.zero] * part / costs.pipe
    filled = work
    if costs.pipe > 1 and c.schedule in ("gpipe", "1f1b"):
        filled = work / (1 - (1 - 1 / c.micro) ** costs.pipe)
    return max(filled, c.micro * work / costs.pipe + after) * SLACK


def pace_bound(costs: Costs) -> float:
    """A bound that knows the layers: every micro-batch goes through the slowest stage, which can only be so fast."""
    return costs.candidate.micro * costs.chain.pace(costs.candidate.stages) * SLACK


def memory_bound(costs: Costs) -> float:
    """Bytes that the fullest device has under any cut: as much as the mean, and as its fullest unit."""
    c, chain = costs.candidate, costs.chain
    held = stash_bound(c.schedule, costs.pipe, c.micro, costs.pipe - 1) if c.chunks == 1 else 1  # the last holds least
    whole = _in_memory(costs, chain.totals, held)
    units = _in_memory(costs, chain.each, held) + chain.work[c.zero == 3]
    return max(float(whole) / costs.pipe, float(units.max())) * SLACK


def _in_memory(costs: Costs, sizes: Mapping[str, Any], held: float) -> Any:
    """Bytes of runs of units with so many micro-batches, but for what they need at work."""
    c, data = costs.candidate, costs.data
    return sizes["parameters"] / (data if c.zero == 3 else 1) \
        + sizes["gradients"] / (data if c.zero >= 2 or c.zero and c.one_program else 1) \
        + sizes["states"] / (data if c.zero else 1) + held * sizes["activations"]


# Cuts ----------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def every_cut(count: int, stages: int) -> np.ndarray:
    """All ways to cut so many units, (cuts, stages): the first unit of each stage."""
    inner = list(itertools.combinations(range(1, count), stages - 1))
    return np.array([(0, *bounds) for bounds in inner], int).reshape(len(inner), stages)


def best_cut(costs: Costs, memory: float, wanted: float = math.inf) -> tuple[int, ...] | None:
    """The fastest cut that fits in memory; of many cuts the one that moving bounds arrives at.

    None: nothing fits, or is faster than `wanted`, the seconds of a step that are of interest. Of many cuts one that is
    far from that is left as it is.
    """
    count, stages = len(costs.chain.units), costs.candidate.stages
    if memory_bound(costs) > memory:
        return None
    if math.comb(count - 1, stages - 1) <= MOST_CUTS:
        found = _fastest(costs, every_cut(count, stages), memory, wanted)
        return None if found is None else found[1]
    slowest, start = balance(costs, memory)
    if start is None or costs.candidate.chunks == 1 and slowest * costs.candidate.micro * SLACK >= wanted:
        return None
    best = _fastest(costs, np.array([start]), memory) or (math.inf, start)
    for _ in range(ROUNDS if best[0] == math.inf or best[0] < WORTHWHILE * wanted else 0):
        moved = _fastest(costs, _moved(best[1], count), memory, best[0] * SLACK)
        if moved is None:
            break
        best = moved
    return best[1] if best[0] < math.inf else None


def _fastest(costs: Costs, cuts: np.ndarray, memory: float,
             wanted: float = math.inf) -> tuple[float, tuple[int, ...]] | None:
    """Of cuts that fit the fastest, if it takes less than `wanted`. Those whose bound is not below that of others, once
    these have been played, are not played."""
    stages = costs.stages(cuts)
    cuts, stages = _some(cuts, stages, costs.memory(stages).max(0) <= memory)
    floor = costs.floor(cuts, stages) * SLACK if len(cuts) > 1 else np.zeros(len(cuts))
    order, best = np.argsort(floor), None
    for first in range(0, len(cuts), AT_ONCE):
        chosen = order[first:first + AT_ONCE]
        chosen = chosen[floor[chosen] < wanted]
        if not chosen.size:
            break
        own, figures = _some(cuts, stages, chosen)
        seconds = costs.seconds(own, figures)
        k = int(seconds.argmin())
        if seconds[k] < wanted:
            wanted, best = float(seconds[k]), tuple(own[k].tolist())
    return None if best is None else (wanted, best)


def _some(cuts: np.ndarray, stages: dict[str, np.ndarray],
          which: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return cuts[which], {n: v[:, which] for n, v in stages.items()}


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
    seconds, static, kept = _stage_tables(costs)
    row = np.full(count + 1, np.inf)
    row[0] = 0.0
    chosen, numbers, room = [], np.arange(count + 1), np.empty_like(static)
    for s in range(stages):
        nbytes = np.add(static, np.multiply(kept, _held(costs, s), out=room), out=room)
        table = nbytes if least else np.where(nbytes <= memory / costs.candidate.chunks, seconds, np.inf)
        worst = np.maximum(row[:, None], table, out=room)
        chosen.append(worst.argmin(0))
        row = worst[chosen[-1], numbers]
    if not row[count] < np.inf:
        return math.inf, None
    bounds, end = [], count
    for s in reversed(range(stages)):
        end = int(chosen[s][end])
        bounds.append(end)
    return float(row[count]), tuple(reversed(bounds))


def _stage_tables(costs: Costs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every run of units [start, end] seconds, bytes and, for each micro-batch that is held, bytes besides.

    Infinite where end <= start.
    """
    c, chain, at = costs.candidate, costs.chain, np.arange(len(costs.chain.units) + 1)
    starts, ends = at[:, None], at[None, :]
    names = ("forward", "backward", "parameters", "gradients", "states", "activations")
    runs = {n: chain.of(n, starts, ends) for n in names}
    seconds = runs["forward"] + runs["backward"]
    if c.zero == 3:
        seconds += (3 if c.recompute else 2) * costs.gathered(runs["parameters"])
    static = _in_memory(costs, runs, 0.0) + chain.excess[c.zero == 3]
    if costs.pipe > 1:
        static += 2 * np.concatenate([[0.0], chain.output])
    empty = np.tril_indices(len(at))
    seconds[empty] = static[empty] = np.inf
    return seconds, static, runs["activations"]


def _held(costs: Costs, stage: int) -> float:
    """Micro-batches that a stage holds at most."""
    return float(costs.candidate.held[stage % costs.pipe][:, stage // costs.pipe].max())


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
    search = _Search(prices, machine, list(candidates(machine, batch, choices)))
    found: list[Layout] = []
    costed = 0
    for bound, costs in _in_order([search.seconds(c) for c in search.candidates]):
        wanted = found[most - 1].seconds if len(found) >= most else math.inf
        if bound >= wanted:
            break
        if costs is not None:
            costed += 1
            cut = best_cut(costs, machine.memory, wanted)
            if cut is not None:
                found.append(costs.layout(cut))
                found.sort(key=lambda x: (x.seconds, x.nbytes))
    if not found:
        raise AttributeValueError(search.too_large(batch))
    return Found(tuple(found[:most]), len(search.candidates), costed)


Bounds = Iterator[tuple[float, "Costs | None"]]


def _in_order(bounds: Sequence[Bounds]) -> Bounds:
    """What comes next of better and better bounds, the lowest first."""
    waiting = [(*first, number) for number, b in enumerate(bounds) if (first := next(b, None)) is not None]
    heap = [(bound, number, costs) for bound, costs, number in waiting]
    heapq.heapify(heap)
    while heap:
        bound, number, costs = heapq.heappop(heap)
        yield bound, costs
        if costs is None and (better := next(bounds[number], None)) is not None:
            heapq.heappush(heap, (better[0], number, better[1]))


class _Search:
    """What is known of the candidates so far."""

    def __init__(self, prices: Prices, machine: Machine, candidates: Sequence[Candidate]):
        self.prices, self.machine, self.candidates = prices, machine, candidates
        self.chains: dict[tuple[int, int, bool], Chain | None] = {}

    def chain(self, tensor: int, examples: int, recompute: bool) -> Chain | None:
        """The units, or None."""
        key = tensor, examples, recompute
        if key not in self.chains:
            units = self.prices.units(*key)
            self.chains[key] = Chain(units) if units else None
        return self.chains[key]

    def costs(self, candidate: Candidate) -> Costs | None:
        """What a candidate costs; None if the model has nothing to split, or too few layers, for it."""
        chain = self.chain(candidate.size("tensor"), candidate.examples, candidate.recompute)
        fits = chain is not None and len(chain.units) >= candidate.stages
        return Costs(candidate, chain, self.machine) if chain is not None and fits else None

    def rough(self, candidate: Candidate) -> tuple[Costs, float]:
        """By the layers of one rank: what a candidate costs as if these were all there is, and the bytes that the
        fullest device has at least of parameters, gradients and states."""
        chain = self.chain(1, candidate.examples, False)
        assert chain is not None
        costs = Costs(candidate, chain, self.machine)
        nbytes = _in_memory(costs, chain.totals, 0.0) / candidate.size("tensor") / costs.pipe
        return costs, float(nbytes) * SLACK

    def seconds(self, candidate: Candidate) -> Bounds:
        """Better and better bounds on the seconds of a candidate, the last with what it costs; none if it does not fit
        or is not possible."""
        one, nbytes = self.rough(candidate)
        if nbytes > self.machine.memory:
            return
        tensor, bound = candidate.size("tensor"), 0.0
        whole = one.chain.totals["forward"] + one.chain.totals["backward"]
        for ranks in divisors(tensor)[:-1]:
            some = self.chain(ranks, candidate.examples, False)
            if some is not None:
                beyond = max(some.totals["forward"] + some.totals["backward"] - whole / ranks, 0.0)
                bound = max(bound, _work_bound(one, whole / tensor + beyond, tensor) * ROUGH)
                yield bound, None
        costs = self.costs(candidate)
        if costs is None or memory_bound(costs) > self.machine.memory:
            return
        bound = lower_bound(costs)
        if candidate.stages > 1:
            yield bound, None
            bound = max(bound, pace_bound(costs))
        yield bound, costs

    def nbytes(self, candidate: Candidate) -> Bounds:
        """The same of the bytes of its fullest device."""
        yield self.rough(candidate)[1] * ROUGH, None
        costs = self.costs(candidate)
        if costs is not None:
            yield memory_bound(costs), costs

    def too_large(self, batch: int) -> str:
        """What to say when no candidate fits: the least memory that would do."""
        least, which = math.inf, ""
        for bound, costs in _in_order([self.nbytes(c) for c in self.candidates]):
            if bound >= least:
                break
            if costs is not None and (nbytes := least_memory(costs)) < least:
                least, which = nbytes, str(costs.candidate)
        if not which:
            return _nothing(self.machine, batch)
        return (f"no layout on {self.machine.devices} devices fits in {self.machine.memory:,.0f} bytes each; the least "
                f"that does is {math.ceil(least):,} ({which})")


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
