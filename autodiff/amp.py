"""Automatic mixed precision: contractions in a 16-bit dtype, what would lose digits in float32.

A pass over graphs of float32 values, forward graphs as well as whole training steps. Each op's slot `amp` says how it
is treated:

* `narrow`: operands are cast to the 16-bit dtype (matmul, conv, attention: they accumulate in f32 inside);
* `wide`: operands are cast back to f32 (sums, norms, losses, exp and log...);
* `follow`: narrow where its data is narrow already, so that activations stay narrow between contractions. Parameters
  and smaller operands (a bias) are then cast along; an f32 operand of the same size makes the result f32;
* `inside`: an op with regions; the pass works in these, and values that cross the border narrow stay so;
* `cast`: says its dtype itself.

Inputs and outputs keep their types: parameters stay f32 masters, and a training step updates them in f32. To that end
`follow` counts as `wide` where no contraction comes after any more, as in optimizer updates. A contraction whose
result is only read as f32 gives f32 at once, from its accumulators. A value is cast once however often it is read, and
no value is cast there and back.

Micikevicius et al., "Mixed precision training" (arXiv:1710.03740).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..ir import ops as _declared  # noqa: F401  (a class fills a slot of a record that exists)
from ..ir.builder import GraphBuilder, make_node
from ..ir.context import emit
from ..ir.dtypes import DType, as_dtype, float32
from ..ir.errors import DTypeError
from ..ir.graph import Graph, Node, Value
from ..ir.location import Loc
from ..ir.opdef import all_ops, fill
from ..ir.pipeline import Pass, PassResult
from ..ir.rewrite import with_operands

NARROW = "matmul conv conv_input_grad conv_weight_grad attention"
WIDE = """reduce_sum reduce_mean reduce_prod logsumexp cumsum cumprod softmax log_softmax layer_norm rms_norm group_norm
    batch_norm cross_entropy scatter_add scatter_add_along_axis scatter_add_nd exp exp2 expm1 log log2 log10 log1p
    pow sqrt rsqrt cbrt reciprocal tan sinh cosh asin acos asinh acosh atanh atan2 hypot sin cos softplus erfc
    bitcast"""
CAST = "cast"


def _classify() -> None:
    for name, record in all_ops().items():
        chosen = ("narrow" if name in NARROW.split() else "wide" if name in WIDE.split() else
                  "cast" if name == CAST else "inside" if record.has("regions") else "follow")
        if "amp" not in record.slots:
            fill("amp", name, chosen)


_classify()


@dataclass(frozen=True)
class Decision:
    """What was decided for one node: its class, the dtype it computes in, and why."""

    op: str
    rule: str
    dtype: DType
    reason: str
    loc: Loc | None

    def __str__(self) -> str:
        return f"{self.op}: {self.dtype.short} ({self.rule}: {self.reason})" + (f" at {self.loc}" if self.loc else "")


class Decisions(tuple[Decision, ...]):
    """The decisions of a run, in the order of the nodes. As text: one a line."""

    def __str__(self) -> str:
        return "".join(f"\n  {d}" for d in self)


def mixed_precision(graph: Graph, dtype: Any = "bfloat16") -> PassResult:
    """The graph with contractions in a 16-bit dtype; `stats["decisions"]` lists a `Decision` per floating node.

    Raises:
        DTypeError: dtype is not bfloat16 or float16.
    """
    narrow = as_dtype(dtype)
    if narrow not in ("bfloat16", "float16"):
        raise DTypeError(f"amp is {dtype!r}; expected 'bfloat16' or 'float16'")
    decisions: list[Decision] = []
    result = _convert(graph, narrow, decisions)
    counts: Counter[str] = Counter(str(d.dtype) for d in decisions)
    changed = counts[str(narrow)] > 0
    return PassResult(result if changed else graph, changed, {**counts, "decisions": Decisions(decisions)})


def amp_pass(dtype: Any = "bfloat16") -> Pass:
    return Pass(f"amp_{as_dtype(dtype).short}", lambda graph: mixed_precision(graph, dtype))


def _convert(graph: Graph, narrow: DType, decisions: list[Decision]) -> Graph:
    """A graph with the same inputs and output types."""
    converter = _Converter(graph, narrow, decisions)
    with converter.builder:
        for node in graph.nodes:
            with converter.builder.at(node.loc):
                converter.convert(node)
        outputs = [converter.read(v, v.dtype) for v in graph.outputs]
    converted = Graph(graph.name, graph.inputs, graph.roles, converter.builder.graph.nodes, outputs, graph.aliases,
                      graph.meta)
    return keep_accumulators(converted).graph


class _Converter:
    """Rewrites one level of a graph. `native` holds what stands for a value: of its own dtype, or narrow."""

    def __init__(self, graph: Graph, narrow: DType, decisions: list[Decision]):
        self.narrow, self.decisions = narrow, decisions
        self.builder = GraphBuilder(graph.name)
        self.native: dict[Value, Value] = {v: v for v in graph.inputs}
        self.casts: dict[tuple[Value, DType], Value] = {}
        self.leads_to_narrow = _upstream_of_narrow(graph)
        self.parameters = {v for v, role in zip(graph.inputs, graph.roles) if role in ("parameter", "state", "scalar")}

    def read(self, value: Value, dtype: DType) -> Value:
        """A value of the old graph in the given dtype (its own, or narrow)."""
        native = self.native[value]
        if native.dtype == dtype:
            return native
        key = (native, dtype)
        if key not in self.casts:
            self.casts[key] = emit("cast", native, dtype=dtype)
        return self.casts[key]

    def is_narrow(self, value: Value) -> bool:
        return value.dtype == float32 and self.native[value].dtype == self.narrow

    def convert(self, node: Node) -> None:
        wide = [v for v in (*node.operands, *node.results) if v.dtype == float32]
        kind = node.op.slots.get("amp", "wide")
        if kind == "inside":
            self._inside(node)
        elif kind == "cast":
            self._cast(node)
        elif not wide:
            self._emit(node, None)
        else:
            dtype, reason = self._choose(node, kind)
            self.decisions.append(Decision(node.op.name, kind, dtype, reason, node.loc))
            self._emit(node, dtype)

    def _choose(self, node: Node, kind: str) -> tuple[DType, str]:
        if not any(v.dtype == float32 for v in node.operands):
            return float32, "has no f32 operand"
        if kind == "narrow":
            return self.narrow, "accumulates in f32"
        if kind == "wide":
            return float32, "would lose digits"
        narrow = [v for v in node.operands if self.is_narrow(v)]
        if not narrow:
            return float32, "its operands are f32"
        if node not in self.leads_to_narrow:
            return float32, "no contraction comes after"
        most = max((v.type.size for v in narrow), key=lambda s: s if isinstance(s, int) else float("inf"))
        for v in node.operands:
            if v.dtype == float32 and v not in narrow and not self._goes_along(v, most):
                return float32, "an operand of the same size is f32"
        return self.narrow, "its data is narrow"

    def _goes_along(self, value: Value, most: Any) -> bool:
        """Whether an f32 operand is cast to join narrow ones of at most so many elements."""
        constant = value.producer is not None and value.producer.op.has("constant")
        size = value.type.size
        smaller = isinstance(size, int) and (not isinstance(most, int) or size < most)
        return value in self.parameters or constant or smaller

    def _emit(self, node: Node, dtype: DType | None) -> None:
        operands = [self.read(v, dtype if dtype and v.dtype == float32 else v.dtype) for v in node.operands]
        attrs = dict(node.attrs)
        if dtype == self.narrow and attrs.get("out_dtype") == float32:
            attrs["out_dtype"] = None
        self._take(node, self.builder.emit(node.op.name, operands, attrs, node.regions))

    def _take(self, node: Node, results: Sequence[Value]) -> None:
        for old, new in zip(node.results, results):
            new.name = old.name
            self.native[old] = new

    def _cast(self, node: Node) -> None:
        """A cast from what stands for its operand; none if that has the dtype already."""
        (x,), dtype = node.operands, node.attrs["dtype"]
        native = self.native[x]
        if native.dtype == dtype:
            self.native[node.result] = native
        else:
            self._take(node, [emit("cast", native, dtype=dtype)])

    def _inside(self, node: Node) -> None:
        regions = [_convert(r, self.narrow, self.decisions) for r in node.regions]
        inputs, outputs = _open_borders(node)
        regions, received = _receive_narrow(regions, inputs, self.narrow)
        regions = _return_narrow(regions, outputs, self.narrow)
        skipped = len(node.operands) - len(node.regions[0].inputs)
        operands = [self.read(v, self.narrow if i - skipped in received else v.dtype)
                    for i, v in enumerate(node.operands)]
        self._take(node, self.builder.emit(node.op.name, operands, node.attrs, regions))


def _upstream_of_narrow(graph: Graph) -> set[Node]:
    """The nodes that a contraction depends on."""
    read: set[Value] = set()
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        contracts = any(n.op.slots.get("amp") == "narrow" for r in node.regions for n in r.walk())
        if any(v in read for v in node.results):
            found.add(node)
        if node in found or contracts or node.op.slots.get("amp") == "narrow":
            read.update(node.operands)
    return found


# --- the borders of regions ------------------------------------------------------------------------------


def _open_borders(node: Node) -> tuple[range, range]:
    """Inputs and outputs of a node's regions that need not be of one type with a carry."""
    first = node.attrs.get("n_carry", 0)
    outputs = len(node.regions[-1].outputs)
    return range(first, len(node.regions[0].inputs)), range(first, outputs)


