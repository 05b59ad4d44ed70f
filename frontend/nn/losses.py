"""Losses as modules: `CrossEntropyLoss(label_smoothing=0.1)(logits, labels)`."""

from __future__ import annotations

from typing import Any

from ..tensor import Tensor
from . import functional
from .module import Module


def _loss(name: str, function: Any, doc: str) -> type[Module]:
    def __init__(self: Any, **options: Any) -> None:
        Module.__init__(self)
        self.options = options

    def forward(self: Any, prediction: Tensor, target: Tensor) -> Tensor:
        return function(prediction, target, **self.options)

    doc = f"{doc} Options are those of `functional.{function.__name__}`."
    return type(name, (Module,), {"__init__": __init__, "forward": forward, "__doc__": doc, "__module__": __name__})


MSELoss = _loss("MSELoss", functional.mse_loss, "Mean squared error.")
L1Loss = _loss("L1Loss", functional.l1_loss, "Mean absolute error.")
HuberLoss = _loss("HuberLoss", functional.huber_loss, "Quadratic near zero, linear beyond.")
CrossEntropyLoss = _loss("CrossEntropyLoss", functional.cross_entropy, "Cross-entropy of logits and labels.")
NLLLoss = _loss("NLLLoss", functional.nll_loss, "Negative log-likelihood of log-probabilities.")
BCEWithLogitsLoss = _loss("BCEWithLogitsLoss", functional.binary_cross_entropy_with_logits,
                          "Binary cross-entropy of logits.")
KLDivLoss = _loss("KLDivLoss", functional.kl_div, "Kullback-Leibler divergence.")
