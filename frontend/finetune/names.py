"""Choosing parameters by the names that people give them.

A pattern is a shell glob over dotted names, `"encoder.layer.2.*"`, `"*bias"`; with `!` in front it takes names out
again. Several apply one after the other, as one string with commas or as a list: `"*, !embeddings.*"`.

Exporters to ONNX lose the names of transposed weights (`onnx::MatMul_470`), but the node that uses one is still called
by its place in the model. So every parameter also answers to the paths of the nodes that use it, written with dots:
`encoder.layer.0.attention.query.MatMul` (`Module.parameter_aliases`). Both hold too when the graph has been put into
another module.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from ...ir.errors import ArgumentsError
from ..nn import Module, Parameter

Patterns = str | Sequence[str]

NORMS = ("*norm*", "*Norm*", "*.bn*", "bn*")
"""Where the scale and shift of a normalisation stand by custom."""


def parameters(model: Module) -> dict[str, Parameter]:
    """Floating-point parameters by dotted name."""
    return {name: p for name, p in model.named_parameters() if p.dtype.is_float}


def aliases(model: Module) -> dict[str, tuple[str, ...]]:
    """For every parameter that has them: further names, with dots."""
    found: dict[str, tuple[str, ...]] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, others in module.parameter_aliases().items():
            spoken = [dotted(other) for other in others]
            inner = [name, *spoken] if prefix else []  # as in the file, whatever the graph has become part of
            found[prefix + name] = (*(prefix + s for s in spoken), *inner)
    return found


def dotted(path: str) -> str:
    """A node's path, `/encoder/layer.0/MatMul`, written as names of parameters are."""
    return re.sub(r"[./]+", ".", path).strip(".")


def split(patterns: Patterns) -> list[str]:
    """The single patterns."""
    listed = patterns.split(",") if isinstance(patterns, str) else [q for p in patterns for q in p.split(",")]
    return [p.strip() for p in listed if p.strip()]


def select(model: Module, patterns: Patterns, among: Iterable[str] | None = None) -> list[str]:
    """Names of the parameters that the patterns choose, in the order of the model.

    Args:
        model: whose parameters are meant.
        patterns: see the module's text. If the first one takes names out, it takes them out of all.
        among: names to choose from; default: all floating-point parameters.

    Raises:
        ArgumentsError: a pattern fits no name; the nearest ones are named.
    """
    listed = split(patterns)
    own, known = aliases(model), list(parameters(model) if among is None else among)
    chosen = set(known) if listed and listed[0].startswith("!") else set()
    for pattern in listed:
        glob = pattern.lstrip("!")
        fits = re.compile(fnmatch.translate(glob)).match
        fitting = {n for n in known if any(fits(m) for m in (n, *own.get(n, ())))}
        if not fitting:
            raise ArgumentsError(f"the pattern {pattern!r} fits no parameter{_nearest(glob, known, own)}")
        chosen = chosen - fitting if pattern.startswith("!") else chosen | fitting
    return [n for n in known if n in chosen]


def _nearest(glob: str, known: Sequence[str], own: dict[str, tuple[str, ...]]) -> str:
    spoken = list(dict.fromkeys(m for n in known for m in (n, *own.get(n, ()))))
    near = difflib.get_close_matches(glob.strip("*."), spoken, n=4, cutoff=0.3) or spoken[:4]
    return f"; there are for example {', '.join(near)} ({len(known)} in all)" if near else "; there are none"


def freeze(model: Module, patterns: Patterns = "*") -> list[str]:
    """Keeps the chosen parameters from being trained; gives their names."""
    return _set(model, patterns, False)


def unfreeze(model: Module, patterns: Patterns = "*") -> list[str]:
    """Lets the chosen parameters be trained; gives their names."""
    return _set(model, patterns, True)


def train_only(model: Module, patterns: Patterns) -> list[str]:
    """Lets the chosen parameters be trained and freezes all others; gives the names of the former."""
    chosen = select(model, patterns)
    train_exactly(model, chosen)
    return chosen


def train_exactly(model: Module, names: Iterable[str]) -> None:
    """As `train_only`, by full names."""
    chosen = set(names)
    for name, parameter in parameters(model).items():
        if bool(parameter.requires_grad) != (name in chosen):
            parameter.requires_grad = name in chosen


def bitfit(model: Module, also: Patterns = ()) -> list[str]:
    """Trains the biases (and the shifts of normalisations) alone: BitFit (Ben Zaken, Ravfogel & Goldberg 2022).

    A bias is what is called one, or an imported vector that is added to something.

    Args:
        model: whose parameters are meant.
        also: patterns of what trains besides, usually the head.

    Returns:
        The names of what trains now.
    """
    own = aliases(model)
    vectors = {n: p for n, p in parameters(model).items() if p.ndim <= 1}
    biases = [n for n in vectors if re.search(r"(bias|beta)$", n) or any(
        re.search(r"(^|\.)(Add|BiasAdd)(_\d+)?$", a) for a in own.get(n, ()))]
    if not biases:
        raise ArgumentsError("BitFit trains biases, but no parameter of the model is one")
    return train_only(model, [*map(literal, biases), *split(also)])


def literal(name: str) -> str:
    """The pattern that fits this name alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _set(model: Module, patterns: Patterns, trains: bool) -> list[str]:
    chosen = select(model, patterns)
    known = parameters(model)
    for name in chosen:
        if bool(known[name].requires_grad) != trains:
            known[name].requires_grad = trains
    return chosen


def summary(model: Module) -> dict[str, int]:
    """How many numbers the model has and how many of them train: {"parameters": ..., "trainable": ...}."""
    sizes = [(int(p.size), bool(p.requires_grad)) for p in parameters(model).values()]
    return {"parameters": sum(n for n, _ in sizes), "trainable": sum(n for n, trains in sizes if trains)}
