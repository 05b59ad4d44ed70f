"""New heads on old bodies.

An imported graph is cut where its old head begins (or at any value, by name), so what only the old head needed is gone;
a module of `td.nn` gets another layer in the place of one of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...ir.dims import Dim
from ...ir.errors import ArgumentsError
from .. import functions as F
from ..nn import Dropout, Linear, Module, Sequential
from ..tensor import Tensor
from ..trace import trace

POOLS = ("none", "mean", "first", "max", "spatial")
TAIL = frozenset({"Softmax", "LogSoftmax", "Sigmoid", "Identity", "Add", "Flatten", "Squeeze", "Reshape", "Cast",
                  "Tanh"})
"""Ops that may stand between a classifier's last product and the output."""


class Headed(Module):
    """A body, a pooling and a head: called with the body's inputs, gives what the head makes of its features.

    Attributes:
        body, head: modules.
        pool: "none"; over the second axis of (batch, positions, features): "mean" (of the positions whose mask is not
            zero), "max", "first"; "spatial": the mean over all axes after the second, of (batch, features, ...).
        output: which of the body's results are the features.
        mask: which argument says what positions count, for "mean" and "max"; None: all.
    """

    def __init__(self, body: Module, head: Module, pool: str = "none", output: int = 0, mask: int | None = None):
        super().__init__()
        if pool not in POOLS:
            raise ArgumentsError(f"there is no pooling {pool!r}; there are {', '.join(POOLS)}")
        self.body, self.head = body, head
        self.pool, self.output, self.mask = pool, output, mask

    def features(self, *inputs: Any) -> Tensor:
        """What the head gets, (batch, features)."""
        results = self.body(*inputs)
        x = results[self.output] if isinstance(results, (tuple, list)) else results
        return _pooled(x, self.pool, None if self.mask is None else inputs[self.mask])

    def forward(self, *inputs: Any) -> Tensor:
        return self.head(self.features(*inputs))

    def extra_repr(self) -> str:
        return f"pool={self.pool}"


def _pooled(x: Tensor, pool: str, mask: Any) -> Tensor:
    if pool == "none":
        return x
    if pool == "spatial":
        return F.mean(x, axis=tuple(range(2, x.ndim)))
    if pool == "first":
        return x[:, 0]
    if mask is None:
        return F.mean(x, axis=1) if pool == "mean" else F.max(x, axis=1)
    counts = F.expand_dims(F.asarray(mask), -1)  # (batch, positions, 1)
    if pool == "max":
        return F.max(F.where(counts != 0, x, -3.0e38 if x.dtype.bits >= 32 else -3.0e4), axis=1)
    weights = (counts != 0).astype(x.dtype)
    return F.sum(x * weights, axis=1) / F.maximum(F.sum(weights, axis=1), 1)


def add_head(body: Module, classes: int | Module, *, pool: str = "none", output: int | str = 0,
             mask: int | str | None = None, features: int | None = None, dropout: float = 0.0) -> Headed:
    """Puts a head on a module.

    Args:
        body: an imported graph or any module; not copied.
        classes: the outputs of a new linear layer, or the head itself.
        pool: what is done to the body's features before; see `Headed`.
        output: which result of the body: a number, or in an imported graph the name of any value, where the graph is
            cut.
        mask: the argument (number, or the name of a graph's input) that says which positions count.
        features: their number; needed where the body's input types are not known from a file.
        dropout: on what the head gets.

    Raises:
        ArgumentsError: the number of features cannot be found, or there is no such output or input.
    """
    if isinstance(output, str):
        _imported(body, "an output by name").select_outputs([output])
        output = 0
    if isinstance(mask, str):
        names = list(_imported(body, "an input by name").input_names)
        if mask not in names:
            raise ArgumentsError(f"the graph has no input {mask!r}; it has {', '.join(names)}")
        mask = names.index(mask)
    if isinstance(classes, Module):
        head = classes
    else:
        head = Linear(features or _width(body, pool, output, mask), classes)
        if dropout:
            head = Sequential({"dropout": Dropout(dropout), "linear": head})
    return Headed(body, head, pool, output, mask)


def replace_head(model: Module, classes: int | Module, at: str | None = None, dropout: float = 0.0) -> Module:
    """Replaces what makes the classes of a classifier.

    Args:
        model: an imported graph, or a module of `td.nn`, which is changed in place.
        classes: the outputs of a new linear layer, or the head itself.
        at: of a module, the dotted name of the layer to replace (default: its last linear layer); of an imported graph,
            the value that the new head gets (default: what the last product before the output multiplies).
        dropout: before a new linear layer.

    Returns:
        The model to train: for an imported graph a `Headed`, otherwise the model itself.

    Raises:
        ArgumentsError: no head was found, or there is no layer of that name.
    """
    if hasattr(model, "select_outputs"):
        return add_head(model, classes, output=at or _head_input(model), dropout=dropout)
    layers = dict(model.named_modules())
    name = at if at is not None else next((n for n, m in reversed(layers.items()) if isinstance(m, Linear)), "")
    if not name or name not in layers:
        raise ArgumentsError(f"{type(model).__name__} has no layer {name!r} to replace; name it: at=..." if name else
                             f"{type(model).__name__} has no linear layer; name the layer to replace: at=...")
    old = layers[name]
    if isinstance(classes, Module):
        fresh = classes
    elif isinstance(old, Linear):
        fresh = Linear(old.in_features, classes, bias=old.bias is not None)
        if dropout:
            fresh = Sequential({"dropout": Dropout(dropout), "linear": fresh})
    else:
        raise ArgumentsError(f"{name} is a {type(old).__name__}, not linear: give the module that replaces it")
    parent, _, own = name.rpartition(".")
    layers[parent].add_module(own, fresh)
    return model


def _imported(body: Module, what: str) -> Any:
    if not hasattr(body, "select_outputs"):
        raise ArgumentsError(f"{type(body).__name__} is no imported graph, so {what} means nothing to it; give a "
                             "number")
    return body


def _head_input(model: Any) -> str:
    """The value that the last product with a weight multiplies, if only a tail of simple ops follows it."""
    makers = {o: n for n in model.nodes for o in n.output}
    weights = model.product_weights()
    value = model.output_names[0]
    for _ in range(8):
        node = makers.get(value)
        if node is None:
            break
        if node.op_type in ("MatMul", "Gemm", "FusedMatMul", "FusedGemm") and node.input[1] in weights:
            return str(node.input[0])
        if node.op_type not in TAIL:
            break
        value = next((i for i in node.input if i in makers), "")
    raise ArgumentsError(f"{model.label}: no classifier was found before the output {model.output_names[0]!r}; name "
                         "the value that the new head gets: replace_head(..., at=...), or add_head(..., output=...)")


def _width(body: Module, pool: str, output: int, mask: int | None) -> int:
    specs: Sequence[Any] | None = getattr(body, "inputs", None)
    if specs is None or any(s is None for s in specs):
        raise ArgumentsError("the number of features does not follow from the body's inputs; give it: features=...")
    headed = Headed(body, Module(), pool, output, mask)
    value = trace(headed.features, *specs).outputs[0]
    width = value.shape[-1]
    if isinstance(width, Dim) or value.type.rank != 2:
        raise ArgumentsError(f"the body gives features of type {value.type}; a linear head needs (batch, features) "
                             "with a fixed number of features: choose a pooling (pool=...) or give features=...")
    return int(width)
