"""A device runs its part of a pipeline's schedule.

For every task its program gets four kinds of inputs: tensors that stay for the step (parameters, sums of gradients,
state), the device's part of the micro-batch, what the neighbouring stage handed over, and what the forward pass kept.
Programs are functions from arrays to arrays: nothing here knows how they were made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..ir.types import TensorType
from .messages import Messages
from .pipeline import BACKWARD, FORWARD, WEIGHTS, Task

AHEAD = 2  # tasks for which receives are posted: the present one and the next


@dataclass
class Program:
    """A forward or backward program and where its inputs come from; each list holds (position, number there).

    Attributes:
        fixed: the inputs, those that stay filled in.
        batch: from the parts of the micro-batch; handed: from the stage before; kept: from the forward pass's outputs;
            cotangents: of what the stage handed on; middle: from the backward program, for the one of weights.
    """

    run: Callable[[Sequence[Any]], list[np.ndarray]]
    fixed: list[Any]
    batch: list[tuple[int, int]] = field(default_factory=list)
    handed: list[tuple[int, int]] = field(default_factory=list)
    kept: list[tuple[int, int]] = field(default_factory=list)
    cotangents: list[tuple[int, int]] = field(default_factory=list)
    middle: list[tuple[int, int]] = field(default_factory=list)

    def __call__(self, batch: Sequence[np.ndarray], handed: Sequence[np.ndarray], kept: Sequence[np.ndarray] = (),
                 cotangents: Sequence[np.ndarray] = (), middle: Sequence[np.ndarray] = ()) -> list[np.ndarray]:
        """The outputs, for one micro-batch."""
        inputs = list(self.fixed)
        for places, given in ((self.batch, batch), (self.handed, handed), (self.kept, kept),
                              (self.cotangents, cotangents), (self.middle, middle)):
            for position, number in places:
                inputs[position] = given[number]
        return self.run(inputs)


@dataclass
class StageProgram:
    """One stage on one device, for micro-batches of one size.

    Attributes:
        parts: what cuts the device's parts out of a micro-batch's arrays.
        handed, out: types of what it is handed, and hands on (of the last stage: the loss).
        back: which of `handed` get a cotangent; `returned`: which of `out` do.
        kept: which of the forward program's outputs the backward program reads.
        results: numbers of the whole graph's outputs -> place among the forward program's outputs.
        first: the backward program of the first micro-batch, which starts the sums of gradients.
        cotangents: if the backward pass comes in two, its first part; `backward` and `first` are then the second.
    """

    forward: Program
    backward: Program
    first: Program
    cotangents: Program | None
    parts: Callable[[Sequence[np.ndarray]], list[np.ndarray]]
    handed: list[TensorType]
    out: list[TensorType]
    back: list[int]
    returned: list[int]
    kept: list[int]
    results: dict[int, int]


@dataclass
class _Held:
    """What a stage keeps of a micro-batch until its backward pass is done. `lent`: buffers that then go back."""

    parts: list[np.ndarray]
    handed: list[np.ndarray]
    kept: list[np.ndarray]
    lent: list[np.ndarray]
    cotangents: list[np.ndarray] = field(default_factory=list)
    middle: list[np.ndarray] = field(default_factory=list)


class Runner:
    """One device's place in a pipeline.

    Attributes:
        order: its tasks. Stage s runs on device s % devices.
        widest: the most tensors that cross between two stages, anywhere.
        most_kept: the most micro-batches whose activations it held at a time in the last step.
        results: what the stages gave besides the loss in the last step: output -> micro-batch -> array.
    """

    def __init__(self, order: Sequence[Task], here: int, devices: int, stages: int, micro: int,
                 messages: Messages | None):
        self.order, self.here, self.devices, self.stages, self.micro = order, here, devices, stages, micro
        self.messages = messages
        self.local: dict[tuple[Any, ...], list[np.ndarray]] = {}
        self.held: dict[tuple[int, int], _Held] = {}
        self.most_kept, self.widest = 0, 1
        self.results: dict[int, dict[int, np.ndarray]] = {}

    def step(self, programs: Sequence[Mapping[int, StageProgram]], batch: Sequence[Sequence[np.ndarray]],
             shares: Sequence[float]) -> float:
        """Runs all tasks; the loss, if the last stage is here, else 0.

        Args:
            programs: for each micro-batch the programs of this device's stages.
            batch: the arrays of each micro-batch; shares: what each counts in the loss.
        """
        loss, self.most_kept, self.results = 0.0, 0, {}
        self.held.clear()  # of a step that was interrupted
        self.local.clear()
        for k, task in enumerate(self.order):
            for later in self.order[k:k + AHEAD]:
                self.expect(later, programs[later.micro][later.stage])
            program = programs[task.micro][task.stage]
            if task.phase == FORWARD:
                found = self.forward(program, task, batch[task.micro])
                if task.stage + 1 == self.stages and shares[task.micro]:  # what counts nothing may be 0 / 0
                    loss += float(found) * shares[task.micro]
                self.most_kept = max(self.most_kept, len(self.held))
            elif task.phase == BACKWARD:
                self.backward(program, task, shares[task.micro])
            elif program.cotangents is not None:
                self.weights(program, task)
        if self.messages is not None:
            self.messages.finish()
        return loss

    def source(self, task: Task) -> int | None:
        """The stage whose results a task reads; None if there is none."""
        if task.phase == WEIGHTS:
            return None
        stage = task.stage - 1 if task.phase == FORWARD else task.stage + 1
        return stage if 0 <= stage < self.stages else None

    def tag(self, phase: str, stage: int, micro: int) -> int:
        """Of the first message to a stage; each tensor has one of its own."""
        return (((phase == BACKWARD) * self.stages + stage) * self.micro + micro) * self.widest

    def expect(self, task: Task, program: StageProgram) -> None:
        """Posts the receives of a task that reads what another device sends."""
        source = self.source(task)
        if source is None or source % self.devices == self.here:
            return
        assert self.messages is not None
        types = program.handed if task.phase == FORWARD else [program.out[i] for i in program.returned]
        self.messages.post((task,), types, source % self.devices, self.tag(task.phase, task.stage, task.micro))

    def take(self, task: Task) -> tuple[list[np.ndarray], bool]:
        """What a task reads of another stage, and whether it was received."""
        source = self.source(task)
        if source is None:
            return [], False
        if source % self.devices == self.here:
            return self.local.pop((task,)), False
        assert self.messages is not None
        return self.messages.take((task,), f"recv {task} from stage {source}"), True

    def give(self, arrays: list[np.ndarray], task: Task, stage: int) -> None:
        """Hands arrays to a stage that comes after a task."""
        if stage % self.devices == self.here:
            self.local[Task(task.phase, stage, task.micro),] = arrays
            return
        assert self.messages is not None
        self.messages.send(arrays, stage % self.devices, self.tag(task.phase, stage, task.micro))

    def forward(self, program: StageProgram, task: Task, arrays: Sequence[np.ndarray]) -> Any:
        """Runs a forward task; the loss, if it is of the last stage."""
        handed, received = self.take(task)
        parts = program.parts(arrays)
        outputs = program.forward(parts, handed)
        self.held[task.stage, task.micro] = _Held(parts, handed, [outputs[i] for i in program.kept],
                                                  list(handed) if received else [])
        for number, place in program.results.items():
            self.results.setdefault(number, {})[task.micro] = np.array(outputs[place])
        if task.stage + 1 == self.stages:
            return outputs[0]
        self.give(outputs[:len(program.out)], task, task.stage + 1)
        return None

    def backward(self, program: StageProgram, task: Task, share: float) -> None:
        """Runs a backward task, or as much of it as the stage before waits for."""
        held = self.held[task.stage, task.micro]
        if task.stage + 1 == self.stages:
            held.cotangents = [np.full((), share, program.out[0].dtype.np)]
        else:
            held.cotangents, received = self.take(task)
            held.lent += held.cotangents if received else []
        if program.cotangents is None:
            outputs = self.weights(program, task)
        else:
            outputs = held.middle = program.cotangents(held.parts, held.handed, held.kept, held.cotangents)
        if task.stage:
            self.give(outputs[:len(program.back)], task, task.stage - 1)

    def weights(self, program: StageProgram, task: Task) -> list[np.ndarray]:
        """Runs what adds to the gradients; nothing is kept of the micro-batch any more."""
        held = self.held.pop((task.stage, task.micro))
        run = program.backward if task.micro else program.first
        outputs = run(held.parts, held.handed, held.kept, held.cotangents, held.middle)
        if self.messages is not None:
            for array in held.lent:
                self.messages.buffers.back(array)
        return outputs
