"""What an exporter did to a model when it took it out of training, and what is made of that.

An inference graph has lost things that training needs: batch norms were folded into convolutions or fixed to their
statistics, dropouts removed, activations fused into products, the softmax left at the end. `recognise` finds such
places in an imported graph and says what is assumed of each; `prepare` also acts on it. Neither guesses silently: every
finding is in the report, with the nodes it was made from and the argument that changes what is done.

    report = td.finetune.prepare(body, dropout=0.1)
    print(report)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...ir.errors import ArgumentsError, AttributeValueError
from ..nn import Dropout, Module, functional
from ..tensor import Tensor

NORMS = frozenset({"BatchNormalization", "InstanceNormalization", "GroupNormalization", "LayerNormalization",
                   "SkipLayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"})
CONVOLUTIONS = frozenset({"Conv", "FusedConv", "ConvTranspose"})
FUSED = frozenset({"BiasGelu", "FastGelu", "QuickGelu", "SkipLayerNormalization", "BiasAdd", "BiasSplitGelu",
                   "FusedMatMul", "Attention", "MultiHeadAttention", "EmbedLayerNormalization", "BiasDropout"})
QUANTISED = frozenset({"QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearConv",
                       "QLinearMatMul", "QLinearAdd", "QLinearMul", "DynamicQuantizeMatMul", "QGemm"})
TIED_SIZE = 4096
"""Equal initializers with fewer elements are taken for chance (ones, zeros)."""


@dataclass(frozen=True)
class Finding:
    """One kind of place in a graph.

    Attributes:
        kind: what was found.
        where: names of the nodes (or parameters).
        treated: what is assumed and done.
        option: the argument of `prepare` that changes it; "" if none does.
    """

    kind: str
    where: tuple[str, ...]
    treated: str
    option: str = ""


@dataclass
class Report:
    """What was found in a model; prints as a table.

    Attributes:
        findings: one for each kind.
        trainable, constant: floating-point numbers that are parameters, and that are buffers or constants.
    """

    label: str
    findings: list[Finding] = field(default_factory=list)
    trainable: int = 0
    constant: int = 0

    def __getitem__(self, kind: str) -> Finding:
        return next(f for f in self.findings if f.kind == kind)

    def __contains__(self, kind: object) -> bool:
        return any(f.kind == kind for f in self.findings)

    def __str__(self) -> str:
        head = f"{self.label}: {self.trainable:,} numbers are parameters, {self.constant:,} stay as they are"
        lines = [f"  {f.kind} ({len(f.where)}): {f.treated}" + (f" [{f.option}]" if f.option else "")
                 + f"\n      {_shortened(f.where)}" for f in self.findings]
        return "\n".join([head, *(lines or ["  nothing was assumed"])])

    def table(self) -> Any:
        """The report as a rich table."""
        from rich.table import Table

        table = Table("found", "nodes", "what is assumed and done", "option", title=str(self).partition("\n")[0],
                      title_justify="left")
        for f in self.findings:
            table.add_row(f.kind, str(len(f.where)), f.treated, f.option)
        return table


def _shortened(names: tuple[str, ...], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names) - most} more)" if len(names) > most else "")


class View:
    """An imported graph with who makes and who reads each value."""

    def __init__(self, module: Any):
        self.module = module
        self.nodes = list(module.nodes)
        self.makers = {o: n for n in self.nodes for o in n.output if o}
        self.readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def of(self, *ops: str) -> list[Any]:
        """Nodes of these ops, in order."""
        return [n for n in self.nodes if n.op_type in ops]

    def maker(self, value: str, *ops: str) -> Any:
        """The node that makes a value, if it is of one of the ops."""
        node = self.makers.get(value)
        return node if node is not None and (not ops or node.op_type in ops) else None

    def after(self, node: Any) -> list[Any]:
        """Who reads the first result of a node."""
        return self.readers.get(node.output[0], [])

    def stored(self, name: str) -> Any:
        """The shape and elements of a stored value, or None."""
        tensor = self.module._parameters.get(name)
        if tensor is None:
            tensor = self.module._buffers.get(name)
        return tensor if tensor is not None else self.module.constants.get(name)


def called(node: Any) -> str:
    """A node's name, or that of its first result."""
    return str(node.name or node.output[0])


