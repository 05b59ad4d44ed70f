"""The optimizers, each one update rule. All agree with torch.optim to rounding (Lion with its paper)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ...ir.dtypes import as_dtype
from ...ir.errors import AttributeValueError
from .. import functions as F
from ..pending import Full
from ..tensor import Tensor
from .base import Optimizer, State, compute_dtype
from .schedules import Rate


def _zeros(param: Tensor, value: float = 0.0) -> Tensor:
    made: Tensor = Tensor._later(Full(param.type.with_dtype(as_dtype(compute_dtype(param))), value))
    return made


class SGD(Optimizer):
    """Stochastic gradient descent with momentum (Polyak 1964) or Nesterov momentum (Sutskever et al. 2013).

    Args:
        params, lr: see Optimizer.
        momentum: 0 keeps no momentum buffer.
        dampening: fraction of the gradient kept out of the buffer after the first step.
        weight_decay: L2 penalty, added to the gradient.
        nesterov: look ahead along the momentum; needs momentum > 0 and dampening 0.
    """

    static_options = ("nesterov",)
    counted = ("fresh",)

    def __init__(self, params: Iterable[Any], lr: Rate = 1e-3, momentum: Rate = 0.0, dampening: float = 0.0,
                 weight_decay: Rate = 0.0, nesterov: bool = False):
        if nesterov and (momentum == 0.0 or dampening != 0.0):
            raise AttributeValueError("Nesterov momentum needs momentum > 0 and dampening = 0")
        super().__init__(params, lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay,
                         nesterov=nesterov)

    def init_parameter(self, param: Tensor, options: Mapping[str, Any]) -> State:
        return {"momentum": _zeros(param)} if options["momentum"] != 0.0 else {}

    def scalars(self, step: int, options: Mapping[str, float]) -> dict[str, float]:
        # the first gradient enters the buffer whole, as in torch
        fresh = 1.0 if step == 0 else 1.0 - options["dampening"]
        return {"lr": options["lr"], "momentum": options["momentum"], "fresh": fresh,
                "weight_decay": options["weight_decay"]}

    def update_parameter(self, param: Tensor, grad: Tensor, state: State, scalars: Mapping[str, Tensor],
                         options: Mapping[str, Any]) -> tuple[Tensor, State]:
        grad = grad + scalars["weight_decay"] * param
        if "momentum" not in state:
            return param - scalars["lr"] * grad, {}
        buffer = scalars["momentum"] * state["momentum"] + scalars["fresh"] * grad
        direction = grad + scalars["momentum"] * buffer if options["nesterov"] else buffer
        return param - scalars["lr"] * direction, {"momentum": buffer}


class AdaGrad(Optimizer):
    """Step sizes by the root of the sum of squared gradients (Duchi, Hazan & Singer 2011)."""

    counted = ("lr",)

    def __init__(self, params: Iterable[Any], lr: Rate = 1e-2, lr_decay: float = 0.0, weight_decay: Rate = 0.0,
                 initial_accumulator: float = 0.0, eps: float = 1e-10):
        super().__init__(params, lr, lr_decay=lr_decay, weight_decay=weight_decay,
                         initial_accumulator=initial_accumulator, eps=eps)

    def init_parameter(self, param: Tensor, options: Mapping[str, Any]) -> State:
        return {"sum": _zeros(param, options["initial_accumulator"])}

    def scalars(self, step: int, options: Mapping[str, float]) -> dict[str, float]:
        return {"lr": options["lr"] / (1.0 + step * options["lr_decay"]),
                "weight_decay": options["weight_decay"], "eps": options["eps"]}

    def update_parameter(self, param: Tensor, grad: Tensor, state: State, scalars: Mapping[str, Tensor],
                         options: Mapping[str, Any]) -> tuple[Tensor, State]:
        grad = grad + scalars["weight_decay"] * param
        total = state["sum"] + grad * grad
        return param - scalars["lr"] * (grad / (F.sqrt(total) + scalars["eps"])), {"sum": total}


class RMSProp(Optimizer):
    """Step sizes by the root of a moving average of squared gradients (Tieleman & Hinton 2012).

    `centered` divides by the deviation from the mean gradient instead (Graves 2013).
    """

    static_options = ("centered",)

    def __init__(self, params: Iterable[Any], lr: Rate = 1e-2, alpha: float = 0.99, eps: float = 1e-8,
                 weight_decay: Rate = 0.0, momentum: Rate = 0.0, centered: bool = False):
        super().__init__(params, lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum,
                         centered=centered)

    def init_parameter(self, param: Tensor, options: Mapping[str, Any]) -> State:
        state = {"square": _zeros(param)}
        if options["centered"]:
            state["mean"] = _zeros(param)
        if options["momentum"] != 0.0:
            state["momentum"] = _zeros(param)
        return state

    def scalars(self, step: int, options: Mapping[str, float]) -> dict[str, float]:
        return {**options, "beta": 1.0 - options["alpha"]}

    def update_parameter(self, param: Tensor, grad: Tensor, state: State, scalars: Mapping[str, Tensor],
                         options: Mapping[str, Any]) -> tuple[Tensor, State]:
        grad = grad + scalars["weight_decay"] * param
        alpha, beta = scalars["alpha"], scalars["beta"]
        new = {"square": alpha * state["square"] + beta * (grad * grad)}
        spread = new["square"]
        if options["centered"]:
            new["mean"] = alpha * state["mean"] + beta * grad
            spread = spread - new["mean"] * new["mean"]
        direction = grad / (F.sqrt(spread) + scalars["eps"])
        if "momentum" in state:
            direction = new["momentum"] = scalars["momentum"] * state["momentum"] + direction
        return param - scalars["lr"] * direction, new


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015); `weight_decay` is an L2 penalty in the gradient, see AdamW for the other kind.

    Args:
        params, lr: see Optimizer.
        betas: decay of the moving averages of the gradient and of its square.
        eps: added to the root of the second moment.
        amsgrad: divide by the largest second moment so far (Reddi, Kale & Kumar 2018).
    """

    static_options = ("amsgrad",)
    counted = ("step_size", "root_correction")

    def __init__(self, params: Iterable[Any], lr: Rate = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: Rate = 0.0, amsgrad: bool = False):
        if not all(0.0 <= b < 1.0 for b in betas):
            raise AttributeValueError(f"betas must lie in [0, 1), got {betas}")
        super().__init__(params, lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay,
                         amsgrad=amsgrad)

    def init_parameter(self, param: Tensor, options: Mapping[str, Any]) -> State:
        names = ("mean", "square", "largest") if options["amsgrad"] else ("mean", "square")
        return {name: _zeros(param) for name in names}

    def scalars(self, step: int, options: Mapping[str, float]) -> dict[str, float]:
        correction1 = 1.0 - options["beta1"] ** (step + 1)
        correction2 = 1.0 - options["beta2"] ** (step + 1)
        return {"step_size": options["lr"] / correction1, "root_correction": 1.0 / math.sqrt(correction2),
                "beta1": options["beta1"], "rest1": 1.0 - options["beta1"],
                "beta2": options["beta2"], "rest2": 1.0 - options["beta2"], "eps": options["eps"],
                "weight_decay": options["weight_decay"], "keep": 1.0 - options["lr"] * options["weight_decay"]}

    def update_parameter(self, param: Tensor, grad: Tensor, state: State, scalars: Mapping[str, Tensor],
                         options: Mapping[str, Any]) -> tuple[Tensor, State]:
        return self._adam(param, grad + scalars["weight_decay"] * param, state, scalars, options)

    @staticmethod
    def _adam(param: Tensor, grad: Tensor, state: State, scalars: Mapping[str, Tensor],
              options: Mapping[str, Any]) -> tuple[Tensor, State]:
        new = {"mean": scalars["beta1"] * state["mean"] + scalars["rest1"] * grad,
               "square": scalars["beta2"] * state["square"] + scalars["rest2"] * (grad * grad)}
        second = new["square"]
        if options["amsgrad"]:
            second = new["largest"] = F.maximum(state["largest"], second)
        scale = F.sqrt(second) * scalars["root_correction"] + scalars["eps"]
        return param - scalars["step_size"] * (new["mean"] / scale), new


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019): the parameter shrinks by `lr * weight_decay`."""

    def __init__(self, params: Iterable[Any], lr: Rate = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: Rate = 1e-2, amsgrad: bool = False):
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad)

    def update_parameter(self, param: Tensor, grad: Tensor, state: State, scalars: Mapping[str, Tensor],
                         options: Mapping[str, Any]) -> tuple[Tensor, State]:
        return self._adam(param * scalars["keep"], grad, state, scalars, options)


class Lion(Optimizer):
    """Sign of an interpolated momentum, decoupled weight decay (Chen et al. 2023, algorithm 2)."""

    def __init__(self, params: Iterable[Any], lr: Rate = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
                 weight_decay: Rate = 0.0):
        super().__init__(params, lr, beta1=betas[0], beta2=betas[1], weight_decay=weight_decay)

    def init_parameter(self, param: Tensor, options: Mapping[str, Any]) -> State:
        return {"mean": _zeros(param)}

    def scalars(self, step: int, options: Mapping[str, float]) -> dict[str, float]:
        return {"lr": options["lr"], "keep": 1.0 - options["lr"] * options["weight_decay"],
                "beta1": options["beta1"], "rest1": 1.0 - options["beta1"],
                "beta2": options["beta2"], "rest2": 1.0 - options["beta2"]}

    def update_parameter(self, param: Tensor, grad: Tensor, state: State, scalars: Mapping[str, Tensor],
                         options: Mapping[str, Any]) -> tuple[Tensor, State]:
        direction = F.sign(scalars["beta1"] * state["mean"] + scalars["rest1"] * grad)
        mean = scalars["beta2"] * state["mean"] + scalars["rest2"] * grad
        return param * scalars["keep"] - scalars["lr"] * direction, {"mean": mean}
