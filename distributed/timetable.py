"""A pipeline schedule as arrays, to be played for many cuts at once.

`pipeline.simulate` goes from task to task. Here tasks that wait for none of each other are a level, and a level is a
few array operations over its tasks and all cuts. Of m micro-batches over p devices there are some 2 (m + p) levels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from .pipeline import BACKWARD, FORWARD, WEIGHTS, Schedule, Task, in_order, needs, schedule, stash_bound

BLOCK = 1 << 21  # times of tasks that are in memory together
PHASES = {FORWARD: 0, BACKWARD: 1, WEIGHTS: 2}


@dataclass(frozen=True)
class Timetable:
    """The tasks of a schedule, level by level, counted from 1; 0 stands for none.

    Attributes:
        plan: the schedule.
        own, other: of each task, the one before it on its device, and the one on another stage whose result it reads.
        hop: the stage behind which that result travels. work: phase x stages + stage.
        levels: where each level begins, and the end. last: the last task of each device.
        apart: whether gradients of weights are tasks of their own.
    """

    plan: Schedule
    own: np.ndarray
    other: np.ndarray
    hop: np.ndarray
    work: np.ndarray
    levels: tuple[int, ...]
    last: np.ndarray
    apart: bool

    def play(self, forward: np.ndarray, backward: np.ndarray, hop: np.ndarray) -> np.ndarray:
        """When each device is done, (devices, cuts), for the stages' times (stages, cuts) and hops after each stage.

        The same as `pipeline.simulate`, with half of a backward pass for gradients of weights that are apart.
        """
        if len(self.plan) == 1:
            return np.array((forward + backward).sum(0, keepdims=True) * self.levels[-1] / 2 / len(forward))
        later = backward / 2 if self.apart else 0.0 * backward
        later[0] = 0.0
        times = np.concatenate([forward, backward - later, later])
        step = max(1, BLOCK // self.levels[-1])
        blocks = range(0, forward.shape[1], step)
        return np.concatenate([self._play(times[:, a:a + step], hop[:, a:a + step]) for a in blocks], axis=1)

    def _play(self, times: np.ndarray, hop: np.ndarray) -> np.ndarray:
        ends = np.zeros((self.levels[-1] + 1, times.shape[1]))
        hop = np.concatenate([hop, np.zeros((1, hop.shape[1]))])
        for a, b in zip(self.levels, self.levels[1:]):
            here = slice(a + 1, b + 1)
            ready = ends[self.other[here]] + hop[self.hop[here]]
            ends[here] = np.maximum(ends[self.own[here]], ready, out=ready) + times[self.work[here]]
        return np.array(ends[self.last])


@functools.lru_cache(maxsize=1024)
def timetable(kind: str, devices: int, micro: int, chunks: int) -> Timetable:
    """The timetable of `pipeline.schedule`."""
    plan = schedule(kind, devices, micro, chunks)
    stages = devices * chunks
    level: dict[Task, int] = {}
    rows = []  # level, device, task
    highest = [0] * devices
    for d, task in in_order(plan, stages):
        highest[d] = level[task] = max((highest[d], *(level[b] for b in needs(task, stages)))) + 1
        rows.append((level[task], d, task))
    rows.sort(key=lambda row: row[:2])
    return _arrays(plan, rows, devices, stages)


def _arrays(plan: Schedule, rows: list[tuple[int, int, Task]], devices: int, stages: int) -> Timetable:
    number: dict[Task, int] = {}
    last = [0] * devices
    own, other, hop, work, starts = [0], [0], [stages - 1], [0], []
    for k, (at, d, task) in enumerate(rows, start=1):
        if k == 1 or rows[k - 2][0] != at:
            starts.append(k - 1)
        before = next((b for b in needs(task, stages) if b.stage != task.stage), None)
        own.append(last[d])
        other.append(number[before] if before is not None else 0)
        hop.append(min(task.stage, before.stage) if before is not None else stages - 1)
        work.append(PHASES[task.phase] * stages + task.stage)
        number[task] = last[d] = k
    return Timetable(plan, np.array(own), np.array(other), np.array(hop), np.array(work), (*starts, len(rows)),
                     np.array(last), any(task.phase == WEIGHTS for tasks in plan for task in tasks))


@functools.lru_cache(maxsize=1024)
def held_of(kind: str, devices: int, micro: int, chunks: int) -> tuple[np.ndarray, ...]:
    """For each device the numbers of micro-batches of each of its chunks that it holds together, as rows."""
    if chunks == 1:
        return tuple(np.array([[float(stash_bound(kind, devices, micro, d))]]) for d in range(devices))
    found = []
    for tasks in schedule(kind, devices, micro, chunks):
        change = np.zeros((len(tasks), chunks))
        for k, task in enumerate(tasks):
            change[k, task.stage // devices] = 1 if task.phase == FORWARD else -1
        counts = np.unique(np.cumsum(change, 0), axis=0)
        most = (counts[:, None] <= counts[None]).all(2).sum(1) == 1  # no other row holds as many everywhere
        found.append(counts[most])
    return tuple(found)
