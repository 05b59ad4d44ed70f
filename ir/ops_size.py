"""Sizes as numbers, and numbers as sizes.

`size` gives a symbolic size as a number to compute with. `bind_size` is its converse: from it on, a name stands for an
element that the graph computes, so that shapes may depend on data (a mask selects as many elements as it has). A graph
with such names is compiled in phases, each of which begins where sizes become known: see `phases`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .dims import Dim
from .ops_common import (
    REQUIRED,
    TensorType,
    as_dtype,
    check_shape_attr,
    define,
    fail_attr,
    fail_dtype,
    fail_shape,
)

INT64, UINT8 = as_dtype("int64"), as_dtype("uint8")


def size_infer(of: Any) -> TensorType:
    check_shape_attr((of,), "of")
    return TensorType((), INT64)


define("size", "", size_infer, lambda of: np.asarray(of, np.int64), "A size as a number.",
       attrs={"of": REQUIRED}, traits=["constant"], undifferentiable="integer result")


def bind_size_infer(count: TensorType, size: Any, most: Any, what: Any) -> TensorType:
    if count.shape != () or not count.dtype.is_integer:
        (fail_shape if count.dtype.is_integer else fail_dtype)(f"the count is an integer scalar, got {count}")
    if not isinstance(size, (int, Dim)) or isinstance(size, Dim) and not str(size).isidentifier():
        fail_attr(f"size is {size!r}; expected a name that is new")
    return TensorType((size, 0), UINT8)


def bind_size_reference(count: Any, size: Any, most: Any, what: Any) -> Any:
    return np.empty((int(count), 0), np.uint8)


define("bind_size", "count", bind_size_infer, bind_size_reference,
       "Makes `size`, a name, stand for the count in all shapes and attributes from here on. `most`: the count is no "
       "larger; `what` says in messages what is counted. The result, of shape [size, 0], holds nothing.",
       attrs={"size": REQUIRED, "most": None, "what": ""}, traits=["effect"], undifferentiable="integer operand",
       unlowered="a graph is split there before it is lowered")


def true_places_infer(mask: TensorType, size: Any) -> TensorType:
    if not mask.dtype.is_bool:
        fail_dtype(f"the mask has the dtype {mask.dtype}, expected bool")
    if mask.rank != 1:
        fail_shape(f"the mask has one axis, got {mask}")
    check_shape_attr((size,), "size")
    return TensorType((size,), INT64)


def true_places_reference(mask: Any, size: Any) -> Any:
    places = np.zeros(size, np.int64)
    found = np.flatnonzero(mask)[:size]
    places[:len(found)] = found
    return places


define("true_places", "mask", true_places_infer, true_places_reference,
       "The places of the first `size` true elements of a mask, in order; 0 where there are fewer.",
       attrs={"size": REQUIRED}, undifferentiable="integer result")
