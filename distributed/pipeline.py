"""Pipeline schedules as pure data: which stage does what, when.

A schedule is for every device a list of `Task`s in the order in which it does them; nothing else. GPipe (Huang et al.
2019, arXiv:1811.06965) runs all forward passes, then all backward passes. 1F1B (Narayanan et al. 2019, PipeDream;
2021, arXiv:2104.04473) starts a backward pass as soon as it can, so stage i keeps the activations of at most p - i
micro-batches. Interleaved 1F1B gives each device several chunks of the model, v of them, and divides the bubble by v.

`simulate` plays a schedule with given times and finds deadlocks; for uniform stages the bubble of GPipe and 1F1B is
(p - 1) / (m + p - 1) of the time, with p devices and m micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..ir.errors import AttributeValueError

FORWARD, BACKWARD, WEIGHTS = "F", "B", "W"


class Task(NamedTuple):
    """One micro-batch through one stage. `stage` counts through the model; device `stage % devices` runs it."""

    phase: str
    stage: int
    micro: int

    def __str__(self) -> str:
        return f"{self.phase}{self.stage}.{self.micro}"


Schedule = tuple[tuple[Task, ...], ...]  # of each device


def _check(devices: int, micro: int, chunks: int = 1) -> None:
    for name, value in (("devices", devices), ("micro-batches", micro), ("chunks", chunks)):
        if value < 1:
            raise AttributeValueError(f"a pipeline needs at least 1 of its {name}, got {value}")


def gpipe(devices: int, micro: int) -> Schedule:
    """All forward passes, then all backward passes."""
    _check(devices, micro)
    return tuple((*(Task(FORWARD, d, m) for m in range(micro)), *(Task(BACKWARD, d, m) for m in range(micro)))
                 for d in range(devices))


def one_f_one_b(devices: int, micro: int) -> Schedule:
    """Warm up, then one forward and one backward pass by turns, then what is left of the backward passes."""
    _check(devices, micro)
    return tuple(_by_turns([Task(FORWARD, d, m) for m in range(micro)], [Task(BACKWARD, d, m) for m in range(micro)],
                           min(devices - d - 1, micro)) for d in range(devices))


def _by_turns(forward: list[Task], backward: list[Task], warm: int) -> tuple[Task, ...]:
    order = forward[:warm]
    for f, b in zip(forward[warm:], backward):
        order += [f, b]
    return (*order, *backward[len(forward) - warm:])


def interleaved(devices: int, micro: int, chunks: int) -> Schedule:
    """1F1B with `chunks` stages on each device; micro-batches go in groups of as many as there are devices.

    Raises:
        AttributeValueError: the micro-batches are no multiple of the devices (as in Megatron-LM).
    """
    _check(devices, micro, chunks)
    if chunks == 1:
        return one_f_one_b(devices, micro)
    if micro % devices:
        raise AttributeValueError(f"interleaved 1F1B needs micro-batches in multiples of the {devices} devices, "
                                  f"got {micro}")
    order = [(group * devices + i, chunk) for group in range(micro // devices) for chunk in range(chunks)
             for i in range(devices)]
    schedules = []
    for d in range(devices):
        forward = [Task(FORWARD, chunk * devices + d, m) for m, chunk in order]
        backward = [Task(BACKWARD, (chunks - 1 - chunk) * devices + d, m) for m, chunk in order]
        warm = min((devices - d - 1) * 2 + (chunks - 1) * devices, len(forward))
        schedules.append(_by_turns(forward, backward, warm))
    return tuple(schedules)


def zb_h1(devices: int, micro: int) -> Schedule:
    """1F1B whose backward passes come in two: cotangents at once, as the stage before waits for them, gradients of
    weights d micro-batches later on device d, where it would wait (Qi et al. 2023, arXiv:2401.10241, ZB-H1). The first
    device, for which nobody waits, has them in one. Every device keeps as many micro-batches as the first one."""
    schedules = []
    for d, tasks in enumerate(one_f_one_b(devices, micro)):
        order: list[Task] = []
        for task in tasks:
            order.append(task)
            if d and task.phase == BACKWARD and task.micro >= d:
                order.append(Task(WEIGHTS, d, task.micro - d))
        schedules.append((*order, *(Task(WEIGHTS, d, m) for m in range(max(micro - d, 0), micro if d else 0))))
    return tuple(schedules)


SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1")


def schedule(kind: str, devices: int, micro: int, chunks: int = 1) -> Schedule:
    """The schedule by name.

    Raises:
        AttributeValueError: there is none of that name, or it has no `chunks`.
    """
    if chunks > 1 and kind != "interleaved" and kind in SCHEDULES:
        raise AttributeValueError(f"the schedule {kind!r} has one stage on each device, not {chunks} chunks: use "
                                  "'interleaved', or chunks=1")
    if kind == "gpipe":
        return gpipe(devices, micro)
    if kind == "1f1b":
        return one_f_one_b(devices, micro)
    if kind == "interleaved":
        return interleaved(devices, micro, chunks)
    if kind == "zb-h1":
        return zb_h1(devices, micro)
    raise AttributeValueError(f"there is no pipeline schedule {kind!r}; there are: {', '.join(SCHEDULES)}")


def stash_bound(kind: str, devices: int, micro: int, stage: int, chunks: int = 1) -> int:
    """Micro-batches whose activations a device keeps at most (counted once for each of its chunks)."""
    if kind == "gpipe":
        return micro
    if kind == "zb-h1":
        return min(devices, micro)
    if kind == "1f1b" or chunks == 1:
        return min(devices - stage, micro)
    return min((devices - stage - 1) * 2 + (chunks - 1) * devices + 1, micro * chunks)


# Playing a schedule ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Played:
    """What a schedule comes to.

    Attributes:
        spans: task -> (start, end) in seconds.
        makespan: until the last task ends.
        bubble: the part of the devices' time in which they do nothing.
        stash: for each device, the most activations that it holds at a time.
    """

    spans: Mapping[Task, tuple[float, float]]
    makespan: float
    bubble: float
    stash: tuple[int, ...]


def needs(task: Task, stages: int) -> list[Task]:
    """The tasks whose results a task reads."""
    if task.phase == FORWARD:
        return [Task(FORWARD, task.stage - 1, task.micro)] if task.stage else []
    if task.phase == WEIGHTS:
        return [Task(BACKWARD, task.stage, task.micro)]
    after = [Task(BACKWARD, task.stage + 1, task.micro)] if task.stage + 1 < stages else []
    return [Task(FORWARD, task.stage, task.micro), *after]


def in_order(plan: Schedule, stages: int) -> Iterator[tuple[int, Task]]:
    """(device, task): all tasks, each behind those that it needs and those in front of it on its device.

    Raises:
        AttributeValueError: tasks wait for each other for ever; the message names them.
    """
    done: set[Task] = set()
    at = [0] * len(plan)
    while len(done) < sum(map(len, plan)):
        before = len(done)
        for d, tasks in enumerate(plan):
            while at[d] < len(tasks) and done.issuperset(needs(tasks[at[d]], stages)):
                yield d, tasks[at[d]]
                done.add(tasks[at[d]])
                at[d] += 1
        if len(done) == before:
            stuck = [str(tasks[at[d]]) for d, tasks in enumerate(plan) if at[d] < len(tasks)]
            raise AttributeValueError(f"the schedule deadlocks: {', '.join(stuck)} wait for each other")


def simulate(plan: Schedule, forward: Sequence[float], backward: Sequence[float],
             transfer: float | Sequence[float] = 0.0, weights: Sequence[float] | None = None) -> Played:
    """Plays a schedule: stage s takes `forward[s]` and `backward[s]` seconds, a hop between devices `transfer`.

    `weights`: of the backward passes the gradients of weights, where a schedule has them apart; default: half.
    `transfer`: one number, or one for every stage but the last: from it to the next, or back.

    Raises:
        AttributeValueError: as of `in_order`.
    """
    stages, times = len(forward), _times(plan, forward, backward, weights)
    hops = [transfer] * (stages - 1) if isinstance(transfer, (int, float)) else list(transfer)
    spans: dict[Task, tuple[float, float]] = {}
    clock = [0.0] * len(plan)
    for d, task in in_order(plan, stages):
        ready = max((spans[b][1] + (hops[min(b.stage, task.stage)] if b.stage != task.stage else 0.0)
                     for b in needs(task, stages)), default=0.0)
        start = max(clock[d], ready)
        clock[d] = start + times[task.phase, task.stage]
        spans[task] = (start, clock[d])
    makespan = max(clock)
    busy = sum(end - start for start, end in spans.values())
    return Played(spans, makespan, 1 - busy / (makespan * len(plan)) if makespan else 0.0, tuple(map(stash, plan)))


def _times(plan: Schedule, forward: Sequence[float], backward: Sequence[float],
           weights: Sequence[float] | None) -> dict[tuple[str, int], float]:
    """(phase, stage) -> seconds."""
    apart = {task.stage for tasks in plan for task in tasks if task.phase == WEIGHTS}
    later = [(b / 2 if weights is None else weights[s]) * (s in apart) for s, b in enumerate(backward)]
    return {**{(FORWARD, s): f for s, f in enumerate(forward)}, **{(WEIGHTS, s): w for s, w in enumerate(later)},
            **{(BACKWARD, s): b - w for s, (b, w) in enumerate(zip(backward, later))}}


def stash(tasks: Sequence[Task]) -> int:
    """The most micro-batches that have gone forward and not yet back, in a device's order."""
    held = most = 0
    last = WEIGHTS if any(task.phase == WEIGHTS for task in tasks) else BACKWARD
    for task in tasks:
        held += 1 if task.phase == FORWARD else -1 if task.phase == last else 0
        most = max(most, held)
    return most


