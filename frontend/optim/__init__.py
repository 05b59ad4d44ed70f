"""Optimizers, learning-rate schedules and gradient clipping."""

from .algorithms import SGD, AdaGrad, Adam, AdamW, Lion, RMSProp
from .base import Optimizer, ParameterGroup
from .clip import clip_by_global_norm, clip_by_value, global_norm
from .schedules import (
    Constant,
    Cosine,
    Cyclical,
    Exponential,
    LinearWarmup,
    MultiStep,
    OneCycle,
    Polynomial,
    Schedule,
    Step,
)

__all__ = [
    "SGD", "AdaGrad", "Adam", "AdamW", "Lion", "RMSProp",
    "Optimizer", "ParameterGroup", "clip_by_global_norm", "clip_by_value", "global_norm",
    "Constant", "Cosine", "Cyclical", "Exponential", "LinearWarmup", "MultiStep", "OneCycle", "Polynomial",
    "Schedule", "Step",
]
