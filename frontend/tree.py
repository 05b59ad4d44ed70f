"""Nested containers of tensors: taking them apart and putting them together again.

Arguments and results of traced functions may be tensors nested in tuples, lists, dicts and named tuples, or in a
class that says how it is taken apart (`register`). Anything else is a leaf. A `Structure` is what is left of a tree
when its leaves are taken out; it is hashable, so that it can be part of a cache's key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..ir.errors import ArgumentsError, RegistryError


@dataclass(frozen=True)
class Structure:
    """The shape of a tree. `kind` is "leaf", "none", "tuple", "list", "dict" or a class; `keys` name the children."""

    kind: Any
    keys: tuple[Any, ...] = ()
    children: tuple[Structure, ...] = ()

    @property
    def leaves(self) -> int:
        """How many leaves a tree of this structure has."""
        return 1 if self.kind == "leaf" else sum(child.leaves for child in self.children)

    def paths(self, prefix: str = "") -> Iterator[str]:
        """Where each leaf stands, as Python would write it: `[0]['weight']`."""
        if self.kind == "leaf":
            yield prefix
        for key, child in zip(self.keys, self.children):
            yield from child.paths(f"{prefix}[{key!r}]" if self.kind in ("tuple", "list", "dict")
                                   else f"{prefix}.{key}")

    def __str__(self) -> str:
        if self.kind == "leaf":
            return "*"
        if self.kind == "none":
            return "None"
        inner = ", ".join(map(str, self.children))
        if self.kind == "tuple":
            return f"({inner},)" if len(self.children) == 1 else f"({inner})"
        if self.kind == "list":
            return f"[{inner}]"
        named = ", ".join(f"{k!r}: {c}" if self.kind == "dict" else f"{k}={c}"
                          for k, c in zip(self.keys, self.children))
        return f"{{{named}}}" if self.kind == "dict" else f"{self.kind.__name__}({named})"


LEAF = Structure("leaf")
NONE = Structure("none")
_classes: dict[type, tuple[Callable[[Any], dict[str, Any]], Callable[[dict[str, Any]], Any]]] = {}


def register(cls: type, take_apart: Callable[[Any], dict[str, Any]], put_together: Callable[[dict[str, Any]], Any],
             ) -> None:
    """Makes a class a container: `take_apart(x)` gives its named parts, `put_together(parts)` makes one from them.

    Raises:
        RegistryError: the class is registered already.
    """
    if cls in _classes:
        raise RegistryError(f"{cls.__name__} is registered as a container already")
    _classes[cls] = (take_apart, put_together)


def flatten(tree: Any) -> tuple[list[Any], Structure]:
    """The leaves of a tree from left to right, dicts in the order of their sorted keys, and its structure."""
    leaves: list[Any] = []
    return leaves, _flatten(tree, leaves)


def _flatten(tree: Any, leaves: list[Any]) -> Structure:
    kind = type(tree)
    if kind is tuple:
        return Structure("tuple", tuple(range(len(tree))), tuple(_flatten(x, leaves) for x in tree))
    if kind is list:
        return Structure("list", tuple(range(len(tree))), tuple(_flatten(x, leaves) for x in tree))
    if isinstance(tree, dict):
        keys = _sorted(tree)
        return Structure("dict", keys, tuple(_flatten(tree[k], leaves) for k in keys))
    if tree is None:
        return NONE
    if kind in _classes:
        parts = _classes[kind][0](tree)
        return Structure(kind, tuple(parts), tuple(_flatten(x, leaves) for x in parts.values()))
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return Structure(kind, tree._fields, tuple(_flatten(x, leaves) for x in tree))
    leaves.append(tree)
    return LEAF


def _sorted(tree: dict[Any, Any]) -> tuple[Any, ...]:
    try:
        return tuple(sorted(tree))
    except TypeError:
        return tuple(sorted(tree, key=lambda k: (type(k).__name__, str(k))))


def unflatten(structure: Structure, leaves: Sequence[Any]) -> Any:
    """The tree of a structure with the given leaves."""
    return _unflatten(structure, iter(leaves))


def _unflatten(structure: Structure, leaves: Iterator[Any]) -> Any:
    if structure.kind == "leaf":
        return next(leaves)
    if structure.kind == "none":
        return None
    children = [_unflatten(child, leaves) for child in structure.children]
    if structure.kind == "tuple":
        return tuple(children)
    if structure.kind == "list":
        return children
    if structure.kind == "dict":
        return dict(zip(structure.keys, children))
    if structure.kind in _classes:
        return _classes[structure.kind][1](dict(zip(structure.keys, children)))
    return structure.kind(*children)


def map(fn: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """A tree of `fn(leaf, *leaves of the others)`.

    Raises:
        ArgumentsError: the trees have different structures.
    """
    leaves, structure = flatten(tree)
    columns = [leaves]
    for other in others:
        found, theirs = flatten(other)
        if theirs != structure:
            raise ArgumentsError(f"the trees differ: {structure} and {theirs}")
        columns.append(found)
    return unflatten(structure, [fn(*row) for row in zip(*columns)])


def to_json(structure: Structure) -> Any:
    """Plain data for an artifact's header. Classes do not travel: they become dicts of their named parts."""
    kind = structure.kind if isinstance(structure.kind, str) else "dict"
    return [kind, list(structure.keys), [to_json(c) for c in structure.children]]


def from_json(data: Any) -> Structure:
    """The inverse of `to_json`."""
    kind, keys, children = data
    return Structure(kind, tuple(keys), tuple(from_json(c) for c in children))
