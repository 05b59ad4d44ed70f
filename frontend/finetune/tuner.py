"""The fine-tuning run: stages of epochs of compiled steps, evaluated, saved, resumed.

The step is `td.train_step`: forward, backward, clipping and update as one program, in which each parameter's freeze
flag is a run-time input. So going from stage to stage compiles nothing; with `prune_frozen`, once for each stage.

Where a run stands is a number, the steps done. Stage, epoch and batch follow from it, the order of the data from seed
and epoch, the random numbers from the generator's state, so a run that is resumed from a checkpoint goes on as if it
had not been interrupted, to the last bit.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...ir.errors import ArgumentsError, CheckpointError, GradientError
from .. import random
from ..checkpoint import load_checkpoint, save_checkpoint
from ..compile import compile as compile_
from ..nn import Module
from ..optim import Optimizer
from ..optim.schedules import Function
from ..tensor import Tensor
from ..train import TrainStep, train_step
from .board import Board
from .data import as_batches, whole_batches
from .layers import Stage, layerwise_lr
from .metrics import SMALLER_IS_BETTER, metrics_of, objective_of
from .names import literal, parameters, select, train_exactly
from .settings import OPTIMIZERS, Settings, settings_of

LAST, BEST = "last.safetensors", "best.safetensors"


@dataclass
class History:
    """What a run did.

    Attributes:
        steps: steps done.
        losses: the training loss of every step.
        evaluations: {"step", "stage", "epoch", "loss", metrics...} of each evaluation.
        best: the best of them by the monitored metric; None before the first.
        stopped: why the run ended before its time, or "".
        seconds: spent in steps, compilation included.
        examples: trained on.
        first_seconds, first_examples: of these, in the first step of each program, which compiles it.
    """

    steps: int = 0
    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    stopped: str = ""
    seconds: float = 0.0
    examples: int = 0
    first_seconds: float = 0.0
    first_examples: int = 0

    @property
    def speed(self) -> float:
        """Examples a second, without the first step of each program; 0 while there were no others."""
        rest = self.examples - self.first_examples
        return rest / (self.seconds - self.first_seconds) if rest else 0.0


@dataclass(frozen=True)
class Position:
    """Where a step lies: number of the stage, of the epoch in the whole run, of the batch in the epoch."""

    stage: int
    epoch: int
    batch: int


class Tuner:
    """Trains a model on data.

    Args:
        model: what trains; what `requires_grad` says is what trains if no stages are given.
        data: (inputs..., target) as arrays, or `Batches`.
        evaluation: held-out data of the same kind; None: no evaluation.
        folder: for the checkpoints `last.safetensors` and `best.safetensors`; None: none are written, and the best
            weights are kept in memory.
        settings: see `Settings`; single ones can be given by name instead.
        show: whether progress is shown.

    Attributes:
        step: the compiled step; `step.stats.compiles` counts.
        optimizer: over every parameter, or with `prune_frozen` over those that some stage trains.
        history: of the run so far.

    Raises:
        ArgumentsError, AttributeValueError: a setting outside its domain; a pattern that fits nothing; data of no
            use.
    """

    def __init__(self, model: Module, data: Any, *, evaluation: Any = None, folder: Any = None,
                 settings: Settings | None = None, show: bool = True, **changes: Any):
        self.model = model
        self.settings = settings_of(settings, changes)
        self.evaluation, self.folder, self.show = evaluation, None if folder is None else Path(folder), show
        self.data = as_batches(data, self.settings.batch_size, self.settings.seed)
        self.objective = objective_of(self.settings.objective)
        self.metrics = metrics_of(self.settings.metrics, self.settings.objective)
        self.monitor = self.settings.monitor or next(iter(self.metrics), "loss")
        if self.monitor not in (*self.metrics, "loss"):
            raise ArgumentsError(f"the monitored metric {self.monitor!r} is none of {', '.join(self.metrics)}, loss")
        self.stages = list(self.settings.stages or [self._as_it_is()])
        self._chosen = [select(model, stage.train) for stage in self.stages]
        self.epochs = sum(stage.epochs for stage in self.stages)
        self.total = self.epochs * len(self.data)
        self.optimizer = self._optimizer()
        s = self.settings
        self.step: TrainStep = train_step(model, self._loss, self.optimizer, amp=s.amp, clip_norm=s.clip_norm,
                                          accumulate=s.accumulate, freezable=True, prune_frozen=s.prune_frozen)
        self._predict = compile_(self._outputs, amp=s.amp)
        self.history = History()
        self._waited = 0  # evaluations since the best
        self._best: dict[str, np.ndarray] | None = None

    # What the run is made of --------------------------------------------------------------------------------------

    def _as_it_is(self) -> Stage:
        names = [n for n, p in parameters(self.model).items() if p.requires_grad]
        if not names:
            raise ArgumentsError("every parameter is frozen; unfreeze some, or give stages")
        return Stage(tuple(map(literal, names)), self.settings.epochs)

    def _optimizer(self) -> Optimizer:
        s, known = self.settings, parameters(self.model)
        kept = {n for names in self._chosen for n in names} if s.prune_frozen else set(known)
        factors = layerwise_lr(self.model, s.layer_decay, s.layer_patterns) if s.layer_decay else {}
        head = set(select(self.model, s.head)) if s.head else set()
        plain = set(select(self.model, s.no_decay)) if s.no_decay else set()
        rate = s.rate(self.total) * Function(self._stage_factor)
        groups: dict[tuple[float, bool], list[Any]] = {}
        for name, parameter in known.items():
            if name in kept:
                factor = factors.get(name, 1.0) * (s.head_lr if name in head else 1.0)
                groups.setdefault((factor, parameter.ndim > 1 and name not in plain), []).append(parameter)
        make = s.optimizer if callable(s.optimizer) else OPTIMIZERS[s.optimizer]
        listed = [{"params": group, "lr": rate * (s.lr * factor), "weight_decay": s.weight_decay if decays else 0.0}
                  for (factor, decays), group in groups.items()]
        made: Optimizer = make(listed, lr=s.lr, weight_decay=s.weight_decay)
        return made

    def _stage_factor(self, step: int) -> float:
        return self.stages[self.position(min(step, self.total - 1)).stage].lr

    def _outputs(self, *inputs: Any) -> Any:
        return self.model(*inputs)

    def _loss(self, model: Module, *batch: Any) -> Tensor:
        return self.objective(model(*batch[:-1]), batch[-1])

    def position(self, step: int) -> Position:
        """Where the step of this number (from 0) lies."""
        epoch, batch = divmod(step, len(self.data))
        passed = 0
        for number, stage in enumerate(self.stages):
            passed += stage.epochs
            if epoch < passed:
                return Position(number, epoch, batch)
        return Position(len(self.stages) - 1, epoch, batch)

    # Running ------------------------------------------------------------------------------------------------------

    def fit(self, resume: bool = False) -> History:
        """Runs to the end of the last stage, or until stopping early.

        An interruption (Ctrl-C) saves a checkpoint first if there is a folder.

        Args:
            resume: go on from the checkpoint in the folder if there is one.

        Returns:
            The history; the model holds the best weights (with `keep_best` and an evaluation), else the last.

        Raises:
            CheckpointError: the checkpoint is damaged, or of a run with other settings.
            GradientError: the loss is not finite.
        """
        if resume and self.folder is not None and (self.folder / LAST).exists():
            self.load(self.folder / LAST)
        elif not self.history.steps:
            random.seed(self.settings.seed)
        board = Board(self.total, len(self.data), self.show)
        try:
            with board:
                for _ in self._steps(board):
                    pass
        except KeyboardInterrupt:
            if self.folder is not None and self.history.steps:
                self.save(self.folder / LAST)
            raise
        finally:
            self.model.eval()
        if self.settings.keep_best and self.history.best is not None:
            self._restore_best()
        return self.history

    def _steps(self, board: Board) -> Iterator[None]:
        history, every = self.history, self.settings
        current = -1
        while history.steps < self.total and not history.stopped:
            where = self.position(history.steps)
            if where.stage != current:
                current = where.stage
                train_exactly(self.model, self._chosen[current])
            self.model.train()
            batch = self.data.batch(where.epoch, where.batch)
            compiles, started = self.step.stats.compiles, time.perf_counter()
            loss = float(self.step(*batch).item())
            seconds = time.perf_counter() - started
            history.seconds += seconds
            if not math.isfinite(loss):
                raise GradientError(f"the loss of step {history.steps + 1} is {loss}: lower lr, clip the gradients "
                                    "(clip_norm), or look for bad numbers in the data; the last "
                                    "checkpoint is still good")
            history.examples += len(batch[-1])
            if self.step.stats.compiles > compiles:
                history.first_seconds += seconds
                history.first_examples += len(batch[-1])
            history.steps += 1
            history.losses.append(loss)
            board.step(where.stage, where.epoch, loss, history.speed)
            ended = history.steps % len(self.data) == 0
            if self.evaluation is not None and _due(history.steps, every.evaluate_every, ended):
                self._evaluated(where, board)
            if self.folder is not None and (_due(history.steps, every.save_every, ended) or history.stopped):
                self.save(self.folder / LAST)
            if ended:
                board.epoch(where.epoch, float(np.mean(history.losses[-len(self.data):])),
                            history.evaluations[-1] if history.evaluations else {}, history.speed)
            yield

    def _evaluated(self, where: Position, board: Board) -> None:
        found = {"step": self.history.steps, "stage": where.stage, "epoch": where.epoch,
                 **self.evaluate(self.evaluation)}
        self.history.evaluations.append(found)
        best = self.history.best
        sign = -1 if self.monitor in SMALLER_IS_BETTER else 1
        if best is None or sign * found[self.monitor] > sign * best[self.monitor]:
            self.history.best, self._waited = found, 0
            if self.settings.keep_best and self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
                save_checkpoint(self.folder / BEST, self.model, step=self.history.steps)
            elif self.settings.keep_best:
                self._best = {n: t.numpy() for n, t in self.model.state_dict().items()}
        else:
            self._waited += 1
            if self.settings.patience is not None and self._waited >= self.settings.patience:
                self.history.stopped = f"{self.monitor} has not improved in {self._waited} evaluations"
        board.evaluation(found)

    def _restore_best(self) -> None:
        if self._best is not None:
            self.model.load_state_dict(self._best)
        elif self.folder is not None and (self.folder / BEST).exists():
            state = random.default_generator().state.numpy()
            load_checkpoint(self.folder / BEST, self.model)
            random.default_generator().state.assign(state)

    # Using the model ----------------------------------------------------------------------------------------------

    def outputs(self, data: Any) -> tuple[np.ndarray, np.ndarray]:
        """(outputs, targets) over data, in evaluation mode; the last batch is padded, so one program serves all."""
        was = self.model.training
        self.model.eval()
        try:
            found, targets = [], []
            for batch, real in whole_batches(data, self.settings.batch_size):
                found.append(self._predict(*batch[:-1]).numpy()[:real])
                targets.append(np.asarray(batch[-1])[:real])
        finally:
            self.model.train(was)
        return np.concatenate(found), np.concatenate(targets)

    def evaluate(self, data: Any) -> dict[str, float]:
        """The loss and the metrics over data, {"loss": ..., name: ...}."""
        outputs, targets = self.outputs(data)
        loss = float(self.objective(Tensor(outputs), Tensor(targets)).item())
        return {"loss": loss, **{name: float(metric(outputs, targets)) for name, metric in self.metrics.items()}}

    def predict(self, *inputs: Any) -> np.ndarray:
        """The model's outputs for inputs of any number of examples, in evaluation mode."""
        return self.outputs((*inputs, np.zeros(len(inputs[0]), np.int64)))[0]

    # Checkpoints --------------------------------------------------------------------------------------------------

    def save(self, path: Any) -> None:
        """Writes where the run stands, atomically: weights, optimizer, random state, position, history."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        h = self.history
        notes = {"settings": self._fingerprint(), "waited": str(self._waited), "history": json.dumps(
            {"losses": h.losses, "evaluations": h.evaluations, "best": h.best, "stopped": h.stopped,
             "seconds": h.seconds, "examples": h.examples, "first_seconds": h.first_seconds,
             "first_examples": h.first_examples})}
        save_checkpoint(path, self.model, self.optimizer, h.steps, notes)

    def _fingerprint(self) -> str:
        known = {"steps of an epoch": len(self.data), "parameters": len(self.optimizer.params)}
        return json.dumps({**json.loads(self.settings.fingerprint()), **known}, sort_keys=True)

    def load(self, path: Any) -> None:
        """Goes back to where a run stood when it was saved.

        Raises:
            CheckpointError: the file is damaged, or of a run with other settings or data.
        """
        found = load_checkpoint(path, self.model, self.optimizer)
        notes = found.metadata
        if found.step is None or "settings" not in notes:
            raise CheckpointError(f"{path} is no checkpoint of a fine-tuning run")
        if notes["settings"] != self._fingerprint():
            theirs, ours = json.loads(notes["settings"]), json.loads(self._fingerprint())
            other = [f"{k}: {theirs.get(k)!r} there, {ours.get(k)!r} here"
                     for k in sorted({*theirs, *ours}) if theirs.get(k) != ours.get(k)]
            raise CheckpointError(f"{path} is of a run with other settings: {'; '.join(other)}")
        self._waited = int(notes["waited"])
        self.history = History(found.step, **json.loads(notes["history"]))


def _due(step: int, every: int, ended: bool) -> bool:
    return step % every == 0 if every else ended