def most_waiting(tasks: Sequence[Task], stage: int) -> int:
    """The most micro-batches that have gone forward through a stage and not yet back, in its device's order."""
    return stash([task for task in tasks if task.stage == stage])


def most_held(tasks: Sequence[Task], waiting: Mapping[tuple[str, int], int],
              running: Mapping[tuple[str, int], int]) -> int:
    """The most bytes that a device holds at a time, in its order.

    `waiting`: of (phase, stage), what a micro-batch leaves behind once it has been through that; `running`: what the
    task takes while it runs, besides what was left behind before.
    """
    left: dict[tuple[int, int], int] = {}
    most = 0
    for task in tasks:
        most = max(most, sum(left.values()) + running[task.phase, task.stage])
        left[task.stage, task.micro] = waiting[task.phase, task.stage]
        most = max(most, sum(left.values()))
    return most


def ideal_bubble(devices: int, micro: int, chunks: int = 1) -> float:
    """(p - 1) / (v m + p - 1): the bubble of uniform stages."""
    return (devices - 1) / (chunks * micro + devices - 1)


def chart(played: Played, devices: int, width: int = 100) -> str:
    """The schedule as text, one line a device: digits are the micro-batches' forward passes, letters the backward
    (capitals: gradients of weights, where these come apart)."""
    scale = width / played.makespan if played.makespan else 0.0
    lines = [[" "] * width for _ in range(devices)]
    for task, (start, end) in sorted(played.spans.items(), key=lambda item: item[1]):
        mark = {FORWARD: DIGITS, BACKWARD: LETTERS, WEIGHTS: LETTERS.upper()}[task.phase][task.micro % 26]
        for x in range(int(start * scale), max(int(end * scale), int(start * scale) + 1)):
            if x < width:
                lines[task.stage % devices][x] = mark
    return "\n".join(f"{d:3} |{''.join(line)}|" for d, line in enumerate(lines))


DIGITS = "0123456789" + "@#$%&*+=<>?!:;~^"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
