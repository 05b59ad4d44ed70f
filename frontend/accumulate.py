"""Gradient accumulation: a batch in parts, one after the other, weighed so that the step is that of the whole batch.

A loss is the mean over the examples of a part, or over its tokens. The mean over the batch is the mean of the parts'
losses weighed by what each counts: by default its examples, or what `train_step(weight=)` says, such as the tokens
that are not masked. So parts may differ in length (10 examples in 4 parts are 3 + 3 + 2 + 2) and in tokens, and the
gradient is the same. A part that counts nothing adds nothing, though its loss be 0 / 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..ir.errors import ArgumentsError
from ..ir.location import user_location
from . import control, tree
from . import functions as F
from .dispatch import apply
from .tensor import Tensor

Parts = list[tuple[int, int]]
"""(how many, examples of each), the longer ones first."""


@dataclass(frozen=True)
class Spread:
    """How a mesh shares the work: over so many ranks each takes its part of every part of the batch.

    `lies`: the mesh axes over which a gradient is split while it is added up; None: it stays a sum on every rank.
    `weight`: in place of the step's.
    """

    ranks: int = 1
    lies: Callable[[Tensor], tuple[str, ...] | None] = lambda parameter: None
    weight: Callable[..., Any] | None = None


ALONE = Spread()
OnePart = Callable[[Any, Any], tuple[Any, list["Tensor | None"]]]


def parts_of(length: int, parts: int, ranks: int = 1) -> Parts:
    """How a batch is cut: as equally as it goes, each part a multiple of `ranks` (if the whole is one)."""
    each = ranks if length % ranks == 0 else 1
    size, longer = divmod(length // each, parts)
    return [(count, n * each) for count, n in ((longer, size + 1), (parts - longer, size)) if count]


def accumulated(one_part: OnePart, batch: tuple[Any, ...], params: Sequence[Tensor], parts: int,
                weight: Callable[..., Any] | None, spread: Spread = ALONE) -> tuple[Any, list[Tensor | None]]:
    """Traced: the result of a batch in parts, and the gradients.

    `one_part(part, share)` gives the result of a part (a loss, or a tuple that begins with it) and the gradients of
    the loss times its share (of the loss itself if that is None).

    Raises:
        ArgumentsError: the batch does not fit, or (loss, aux) has aux of other shapes for shorter parts.
    """
    weight = spread.weight or weight
    leaves, structure = tree.flatten(batch)
    groups = _groups(leaves, parts, spread.ranks)
    stacked = [tree.unflatten(structure, [_stacked(leaf, i, parts, spread.ranks) for leaf in leaves])
               for i in range(len(groups))]
    wide = "float64" if any(p.dtype == "float64" for p in params) else "float32"
    shares = [None] if weight is None and len(groups) == 1 else _shares(stacked, groups, weight, wide)
    absent: list[bool] = []  # which parameters get no gradient: known once the body has been traced

    def body(sums: list[Tensor], xs: tuple[Any, Any]) -> tuple[list[Tensor], Any]:
        result, grads = one_part(*xs)
        absent[:] = [g is None for g in grads]
        return [s if g is None else _laid(s + g.astype(s.dtype), spread.lies(p))
                for s, g, p in zip(sums, grads, params)], result

    sums = [F.zeros(p.shape, p.dtype if p.dtype.bits >= 32 else "float32") for p in params]
    found = []
    for part, share in zip(stacked, shares):
        sums, results = control.scan(body, sums, (part, share))
        found.append(results)
    results = found[0] if len(found) == 1 else _joined(found)
    losses = results[0] if isinstance(results, tuple) else results
    if shares[0] is None:
        mean = F.mean(losses, axis=0)
        sums = [s * (1.0 / parts) for s in sums]
    else:
        mean = F.sum(share_of(losses, F.concatenate(shares)))
    grads = [None if none else s for s, none in zip(sums, absent)]
    return ((mean, *results[1:]) if isinstance(results, tuple) else mean), grads


def share_of(loss: Tensor, share: Tensor) -> Tensor:
    """The loss times its share, and 0 where that is 0."""
    made: Tensor = F.where(share > 0, loss, F.zeros((), loss.dtype)) * share.astype(loss.dtype)
    return made


def _shares(stacked: Sequence[Any], groups: Parts, weight: Callable[..., Any] | None, wide: str) -> list[Any]:
    """The part of the whole that each part counts; for each length of parts a row."""
    if weight is None:
        examples = sum(count * size for count, size in groups)
        return [F.full((count,), size / examples, wide) for count, size in groups]

    def counted(nothing: list[Tensor], part: tuple[Any, ...]) -> tuple[list[Tensor], Tensor]:
        found = F.asarray(weight(*part))
        if found.ndim:
            raise ArgumentsError(f"train_step: weight(*batch) has to give one number for a part of the batch, not "
                                 f"{found.type}; sum it up", user_location())
        return nothing, found.astype(wide)

    counts = [control.scan(counted, [], part)[1] for part in stacked]
    total = F.sum(F.concatenate(counts))
    return [c / total for c in counts]


def _laid(x: Tensor, dims: tuple[str, ...] | None) -> Tensor:
    made: Tensor = x if dims is None else apply("annotate", x, dims=dims)
    return made


def _groups(leaves: Sequence[Any], parts: int, ranks: int) -> Parts:
    """How the tensors of a batch are cut."""
    found: list[list[int]] = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise ArgumentsError(f"train_step: with accumulate the batch holds tensors only, got {leaf!r}",
                                 user_location())
        if leaf.ndim == 0 or leaf.shape[0] < parts:
            raise ArgumentsError(f"train_step: a tensor {leaf.type} of the batch does not divide into {parts} parts "
                                 "along its first axis (accumulate)", user_location())
        cut = parts_of(leaf.shape[0], parts, ranks)
        found.append([count for count, _ in cut])
        if found[-1] != found[0]:
            raise ArgumentsError(f"train_step: the tensors of the batch have {leaves[0].shape[0]} and {leaf.shape[0]} "
                                 f"examples, which do not divide into {parts} parts alike (accumulate)",
                                 user_location())
    return parts_of(leaves[0].shape[0], parts, ranks)


def _stacked(leaf: Tensor, number: int, parts: int, ranks: int) -> Tensor:
    """The parts of one length of a tensor, along a new first axis.

    Where parts differ in length, each rank's examples lie together, and a part takes some of every rank's.
    """
    length, *rest = leaf.shape
    cut = parts_of(length, parts, ranks)
    if len(cut) == 1:
        return leaf.reshape((parts, length // parts, *rest))
    each = ranks if length % ranks == 0 else 1
    count, size = cut[number][0], cut[number][1] // each
    start = sum(n * s for n, s in cut[:number]) // each
    rows = leaf.reshape((each, length // each, *rest))[:, start:start + count * size]
    return F.moveaxis(rows.reshape((each, count, size, *rest)), 1, 0).reshape((count, each * size, *rest))


def _joined(found: Sequence[Any]) -> Any:
    """What the parts of both lengths gave, one after the other."""
    pairs = [tree.flatten(results) for results in found]
    leaves = []
    for a, b in zip(pairs[0][0], pairs[1][0]):
        if a.shape[1:] != b.shape[1:]:
            raise ArgumentsError(f"train_step: a result of the loss function has another shape for shorter parts "
                                 f"({a.type}, {b.type}), so they cannot be stacked: return what does not depend on the "
                                 "size, or a batch that divides equally (accumulate)", user_location())
        leaves.append(F.concatenate([a, b], axis=0))
    return tree.unflatten(pairs[0][1], leaves)
