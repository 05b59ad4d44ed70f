"""`train_step`: forward, backward, clipping and the optimizer's update as ONE compiled graph.

Parameters, optimizer state, running statistics and the random state are inputs of the graph that outputs take over, so
a step updates them where they lie. What changes from step to step (learning rate, bias corrections, clip norm, which
parameters are frozen) enters as run-time scalars: none of it compiles anything again. Each parameter has a flag of its
own rather than an element of one mask, so that the updates of equal parameters stay one kernel.

The protocol of optimizers (base class `optim.Optimizer`):

* `opt.params`: list of parameters; `opt.state`: for each a dict name -> tensor; `opt.steps`: steps taken so far;
* `opt.hyperparameters(step, each=False) -> dict[str, float]`: every number of that step, computed on the host; with
  `each` those that count a parameter's own updates stand there once for every parameter;
* `opt.update(params, grads, state, hyper) -> (new_params, new_state)`: pure functions of tensors; `hyper` holds
  scalar tensors under the names of `hyperparameters`, a gradient that is None means: leave this parameter alone;
* `opt.groups` with `.options`, and `opt.static_options`: the options that shape the update;
* `opt.skip(flags)`: notes for which parameters the step was none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..ir.errors import ArgumentsError, AttributeValueError, GradientError, TraceError
from ..ir.graph import Graph
from ..ir.location import user_location
from . import functions as F
from . import tree
from .accumulate import ALONE, accumulated, share_of
from .compile import Compiled
from .dynamic import Arguments, Dynamic
from .eager import records
from .optim.clip import clip_by_global_norm
from .recording import current_trace
from .signature import scan
from .tensor import Tensor
from .trace import leaf_type
from .transforms import gradients

CLIP, FLAG = "clip_norm", "trainable."


def train_step(model: Any, loss_fn: Callable[..., Any], opt: Any, amp: Any = None, clip_norm: float | None = None,
               accumulate: int = 1, memory_budget: int | None = None, target: str = "cpu", freezable: bool = False,
               prune_frozen: bool = False, dynamic: Mapping[str, Any] | None = None,
               weight: Callable[..., Any] | None = None) -> TrainStep:
    """A compiled training step.

    A parameter whose `requires_grad` is False is frozen: neither it nor its optimizer state moves. That is a run-time
    input, so freezing and unfreezing between steps compiles nothing, but for the first freeze unless `freezable`.

    Args:
        model: what `loss_fn` gets first, usually an `nn.Module`.
        loss_fn: `loss_fn(model, *batch)` returns a floating scalar, the mean over the batch, or (loss, aux).
        opt: an optimizer over the parameters to train.
        amp: "bfloat16": mixed precision with float32 master weights.
        clip_norm: gradients whose global norm is larger are scaled down to it.
        accumulate: run the batch in so many parts, adding up the gradients: the memory of a part, the step of the
            whole. Every tensor of the batch is cut along its first axis, as equally as it goes.
        weight: with `accumulate`, what a part counts in the mean: `lambda x, y: (y != -100).sum()` for a loss that is a
            mean over tokens. Default: its examples.
        memory_budget: bytes that values waiting between kernels may take; what costs least to compute again is
            recomputed in the backward pass until that is met. With open sizes it holds at each call: one that is
            too large for the programs there are compiles another.
        target: as for `compile`.
        freezable: compile the flags in from the start, for a model that will be frozen later.
        prune_frozen: leave out the backward pass and the update of what is frozen. Faster and smaller; each new set of
            frozen parameters compiles once.
        dynamic: which sizes of the batch are open, by the parameters of `loss_fn`, as for `compile`: a step with
            `{"x": {0: "batch"}, "y": {0: "batch"}}` serves batches of every size.

    Returns:
        A function of the batch: the loss (and aux) before the update. `.stats` counts compilations.

    Raises:
        ArgumentsError, AttributeValueError: an argument outside its domain.
    """
    return TrainStep(model, loss_fn, opt, amp, clip_norm, accumulate, memory_budget, target, freezable, prune_frozen,
                     dynamic, weight)


class TrainStep:
    """A compiled training step; made by `train_step`.

    Attributes:
        clip_norm: may be changed between steps (not between a number and None: that compiles again).
        stats: as of a compiled function.
    """

    def __init__(self, model: Any, loss_fn: Callable[..., Any], opt: Any, amp: Any, clip_norm: float | None,
                 accumulate: int, memory_budget: int | None, target: str, freezable: bool, prune_frozen: bool,
                 dynamic: Mapping[str, Any] | None = None, weight: Callable[..., Any] | None = None):
        if not callable(loss_fn):
            raise ArgumentsError(f"train_step: loss_fn(model, *batch) must be a function, got {loss_fn!r}",
                                 user_location())
        for name, number in (("accumulate", accumulate), ("memory_budget", memory_budget)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise AttributeValueError(f"train_step: {name} is {number!r}; expected a whole number >= 1",
                                          user_location())
        if clip_norm is not None and not clip_norm > 0:
            raise AttributeValueError(f"train_step: clip_norm is {clip_norm!r}; expected a number > 0", user_location())
        if weight is not None and not callable(weight):
            raise ArgumentsError(f"train_step: weight(*batch) must be a function, got {weight!r}", user_location())
        self.model, self.loss_fn, self.opt, self.weight = model, loss_fn, opt, weight
        self.spread = ALONE  # how a mesh shares the parts of a batch, while it traces
        self.clip_norm, self.accumulate, self.memory_budget = clip_norm, accumulate, memory_budget
        _name_parts(model, opt)
        self.prune_frozen = bool(prune_frozen)
        self._flagged = bool(freezable)  # whether flags are part of the program
        self._wide = np.float64 if any(p.dtype == "float64" for p in opt.params) else np.float32
        self._freezes = -1  # of the count at which `_trainable` was read
        self._trainable: tuple[bool, ...] = ()
        self._any_frozen = False
        self._numbers: dict[str, np.ndarray] = {}
        self._layout: tuple[str, ...] = ()
        self._compiled = _CompiledStep(self, target, amp)
        self._compiled.dynamic = None if dynamic is None else Dynamic(dynamic)

    @property
    def stats(self) -> Any:
        """Compilations, calls, kernels, reasons."""
        return self._compiled.stats

    @property
    def executable(self) -> Any:
        """The program of the last step; None before the first."""
        return self._compiled._last.executable if self._compiled._last else None

    def __call__(self, *batch: Any) -> Any:
        """One step on a batch: updates model and optimizer in place, gives the loss (and aux) from before."""
        found = scan(batch, {})
        if found.traced or current_trace() is not None:
            raise TraceError("train_step updates its model in place and cannot be traced; call it outside",
                             user_location())
        numbers, structure = self._scalars(), self._structure()
        # These are few and known: they join the key as they are instead of being taken apart at each call.
        found.key = (found.key, structure, self._layout)
        found.arrays += numbers.values()
        result = self._compiled._run(found, (batch, numbers, structure), {})
        self.opt.steps += 1
        if self._any_frozen:
            self.opt.skip(self._trainable)
        return result

    def trace(self, *batch: Any) -> Graph:
        """The graph that a step on such a batch runs, before the passes."""
        return self._compiled.trace(batch, self._scalars(), self._structure())

    def _scalars(self) -> dict[str, np.ndarray]:
        numbers = self._numbers
        if self._freezes != records.freezes or len(self._trainable) != len(self.opt.params):
            self._freezes = records.freezes
            self._trainable = tuple(bool(p.requires_grad) for p in self.opt.params)
            self._any_frozen = not all(self._trainable)
            self._flagged = self._flagged or self._any_frozen
        given: dict[str, Any] = self.opt.hyperparameters(self.opt.steps, each=self._flagged)
        if self.clip_norm is not None:
            given[CLIP] = self.clip_norm
        if self._flagged and not self.prune_frozen:
            given.update((f"{FLAG}{i}", flag) for i, flag in enumerate(self._trainable))
        if len(numbers) != len(given) or not given.keys() <= numbers.keys():
            numbers = self._numbers = {name: np.zeros((), bool if name.startswith(FLAG) else self._wide)
                                       for name in sorted(given)}
            self._layout = tuple(numbers)
        for name, value in given.items():
            numbers[name][()] = value
        return numbers

    def _structure(self) -> tuple[Any, ...]:
        names = self.opt.static_options
        groups = tuple((len(g.params), *(g.options[n] for n in names)) for g in self.opt.groups)
        return (*groups, self._trainable) if self.prune_frozen else groups

    # The function that is traced --------------------------------------------------------------------------------

    def step(self, batch: tuple[Any, ...], numbers: dict[str, Tensor], structure: tuple[Any, ...]) -> Any:
        """Forward, backward, clipping, update, as tensor functions with assignments."""
        params = list(self.opt.params)
        live = [p for p, trains in zip(params, self._trainable) if trains or not self.prune_frozen]
        result, found = self._forward_backward(batch, live)
        by_parameter = {id(p): g for p, g in zip(live, found)}
        grads = [by_parameter.get(id(p)) for p in params]
        self.update(grads, numbers)
        return result

    def update(self, grads: Sequence[Tensor | None], numbers: Mapping[str, Tensor],
               clip: Callable[..., Any] = clip_by_global_norm) -> None:
        """Traced: clips the gradients (one for each parameter; None: leave it alone) and moves parameters and state."""
        params = list(self.opt.params)
        flags = [numbers.get(f"{FLAG}{i}") for i in range(len(params))]
        grads = [g if g is None or f is None else F.where(f, g, F.zeros((), g.dtype)) for g, f in zip(grads, flags)]
        if CLIP in numbers:
            grads, _ = clip(grads, numbers[CLIP].astype("float32"))
        hyper = {name: value for name, value in numbers.items() if name != CLIP and not name.startswith(FLAG)}
        new_params, new_state = self.opt.update(params, grads, self.opt.state, hyper)
        for param, new, flag in zip(params, new_params, flags):
            _replace(param, new, flag)
        for slots, new_slots, flag in zip(self.opt.state, new_state, flags):
            for name, new in new_slots.items():
                _replace(slots[name], new, flag)

    def _forward_backward(self, batch: tuple[Any, ...], params: list[Tensor]) -> tuple[Any, list[Tensor | None]]:
        if self.accumulate == 1:
            return self._one_part(batch, params)
        return accumulated(lambda part, share: self._one_part(part, params, share), batch, params, self.accumulate,
                           self.weight, self.spread)

    def _one_part(self, batch: tuple[Any, ...], params: list[Tensor],
                  share: Tensor | None = None) -> tuple[Any, list[Tensor | None]]:
        result = self.loss_fn(self.model, *batch)
        loss = result[0] if isinstance(result, tuple) else result
        if not isinstance(loss, Tensor):
            raise GradientError(f"train_step: loss_fn returned {loss!r}; it must return a scalar, or (loss, aux)",
                                user_location())
        return result, gradients(loss if share is None else share_of(loss, share), params)


def _replace(tensor: Tensor, new: Tensor, flag: Tensor | None) -> None:
    if new is not tensor:
        new = new.astype(tensor.dtype)
        tensor.assign(new if flag is None else F.where(flag, new, tensor))


def _name_parts(model: Any, opt: Any) -> None:
    """Names and roles for what the graph will show: parameters, buffers, optimizer state."""
    for kind in ("named_parameters", "named_buffers"):
        for name, tensor in getattr(model, kind, lambda: ())():
            tensor.name = tensor.name or name
    for i, (param, slots) in enumerate(zip(opt.params, opt.state)):
        for name, tensor in slots.items():
            tensor.role = "state"
            tensor.name = tensor.name or f"{param.name or i}.{name}"


class _CompiledStep(Compiled):
    """The compiled function of (batch, numbers, structure)."""

    def __init__(self, step: TrainStep, target: str, amp: Any):
        super().__init__(step.step, target, amp, step.memory_budget)
        self.step = step
        self._recordable = False  # a batch that requires a gradient is still only data
        self.__name__ = "train_step"

    def _open(self, args: Sequence[Any], keywords: dict[str, Any]) -> Arguments | None:
        batch, *rest = args
        given = None if self.dynamic is None else self.dynamic.arguments(self.step.loss_fn, batch, {}, skip=1)
        return None if given is None else ((given[0], *rest), keywords)

    def trace(self, *args: Any, **keywords: Any) -> Graph:
        """As for functions; the numbers get the role `scalar`."""
        graph = super().trace(*args)
        graph.name = "train_step"
        first = sum(1 for leaf in tree.flatten(args[0])[0] if leaf_type(leaf) is not None)
        for i, name in enumerate(args[1]):
            graph.roles[first + i] = "scalar"
            graph.inputs[first + i].name = name.replace(".", "_")
        return graph
