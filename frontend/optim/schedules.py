"""Learning-rate schedules: functions from the step number to a factor or a rate.

A schedule is a frozen value that is called with the number of steps done so far (0 for the first) and
gives a float. Schedules compose: `a * b` multiplies, `a.then(b, at=1000)` switches over (b counts from
0 at the switch), a plain number counts as a constant. The compiled training step receives the value
as a run-time scalar, so a schedule never causes a recompile.

    lr = LinearWarmup(1e-3, steps=500).then(Cosine(1e-3, steps=9500), at=500)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...ir.errors import AttributeValueError

Rate = float | Callable[[int], float]


class Schedule:
    """Base class: `schedule(step) -> float`."""

    def __call__(self, step: int) -> float:
        raise AttributeValueError(f"{type(self).__name__} must define __call__(step) -> float")

    def __mul__(self, other: Rate) -> Schedule:
        return Product(self, as_schedule(other))

    __rmul__ = __mul__

    def then(self, other: Rate, at: int) -> Schedule:
        """This schedule for the first `at` steps, then `other`, which starts from its own step 0."""
        return Joined((self, as_schedule(other)), (at,))


def as_schedule(rate: Rate) -> Schedule:
    """A schedule from a schedule, a number (constant) or any function of the step."""
    if isinstance(rate, Schedule):
        return rate
    return Function(rate) if callable(rate) else Constant(float(rate))


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise AttributeValueError(message)


@dataclass(frozen=True)
class Constant(Schedule):
    """Always `value`."""

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class Function(Schedule):
    """Any function of the step."""

    function: Callable[[int], float]

    def __call__(self, step: int) -> float:
        return float(self.function(step))


@dataclass(frozen=True)
class Product(Schedule):
    """The product of two schedules at the same step."""

    first: Schedule
    second: Schedule

    def __call__(self, step: int) -> float:
        return self.first(step) * self.second(step)


@dataclass(frozen=True)
class Joined(Schedule):
    """Schedules one after the other; `boundaries[i]` is the step at which part i + 1 begins, counting from 0."""

    parts: Sequence[Schedule]
    boundaries: Sequence[int]

    def __post_init__(self) -> None:
        _check(len(self.boundaries) == len(self.parts) - 1 and list(self.boundaries) == sorted(self.boundaries),
               "a sequence of n schedules needs n - 1 ascending boundaries")

    def __call__(self, step: int) -> float:
        begun = sum(step >= b for b in self.boundaries)
        return self.parts[begun](step - (self.boundaries[begun - 1] if begun else 0))


@dataclass(frozen=True)
class Step(Schedule):
    """`value * gamma ** (step // every)`: torch's StepLR."""

    value: float
    every: int
    gamma: float = 0.1

    def __post_init__(self) -> None:
        _check(self.every >= 1, f"Step needs every >= 1, got {self.every}")

    def __call__(self, step: int) -> float:
        return self.value * self.gamma ** (step // self.every)


@dataclass(frozen=True)
class MultiStep(Schedule):
    """`value * gamma ** (milestones passed)`: torch's MultiStepLR."""

    value: float
    milestones: Sequence[int]
    gamma: float = 0.1

    def __call__(self, step: int) -> float:
        return self.value * self.gamma ** sum(step >= m for m in self.milestones)


@dataclass(frozen=True)
class Exponential(Schedule):
    """`value * gamma ** step`."""

    value: float
    gamma: float

    def __call__(self, step: int) -> float:
        return self.value * self.gamma ** step


@dataclass(frozen=True)
class LinearWarmup(Schedule):
    """From `start * value` to `value` in `steps` steps, linearly, then `value`."""

    value: float
    steps: int
    start: float = 0.0

    def __post_init__(self) -> None:
        _check(self.steps >= 1, f"LinearWarmup needs steps >= 1, got {self.steps}")

    def __call__(self, step: int) -> float:
        done = min(step / self.steps, 1.0)
        return self.value * (self.start + (1.0 - self.start) * done)


@dataclass(frozen=True)
class Cosine(Schedule):
    """From `value` to `end` in `steps` steps along half a cosine, then `end` (Loshchilov & Hutter 2017, SGDR).

    With `restarts` the cosine starts again at `value` every `steps` steps.
    """

    value: float
    steps: int
    end: float = 0.0
    restarts: bool = False

    def __post_init__(self) -> None:
        _check(self.steps >= 1, f"Cosine needs steps >= 1, got {self.steps}")

    def __call__(self, step: int) -> float:
        done = step % self.steps if self.restarts else min(step, self.steps)
        return self.end + 0.5 * (self.value - self.end) * (1.0 + math.cos(math.pi * done / self.steps))


@dataclass(frozen=True)
class Polynomial(Schedule):
    """From `value` to `end` in `steps` steps by `(1 - step/steps) ** power`, then `end`; power 1 is linear."""

    value: float
    steps: int
    power: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        _check(self.steps >= 1, f"Polynomial needs steps >= 1, got {self.steps}")

    def __call__(self, step: int) -> float:
        left = 1.0 - min(step, self.steps) / self.steps
        return self.end + (self.value - self.end) * left ** self.power


@dataclass(frozen=True)
class Cyclical(Schedule):
    """Between `low` and `high` along a triangle: `up` steps up, `down` steps down (Smith 2017)."""

    low: float
    high: float
    up: int
    down: int | None = None

    def __post_init__(self) -> None:
        _check(self.up >= 1 and (self.down is None or self.down >= 1), "Cyclical needs up >= 1 and down >= 1")

    def __call__(self, step: int) -> float:
        down = self.up if self.down is None else self.down
        at = step % (self.up + down)
        height = at / self.up if at <= self.up else 1.0 - (at - self.up) / down
        return self.low + (self.high - self.low) * height


@dataclass(frozen=True)
class OneCycle(Schedule):
    """Up to `high` for the first `rise` of `steps`, then down to almost 0, by cosines (Smith & Topin 2018).

    Equal to torch's OneCycleLR with cosine annealing and two phases: it starts from `high / start_divisor`
    and ends at `high / start_divisor / end_divisor`.
    """

    high: float
    steps: int
    rise: float = 0.3
    start_divisor: float = 25.0
    end_divisor: float = 1e4

    def __post_init__(self) -> None:
        _check(self.steps >= 2 and 0.0 < self.rise < 1.0, "OneCycle needs steps >= 2 and 0 < rise < 1")

    def __call__(self, step: int) -> float:
        start = self.high / self.start_divisor
        top, last = self.rise * self.steps - 1.0, self.steps - 1.0
        step = min(step, self.steps - 1)
        if step <= top:
            return _cosine_between(start, self.high, step / top)
        return _cosine_between(self.high, start / self.end_divisor, (step - top) / (last - top))


def _cosine_between(start: float, end: float, done: float) -> float:
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * done))
