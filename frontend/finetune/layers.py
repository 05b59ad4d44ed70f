"""How deep a parameter lies: layer-wise learning rates and gradual unfreezing need to know.

Models number their repeated blocks (`encoder.layer.0`, `features.3`, `layer2`), so the longest numbered row of names is
taken for the stack; what stands before it is its bottom (embeddings, a stem), what stands after it its top (a head). A
model without one is cut at its layers, in the order in which they were made. Patterns given from bottom to top say
otherwise.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ...ir.errors import ArgumentsError, AttributeValueError
from ..nn import Module
from .names import Patterns, aliases, literal, parameters, select

_NUMBER = re.compile(r"(?<![0-9])(\d+)(?=\.[^.]+\.[^.]+)")  # of a block, which holds layers that hold parameters

_PART = re.compile(r"_?(weights?|bias|offset|kernel|scale|gamma|beta|[wb])(_\d+)?$")


@dataclass(frozen=True)
class Stage:
    """A part of a training run: what trains, and for how long.

    Attributes:
        train: patterns of the parameters that train; all others are frozen.
        epochs: passes over the data.
        lr: factor on the learning rate of the run.
    """

    train: Patterns = "*"
    epochs: int = 1
    lr: float = 1.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or not self.lr > 0:
            raise AttributeValueError(f"a stage needs epochs >= 1 and lr > 0, got {self.epochs} and {self.lr}")


def layers(model: Module, patterns: Sequence[Patterns] | None = None) -> list[list[str]]:
    """The names of the parameters, layer by layer from the bottom to the top.

    Args:
        model: whose parameters are meant.
        patterns: one entry for each layer from the bottom; what none names belongs to the top. Default: found by
            the names, see the module's text.
    """
    known = list(parameters(model))
    if not known:
        raise ArgumentsError("the model has no floating-point parameters")
    if patterns is not None:
        named = {n: i for i, p in enumerate(patterns) for n in select(model, p)}
        depth = {n: named.get(n, len(patterns)) for n in known}
    else:
        depth = _found(model, known)
    places = sorted(set(depth.values()))
    return [[n for n in known if depth[n] == place] for place in places]


def _found(model: Module, known: list[str]) -> dict[str, int]:
    own = aliases(model)
    numbered: dict[str, dict[str, int]] = defaultdict(dict)  # what stands before the number -> parameter -> number
    for name in known:
        for path in (*own.get(name, ()), name):  # the own name counts most, so it comes last
            for hit in _NUMBER.finditer(path):
                numbered[path[:hit.start()]][name] = int(hit.group())
    rows = {stem: row for stem, row in numbered.items() if len(set(row.values())) > 1 and 3 * len(row) >= len(known)}
    if not rows:
        owners = [_owner(n) for n in known]
        order = list(dict.fromkeys(owners))
        return {n: order.index(owner) for n, owner in zip(known, owners)}
    row = max(rows.values(), key=lambda r: (len(r), len(set(r.values()))))
    first = min(i for i, n in enumerate(known) if n in row)
    bottom, top = min(row.values()) - 1, max(row.values()) + 1
    return {n: row.get(n, bottom if i < first else top) for i, n in enumerate(known)}


def _owner(name: str) -> str:
    """What a parameter belongs to: its name without the part that says weight or bias."""
    return name.rpartition(".")[0] if "." in name else _PART.sub("", name)


def layerwise_lr(model: Module, decay: float, patterns: Sequence[Patterns] | None = None) -> dict[str, float]:
    """Factors on the learning rate: 1 for the top layer, `decay` less for each layer below (Howard & Ruder 2018;
    Clark et al. 2020, ELECTRA, use 0.8)."""
    if not 0.0 < decay <= 1.0:
        raise AttributeValueError(f"layer-wise decay lies in (0, 1], got {decay}")
    found = layers(model, patterns)
    return {n: decay ** (len(found) - 1 - i) for i, layer in enumerate(found) for n in layer}


def gradual(model: Module, epochs: int = 1, last: int | None = None,
            patterns: Sequence[Patterns] | None = None) -> list[Stage]:
    """Stages of gradual unfreezing (Howard & Ruder 2018): the top layer first, one more from above in each stage.

    What is frozen when this is called (tables of embeddings, weights that have adapters) stays so in every stage.

    Args:
        model: whose layers are meant.
        epochs: of each stage.
        last: epochs of the last stage, in which all trains; default: as the others.
        patterns: see `layers`.
    """
    known = parameters(model)
    trains = [[n for n in layer if known[n].requires_grad] for layer in layers(model, patterns)]
    found = [layer for layer in trains if layer]
    if not found:
        raise ArgumentsError("every parameter is frozen; unfreeze what is to be trained in the end")
    chosen = [[n for layer in found[-k:] for n in layer] for k in range(1, len(found) + 1)]
    return [Stage(tuple(map(literal, names)), last if last and k == len(chosen) else epochs)
            for k, names in enumerate(chosen, 1)]
