"""`trace`: from a Python function of tensors to a graph.

    def mlp(x, w, b):
        return td.maximum(x @ w + b, 0)

    graph = td.trace(mlp, td.spec((8, 784)), td.spec((784, 10)), td.spec((10,)))

The function runs once, on tracers. Python control flow over sizes and over what is not a tensor runs as it stands and
leaves no mark in the graph; over the elements of tensors it cannot, and raises an error that names the line.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ir.dims import Dim
from ..ir.dtypes import as_dtype
from ..ir.errors import ShapeError, TraceError
from ..ir.graph import Graph, Value
from ..ir.location import user_location
from ..ir.types import TensorType
from . import tree
from .dispatch import as_tensor, is_weak
from .eager import array_type
from .grad_mode import enable_grad
from .recording import Trace
from .tensor import Tensor


@dataclass(frozen=True)
class Spec:
    """The type of an argument of a traced function; made by `spec`."""

    type: TensorType
    name: str = ""

    @property
    def shape(self) -> tuple[Any, ...]:
        """Sizes: ints and `Dim`s."""
        return self.type.shape

    @property
    def dtype(self) -> Any:
        """The element type."""
        return self.type.dtype

    def __str__(self) -> str:
        return str(self.type)


def spec(shape: Any, dtype: Any = "float32", name: str = "") -> Spec:
    """Describes an argument by shape and dtype.

    Args:
        shape: ints; `td.Dim`s or their names as strings for sizes that are known at run time only.
        dtype: as a name or a dtype object.
        name: how the graph calls it; default: the parameter's name.

    Raises:
        DTypeError, ShapeError: no such dtype or shape.
    """
    sizes = shape if isinstance(shape, (tuple, list)) else (shape,)
    try:
        return Spec(TensorType(tuple(Dim(s) if isinstance(s, str) else s for s in sizes), as_dtype(dtype)), name)
    except (AttributeError, TypeError):
        raise ShapeError(f"{shape!r} is no shape: give ints, td.Dim objects or names", user_location()) from None


def leaf_type(leaf: Any) -> TensorType | None:
    """The type of an argument's leaf; None for what is not a tensor, and so is part of the program."""
    if isinstance(leaf, Tensor):
        kind: TensorType = leaf.type
        return kind
    if isinstance(leaf, np.ndarray) or (isinstance(leaf, np.generic) and not is_weak(leaf)):
        return array_type(np.asarray(leaf))
    return leaf.type if isinstance(leaf, Spec) else None


def trace(fn: Callable[..., Any], *specs: Any, **keywords: Any) -> Graph:
    """Runs `fn` once on tracers and returns the graph of what it computed.

    Args:
        fn: a function of tensors; also an `nn.Module`, or anything that can be called.
        *specs, **keywords: its arguments: `td.spec`s, tensors or arrays (their types count), nested in tuples, lists
            and dicts; anything else (numbers, strings, None...) reaches `fn` as it is.

    Returns:
        A graph whose inputs are the leaves of the arguments, then the tensors that `fn` uses from outside ("captured";
        `graph.meta["captures"]` says which). Its outputs are the leaves of the result, then the new values of tensors
        that `fn` assigned.

    Raises:
        TraceError: `fn` asks a tracer for its elements, or returns something else than tensors.
    """
    return record(fn, specs, keywords)


def record(fn: Callable[..., Any], args: Sequence[Any], keywords: Mapping[str, Any] | None = None) -> Graph:
    """`trace`, with what compiling needs in `graph.meta`: captures, assigns, guards, static,
    in_structure, out_structure."""
    leaves, structure = tree.flatten((tuple(args), dict(keywords or {})))
    names = _names(fn, structure)
    with Trace(_graph_name(fn)) as builder, enable_grad():
        given = []
        for leaf, name in zip(leaves, names):
            kind = leaf_type(leaf)
            if kind is None:
                given.append(leaf)
                continue
            called = leaf.name if isinstance(leaf, Spec) and leaf.name else name
            given.append(Tensor._of(builder.input(kind, called), builder))
        call_args, call_keywords = tree.unflatten(structure, given)
        result = fn(*call_args, **call_keywords)
        results, out_structure = _lift_results(builder, result)
        graph = builder.finish(results)
    static = {i: repr(leaf) for i, leaf in enumerate(leaves) if leaf_type(leaf) is None}
    graph.meta.update(in_structure=structure, out_structure=out_structure, static=static)
    return graph


def _lift_results(builder: Trace, result: Any) -> tuple[list[Value], tree.Structure]:
    leaves, structure = tree.flatten(result)
    values = []
    for leaf, path in zip(leaves, structure.paths()):
        if not (isinstance(leaf, (Tensor, np.ndarray, np.generic)) or is_weak(leaf)):
            raise TraceError(f"the traced function {builder.graph.name!r} returns {leaf!r} (at result{path}); it must "
                             "return tensors, nested in tuples, lists and dicts", user_location())
        values.append(builder.lift(as_tensor(leaf)))
    return values, structure


def _graph_name(fn: Any) -> str:
    name = getattr(fn, "__name__", type(fn).__name__)
    clean = "".join(c if c.isalnum() or c == "_" else "_" for c in name).strip("_")
    return clean if clean and not clean[0].isdigit() else "main"


def _names(fn: Any, structure: tree.Structure) -> list[str]:
    """A name for each leaf: its parameter's, with the path inside it."""
    positional, keyword = structure.children
    names: list[str] = []
    parameters = _parameters(fn, len(positional.children))
    for name, child in zip(parameters, positional.children):
        names += [_clean(name + path) for path in child.paths()]
    for key, child in zip(keyword.keys, keyword.children):
        names += [_clean(str(key) + path) for path in child.paths()]
    return names


def _clean(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.replace("'", "").replace("]", "")).strip("_")


def _parameters(fn: Any, count: int) -> list[str]:
    """Names of the first `count` positional parameters."""
    try:
        found = inspect.signature(getattr(fn, "forward", fn)).parameters.values()
    except (TypeError, ValueError):
        found = ()  # type: ignore[assignment]
    names: list[str] = []
    for parameter in found:
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}{i}" for i in range(count - len(names))]
        elif parameter.kind is not parameter.KEYWORD_ONLY:
            names.append(parameter.name)
    return (names + [f"arg{i}" for i in range(len(names), count)])[:count]
