"""What a layout of a model on a cluster costs: seconds of a step, bytes of a device, bytes sent.

A layout is a mesh (data x tensor x pipe), micro-batches, recomputation, a ZeRO stage, a pipeline schedule and a cut.
The model is a chain of `Unit`s: what one device computes, keeps and sends for one micro-batch. Where their figures
come from is not asked here (`frontend/pricing.py` runs the partitioner on the real layers); what is made of them:

* a stage computes the sum of its units; under ZeRO-3 it gathers their parameters forwards and again backwards;
* the schedule is played (`pipeline.py`), with a hop between devices that takes latency + bytes / bandwidth;
* then a device reduces its gradients over the data axis and updates its parameters. ZeRO-2 and 3 do so after every
  micro-batch. A step that is one program (no pipeline, one micro-batch) reduces them while its backward pass still
  runs, from the last unit to the first;
* a parameter that units of several stages read is on each, and its gradients are added up over the pipeline;
* in memory are parameters, gradients and states, of which ZeRO divides its part, the activations that the schedule
  holds at its worst, what a unit needs besides while it runs, and the tensors under way. The backward pass of a unit
  runs when those behind it have let go of what they kept, so what it needs may find room there.

Many cuts are costed at once: every figure is an array over cuts. That makes it cheap to try all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .cost import Cluster
from .mesh import Mesh
from .pipeline import Played, simulate
from .timetable import Timetable, held_of, timetable


@dataclass(frozen=True)
class Machine:
    """A cluster of equal devices: `memory` in bytes each, `cluster` what they compute and send."""

    devices: int
    memory: float
    cluster: Cluster = Cluster()


@dataclass(frozen=True)
class Unit:
    """A run of layers that is not cut, on one device and for one micro-batch; seconds and bytes.

    Attributes:
        forward, backward: seconds, what is sent along the tensor axis and computed again included.
        parameters, gradients, states: bytes of this device's part.
        activations: kept from the forward pass for the backward pass.
        work: in memory besides, at most, while it runs.
        output: handed to the next unit.
        sent: bytes that the device sends along the tensor axis.
        tied: parameters that other units read as well: (name, bytes of parameter, gradient, states), counted above.
        layers: how many layers of the chain it is.
    """

    forward: float
    backward: float
    parameters: float = 0.0
    gradients: float = 0.0
    states: float = 0.0
    activations: float = 0.0
    work: float = 0.0
    output: float = 0.0
    sent: float = 0.0
    name: str = ""
    tied: tuple[tuple[str, float, float, float], ...] = ()
    layers: int = 1


@dataclass(frozen=True)
class Candidate:
    """A layout without its cut.

    Attributes:
        axes: of the mesh, the slowest varying first.
        examples: of a micro-batch of a replica.
    """

    axes: tuple[tuple[str, int], ...]
    micro: int
    examples: int
    recompute: bool = False
    zero: int = 0
    schedule: str = "1f1b"
    chunks: int = 1

    def size(self, axis: str) -> int:
        """Ranks along an axis; 1 if the mesh lacks it."""
        return dict(self.axes).get(axis, 1)

    @property
    def mesh(self) -> Mesh:
        """The mesh, without axes of one rank."""
        return Mesh({name: size for name, size in self.axes if size > 1})

    @property
    def stages(self) -> int:
        """Runs of units."""
        return self.size("pipe") * self.chunks

    @property
    def timetable(self) -> Timetable:
        """The schedule, as arrays."""
        return timetable(self.schedule, self.size("pipe"), self.micro, self.chunks)

    @property
    def held(self) -> tuple[np.ndarray, ...]:
        """For each device the numbers of micro-batches of each of its chunks that it holds together, as rows."""
        return held_of(self.schedule, self.size("pipe"), self.micro, self.chunks)

    @property
    def one_program(self) -> bool:
        """Whether a step is one program, which reduces gradients while its backward pass runs."""
        return self.micro == 1 and self.size("pipe") == 1

    def __str__(self) -> str:
        text = " ".join(f"{axis}={self.size(axis)}" for axis in ("data", "tensor", "pipe"))
        if self.size("pipe") > 1:
            text += f" {self.schedule}" + (f" x {self.chunks}" if self.chunks > 1 else "")
        return (f"{text} micro-batches={self.micro}{f' zero={self.zero}' if self.zero else ''}"
                f"{' recompute' if self.recompute else ''}")


@dataclass(frozen=True)
class Layout:
    """A candidate with its cut, and what it comes to.

    Attributes:
        bounds: the first unit of each stage.
        seconds: of a step; pipeline: until the last backward pass ends; bubble: the part of that in which devices wait.
        nbytes: of the fullest device; sent: bytes that a device sends in a step, at most.
        stages: of each stage (seconds of a micro-batch, bytes of its device).
        times: of each stage seconds forwards and backwards, and to the next one.
    """

    candidate: Candidate
    units: tuple[Unit, ...] = field(repr=False)
    bounds: tuple[int, ...]
    seconds: float
    pipeline: float
    bubble: float
    nbytes: float
    sent: float
    stages: tuple[tuple[float, float], ...]
    times: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]] = field(repr=False)

    @functools.cached_property
    def played(self) -> Played:
        """Every task's times."""
        return simulate(self.candidate.timetable.plan, *self.times)

    def runs(self) -> list[tuple[Unit, ...]]:
        """The units of each stage."""
        return [self.units[a:b] for a, b in zip(self.bounds, (*self.bounds[1:], len(self.units)))]

    def parameters(self, stage: int) -> float:
        """Bytes of a stage's parameters."""
        ends = (*self.bounds[1:], len(self.units))
        return float(Chain(self.units).of("parameters", np.array(self.bounds[stage]), np.array(ends[stage])))

    @property
    def cut(self) -> tuple[int, ...]:
        """The first layer of each stage, counted in the model's chain."""
        before = np.cumsum([0, *(u.layers for u in self.units)])
        return tuple(int(before[b]) for b in self.bounds)


