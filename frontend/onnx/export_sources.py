"""What `save` is given, as a graph with names: modules, functions, compiled functions, training steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from ...ir.errors import ArgumentsError, OnnxError
from ...ir.graph import Graph
from ...ir.location import user_location
from ..compile import Compiled
from ..grad_mode import no_grad
from ..nn.module import Module
from ..nn.parameter import Parameter
from ..recording import changed
from ..trace import record
from ..train import TrainStep
from .module import identifier


@dataclass
class Source:
    """A traced graph, and what things are called.

    Attributes:
        graph: as traced.
        names: of parameters and buffers, by identity.
        input_names, output_names: None where nothing declares them.
        sizes: what a file called the symbolic sizes whose names are no identifiers.
    """

    graph: Graph
    names: dict[int, str]
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None
    sizes: dict[str, str] = field(default_factory=dict)


def source_of(model: Any, specs: Sequence[Any], train: bool, merge: bool) -> Source:
    """Traces what `save` was given.

    Raises:
        ArgumentsError: it is nothing that can be traced, or the specs do not fit it.
    """
    if isinstance(model, Compiled):
        model = model.fn
    if isinstance(model, Graph):
        if specs:
            raise ArgumentsError("a Graph has its inputs already: save it without specs", user_location())
        return Source(model, {})
    if isinstance(model, TrainStep):
        return Source(model.trace(*specs), names_of(model.model))
    if not callable(model):
        raise ArgumentsError(f"onnx.save takes a module, a function or a graph, not {model!r}", user_location())
    if not isinstance(model, Module):
        return Source(record(model, specs), {})
    declared = None if specs else declaring(model)
    with ExitStack() as stack:
        stack.enter_context(mode(model, train))
        if merge:
            stack.enter_context(merged(model))
        graph = record(model, specs or declared.inputs)  # type: ignore[union-attr]
        return Source(graph, names_of(model), getattr(declared, "input_names", None), _outputs(model, graph),
                      _sizes(declared))


def _sizes(declared: Any) -> dict[str, str]:
    """Identifier -> the name of a size in the file of an imported model."""
    if declared is None:
        return {}
    dims = [d.dim_param for v in declared.model.graph.input for d in v.type.tensor_type.shape.dim]
    return {identifier(name): name for name in dims if any(c.isalnum() for c in name) and identifier(name) != name}


def _outputs(model: Any, graph: Graph) -> Sequence[str] | None:
    """The names that an imported model has for its outputs.

    Raises:
        OnnxError: an output is no tensor.
    """
    names: Sequence[str] | None = getattr(model, "output_names", None)
    structure = graph.meta["out_structure"]
    parts = structure.children if names is not None and len(names) > 1 else (structure,)
    if names is not None and (len(parts) != len(names) or any(p.kind != "leaf" for p in parts)):
        raise OnnxError(f"{type(model).__name__}: an output is a sequence or an optional, not a tensor, which a traced "
                        "graph cannot give; save with keep=True")
    return names


def declaring(model: Module) -> Any:
    """The module that says what inputs there are: an imported one, or the body of one with a new head."""
    found: Any = model
    while not isinstance(getattr(found, "inputs", None), list) and isinstance(getattr(found, "body", None), Module):
        found = found.body
    inputs = getattr(found, "inputs", None)
    if not isinstance(inputs, list) or any(i is None for i in inputs):
        raise ArgumentsError(f"onnx.save({type(model).__name__}, ...) needs the types of its arguments: give a "
                             "td.spec(shape, dtype) for each, or an example", user_location())
    return found


def names_of(model: Any) -> dict[int, str]:
    """Names of parameters and buffers, by identity."""
    named: dict[int, str] = {}
    for kind in ("named_buffers", "named_parameters"):
        listed = getattr(model, kind, None)
        if callable(listed):
            named.update((id(tensor), name) for name, tensor in listed())
    return named


@contextmanager
def mode(model: Module, train: bool) -> Iterator[None]:
    """The module in training or evaluation mode; afterwards every part is as it was."""
    before = {m: m._training for m in model.modules()}
    if set(before.values()) == {train}:
        yield
        return
    try:
        model.train(train)
        yield
    finally:
        for module, was in before.items():
            object.__setattr__(module, "_training", was)
        changed()


@contextmanager
def merged(model: Module) -> Iterator[None]:
    """Every parameter that is read through something (a LoRA adapter...) replaced by what it is read as."""
    before: list[tuple[Module, dict[str, Any], dict[str, Any]]] = []
    try:
        for module in list(model.modules()):
            names = list(dict.fromkeys(name for name, *_ in module.parametrized()))
            if not names:
                continue
            before.append((module, dict(module._parameters), dict(module._readers)))
            with no_grad():
                values = {name: Parameter(module.read(name).numpy()) for name in names}
            module._readers.clear()
            module._parameters.update(values)
        yield
    finally:
        for module, parameters, readers in before:
            module._parameters.update(parameters)
            module._readers.update(readers)


def opset_of(model: Any) -> int | None:
    """The opset that a model was imported with; None for others."""
    while not isinstance(getattr(model, "opsets", None), Mapping) and isinstance(getattr(model, "body", None), Module):
        model = model.body
    opsets = getattr(model, "opsets", None)
    return int(opsets.get("", 1)) if isinstance(opsets, Mapping) else None
