"""Everything of a model that stands in the way, at once and before anything is compiled.

The nodes are looked up first: one without a rule and without a body is unsupported, wherever it is. Then the model is
traced node by node with symbolic sizes; a node that fails is noted, and those that read its results are passed over.
One that fails only because sizes are symbolic is tried again with numbers. For training, the traced graph is searched
for what no gradient passes between parameters and outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import onnx

from ...autodiff.reverse import no_gradient
from ...ir.errors import TreadleError
from ...ir.graph import Graph, Node, Value
from ..dispatch import as_tensor
from ..grad_mode import enable_grad
from ..recording import Trace
from ..tensor import Tensor
from ..trace import Spec
from .functions import has_standard_body
from .module import OnnxModule, load
from .node import NeedsValue, schema_of
from .reader import describe, subgraphs
from .rules import find_rule
from .run import NodeLoc, concrete
from .uses import names_used

GUESSES = (2, 32, 224)
"""Sizes that are tried in the place of symbolic ones."""


@dataclass(frozen=True)
class Problem:
    """Something in the way.

    Attributes:
        node: op and name.
        what: why.
        kind: "unsupported"; "gradient" for what blocks one; "note" for what works, but is good to know.
    """

    node: str
    what: str
    kind: str = "unsupported"

    def __str__(self) -> str:
        return f"{self.node}: {self.what}"


@dataclass
class CheckReport:
    """What `check` found.

    Attributes:
        label: the model.
        nodes: how many nodes were looked at.
        problems: what keeps the model from running (or from being trained).
        notes: what does not.
        frozen: with train, the names of parameters that no gradient reaches.
    """

    label: str
    nodes: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is in the way."""
        return not self.problems

    def __str__(self) -> str:
        lines = [f"{self.label}: {self.nodes} nodes, " + (f"{len(self.problems)} problems" if self.problems
                                                         else "all supported")]
        lines += [f"  {p.kind}: {p}" for p in self.problems]
        lines += [f"  note: {n}" for n in self.notes]
        if self.frozen:
            lines.append(f"  parameters without a gradient: {', '.join(self.frozen)}")
        return "\n".join(lines)


def check(source: Any, train: bool = False) -> CheckReport:
    """Finds every node of a model that is not supported, and with `train` every one that blocks a gradient.

    Args:
        source: what `load` takes, or a module that it gave.

    Raises:
        OnnxError: the file is no valid model at all.
    """
    module = source if isinstance(source, OnnxModule) else load(source)
    report = CheckReport(module.label)
    found = dict.fromkeys(problems_of(module))
    report.nodes = sum(1 for _ in _all_nodes(module))
    named = {p.node for p in found}
    traced = Walk(module, list(module.inputs))
    for problem in _confirmed(module, traced.problems):
        if problem.node not in named and not any(n in problem.what for n in named):
            found[problem] = None
    report.problems = list(found)
    report.notes = traced.notes
    if train:
        blocks, report.frozen = blocked(module, traced)
        report.problems += blocks
    return report


def problems_of(module: OnnxModule) -> list[Problem]:
    """The nodes, those of subgraphs and functions too, that have neither a rule nor a body."""
    own = {key[:2] for key in module.functions}
    found = []
    for node, opsets in _all_nodes(module):
        domain = "" if node.domain == "ai.onnx" else node.domain
        if (node.domain, node.op_type) in own:
            continue
        opset = opsets.get(domain, 1)
        if find_rule(node.op_type, domain, opset) is None and not has_standard_body(node.op_type, domain, opset):
            known = "" if schema_of(node.op_type, domain, opset) else "; nor does the standard know such an op"
            found.append(Problem(describe(node), f"there is no rule for this op at opset {opset}{known}"))
    return found


def _all_nodes(module: OnnxModule) -> Iterable[tuple[onnx.NodeProto, dict[str, int]]]:
    """Every node with the opsets that it is read by."""
    pending: list[tuple[Any, dict[str, int]]] = [(module.nodes, module.opsets)]
    for function in module.functions.values():
        opsets = {"" if e.domain == "ai.onnx" else e.domain: e.version for e in function.opset_import}
        pending.append((function.node, {**module.opsets, **opsets}))
    while pending:
        nodes, opsets = pending.pop()
        for node in nodes:
            yield node, opsets
            pending.extend((inner.node, opsets) for inner in subgraphs(node))


