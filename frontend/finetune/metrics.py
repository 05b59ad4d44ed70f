"""Numbers that say how good predictions are, and objectives by name.

A metric is a function `metric(outputs, targets) -> float` of NumPy arrays over the whole evaluation set; users pass
their own beside the names below. Objectives are functions of tensors `objective(output, target) -> scalar`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...ir.errors import ArgumentsError
from ..nn import functional
from ..tensor import Tensor

Metric = Callable[[np.ndarray, np.ndarray], float]


def accuracy(outputs: np.ndarray, targets: np.ndarray) -> float:
    """The share of rows whose largest output is the target's class; of binary outputs, the share on its side of 0."""
    if outputs.ndim == targets.ndim:
        return float(np.mean((outputs > 0) == (targets > 0.5)))
    return float(np.mean(outputs.argmax(-1) == targets))


def top5(outputs: np.ndarray, targets: np.ndarray) -> float:
    """The share of rows whose target is among the five largest outputs."""
    k = min(5, outputs.shape[-1])
    best = np.argpartition(-outputs, k - 1, axis=-1)[..., :k]
    return float(np.mean((best == targets[..., None]).any(-1)))


def macro_f1(outputs: np.ndarray, targets: np.ndarray) -> float:
    """The mean over classes of the harmonic mean of precision and recall; a class that never occurs does not count."""
    said = outputs.argmax(-1)
    scores = []
    for c in np.union1d(np.unique(targets), np.unique(said)):
        right = float(np.sum((said == c) & (targets == c)))
        scores.append(2 * right / float(np.sum(said == c) + np.sum(targets == c)))
    return float(np.mean(scores))


def mse(outputs: np.ndarray, targets: np.ndarray) -> float:
    """The mean squared error."""
    return float(np.mean((outputs.reshape(targets.shape).astype(np.float64) - targets) ** 2))


def mae(outputs: np.ndarray, targets: np.ndarray) -> float:
    """The mean absolute error."""
    return float(np.mean(np.abs(outputs.reshape(targets.shape).astype(np.float64) - targets)))


METRICS: dict[str, Metric] = {"accuracy": accuracy, "top5": top5, "macro_f1": macro_f1, "mse": mse, "mae": mae}
SMALLER_IS_BETTER = ("loss", "mse", "mae")

OBJECTIVES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "cross_entropy": (functional.cross_entropy, "accuracy"),
    "mse": (functional.mse_loss, "mse"),
    "l1": (functional.l1_loss, "mae"),
    "bce": (functional.binary_cross_entropy_with_logits, "accuracy"),
}
"""Objectives by name, each with the metric that goes with it."""


def objective_of(wanted: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """An objective from its name or a function."""
    if callable(wanted):
        return wanted
    if wanted not in OBJECTIVES:
        raise ArgumentsError(f"there is no objective {wanted!r}; there are {', '.join(OBJECTIVES)}, or give a function "
                             "objective(output, target)")
    return OBJECTIVES[wanted][0]


def metrics_of(wanted: Sequence[Any] | Mapping[str, Any] | None, objective: Any) -> dict[str, Metric]:
    """Metrics by name, from names and functions; by default the one that goes with the objective."""
    if isinstance(wanted, Mapping):
        return dict(wanted)
    if wanted is None:
        wanted = [OBJECTIVES[objective][1]] if objective in OBJECTIVES else []
    found: dict[str, Metric] = {}
    for one in wanted:
        if callable(one):
            found[getattr(one, "__name__", repr(one))] = one
        elif one in METRICS:
            found[one] = METRICS[one]
        else:
            raise ArgumentsError(f"there is no metric {one!r}; there are {', '.join(METRICS)}, or give a function")
    return found
