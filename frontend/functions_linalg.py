"""Products of matrices and tensors. Everything comes down to batched `matmul`, elementwise products and sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from string import ascii_letters
from typing import Any

import numpy as np

from ..ir.dtypes import as_dtype
from ..ir.errors import AttributeValueError, ShapeError
from ..ir.location import user_location
from .dispatch import apply, as_tensor, normalize_axis, promoted
from .functions_elementwise import multiply
from .functions_reduce import sum
from .functions_shape import reshape, transpose
from .tensor import Tensor


def matmul(x: Any, y: Any, transpose_x: bool = False, transpose_y: bool = False, out_dtype: Any = None) -> Tensor:
    """The product of the matrices in the last two axes; leading axes broadcast.

    Args:
        x, y: of at least one axis; a vector stands for a row on the left, a column on the right, and its axis is
            left out of the result.
        transpose_x, transpose_y: take the transpose of a matrix operand, without moving its elements.
        out_dtype: a wider dtype for the result; 16-bit floats accumulate in float32 in any case.

    Raises:
        ShapeError: the inner sizes differ, or an operand has no axis.
    """
    x, y = promoted(x, y)
    if x.ndim == 0 or y.ndim == 0:
        raise ShapeError(f"matmul: {x.type} and {y.type} need at least one axis each; multiply by a number with *",
                         user_location())
    row, column = x.ndim == 1, y.ndim == 1
    x = reshape(x, (1, x.shape[0])) if row else x
    y = reshape(y, (y.shape[0], 1)) if column else y
    result: Tensor = apply("matmul", x, y, transpose_x=bool(transpose_x and not row),
                           transpose_y=bool(transpose_y and not column),
                           out_dtype=None if out_dtype is None else as_dtype(out_dtype))
    if row or column:
        shape = result.shape[:-2] + (() if row else (result.shape[-2],)) + (() if column else (result.shape[-1],))
        result = reshape(result, shape)
    return result


def dot(x: Any, y: Any) -> Tensor:
    """NumPy's dot: inner product of vectors, matrix product, sum over the last axis of x and the last but one of y."""
    x, y = promoted(x, y)
    if x.ndim == 0 or y.ndim == 0:
        return multiply(x, y)
    if y.ndim <= 2:
        return matmul(x, y)
    return tensordot(x, y, axes=((-1,), (-2,)))


def vdot(x: Any, y: Any) -> Tensor:
    """The inner product of the flattened operands."""
    x, y = promoted(x, y)
    return matmul(reshape(x, (x.size,)), reshape(y, (y.size,)))


def inner(x: Any, y: Any) -> Tensor:
    """Sum of products over the last axis of both."""
    x, y = promoted(x, y)
    return multiply(x, y) if x.ndim == 0 or y.ndim == 0 else tensordot(x, y, axes=((-1,), (-1,)))


def outer(x: Any, y: Any) -> Tensor:
    """The matrix of products of the elements of two vectors (operands are flattened)."""
    x, y = promoted(x, y)
    return multiply(reshape(x, (x.size, 1)), reshape(y, (1, y.size)))


def tensordot(x: Any, y: Any, axes: Any = 2) -> Tensor:
    """Sum of products over pairs of axes.

    Args:
        axes: how many of the last axes of x meet the first ones of y, or two sequences of axes.
    """
    x, y = promoted(x, y)
    if isinstance(axes, int):
        left: Sequence[int] = range(x.ndim - axes, x.ndim)
        right: Sequence[int] = range(axes)
    else:
        left, right = (a if isinstance(a, (tuple, list)) else (a,) for a in axes)
    left = [normalize_axis(a, x.ndim) for a in left]
    right = [normalize_axis(a, y.ndim) for a in right]
    if len(left) != len(right) or any(x.shape[a] != y.shape[b] for a, b in zip(left, right)):
        raise ShapeError(f"tensordot: axes {left} of {x.type} do not fit axes {right} of {y.type}", user_location())
    names = iter(ascii_letters)
    lx = [next(names) for _ in range(x.ndim)]
    ly = [lx[left[right.index(i)]] if i in right else next(names) for i in range(y.ndim)]
    out = [c for i, c in enumerate(lx) if i not in left] + [c for i, c in enumerate(ly) if i not in right]
    return _contract([(x, lx), (y, ly)], out)


# einsum --------------------------------------------------------------------------------------------------------

Term = tuple[Tensor, list[str]]


