"""What the ranks of a mesh have to have in common when they start, as text that they compare.

Each rank takes its parts of a model that it has made itself, and draws no more of it. So ranks that were seeded in
different ways, or loaded different files, would train on pieces of different models, and nothing would look wrong.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

from ..distributed.batches import describe
from . import random
from .pending import Cast, Elsewhere, Full, waiting
from .tensor import Tensor

if TYPE_CHECKING:
    from .parallel import ParallelStep


def starting_point(step: ParallelStep) -> str:
    """The plan, the optimizer, and a line for each tensor with a checksum of its elements.

    Of a tensor that was not drawn yet it is that of the place in the random stream; of large ones some thousand
    elements count.
    """
    inner, opt = step.inner, step.inner.opt
    lines = [f"plan: {step.plan}", f"train_step: accumulate={inner.accumulate}, amp={inner._compiled.amp}",
             f"optimizer: {type(opt).__name__} of {len(opt.params)} parameters"]
    state = inner.model.named_state() if hasattr(inner.model, "named_state") else ()
    seen: set[int] = set()
    for name, tensor in (*state, *((f"parameter {i}", p) for i, p in enumerate(opt.params)),
                         *((f"{slot} of parameter {i}", t) for i, slots in enumerate(opt.state)
                           for slot, t in slots.items()), ("random state", random.default_generator().state)):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            lines.append(f"{name}: {tensor.type} {_elements(tensor)}")
    return "\n".join(lines)


def _elements(tensor: Tensor) -> str:
    value: Any = tensor._value
    if not waiting(value):
        return describe([tensor.numpy(copy=False)]).split(" of ")[0]
    source = value.source
    while isinstance(source, Cast):
        source = source.source
    if isinstance(source, Elsewhere):
        return "elsewhere"
    if isinstance(source, Full):
        return f"filled with {source.value}"
    state = getattr(source, "state", None)
    return f"to be drawn from {zlib.crc32(repr(state).encode()):08x}" if state is not None else "to be read"
