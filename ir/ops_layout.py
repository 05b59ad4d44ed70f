"""Channels-last forms of ops on images.

Convolution and pooling are written for (N, C, *spatial). With the attribute `channels_last` the same op takes and
gives its activations as (N, *spatial, C), the layout in which vectors run over channels. The layout pass of
`schedules` sets it for whole graphs; models are written channels first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .types import Shape, TensorType


def to_first(shape: Shape) -> Shape:
    """(N, C, *spatial) of a channels-last shape."""
    return (shape[0], shape[-1], *shape[1:-1])


def to_last(shape: Shape) -> Shape:
    """(N, *spatial, C) of a channels-first shape."""
    return (shape[0], *shape[2:], shape[1])


def spatial_sizes(shape: Shape, channels_last: bool) -> Shape:
    """The spatial part of an activation's shape."""
    return shape[1:-1] if channels_last else shape[2:]


def either_layout_type(infer: Callable[..., Any], activations: Sequence[int], results: Sequence[int]) -> Any:
    """A type rule for both layouts from one for channels first.

    `activations` are the numbers of the operands, `results` those of the results, that have channels.
    """
    def both(*types: TensorType, channels_last: bool = False, **attrs: Any) -> Any:
        if not channels_last:
            return infer(*types, **attrs)
        made = infer(*(t.with_shape(to_first(t.shape)) if i in activations and t.rank > 2 else t
                       for i, t in enumerate(types)), **attrs)
        listed = (made,) if isinstance(made, TensorType) else made
        moved = tuple(t.with_shape(to_last(t.shape)) if i in results else t for i, t in enumerate(listed))
        return moved[0] if isinstance(made, TensorType) else moved
    return both


def either_layout(reference: Callable[..., Any], activations: Sequence[int], results: Sequence[int]) -> Any:
    """A reference for both layouts from one for channels first; see `either_layout_type`."""
    def both(*arrays: Any, channels_last: bool = False, **attrs: Any) -> Any:
        if not channels_last:
            return reference(*arrays, **attrs)
        made = reference(*(np.moveaxis(x, -1, 1) if i in activations else x for i, x in enumerate(arrays)), **attrs)
        listed = made if isinstance(made, tuple) else (made,)
        moved = tuple(np.ascontiguousarray(np.moveaxis(y, 1, -1)) if i in results else y for i, y in enumerate(listed))
        return moved if isinstance(made, tuple) else moved[0]
    return both