def graphs(model: Module) -> Iterator[Any]:
    """The imported graphs in a module."""
    return (m for m in model.modules() if hasattr(m, "select_outputs"))


# What is looked for ------------------------------------------------------------------------------------------------


def live_batch_norms(view: View) -> list[Any]:
    """BatchNormalization nodes, which all hold fixed statistics in an inference graph."""
    return view.of("BatchNormalization")


def affine_norms(view: View) -> list[Any]:
    """A product by one number for each channel and a sum right after a convolution: a batch norm written out."""
    found = []
    for scale in view.of("Mul"):
        conv = next((view.maker(i, *CONVOLUTIONS) for i in scale.input if view.maker(i, *CONVOLUTIONS)), None)
        vector = next((view.stored(i) for i in scale.input if view.stored(i) is not None), None)
        shifted = [n for n in view.after(scale) if n.op_type == "Add" and any(
            view.stored(i) is not None for i in n.input)]
        if conv is not None and vector is not None and shifted and np.size(vector) == max(np.shape(vector), default=0):
            found.append(scale)
    return found


def folded_batch_norms(view: View) -> list[Any]:
    """Convolutions with a bias (of their own, or added next) that no normalisation follows, if most of a graph are so.

    A convolution network without normalisation is seldom trained; a bias where a batch norm used to follow is what
    folding leaves. A few of that kind are nothing unusual (gates, a last layer).
    """
    convolutions = view.of(*CONVOLUTIONS)
    found = [c for c in convolutions if _is_biased(view, c) and not any(n.op_type in NORMS for n in view.after(c))]
    return found if len(found) > 1 and 2 * len(found) > len(convolutions) else []


def _is_biased(view: View, conv: Any) -> bool:
    if len(conv.input) > 2 and conv.input[2]:
        return True
    return any(n.op_type == "Add" and any(view.stored(i) is not None for i in n.input) for n in view.after(conv))


def dropouts(view: View) -> list[Any]:
    """Dropout nodes, which pass their input on in an inference graph."""
    return view.of("Dropout")


def dropped_dropouts(view: View) -> list[Any]:
    """Where the usual transformer drops, and a graph without its dropouts does not: the nodes whose results it was.

    Attention probabilities; the products that are added to the residual before (or after) a layer norm; the norm of
    the sum of embeddings (Devlin et al. 2019, section A.2).
    """
    if dropouts(view):
        return []
    found = [n for n in view.of("Softmax") if any(m.op_type == "MatMul" and m.input[0] == n.output[0]
                                                 for m in view.after(n))]
    for norm in view.of("LayerNormalization"):
        total = view.maker(norm.input[0], "Add")
        if total is None:
            continue
        parts = [view.makers[i] for i in total.input if i in view.makers]
        found += [p for p in parts if p.op_type == "Add" and _has_product(view, p) and p not in found]
        if any(_is_lookup(view, p) for p in parts):
            found.append(norm)
    return found


def _has_product(view: View, node: Any) -> bool:
    return any(view.maker(i, "MatMul", "Gemm") for i in node.input)


def _is_lookup(view: View, node: Any) -> bool:
    return node.op_type == "Gather" or (node.op_type == "Add" and any(view.maker(i, "Gather") for i in node.input))


def fused(view: View) -> list[Any]:
    """Nodes that an optimiser made of several."""
    return [n for n in view.nodes if n.op_type in FUSED or any(a.name == "activation" for a in n.attribute)
            and n.op_type in ("FusedConv", "FusedGemm")]