def einsum(subscripts: str, *operands: Any) -> Tensor:
    """Sums of products in Einstein's notation: `einsum("bhqd,bhkd->bhqk", q, k)`.

    Any number of operands, repeated labels (diagonals), an ellipsis for broadcast axes, an implicit output. Operands
    are contracted in pairs in the order that `numpy.einsum_path` finds cheapest; each pair becomes one batched
    matmul, with transposition flags instead of moved elements where the layout allows it.

    Raises:
        AttributeValueError: the subscripts are malformed.
        ShapeError: they do not fit the operands.
    """
    tensors = promoted(*operands)
    inputs, output = _parse(subscripts, tensors)
    sizes = _sizes(subscripts, tensors, inputs)
    terms = []
    for x, labels in zip(tensors, inputs):
        x, labels = _diagonal(x, labels)
        kept = [i for i, c in enumerate(labels) if x.shape[i] == sizes[c] or x.shape[i] != 1]
        terms.append((reshape(x, tuple(x.shape[i] for i in kept)), [labels[i] for i in kept]))
    return _contract(terms, output)


def _fail(subscripts: str, why: str) -> AttributeValueError:
    return AttributeValueError(f"einsum: {subscripts!r}: {why}", user_location())


def _parse(subscripts: str, tensors: Sequence[Tensor]) -> tuple[list[list[str]], list[str]]:
    """Labels of each operand and of the output, an ellipsis spelled out with labels `0`, `1`... from the right."""
    text = subscripts.replace(" ", "")
    left, arrow, right = text.partition("->")
    parts = left.split(",")
    if len(parts) != len(tensors):
        raise _fail(subscripts, f"names {len(parts)} operands, got {len(tensors)}")
    inputs, widest = [], 0
    for part, x in zip(parts, tensors):
        _check_labels(subscripts, part)
        extra = x.ndim - len(part.replace("...", ""))
        if extra < 0 or (extra and "..." not in part):
            raise ShapeError(f"einsum: {subscripts!r}: {part!r} does not fit {x.type}", user_location())
        widest = max(widest, extra if "..." in part else 0)
        inputs.append(_spell(part, extra))
    named = [c for labels in inputs for c in labels if c.isalpha()]
    if arrow:
        _check_labels(subscripts, right)
        output = _spell(right, widest)
        if len(set(output)) != len(output) or not set(output) <= set(named) | set(map(str, range(widest))):
            raise _fail(subscripts, "the output repeats a label, or has one that no operand has")
    else:
        output = _spell("...", widest) + sorted(c for c in set(named) if named.count(c) == 1)
    return inputs, output


def _check_labels(subscripts: str, part: str) -> None:
    letters = part.replace("...", "", 1)
    if not all(c in ascii_letters for c in letters):
        raise _fail(subscripts, f"{part!r} holds something else than letters and one ellipsis")


def _spell(part: str, extra: int) -> list[str]:
    before, dots, after = part.partition("...")
    return [*before, *(str(i) for i in reversed(range(extra if dots else 0))), *after]


def _sizes(subscripts: str, tensors: Sequence[Tensor], inputs: Sequence[list[str]]) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    for x, labels in zip(tensors, inputs):
        for size, label in zip(x.shape, labels):
            known = sizes.get(label, 1)
            if known != 1 and size != 1 and known != size:
                raise ShapeError(f"einsum: {subscripts!r}: the label {label!r} stands for {known} and {size}, in "
                                 + " and ".join(str(t.type) for t in tensors), user_location())
            sizes[label] = known if size == 1 else size
    return sizes


def _diagonal(x: Tensor, labels: list[str]) -> Term:
    """x with repeated labels merged: along each pair only the elements of equal indices."""
    for label in dict.fromkeys(labels):
        while labels.count(label) > 1:
            first = labels.index(label)
            second = labels.index(label, first + 1)
            rest = [i for i in range(x.ndim) if i not in (first, second)]
            n = x.shape[first]
            x = transpose(x, (*rest, first, second))
            lead = x.shape[:-2]
            x = reshape(x, (*lead, n * n))
            x = apply("slice", x, starts=(0,) * x.ndim, limits=x.shape, strides=(1,) * len(lead) + (n + 1,))
            labels = [labels[i] for i in rest] + [label]
    return x, labels


