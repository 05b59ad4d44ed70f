"""What the ranks of a mesh have to have in common when they start, as text that they compare.

Each rank takes its parts of a model that it has made itself, and draws no more of it. So ranks that were seeded in
different ways, or loaded different files, would train on pieces of different models, and nothing would look wrong.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..distributed.batches import SAMPLE, describe
from . import random
from .pending import parked, waiting
from .tensor import Tensor

if TYPE_CHECKING:
    from .parallel import ParallelStep


def _tensors(step: ParallelStep) -> Iterator[tuple[str, Tensor]]:
    """What a step reads and changes, each once."""
    inner, opt, seen = step.inner, step.inner.opt, set[int]()
    state = inner.model.named_state() if hasattr(inner.model, "named_state") else ()
    for name, tensor in (*state, *((f"parameter {i}", p) for i, p in enumerate(opt.params)),
                         *((f"{slot} of parameter {i}", t) for i, slots in enumerate(opt.state)
                           for slot, t in slots.items()), ("random state", random.default_generator().state)):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def elsewhere(step: ParallelStep) -> list[str]:
    """The names of tensors whose elements other ranks have: another step on this mesh trains them."""
    return [name for name, tensor in _tensors(step) if parked(tensor._value)]


def starting_point(step: ParallelStep, without: Collection[str] = ()) -> str:
    """The plan, the optimizer, and a line for each tensor but some, with a checksum of its first elements.

    Of a tensor that was not drawn yet no more than these are drawn.
    """
    inner, opt = step.inner, step.inner.opt
    lines = [f"plan: {step.plan}", f"train_step: accumulate={inner.accumulate}, amp={inner._compiled.amp}",
             f"optimizer: {type(opt).__name__} of {len(opt.params)} parameters"]
    lines += [f"{name}: {tensor.type} {describe([_first(tensor)]).split(' of ')[0]}"
              for name, tensor in _tensors(step) if name not in without]
    return "\n".join(lines)


def _first(tensor: Tensor) -> np.ndarray:
    """The first rows of a tensor, about `SAMPLE` elements of them."""
    rows = max(1, SAMPLE // max(1, math.prod(tensor.shape[1:])))
    place = tuple(slice(0, min(n, rows) if i == 0 else n) for i, n in enumerate(tensor.shape))
    value: Any = tensor._value
    found: np.ndarray = value.source.part(place) if waiting(value) else tensor.numpy(copy=False)[place]
    return found
