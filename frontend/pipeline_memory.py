"""A device of a pipeline within a memory budget: what its stages keep, and what they compute again.

Between its forward and its backward pass a micro-batch leaves on the device what the backward program reads of the
forward one, and what the stage was handed. The schedule says how many micro-batches wait so at a time; on top comes
what the program that runs takes. If that is more than the budget, the stage's graph of forward and backward pass
is changed before it is taken apart (`autodiff/budget.py`): less is kept, and computed again in the backward program.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..autodiff.budget import keep_less, recompute_to_fit
from ..distributed.halves import Halves, halves
from ..distributed.pipeline import BACKWARD, FORWARD, WEIGHTS, Task, most_held, most_waiting
from ..ir.errors import CompileError
from ..ir.graph import Graph, Value
from ..ir.location import user_location

Source = int | tuple[str, int]  # of an input: its number in the joint graph; what was kept, or made in the middle
SHARES = (1.0, 0.8, 0.6, 0.45, 0.3, 0.2, 0.1, 0.0)  # of what is kept, tried one after the other
ROUNDS = 6


@dataclass(frozen=True)
class RankGraph:
    """What the memory of a stage follows from: forward and backward pass of a rank as one graph.

    Attributes:
        ahead: how many outputs the forward pass has; the first `out` of them are handed on.
        handed, cotangents: the inputs that other stages hand over, forwards and backwards.
        back: how many of the other outputs, which come first among them, are handed back.
        varying: numbers of the inputs that differ from one micro-batch to the next.
        twice: whether the backward pass comes in two.
    """

    graph: Graph
    ahead: int
    out: int
    handed: Sequence[Value]
    cotangents: Sequence[Value]
    back: int
    varying: Collection[int]
    twice: bool


@dataclass(frozen=True)
class Programs:
    """A stage's programs, not compiled yet.

    Attributes:
        cotangents: the first part of the backward pass, if it comes in two; `sources` of its inputs.
        backward: the backward pass, or the second part.
    """

    joint: RankGraph
    forward: Halves
    cotangents: Halves | None
    cotangent_sources: list[Source]
    backward: Graph
    sources: list[Source]

    @classmethod
    def of(cls, joint: RankGraph, graph: Graph) -> Programs:
        """Takes a joint graph apart."""
        parts = halves(graph, joint.ahead, joint.varying)
        backward = parts.backward
        sources: list[Source] = [*(("kept", i) for i in range(len(parts.kept))), *parts.backward_inputs]
        if not joint.twice or not joint.back:
            return cls(joint, parts, None, [], backward, sources)
        moving = [i for i, source in enumerate(sources) if isinstance(source, tuple) or source in joint.varying]
        two = halves(backward, joint.back, moving)
        return cls(joint, parts, two, [sources[i] for i in two.forward_inputs], two.backward,
                   [*(("middle", i) for i in two.kept), *(sources[i] for i in two.backward_inputs)])

    @property
    def kept(self) -> int:
        """Bytes that the forward program leaves for the backward program."""
        return nbytes(self.forward.forward.outputs[i] for i in self.forward.kept)

    @property
    def crossing(self) -> int:
        """Bytes of the longest message to or from another stage."""
        ends = self.forward.forward.outputs[:self.joint.out], self.joint.handed, self.joint.cotangents
        return max(nbytes(values) for values in ends)

    def waiting(self) -> dict[str, int]:
        """Bytes that a micro-batch leaves behind, by the task that it has been through."""
        first = self.kept + nbytes(self.joint.handed)
        middle = 0 if self.cotangents is None else nbytes(self.cotangents.forward.outputs) + nbytes(
            self.joint.cotangents)
        return {FORWARD: first, BACKWARD: first + middle if self.cotangents is not None else 0, WEIGHTS: 0}

    def running(self, arena: Callable[[Graph], int]) -> dict[str, int]:
        """Bytes that a task takes while it runs, besides what waits. `arena`: of a program."""
        ahead, kept = self.forward.forward, {self.forward.forward.outputs[i] for i in self.forward.kept}
        others = nbytes(self.joint.handed) + self.kept + nbytes(v for v in ahead.outputs[:self.joint.out]
                                                                if v not in kept)
        found = {FORWARD: arena(ahead) + others, WEIGHTS: arena(self.backward)}
        behind = self.backward if self.cotangents is None else self.cotangents.forward
        given = behind.outputs[:self.joint.back] if self.cotangents is None else behind.outputs
        return {**found, BACKWARD: arena(behind) + nbytes(self.joint.cotangents) + nbytes(given)}


def nbytes(values: Iterable[Value]) -> int:
    """Of some values, each once."""
    return sum(int(v.type.nbytes) for v in dict.fromkeys(values))


def held(tasks: Sequence[Task], programs: Mapping[int, Programs], arena: Callable[[Graph], int]) -> int:
    """The most bytes of activations that a device has at a time, whose stages these are: what waits, and what the
    program that runs takes."""
    waiting = {(phase, s): n for s, p in programs.items() for phase, n in p.waiting().items()}
    running = {(phase, s): n for s, p in programs.items() for phase, n in p.running(arena).items()}
    return most_held(tasks, waiting, running)


def within(joints: Mapping[int, RankGraph], tasks: Sequence[Task], budget: int | None,
           arena: Callable[[Graph], int]) -> dict[int, Programs]:
    """The programs of a device's stages, which together keep to the budget.

    Raises:
        CompileError: that cannot be; the message states the least that was reached.
    """
    programs = {s: Programs.of(joint, joint.graph) for s, joint in joints.items()}
    if budget is None:
        return programs
    used = held(tasks, programs, arena)
    copies = {s: most_waiting(tasks, s) for s in joints}
    needs = {s: copies[s] * p.kept + max(p.running(arena).values()) for s, p in programs.items()}
    asked = float(budget)
    for left in reversed(range(ROUNDS)):
        if used <= budget:
            return programs
        shares = {s: int(asked * needs[s] / sum(needs.values())) for s in joints}
        programs = {s: Programs.of(joint, _less(joint, copies[s], shares[s])) for s, joint in joints.items()}
        used = held(tasks, programs, arena)
        asked = 0.97 * asked * min(budget / used, 1.0) if left > 1 else 0.0  # the last time, whatever can be had
    if used <= budget:
        return programs
    waiting = max(copies.values())
    raise CompileError(f"memory_budget is {budget:,} bytes, but this stage of the pipeline takes {used:,} even with "
                       f"everything recomputed that helps: its schedule lets up to {waiting} micro-batches wait for "
                       "their backward pass. Give at least that, use more micro-batches (accumulate), more stages, or "
                       "a schedule that keeps fewer, such as '1f1b'", user_location())


def _less(joint: RankGraph, copies: int, most: int) -> Graph:
    """The joint graph, in which as little is computed again as lets it do with so many bytes, of which what is kept
    counts once for each micro-batch that waits; the nearest to it, if nothing does."""
    kept = keep_less(joint.graph, joint.ahead, 1 << 62).stats["kept_after"]
    found: list[tuple[int, Graph]] = []
    before = -1
    for share in SHARES:
        less = keep_less(joint.graph, joint.ahead, int(kept * share))
        if less.stats["kept_after"] == before:
            continue
        before = less.stats["kept_after"]
        room = most - (copies - 1) * (before + nbytes(joint.handed)) - nbytes(joint.handed)
        made = recompute_to_fit(less.graph, max(room, 1), ahead=joint.ahead)
        again = keep_less(made.graph, joint.ahead, 1 << 62).stats["kept_after"]
        needs = made.stats["peak_after"] + (copies - 1) * again + copies * nbytes(joint.handed)
        found.append((needs, made.graph))
        if needs <= most:
            return made.graph
    return min(found, key=lambda entry: entry[0])[1]