def _contract(terms: list[Term], output: list[str]) -> Tensor:
    for step in _order(terms, output):
        chosen = [terms[i] for i in step]
        terms = [t for i, t in enumerate(terms) if i not in step]
        result = chosen[0]
        for i, other in enumerate(chosen[1:], 1):
            others = terms + chosen[i + 1:]
            result = _pair(result, other, {*output, *(c for _, labels in others for c in labels)})
        terms.append(result)
    x, labels = terms[0]
    summed = tuple(i for i, c in enumerate(labels) if c not in output)
    x = sum(x, summed, dtype=x.dtype) if summed else x
    labels = [c for c in labels if c in output]
    x = transpose(x, tuple(labels.index(c) for c in output if c in labels)) if labels else x
    if len(labels) < len(output):  # every operand has size 1 along these
        x = reshape(x, _with_ones(x.shape, [c in labels for c in output]))
    return x


def _with_ones(shape: tuple[Any, ...], present: list[bool]) -> tuple[Any, ...]:
    sizes = iter(shape)
    return tuple(next(sizes) if p else 1 for p in present)


def _order(terms: Sequence[Term], output: list[str]) -> list[tuple[int, ...]]:
    """Which terms to contract at each step; results go to the end of the list."""
    if len(terms) == 1:
        return []
    if len(terms) == 2:
        return [(0, 1)]
    names = {c: ascii_letters[i] for i, c in enumerate(dict.fromkeys(c for _, ls in terms for c in ls))}
    spelled = ",".join("".join(names[c] for c in labels) for _, labels in terms)
    shapes = [np.broadcast_to(np.float32(0), tuple(s if isinstance(s, int) else 64 for s in x.shape)) for x, _ in terms]
    out = "".join(names[c] for c in output if c in names)
    path = np.einsum_path(f"{spelled}->{out}", *shapes, optimize="greedy")[0]
    return [tuple(step) for step in path[1:]]


def _pair(left: Term, right: Term, keep: set[str]) -> Term:
    """The product of two terms, summed over the labels that nothing else needs."""
    (x, lx), (y, ly) = _presum(left, right[1], keep), _presum(right, left[1], keep)
    batch = [c for c in lx if c in ly and c in keep]
    inner = [c for c in lx if c in ly and c not in keep]
    rows, columns = [c for c in lx if c not in ly], [c for c in ly if c not in lx]
    result = batch + rows + columns
    if not inner:
        return multiply(_spread(x, lx, result), _spread(y, ly, result)), result
    x, flip_x = _matrix(x, lx, batch, rows, inner)
    y, flip_y = _matrix(y, ly, batch, inner, columns)
    product = matmul(x, y, transpose_x=flip_x, transpose_y=flip_y)
    sizes = dict(zip(lx, _sizes_of(left, lx))) | dict(zip(ly, _sizes_of(right, ly)))
    return reshape(product, tuple(sizes[c] for c in result)), result


def _sizes_of(term: Term, labels: list[str]) -> list[Any]:
    """The sizes of some labels of a term."""
    x, all_labels = term
    return [x.shape[all_labels.index(c)] for c in labels]


def _presum(term: Term, other: list[str], keep: set[str]) -> Term:
    x, labels = term
    alone = tuple(i for i, c in enumerate(labels) if c not in other and c not in keep)
    if alone:
        x, labels = sum(x, alone, dtype=x.dtype), [c for i, c in enumerate(labels) if i not in alone]
    return x, labels


def _spread(x: Tensor, labels: list[str], result: list[str]) -> Tensor:
    """x with its axes in the order of `result`, and size 1 for the labels that it lacks."""
    x = transpose(x, tuple(labels.index(c) for c in result if c in labels)) if labels else x
    return reshape(x, _with_ones(x.shape, [c in labels for c in result]))


def _matrix(x: Tensor, labels: list[str], batch: list[str], rows: list[str], columns: list[str]) -> tuple[Tensor, bool]:
    """x as (*batch, rows, columns), or with the last two exchanged (True) if that moves no element."""
    flipped = bool(rows) and bool(columns) and labels == batch + columns + rows
    order = batch + columns + rows if flipped else batch + rows + columns
    x = transpose(x, tuple(labels.index(c) for c in order))
    count = len(batch)
    first = len(columns) if flipped else len(rows)
    sizes = x.shape
    x = reshape(x, (*sizes[:count], math.prod(sizes[count:count + first]), math.prod(sizes[count + first:])))
    return x, flipped


def trace_of(x: Any) -> Tensor:
    """The sum of the diagonal of the matrices in the last two axes (`trace` is what records a graph)."""
    return einsum("...ii->...", as_tensor(x))


__all__ = ["dot", "einsum", "inner", "matmul", "outer", "tensordot", "trace_of", "vdot"]