def written_out_norms(view: View) -> list[Any]:
    """Layer norms in single steps: x - mean(x), squared, averaged, rooted."""
    found = []
    for mean in view.of("ReduceMean"):
        for sub in view.after(mean):
            squares = [n for n in view.after(sub) if n.op_type in ("Pow", "Mul")] if sub.op_type == "Sub" else []
            if any(m.op_type == "ReduceMean" for s in squares for m in view.after(s)):
                found.append(mean)
                break
    return found


def probabilities(view: View) -> list[Any]:
    """Softmax or sigmoid nodes that make an output of the graph."""
    return [n for name in view.module.output_names if (n := _probability(view, name)) is not None]


def _probability(view: View, name: str) -> Any:
    node = view.makers.get(name)
    while node is not None and node.op_type == "Identity":
        node = view.makers.get(node.input[0])
    return node if node is not None and node.op_type in ("Softmax", "LogSoftmax", "Sigmoid") else None


def quantised(view: View) -> list[Any]:
    """Nodes that round."""
    return view.of(*QUANTISED)


def tied(view: View) -> list[tuple[str, str]]:
    """Pairs of equal parameters, also transposed ones: one tensor that the exporter wrote twice."""
    seen: dict[str, str] = {}
    pairs = []
    for name, parameter in view.module._parameters.items():
        if parameter is None or parameter.size < TIED_SIZE:
            continue
        array = parameter.numpy(copy=False)
        key = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() + str(array.shape)
        if key in seen:
            pairs.append((seen[key], name))
        seen.setdefault(key, name)
    return pairs


# What is made of it ------------------------------------------------------------------------------------------------


class BatchStatistics(Module):
    """Runs a BatchNormalization node with the statistics of the batch while training, and keeps the stored ones moving.

    Args:
        momentum: the share of the stored statistics that stays at each step.
        eps: added to the variance.
    """

    def __init__(self, momentum: float, eps: float):
        super().__init__()
        self.momentum, self.eps = momentum, eps

    def forward(self, run: Callable[[], Any], operands: Any) -> Any:
        if not self.training:
            return run()
        x, scale, shift, mean, variance = operands[:5]
        return [functional.batch_norm(x, mean, variance, scale, shift, training=True, momentum=1 - self.momentum,
                                      eps=self.eps)]


class Dropping(Dropout):
    """Drops elements of a node's first result while training."""

    def forward(self, run: Callable[[], Any], operands: Any) -> Any:  # type: ignore[override]
        first, *others = run()
        return [super().forward(first) if isinstance(first, Tensor) else first, *others]


KINDS: dict[str, tuple[Callable[[View], list[Any]], str, str]] = {
    "batch norm with fixed statistics": (
        live_batch_norms, "the statistics stay those of the file; scale and shift train", 'batch_norm="train"'),
    "batch norm written as scale and shift": (
        affine_norms, "trains as a scale and shift for each channel; its statistics are inside", ""),
    "convolution with a folded batch norm": (
        folded_batch_norms, "trains as a plain convolution with a bias; the statistics of the old data are inside", ""),
    "dropout that passes on": (dropouts, "drops again while training, at the ratio of the file", "dropout=0"),
    "place of a removed dropout": (dropped_dropouts, "nothing is dropped here", "dropout=0.1"),
    "fused activation or norm": (fused, "differentiated as the steps that it was fused from", ""),
    "layer norm written in single steps": (written_out_norms, "differentiated step by step", ""),
    "probabilities as output": (
        probabilities, "the output stays a probability; a cross-entropy wants the logits before", "logits=True"),
    "quantised value": (quantised, "no gradient passes; what lies before it cannot train", ""),
}
"""What is looked for: how, what is assumed of it by default, and the argument of `prepare` that changes that."""


