"""Searches how to lay a model out on a described cluster: data x tensor x pipeline x micro-batches x recomputation.

Offline and in seconds: a candidate costs a cut of the model's chain (`chain.py`, optimal) and a simulation of its
schedule (`pipeline.py`). All candidates are tried. What is assumed: layers with contractions divide over the tensor
axis and cost one all-reduce of their output forward and one backward (Megatron-LM); parameters take four times their
bytes (gradient, two moments), of which ZeRO-1 divides the moments over the data axis; gradients are reduced after
the last backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..ir.errors import AttributeValueError
from .chain import Cut, Layer, cut, least_memory, stage_bytes
from .cost import Cluster
from .pipeline import Played, schedule, simulate, stash_bound

MOST_MICRO = 128  # micro-batches of a replica that are tried
RECOMPUTE_KEEPS = 0.1  # of a layer's activations: what its input takes, roughly; the rest is computed again


@dataclass(frozen=True)
class Machine:
    """A cluster of equal devices: `memory` in bytes each, `cluster` what they compute and send."""

    devices: int
    memory: float
    cluster: Cluster = Cluster()


@dataclass(frozen=True)
class Layout:
    """One candidate.

    Attributes:
        micro: micro-batches of a replica; recompute: whether layers are computed again in the backward pass.
        seconds: of a step; bubble: the part of it that devices wait for each other.
        nbytes: of the fullest device; sent: bytes that a device sends in a step, at most.
    """

    data: int
    tensor: int
    pipe: int
    micro: int
    recompute: bool
    zero: int
    seconds: float
    bubble: float
    nbytes: float
    sent: float
    cut: Cut
    played: Played

    def __str__(self) -> str:
        return (f"data={self.data} tensor={self.tensor} pipe={self.pipe} micro-batches={self.micro}"
                f"{' recompute' if self.recompute else ''}")


def meshes(devices: int) -> Iterator[tuple[int, int, int]]:
    """Every (data, tensor, pipe) of so many devices."""
    for tensor in divisors(devices):
        for pipe in divisors(devices // tensor):
            yield devices // tensor // pipe, tensor, pipe


def divisors(n: int) -> list[int]:
    """In increasing order."""
    return [i for i in range(1, n + 1) if n % i == 0]


def scaled(layer: Layer, share: float, tensor: int, recompute: bool, cluster: Cluster) -> Layer:
    """A layer on one device, for a micro-batch that is this share of the batch it was measured with."""
    split = tensor if layer.parameters else 1
    forward, backward, output = layer.forward * share / split, layer.backward * share / split, layer.output * share
    if layer.parameters and tensor > 1:
        talk = cluster.all_reduce("tensor", tensor, output)
        forward, backward = forward + talk, backward + talk
    if recompute:
        backward += forward
    kept = layer.activations * share / split
    return replace(layer, forward=forward, backward=backward, parameters=layer.parameters / split,
                   activations=kept * RECOMPUTE_KEEPS if recompute else kept, output=output)


def candidates(machine: Machine, batch: int) -> Iterator[tuple[int, int, int, int, bool]]:
    """(data, tensor, pipe, micro, recompute)."""
    for data, tensor, pipe in meshes(machine.devices):
        if batch % data:
            continue
        for micro in divisors(batch // data):
            if micro <= MOST_MICRO and (pipe == 1 or micro >= pipe):
                yield from ((data, tensor, pipe, micro, recompute) for recompute in (False, True))


def evaluate(layers: Sequence[Layer], machine: Machine, data: int, tensor: int, pipe: int, micro: int,
             recompute: bool) -> Layout | float:
    """A candidate's layout, or the least memory of a device with which it would fit."""
    cluster, zero = machine.cluster, 1 if data > 1 else 0
    own = [scaled(x, 1 / data / micro, tensor, recompute, cluster) for x in layers]
    if zero:
        own = [replace(x, parameters=x.parameters * (0.5 + 0.5 / data)) for x in own]
    kept = [stash_bound("1f1b", pipe, micro, s) for s in range(pipe)]
    if pipe > len(own):
        return math.inf
    link = cluster.along("pipe")
    try:
        found = cut(own, pipe, machine.memory, kept, link.bandwidth)
    except AttributeValueError:
        return least_memory(own, pipe, kept)
    stages = found.stages(own)
    handed = max((s[-1].output for s in stages[:-1]), default=0.0)
    played = simulate(schedule("1f1b", pipe, micro), [sum(x.forward for x in s) for s in stages],
                      [sum(x.backward for x in s) for s in stages], link.latency + handed / link.bandwidth)
    plain = [sum(x.parameters for x in s) / (4 * (0.5 + 0.5 / data) if zero else 4) for s in stages]
    reduce = max(2 * cluster.all_gather("data", data, nbytes) for nbytes in plain)
    talk = [sum(4 * x.output * (tensor - 1) / tensor * micro for x in s if x.parameters) for s in stages]
    sent = max(2 * n * (data - 1) / data + t + 2 * micro * s[-1].output * (pipe > 1)
               for n, t, s in zip(plain, talk, stages))
    nbytes = max(stage_bytes(s, k) for s, k in zip(stages, kept))
    return Layout(data, tensor, pipe, micro, recompute, zero, played.makespan + reduce, played.bubble, nbytes, sent,
                  found, played)


def plan(layers: Sequence[Layer], machine: Machine, batch: int) -> list[Layout]:
    """Every layout that fits, the fastest first.

    Args:
        layers: the model's chain, measured with the whole batch on one device.
        batch: examples in a step; data x micro-batches divides it.

    Raises:
        AttributeValueError: nothing fits in memory; the message gives the least that would do.
    """
    if machine.devices < 1 or batch < 1 or not layers:
        raise AttributeValueError("a plan needs at least one device, one example and one layer")
    found, least = [], math.inf
    for candidate in candidates(machine, batch):
        layout = evaluate(layers, machine, *candidate)
        if isinstance(layout, Layout):
            found.append(layout)
        else:
            least = min(least, layout)
    if not found:
        raise AttributeValueError(f"no layout on {machine.devices} devices fits in {machine.memory:,.0f} bytes each; "
                                  f"the least that does is {least:,.0f}")
    return sorted(found, key=lambda x: (x.seconds, x.nbytes))


def merged(layers: Sequence[Layer], most: int) -> list[Layer]:
    """At most so many layers: neighbours that take the least time together become one."""
    found = list(layers)
    while len(found) > most:
        i = min(range(len(found) - 1), key=lambda k: found[k].forward + found[k + 1].forward)
        a, b = found[i:i + 2]
        found[i:i + 2] = [Layer(a.forward + b.forward, a.backward + b.backward, a.parameters + b.parameters,
                                a.activations + b.activations, b.output, a.name or b.name)]
    return found