class Walk:
    """A model traced node by node, over what fails.

    Attributes:
        graph: what was traced.
        outputs: the values of the model's outputs that were reached.
        problems, notes: nodes that failed, and those where a compiled model is cut.
    """

    def __init__(self, module: OnnxModule, specs: list[Spec | None], only: set[str] | None = None):
        self.problems: list[Problem] = []
        self.notes: list[Problem] = []
        self.outputs: list[Value] = []
        self.captures: dict[Value, Tensor] = {}
        with Trace("check") as trace, enable_grad():
            frame = module.frame({})
            frame.context.trace = trace
            for name, spec in zip(module.input_names, specs):
                if spec is not None:
                    frame.env[name] = Tensor._of(trace.input(spec.type, spec.name), trace)
            for node in module.nodes:
                self._step(frame, node)
            for name in dict.fromkeys(frame.context.counted):
                self.notes.append(Problem(name, "data decide a size here, which is counted at run time", "note"))
            for name in module.output_names:
                self._output(trace, frame.env.get(name))
            self.captures = {value: tensor for tensor, value in trace.captures.values()}
        self.graph: Graph = trace.graph

    def _step(self, frame: Any, node: onnx.NodeProto) -> None:
        try:
            if all(n in frame.env for n in names_used([node]) if n and frame.parent is None):
                frame.step(node)
        except NeedsValue:
            self.notes.append(Problem(describe(node), "data decide here how the program looks: the compiled model is "
                                      "cut in two, and what follows is compiled for each answer", "note"))
        except TreadleError as error:
            text = error.message.removeprefix(f"{describe(node)}: ")
            self.problems.append(Problem(describe(node), text))

    def _output(self, trace: Trace, value: Any) -> None:
        if isinstance(value, list):
            for part in value:
                self._output(trace, part)
        elif value is not None:
            try:
                made = concrete(value)
                if isinstance(made, Tensor):
                    self.outputs.append(trace.lift(as_tensor(made)))
            except (TypeError, TreadleError):
                pass  # strings


def _confirmed(module: OnnxModule, problems: list[Problem]) -> list[Problem]:
    """The problems that are there with numbers for sizes too."""
    if not problems:
        return []
    remaining = problems
    for guess in GUESSES:
        specs = [None if s is None else Spec(s.type.specialize(dict.fromkeys(_names(s), guess)), s.name)
                 for s in module.inputs]
        failed = {p.node: p for p in Walk(module, specs).problems}
        remaining = [failed[p.node] for p in remaining if p.node in failed]
    return remaining


def _names(spec: Spec) -> set[str]:
    return {name for size in spec.shape if not isinstance(size, int) for name in size.names}


# Gradients ----------------------------------------------------------------------------------------------------------


def blocked(module: OnnxModule, walk: Walk) -> tuple[list[Problem], list[str]]:
    """The nodes that no gradient passes on the way to a parameter, and the parameters that none reaches."""
    nodes = list(walk.graph.nodes)
    reaching = _differentiable(nodes, walk.outputs)
    found: dict[Problem, None] = {}
    frozen = []
    parameters = {id(p): name for name, p in module.named_parameters()}
    leading = _leading(nodes, walk.outputs)
    for value, tensor in walk.captures.items():
        name = parameters.get(id(tensor))
        if name is None or value in reaching:
            continue
        if value in leading:
            frozen.append(name)
            found.update(dict.fromkeys(_frontier(nodes, value, leading)))
    influenced = _influenced(nodes, [v for v, t in walk.captures.items() if id(t) in parameters])
    for node in nodes:
        if _raises(node) and any(r in reaching for r in node.results) and any(v in influenced for v in node.operands):
            what = f"{node.op.name} has no gradient: {node.op.undifferentiable}"
            found[Problem(_origin(node), what, "gradient")] = None
    return list(found), frozen


def _raises(node: Node) -> bool:
    return node.op.undifferentiable is not None and "vjp" not in node.op.slots


def _passes(node: Node) -> bool:
    return not _raises(node) and node.op.slots.get("vjp") is not no_gradient


def _differentiable(nodes: list[Node], outputs: Iterable[Value]) -> set[Value]:
    """The values from which a gradient path leads to an output. Ops that raise count as passing: they are reported
    by themselves."""
    reached = {v for v in outputs if v.dtype.is_float}
    for node in reversed(nodes):
        if any(r in reached for r in node.results) and (_passes(node) or _raises(node)):
            reached.update(v for v in node.operands if v.dtype.is_float)
    return reached


def _leading(nodes: list[Node], outputs: Iterable[Value]) -> set[Value]:
    """The values that an output depends on at all."""
    reached = set(outputs)
    for node in reversed(nodes):
        if any(r in reached for r in node.results):
            reached.update(node.operands)
    return reached


def _influenced(nodes: list[Node], sources: Iterable[Value]) -> set[Value]:
    reached = set(sources)
    for node in nodes:
        if any(v in reached for v in node.operands):
            reached.update(r for r in node.results if r.dtype.is_float)
    return reached


def _frontier(nodes: list[Node], source: Value, leading: set[Value]) -> Iterable[Problem]:
    """Where the influence of a parameter first meets a node that passes no gradient."""
    live = {source}
    for node in nodes:
        if not any(v in live for v in node.operands) or not any(r in leading for r in node.results):
            continue
        floats = [r for r in node.results if r.dtype.is_float]
        if _passes(node) and floats:
            live.update(floats)
        else:
            why = node.op.undifferentiable or ("its result is flat almost everywhere" if floats else
                                               f"its result is of dtype {node.results[0].dtype}")
            yield Problem(_origin(node), f"no gradient passes: {why}", "gradient")


def _origin(node: Node) -> str:
    return node.loc.function if isinstance(node.loc, NodeLoc) else f"{node.op.name} at {node.loc}"