def recognise(model: Module) -> Report:
    """What the export did to the imported graphs in a model, and what is assumed of it; changes nothing.

    Raises:
        ArgumentsError: the model holds no imported graph.
    """
    found = list(graphs(model))
    if not found:
        raise ArgumentsError(f"{type(model).__name__} holds no imported graph: td.onnx.load gives one")
    report = Report(", ".join(str(g.label) for g in found))
    for kind, (look, treated, option) in KINDS.items():
        where = tuple(called(n) for g in found for n in look(View(g)))
        if where:
            report.findings.append(Finding(kind, where, treated, option))
    pairs = tuple(f"{a} = {b}" for g in found for a, b in tied(View(g)))
    if pairs:
        report.findings.append(Finding("one tensor stored twice", pairs, "the copies train apart", "tie=True"))
    for g in found:
        stored = [t for table in (g._parameters, g._buffers) for t in table.values() if t is not None]
        report.trainable += sum(int(t.size) for t in stored if t.role == "parameter")
        report.constant += sum(int(t.size) for t in stored if t.role != "parameter" and t.dtype.is_float)
        known = [a for a in g.constants.values() if isinstance(a, np.ndarray) and a.dtype.kind == "f"]
        report.constant += sum(a.size for a in known)
    return report


def prepare(model: Module, *, batch_norm: str = "frozen", dropout: float | None = None, logits: bool = False,
            tie: bool = False) -> Report:
    """Makes the imported graphs in a model ready for training and says what was done.

    Args:
        model: changed in place; its behaviour in evaluation mode stays the same (but for `logits`).
        batch_norm: "frozen": their statistics stay; "train": those of the batch are used while training, and the
            stored ones move.
        dropout: None: Dropout nodes drop at their own ratio, removed ones are not brought back; a number: both drop
            at that ratio; 0: nothing drops.
        logits: cut the graph before a softmax or sigmoid that makes its output.
        tie: let parameters that are equal be one.

    Raises:
        ArgumentsError: the model holds no imported graph.
        AttributeValueError: an argument outside its domain.
    """
    if batch_norm not in ("frozen", "train"):
        raise AttributeValueError(f'prepare: batch_norm is "frozen" or "train", not {batch_norm!r}')
    if dropout is not None and not 0.0 <= dropout < 1.0:
        raise AttributeValueError(f"prepare: dropout lies in [0, 1), got {dropout}")
    report = recognise(model)
    done: dict[str, str] = {}
    for graph in graphs(model):
        view = View(graph)
        if batch_norm == "train":
            for node in live_batch_norms(view):
                wrapper = BatchStatistics(_float(node, "momentum", 0.9), _float(node, "epsilon", 1e-5))
                graph.wrap(node.output[0], "statistics", wrapper.train(graph.training))
            done["batch norm with fixed statistics"] = "those of the batch while training; the stored ones move"
        done.update(_drop(view, dropout))
        if logits and probabilities(view):
            last = {name: _probability(view, name) for name in graph.output_names}
            graph.select_outputs([name if node is None else node.input[0] for name, node in last.items()])
            done["probabilities as output"] = "cut off: the output is the logits"
        if tie:
            for first, second in tied(view):
                graph._parameters[second] = graph._parameters[first]
            done["one tensor stored twice"] = "one parameter from now on"
    report.findings = [Finding(f.kind, f.where, done.get(f.kind, f.treated), f.option) for f in report.findings]
    return report


def _drop(view: View, ratio: float | None) -> dict[str, str]:
    for node in dropouts(view):
        own = _ratio(view, node) if ratio is None else ratio
        if own:
            view.module.wrap(node.output[0], "dropout", Dropping(own).train(view.module.training))
    if ratio:
        for node in dropped_dropouts(view):
            view.module.wrap(node.output[0], "dropout", Dropping(ratio).train(view.module.training))
    if ratio is None:
        return {}
    said = f"drops at {ratio:g} while training" if ratio else "nothing is dropped"
    return {"dropout that passes on": said, "place of a removed dropout": said}


def _ratio(view: View, node: Any) -> float:
    if len(node.input) > 1 and node.input[1]:
        stored = view.stored(node.input[1])
        return 0.5 if stored is None else float(np.asarray(stored).reshape(-1)[0])
    return _float(node, "ratio", 0.5)


def _float(node: Any, name: str, default: float) -> float:
    return next((float(a.f) for a in node.attribute if a.name == name), default)