def _receive_narrow(regions: list[Graph], inputs: range, narrow: DType) -> tuple[list[Graph], set[int]]:
    """Inputs that every region only reads through casts to the narrow dtype become narrow."""
    chosen = {i for i in inputs if regions[0].inputs[i].dtype == float32
              and all(_only_cast(r, r.inputs[i], narrow) for r in regions)}
    if not chosen:
        return regions, chosen
    return [_with_narrow_inputs(r, chosen, narrow) for r in regions], chosen


def _only_cast(region: Graph, value: Value, narrow: DType) -> bool:
    readers = region.uses().get(value, [])
    return (value not in region.outputs and bool(readers)
            and all(n.op.name == "cast" and n.attrs["dtype"] == narrow for n in readers))


def _with_narrow_inputs(region: Graph, chosen: set[int], narrow: DType) -> Graph:
    inputs, mapping = list(region.inputs), dict[Value, Value]()
    for i in chosen:
        inputs[i] = Value(inputs[i].type.with_dtype(narrow), inputs[i].name)
        mapping.update((n.result, inputs[i]) for n in region.uses()[region.inputs[i]])
    nodes = []
    for node in region.nodes:
        if node.results[0] in mapping:
            continue
        fresh = with_operands(node, [mapping.get(v, v) for v in node.operands])
        mapping.update(zip(node.results, fresh.results))
        nodes.append(fresh)
    return Graph(region.name, inputs, region.roles, nodes, [mapping.get(v, v) for v in region.outputs],
                 meta=region.meta)


