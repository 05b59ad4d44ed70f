"""Gradient clipping, on lists of gradients, eager or traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import functions as F
from ..tensor import Tensor


def global_norm(grads: Sequence[Tensor | None]) -> Tensor:
    """The L2 norm of all gradients together, a float32 scalar; None counts as zero."""
    total: Any = 0.0
    for grad in grads:
        if grad is not None:
            wide = grad.astype("float32") if grad.dtype.bits < 32 else grad
            total = total + F.sum(wide * wide)
    return F.sqrt(F.asarray(total))


def clip_by_global_norm(grads: Sequence[Tensor | None], max_norm: Any) -> tuple[list[Tensor | None], Tensor]:
    """Scales all gradients by `max_norm / norm` where their global norm exceeds `max_norm` (Pascanu et al. 2013).

    Returns the gradients and the norm before clipping. `max_norm` may be a scalar tensor.
    """
    norm = global_norm(grads)
    scale = F.minimum(max_norm / (norm + 1e-6), 1.0)  # torch's formula, with its epsilon
    return [None if g is None else g * scale.astype(g.dtype) for g in grads], norm


def clip_by_value(grads: Sequence[Tensor | None], limit: float) -> list[Tensor | None]:
    """Clips every element of every gradient to [-limit, limit]."""
    return [None if g is None else F.clip(g, -limit, limit) for g in grads]
