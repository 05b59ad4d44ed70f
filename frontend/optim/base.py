"""What every optimizer shares: parameter groups, state, and one update rule for eager and compiled steps.

An optimizer is written once, as a pure function of one parameter (`update_parameter`): `td.train_step`
traces it into the compiled graph, where parameters and state are updated in place, and `opt.step()`
runs the same function eagerly on the `.grad` that `loss.backward()` left.

Everything that changes between steps (learning rate, bias corrections...) is computed on the host in
double precision by `hyperparameters(step)` and enters the update as run-time scalars.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...ir.dtypes import float32, float64
from ...ir.errors import ArgumentsError, AttributeValueError, CheckpointError
from ..tensor import Tensor
from .schedules import Rate, as_schedule

State = dict[str, Tensor]


@dataclass
class ParameterGroup:
    """Parameters that share options.

    Options may be changed between steps and none causes a recompile; but what decides which state there is
    (momentum zero or not) must be given when the optimizer is made.
    """

    params: list[Tensor]
    options: dict[str, Any]


class Optimizer:
    """Base class of optimizers, and of those that users write.

    A subclass gives `init_parameter`, `update_parameter` and, if something else than the options changes
    with the step, `scalars`.

    Args:
        params: parameters, or dicts `{"params": [...], "lr": ..., ...}` whose options override the
            defaults for a group (torch's convention).
        lr: learning rate, a number or a schedule (a function of the step).
        **options: further options with their defaults; numbers may also be schedules.

    Raises:
        ArgumentsError: no parameters, or one that stands in two groups.
        AttributeValueError: an option that the optimizer does not have, or a negative one.
    """

    #: options that change the structure of the update: a change of theirs needs a new compilation
    static_options: tuple[str, ...] = ()
    #: scalars that follow how often a parameter was updated, not only the step: a frozen one is not (as in torch)
    counted: tuple[str, ...] = ()

    def __init__(self, params: Iterable[Any], lr: Rate, **options: Any):
        self.defaults = {"lr": lr, **options}
        self.groups: list[ParameterGroup] = []
        self.steps = 0
        listed = list(params)
        if not listed:
            raise ArgumentsError("the optimizer got no parameters: pass model.parameters(), and check that the "
                                 "model's layers are assigned to attributes or held in a ModuleList")
        for group in listed if isinstance(listed[0], Mapping) else [{"params": listed}]:
            self.add_group(group)
        self.skipped: list[int] = [0] * len(self.params)  # steps in which the parameter was frozen
        self.state: list[State] = self.init_state(self.params)

    def add_group(self, group: Mapping[str, Any]) -> None:
        """Adds a group `{"params": [...], option: value, ...}`."""
        params = group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        options = {k: v for k, v in group.items() if k != "params"}
        if unknown := options.keys() - self.defaults.keys():
            raise AttributeValueError(f"{type(self).__name__} has no option {', '.join(sorted(unknown))}; "
                                      f"it has: {', '.join(self.defaults)}")
        known = {id(p) for p in self.params}
        for param in params:
            if not isinstance(param, Tensor) or not param.dtype.is_float:
                raise ArgumentsError(f"an optimizer takes floating-point tensors, got {param!r}")
            if id(param) in known:
                raise ArgumentsError(f"the parameter {param.name or param.shape} stands in two groups, or twice in one")
            known.add(id(param))
        merged = {**self.defaults, **options}
        for name, value in merged.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value < 0:
                raise AttributeValueError(f"{type(self).__name__}: {name} must not be negative, got {value}")
        self.groups.append(ParameterGroup(params, merged))
        if hasattr(self, "state"):
            self.state += [self.init_parameter(p, merged) for p in params]
            self.skipped += [self.steps] * len(params)

    @property
    def params(self) -> list[Tensor]:
        """All parameters, group after group."""
        return [p for g in self.groups for p in g.params]

    @property
    def lr(self) -> Rate:
        """The learning rate (or schedule) of the first group; setting it sets every group's."""
        return self.groups[0].options["lr"]

    @lr.setter
    def lr(self, rate: Rate) -> None:
        for group in self.groups:
            group.options["lr"] = rate

    # -- what a subclass defines

    def init_parameter(self, param: Tensor, options: Mapping[str, Any]) -> State:
        """The state of one parameter before the first step: name -> tensor."""
        return {}

    def scalars(self, step: int, options: Mapping[str, float]) -> dict[str, float]:
        """Run-time numbers of a group at a step (from 0), given its options as numbers.

        The default passes every numeric option on.
        """
        return dict(options)

    def update_parameter(self, param: Tensor, grad: Tensor, state: State, scalars: Mapping[str, Tensor],
                         options: Mapping[str, Any]) -> tuple[Tensor, State]:
        """The new parameter and state. Pure: builds new tensors from the given ones.

        `scalars` are rank-0 tensors of the dtype of the computation; `options` holds the static options.
        """
        raise AttributeValueError(f"{type(self).__name__} must define update_parameter")

    # -- the protocol of train_step

    def init_state(self, params: Sequence[Tensor]) -> list[State]:
        """State of every parameter, in the order of `params`."""
        options = [g.options for g in self.groups for _ in g.params]
        return [self.init_parameter(p, o) for p, o in zip(params, options, strict=True)]

    def hyperparameters(self, step: int, each: bool = False) -> dict[str, float]:
        """Every run-time number of the step, keyed `group.name`: the role-`scalar` inputs of the graph.

        With `each`, those in `counted` stand there for every parameter instead, `group.name.parameter`.
        """
        numbers: dict[str, float] = {}
        at = 0
        for i, group in enumerate(self.groups):
            values = {k: float(as_schedule(v)(step)) for k, v in group.options.items()
                      if k not in self.static_options and v is not None}
            counts = [step - skipped for skipped in self.skipped[at:at + len(group.params)]]
            taken = {count: self.scalars(count, values) for count in {step, *counts}}
            alike = taken[step]
            numbers.update({f"{i}.{k}": v for k, v in alike.items() if not (each and k in self.counted)})
            if each:
                numbers.update({f"{i}.{k}.{at + j}": taken[count][k] for j, count in enumerate(counts)
                                for k in self.counted if k in alike})
            at += len(group.params)
        return numbers

    def skip(self, flags: Sequence[bool]) -> None:
        """Notes that the step just counted in `steps` was none for the parameters whose flag is False."""
        self.skipped = [n + (not flag) for n, flag in zip(self.skipped, flags, strict=True)]

    def structure(self) -> tuple[Any, ...]:
        """What the compiled update depends on besides shapes: part of the compilation key."""
        return (type(self).__qualname__, tuple(tuple(slots) for slots in self.state), tuple(
            (len(g.params), tuple((k, g.options[k]) for k in self.static_options)) for g in self.groups))

    def update(self, params: Sequence[Tensor], grads: Sequence[Tensor | None], state: Sequence[State],
               hyper: Mapping[str, Tensor]) -> tuple[list[Tensor], list[State]]:
        """New parameters and states from gradients; a parameter without gradient stays as it is.

        16-bit parameters are updated in float32 arithmetic and rounded once.
        """
        new_params, new_state, at = [], [], 0
        for i, group in enumerate(self.groups):
            prefix = f"{i}."
            named = {k[len(prefix):]: v for k, v in hyper.items() if k.startswith(prefix)}
            shared = {k: v for k, v in named.items() if "." not in k}
            for _ in group.params:
                param, grad, slots = params[at], grads[at], state[at]
                own = {k: named[f"{k}.{at}"] for k in self.counted if f"{k}.{at}" in named}
                scalars = {**shared, **own}
                at += 1
                if grad is None:
                    new_params.append(param)
                    new_state.append(dict(slots))
                    continue
                wide = compute_dtype(param)
                updated, slots = self.update_parameter(
                    param.astype(wide), grad.astype(wide), slots,
                    {k: v.astype(wide) for k, v in scalars.items()}, group.options)
                new_params.append(updated.astype(param.dtype))
                new_state.append(slots)
        return new_params, new_state

    # -- eager use

    def step(self) -> None:
        """Updates every parameter that has a `.grad`, eagerly."""
        each = any(self.skipped) or any(p.grad is None for p in self.params)
        hyper = {k: Tensor(np.asarray(v, np.float64)) for k, v in self.hyperparameters(self.steps, each).items()}
        params = [p.detach() for p in self.params]
        grads = [None if p.grad is None else p.grad.detach() for p in self.params]
        new_params, new_state = self.update(params, grads, self.state, hyper)
        for param, new, grad in zip(self.params, new_params, grads, strict=True):
            if grad is not None:
                param.assign(new)
        for slots, new_slots in zip(self.state, new_state, strict=True):
            for name, value in new_slots.items():
                slots[name].assign(value)
        self.steps += 1
        self.skip([g is not None for g in grads])

    def zero_grad(self) -> None:
        """Forgets every parameter's gradient."""
        for param in self.params:
            param.grad = None

    # -- checkpoints

    def state_dict(self) -> dict[str, np.ndarray]:
        """`steps`, `skipped` and `index.slot` for every state tensor, as NumPy arrays."""
        arrays = {f"{i}.{name}": t.numpy() for i, slots in enumerate(self.state) for name, t in slots.items()}
        return {"steps": np.asarray(self.steps, np.int64), "skipped": np.asarray(self.skipped, np.int64), **arrays}

    def load_state_dict(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            CheckpointError: entries are missing or left over, or a shape differs; all are named.
        """
        expected = {f"{i}.{name}": t for i, slots in enumerate(self.state) for name, t in slots.items()}
        missing = expected.keys() - arrays.keys()
        extra = arrays.keys() - expected.keys() - {"steps", "skipped"}
        wrong = [f"{k} has shape {arrays[k].shape}, needs {expected[k].shape}"
                 for k in expected.keys() & arrays.keys() if tuple(arrays[k].shape) != tuple(expected[k].shape)]
        if missing or extra or wrong or "steps" not in arrays:
            raise CheckpointError(f"the state is not one of this {type(self).__name__}: missing {sorted(missing)}, "
                                  f"left over {sorted(extra)}, shapes: {wrong or 'fit'}")
        for name, tensor in expected.items():
            tensor.assign(Tensor(np.asarray(arrays[name], tensor.dtype.np)))
        self.steps = int(arrays["steps"])
        skipped = np.asarray(arrays.get("skipped", np.zeros(len(self.state), np.int64)))  # older files have none
        self.skipped = [int(n) for n in np.broadcast_to(skipped, (len(self.state),))]


def compute_dtype(param: Tensor) -> Any:
    """float64 for float64 parameters, float32 otherwise."""
    return float64 if param.dtype == float64 else float32