def _return_narrow(regions: list[Graph], outputs: range, narrow: DType) -> list[Graph]:
    """Outputs that every region computes narrow and casts to f32 are returned narrow."""
    for i in outputs:
        sources = [_widened(r.outputs[i], narrow) for r in regions]
        if all(v is not None for v in sources):
            regions = [Graph(r.name, r.inputs, r.roles, r.nodes,
                             [*r.outputs[:i], v, *r.outputs[i + 1:]], meta=r.meta)  # type: ignore[list-item]
                       for r, v in zip(regions, sources)]
    return regions


def _widened(value: Value, narrow: DType) -> Value | None:
    """x, if the value is the narrow x cast to f32."""
    node = value.producer
    if value.dtype != float32 or node is None or node.op.name != "cast" or node.operands[0].dtype != narrow:
        return None
    return node.operands[0]


# --- accumulators ----------------------------------------------------------------------------------------


def keep_accumulators(graph: Graph) -> PassResult:
    """A narrow contraction that is only read through casts to f32 gives f32 itself, not rounded on the way.

    Worth another run after differentiation: the gradient of a master weight is such a contraction.
    """
    readers, returned = graph.uses(), {v.producer for v in graph.outputs}
    mapping: dict[Value, Value] = {}
    nodes: list[Node] = []
    widened = 0
    for node in graph.nodes:
        fresh = with_operands(node, [mapping.get(v, v) for v in node.operands])
        if node.op.name == "cast" and fresh.operands[0].dtype == node.attrs["dtype"]:
            mapping[node.result] = fresh.operands[0]
            continue
        if node not in returned and _read_wide_only(node, [n for v in node.results for n in readers.get(v, [])]):
            fresh = make_node(node.op, fresh.operands, {**node.attrs, "out_dtype": float32}, (), node.loc)
            widened += 1
        mapping.update(zip(node.results, fresh.results))
        nodes.append(fresh)
    if not widened:
        return PassResult(graph, False, {"widened": 0})
    outputs = [mapping.get(v, v) for v in graph.outputs]
    result = Graph(graph.name, graph.inputs, graph.roles, nodes, outputs, graph.aliases, graph.meta)
    return PassResult(result, True, {"widened": widened})


def _read_wide_only(node: Node, readers: Sequence[Node]) -> bool:
    return ("out_dtype" in node.attrs and node.result.dtype.is_float and node.result.dtype.bits == 16 and bool(readers)
            and all(n.op.name == "cast" and n.attrs["dtype"] == float32 for n in readers))


KEEP_ACCUMULATORS = Pass("keep_accumulators", keep_accumulators)