class Chain:
    """Units as arrays: sums over runs of units by prefix sums."""

    def __init__(self, units: Sequence[Unit]):
        self.units = tuple(units)
        names = ("forward", "backward", "parameters", "gradients", "states", "activations", "sent")
        self.before = {n: np.concatenate([[0.0], np.cumsum([getattr(u, n) for u in units])]) for n in names}
        self.output = np.array([u.output for u in units])
        readers: dict[str, list[int]] = {}
        for i, u in enumerate(units):
            for name, *_ in u.tied:
                readers.setdefault(name, []).append(i)
        sizes = {name: sizes for u in units for name, *sizes in u.tied}
        self.tied = [(at, dict(zip(("parameters", "gradients", "states"), sizes[name])))
                     for name, at in readers.items() if len(at) > 1]
        # [a, b]: by how much the units a to b - 1 need more than they keep; the second if parameters are gathered
        kept = [u.activations for u in units]
        self.each = {n: np.diff(x) for n, x in self.before.items()}
        self.work = [np.array([u.work for u in units]), np.array([u.work + u.parameters for u in units])]
        self.excess = [_excess(kept, work) for work in self.work]
        self.totals = {n: float(self.of(n, np.array(0), np.array(len(self.units)))) for n in names}
        self._paces = [np.where(np.arange(len(units) + 1) == 0, 0.0, np.inf)]

    def pace(self, stages: int) -> float:
        """Seconds of the slowest of so many stages at best, for any use of memory and network."""
        edges = self.before["forward"] + self.before["backward"]
        while len(self._paces) <= stages:
            seconds = np.maximum(self._paces[-1][:, None], edges[None, :] - edges[:, None])
            seconds[np.tril_indices(len(edges))] = np.inf
            self._paces.append(seconds.min(0))
        return float(self._paces[stages][-1])

    def of(self, name: str, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """The sums over runs; what units of a run share counts once."""
        found: np.ndarray = self.before[name][ends] - self.before[name][starts]
        for at, sizes in self.tied:
            for a, b in zip(at, at[1:]):
                found = found - sizes.get(name, 0.0) * ((starts <= a) & (b < ends))
        return found


def _excess(kept: Sequence[float], work: np.ndarray) -> np.ndarray:
    found = np.zeros((len(kept) + 1, len(kept) + 1))
    for a in range(len(kept)):
        held = np.cumsum(kept[a:])
        found[a, a + 1:] = np.maximum.accumulate(held + work[a:]) - held
    return found


class Costs:
    """What the cuts of a candidate cost. `chain`: its units."""

    def __init__(self, candidate: Candidate, chain: Chain, machine: Machine):
        self.candidate, self.chain, self.machine = candidate, chain, machine
        self.cluster = _seen(machine.cluster, candidate.axes)
        self.data, self.pipe = candidate.size("data"), candidate.size("pipe")

    # The parts of a step -------------------------------------------------------------------------------------------

    def gathered(self, nbytes: np.ndarray) -> np.ndarray:
        """Seconds to gather, or to reduce and scatter, over the data axis."""
        link, part = self.cluster.along("data"), (self.data - 1) / self.data
        return np.array((nbytes > 0) * self.cluster.all_gather("data", self.data, 0.0) + nbytes * part / link.bandwidth)

    def reduction(self, gradients: np.ndarray, parameters: np.ndarray) -> np.ndarray:
        """Seconds after the last backward pass to bring gradients together over the data axis, and parameters back."""
        if self.data == 1:
            return np.zeros_like(gradients)
        if self.candidate.zero == 0:
            return self.cluster.all_reduces("data", self.data, gradients)
        first = self.gathered(gradients) if self.candidate.zero == 1 else 0.0 * gradients
        return np.array(first + (0.0 if self.candidate.zero == 3 else self.gathered(parameters)))

    def tying(self, bounds: np.ndarray) -> np.ndarray:
        """Seconds to add up the gradients of parameters that several devices have, (cuts,)."""
        found = np.zeros(len(bounds))
        for at, sizes in self.chain.tied:
            homes = np.array([(bounds <= i).sum(1) - 1 for i in at]) % self.pipe
            one = self.cluster.all_reduce("pipe", self.pipe, sizes["gradients"])
            found += one * (homes.min(0) != homes.max(0))
        return found

    def update(self, parameters: np.ndarray, gradients: np.ndarray, states: np.ndarray) -> np.ndarray:
        """Seconds of the optimizer: parameters and states are read and written, gradients read."""
        share = self.data if self.candidate.zero else 1
        return np.array((2 * parameters + gradients + 2 * states) / share / self.cluster.memory)

    def gathering(self, parameters: np.ndarray) -> np.ndarray:
        """Seconds to gather the parameters of a run of units under ZeRO-3, once."""
        return self.gathered(parameters) if self.candidate.zero == 3 else np.zeros_like(parameters)

    def exposed(self) -> float:
        """Seconds of the reduction that a step of one program does not hide behind its backward pass."""
        clock = channel = 0.0
        reduce = self.cluster.reduce_scatter if self.candidate.zero else self.cluster.all_reduce
        later = dict.fromkeys(range(len(self.chain.units)), 0.0)  # reduced by the first reader, which comes last
        for at, sizes in self.chain.tied:
            for b in at[1:]:
                later[b] += sizes["gradients"]
        for i, u in reversed(list(enumerate(self.chain.units))):
            clock += u.backward + (2 if self.candidate.recompute else 1) * float(self.gathering(np.array(u.parameters)))
            if u.gradients:
                channel = max(channel, clock) + reduce("data", self.data, u.gradients - later[i])
        back = 0.0
        if self.candidate.zero in (1, 2) and self.data > 1:
            back = self.cluster.all_gather("data", self.data, self.chain.totals["parameters"])
        return max(channel - clock, 0.0) + back

    # All of it -----------------------------------------------------------------------------------------------------

    def stages(self, bounds: np.ndarray) -> dict[str, np.ndarray]:
        """Figures of each stage, (stages, cuts), for the first units of the stages, (cuts, stages)."""
        starts = bounds.T
        ends = np.concatenate([starts[1:], np.full((1, bounds.shape[0]), len(self.chain.units))])
        found = {n: self.chain.of(n, starts, ends) for n in self.chain.before}
        found["work"] = self.chain.excess[self.candidate.zero == 3][starts, ends]
        found["output"] = self.chain.output[ends - 1]
        again = self.gathering(found["parameters"])
        found["forward"] = found["forward"] + again
        found["backward"] = found["backward"] + again * (2 if self.candidate.recompute else 1)
        if not self.candidate.one_program:  # sums of gradients, or of the parts that ZeRO leaves, are read and written
            split = self.candidate.zero >= 2
            adding = 3 * found["gradients"] / (self.data if split else 1) / self.cluster.memory
            found["backward"] = found["backward"] + adding + (self.gathered(found["gradients"]) if split else 0.0)
        return found

    def on_devices(self, values: np.ndarray) -> np.ndarray:
        """(stages, cuts) summed to (devices, cuts)."""
        return np.array(values.reshape(self.candidate.chunks, self.pipe, -1).sum(0))

    def memory(self, stages: dict[str, np.ndarray]) -> np.ndarray:
        """Bytes of each device, (devices, cuts)."""
        own = {n: self.on_devices(stages[n]) for n in ("parameters", "gradients", "states")}
        zero, data = self.candidate.zero, self.data
        sums = own["gradients"] / (data if zero >= 2 or zero and self.candidate.one_program else 1)
        static = own["parameters"] / (data if zero == 3 else 1) + sums + own["states"] / (data if zero else 1)
        kept = stages["activations"].reshape(self.candidate.chunks, self.pipe, -1)
        held = self.candidate.held
        stash = np.array([(held[d] @ kept[:, d]).max(0) for d in range(self.pipe)])
        by_chunk = (self.candidate.chunks, self.pipe, -1)
        under_way = 2 * stages["output"].reshape(by_chunk).max(0) if self.pipe > 1 else 0.0
        return np.array(static + stash + stages["work"].reshape(by_chunk).max(0) + under_way)

    def hops(self, stages: dict[str, np.ndarray]) -> np.ndarray:
        """Seconds from each stage to the next, (stages - 1, cuts)."""
        link = self.cluster.along("pipe")
        return np.array(link.latency + stages["output"][:-1] / link.bandwidth)

    def seconds(self, bounds: np.ndarray, stages: dict[str, np.ndarray]) -> np.ndarray:
        """Of a step, for each cut."""
        ends = self.candidate.timetable.play(stages["forward"], stages["backward"], self.hops(stages))
        own = [self.on_devices(stages[n]) for n in ("parameters", "gradients", "states")]
        reduced = np.full_like(ends, self.exposed()) if self.candidate.one_program else self.reduction(own[1], own[0])
        return np.array((ends + reduced + self.update(*own)).max(0) + self.tying(bounds))

    def floor(self, bounds: np.ndarray, stages: dict[str, np.ndarray]) -> np.ndarray:
        """Seconds that a step takes at least, for each cut: a device waits for a forward pass of those before it, works
        for every micro-batch, and those before it wait for its last backward pass."""
        c, hops = self.candidate, self.hops(stages)
        work = self.on_devices(stages["forward"] + stages["backward"]) * c.micro
        none = np.zeros((1, work.shape[1]))
        ahead = np.concatenate([none, np.cumsum(stages["forward"][:-1] + hops, 0)])[:self.pipe]
        own = [self.on_devices(stages[n]) for n in ("parameters", "gradients", "states")]
        after = self.update(*own) + (0.0 if c.one_program else self.reduction(own[1], own[0]))
        found = (ahead + work + after).max(0)
        if c.schedule in ("gpipe", "1f1b"):
            back = np.concatenate([none, np.cumsum(stages["backward"][:-1] + hops, 0)])
            found = np.maximum(found, (ahead + work + back).max(0) + after[0])
        return np.array(found + self.tying(bounds))

    def sent(self, bounds: np.ndarray, stages: dict[str, np.ndarray]) -> np.ndarray:
        """Bytes that each device sends in a step."""
        own = {n: self.on_devices(stages[n]) for n in ("parameters", "gradients", "sent")}
        part, micro, zero = (self.data - 1) / self.data, self.candidate.micro, self.candidate.zero
        gathers = {0: 0.0, 1: 1.0, 2: 1.0, 3: micro * (3.0 if self.candidate.recompute else 2.0)}[zero]
        sums = {0: 2.0, 1: 1.0}.get(zero, 1.0 * micro)
        over_data = part * (sums * own["gradients"] + gathers * own["parameters"])
        handed = np.zeros_like(stages["output"])
        if self.pipe > 1:
            handed[:-1] += stages["output"][:-1]  # forwards
            handed[1:] += stages["output"][:-1]  # backwards
        for at, sizes in self.chain.tied:
            homes = np.array([(bounds <= i).sum(1) - 1 for i in at]) % self.pipe
            several = homes.min(0) != homes.max(0)
            over_data = over_data + 2 * (self.pipe - 1) / self.pipe * sizes["gradients"] * several
        return np.array(over_data + micro * (own["sent"] + self.on_devices(handed)))

    def layout(self, bounds: Sequence[int]) -> Layout:
        """The layout of one cut."""
        cuts = np.array([bounds])
        stages = self.stages(cuts)
        forward, backward, hops = (tuple(x[:, 0].tolist()) for x in (stages["forward"], stages["backward"],
                                                                     self.hops(stages)))
        ends = self.candidate.timetable.play(stages["forward"], stages["backward"], self.hops(stages)).max()
        busy = self.candidate.micro * (sum(forward) + sum(backward))
        memory = self.memory(stages)[:, 0]
        per_stage = tuple((f + b, float(memory[s % self.pipe])) for s, (f, b) in enumerate(zip(forward, backward)))
        return Layout(self.candidate, self.chain.units, tuple(int(b) for b in bounds),
                      float(self.seconds(cuts, stages)[0]), float(ends), 1 - busy / (float(ends) * self.pipe or 1.0),
                      float(memory.max()), float(self.sent(cuts, stages).max()), per_stage, (forward, backward, hops))


@functools.lru_cache(maxsize=4096)
def _seen(cluster: Cluster, axes: tuple[tuple[str, int], ...]) -> Cluster:
    """The cluster as the axes of a mesh see it."""
    return cluster.on(Mesh({name: size for name, size in axes if size > 1}))
