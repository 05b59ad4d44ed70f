"""What a fine-tuning run is: every choice in one frozen record, which checkpoints carry and resuming compares."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ...ir.errors import AttributeValueError
from ..optim import SGD, Adam, AdamW, Cosine, LinearWarmup, Lion, Optimizer, Polynomial, Schedule
from ..optim.schedules import Constant, as_schedule
from .layers import Stage
from .names import Patterns

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": AdamW, "adam": Adam, "lion": Lion, "sgd": SGD}
SHAPES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class Settings:
    """The choices of a run.

    Attributes:
        objective: "cross_entropy", "mse", "l1", "bce", or a function `objective(output, target) -> scalar`.
        optimizer: "adamw", "adam", "lion", "sgd", or a function `optimizer(groups, lr=..., weight_decay=...)`.
        lr: of the top layer at its highest.
        schedule: what the rate does after warming up: "linear" (to 0), "cosine" (to 0), "constant"; or a schedule
            (a function of the step that gives a factor), which replaces warm-up too.
        warmup: steps over which the rate rises, or their share of all steps if below 1.
        weight_decay: of matrices; vectors (biases, norms) and what `no_decay` names have none.
        no_decay: patterns.
        layer_decay: factor on the rate for each layer further down; see `layers`.
        layer_patterns: the layers from bottom to top; None: found by name.
        head_lr: factor on the rate for what `head` names.
        head: patterns.
        epochs: passes over the data where `stages` is not given.
        stages: what trains, one part of the run after the other.
        batch_size: examples of a step.
        accumulate: parts that a batch is computed in.
        amp: "bfloat16": mixed precision.
        clip_norm: largest norm of the gradients; None: they are not clipped.
        prune_frozen: leave the backward pass of what is frozen out; compiles once for each stage.
        metrics: names or functions; see `metrics`.
        monitor: the metric that says which weights are best; "loss" is always there.
        patience: evaluations without a better one after which the run stops.
        evaluate_every, save_every: steps; 0: at the end of each epoch.
        keep_best: end with the best weights, not the last.
        seed: of the order of the data and of what is drawn while training.
    """

    objective: Any = "cross_entropy"
    optimizer: Any = "adamw"
    lr: float = 2e-5
    schedule: Any = "linear"
    warmup: float = 0.06
    weight_decay: float = 0.01
    no_decay: Patterns = ()
    layer_decay: float | None = None
    layer_patterns: Sequence[Patterns] | None = None
    head_lr: float = 1.0
    head: Patterns = ()
    epochs: int = 3
    stages: Sequence[Stage] | None = None
    batch_size: int = 32
    accumulate: int = 1
    amp: str | None = None
    clip_norm: float | None = 1.0
    prune_frozen: bool = False
    metrics: Sequence[Any] | Mapping[str, Any] | None = None
    monitor: str | None = None
    patience: int | None = None
    evaluate_every: int = 0
    save_every: int = 0
    keep_best: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.lr > 0, f"lr must be above 0, got {self.lr}")
        _check(self.warmup >= 0, f"warmup must not be negative, got {self.warmup}")
        _check(callable(self.schedule) or self.schedule in SHAPES,
               f"schedule is {', '.join(SHAPES)} or a function of the step, not {self.schedule!r}")
        _check(callable(self.optimizer) or self.optimizer in OPTIMIZERS,
               f"optimizer is {', '.join(OPTIMIZERS)} or a function, not {self.optimizer!r}")
        for name in ("epochs", "batch_size", "accumulate"):
            _check(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        _check(self.batch_size % self.accumulate == 0,
               f"a batch of {self.batch_size} does not divide into {self.accumulate} equal parts (accumulate)")
        _check(self.patience is None or self.patience >= 1, f"patience must be at least 1, got {self.patience}")
        _check(self.evaluate_every >= 0 and self.save_every >= 0, "evaluate_every and save_every must not be negative")

    def rate(self, steps: int) -> Schedule:
        """The factor on every learning rate in a run of so many steps."""
        if callable(self.schedule):
            return as_schedule(self.schedule)
        rise = int(self.warmup if self.warmup >= 1 else self.warmup * steps)
        rest = max(steps - rise, 1)
        shape: Schedule = {"linear": Polynomial(1.0, rest), "cosine": Cosine(1.0, rest),
                           "constant": Constant(1.0)}[self.schedule]
        return LinearWarmup(1.0, rise).then(shape, at=rise) if rise else shape

    def fingerprint(self) -> str:
        """What a run that goes on must have in common with the one that was interrupted, as JSON."""
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in (
            "patience", "evaluate_every", "save_every", "metrics", "monitor", "keep_best")}
        return json.dumps(shown, default=_plain, sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Stage):
        return [value.train, value.epochs, value.lr]
    return getattr(value, "__qualname__", None) or repr(value)


def _check(right: bool, message: str) -> None:
    if not right:
        raise AttributeValueError(f"fine-tuning: {message}")


def settings_of(given: Settings | None, changes: Mapping[str, Any]) -> Settings:
    """Settings with some replaced.

    Raises:
        AttributeValueError: an unknown name, or a value outside its domain.
    """
    known = {f.name for f in fields(Settings)}
    if unknown := sorted(changes.keys() - known):
        raise AttributeValueError(f"fine-tuning has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return replace(given or Settings(), **changes)
