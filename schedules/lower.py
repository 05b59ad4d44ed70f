"""From a graph to a program: ops without a schedule are decomposed, nodes are grouped, each group becomes a kernel.

    graph --expand--> graph of ops with a lowering --layout, fuse--> groups --order--> kernels over buffers

Every value that crosses a group has a buffer; a reshape is another name for its operand's. Outputs are written where
the caller wants them, an output that takes over an input right into that input if all other readers of the input
can run before. Control flow becomes loops and branches over the kernels of its regions (lower_control).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from ..ir.decompose import INLINE, MARKERS, erase
from ..ir.graph import Graph, Node, Value
from ..ir.opdef import rule
from ..ir.rewrite import Rewriter, rewrite
from ..ir.subjects import subjects
from . import (
    attention,
    lower_collective,
    lower_elementwise,
    lower_fold,
    lower_pool,
    lower_reduce,
    lower_scatter,
    lower_shape,
    lower_sort,
)
from .faults import Origin, explained
from .fuse import fuse
from .group import Group, is_anchor
from .inplace import takes_over
from .layout import channels_last
from .loops import Signature
from .lower_control import CONTROL, Place, lower_control
from .lower_slots import Anchor, Host, Kernel
from .order import in_order, is_other_name
from .program import Arg, Buffer, Copy, HostCall, KernelCall, Program, SizeArg, Step, View
from .rules import kernel_of
from .size_checks import size_checks
from .sizes import expecting, hint, size_names, with_sizes
from .target import Target

__all__ = ["attention", "expand", "lower", "lower_collective", "lower_elementwise", "lower_fold", "lower_pool",
           "lower_reduce", "lower_scatter", "lower_shape", "lower_sort"]


class _Expand(Rewriter):
    """Decomposes ops that have no schedule of their own, until all have one."""

    def replace(self, node: Node) -> Sequence[Value] | None:
        lowering = node.op.slots.get("lower")
        refused = isinstance(lowering, Anchor) and not lowering.takes(node)
        if node.op.name in CONTROL or node.op.name in MARKERS or lowering is not None and not refused:
            return None
        if "decompose" not in node.op.slots:
            rule("lower", node.op, node.loc)  # raises, and says what is missing
        self.stats[node.op.name] += 1
        regions = {"regions": node.regions} if node.op.has("regions") else {}
        found = node.op.slots["decompose"](*node.operands, **node.attrs, **regions)
        return [found] if isinstance(found, Value) else list(found)


def expand(graph: Graph) -> Graph:
    """The graph with every op that has no lowering decomposed, regions included; marks for passes are gone.

    Raises:
        MissingRuleError: an op has neither rule; the message names it and the user's line.
    """
    return rewrite(erase(INLINE.run(graph).graph).graph, _Expand(graph.name))


def without_dead(graph: Graph) -> Graph:
    """The graph without nodes that nothing needs."""
    needed = set(graph.outputs)
    nodes = []
    for node in reversed(graph.nodes):
        if node.op.has("effect") or any(v in needed for v in node.results):
            needed.update(node.operands)
            nodes.append(node)
    return Graph(graph.name, graph.inputs, graph.roles, nodes[::-1], graph.outputs, graph.aliases, graph.meta)


def lower(graph: Graph, target: Target | str = "cpu", expected: Mapping[str, int] | None = None) -> Program:
    """The program of a graph. Where shapes are symbolic it runs at every size, and is fastest near the `expected` ones.

    Raises:
        CompileError: a size does not follow from the shapes of the inputs, or no schedule accepts a group.
        MissingRuleError: an op has neither a lowering nor a decomposition.
    """
    target = Target.parse(target)
    with expecting(expected):
        return _lower(graph, target)


def _lower(graph: Graph, target: Target) -> Program:
    graph = channels_last(expand(graph)).graph
    inputs = [Buffer(v.name or f"in{i}", v.shape, v.dtype, "input") for i, v in enumerate(graph.inputs)]
    outputs = [Buffer(f"out{i}", v.shape, v.dtype, "output",
                      alias_of=inputs[graph.aliases[i]] if i in graph.aliases else None)
               for i, v in enumerate(graph.outputs)]
    steps = Lowering(target, subjects(graph)).region(graph, inputs, outputs)
    return Program(_distinct(inputs), outputs, steps, graph.name, list(graph.roles), checks=size_checks(graph))


def _distinct(buffers: Sequence[Buffer]) -> list[Buffer]:
    """The buffers with names that tell them apart."""
    seen: set[str] = set()
    for buffer in buffers:
        name = buffer.name
        for i in itertools.count(1):
            if buffer.name not in seen:
                break
            buffer.name = f"{name}_{i}"
        seen.add(buffer.name)
    return list(buffers)


def reshaped(arg: Place, shape: Sequence[int]) -> Place:
    """The same memory under another shape."""
    shape = tuple(shape)
    if isinstance(arg, View):
        return View(arg.buffer, shape, arg.offset, arg.terms)
    assert isinstance(arg, Buffer)
    return arg if arg.shape == shape else Buffer(arg.name, shape, arg.dtype, "temp", alias_of=arg)


def other_name(node: Node, place: Place) -> Place:
    """The memory of a view whose elements lie together in its operand's."""
    if node.op.name == "reshape":
        return reshaped(place, node.result.shape)
    sizes = node.operands[0].shape
    offset = sum(start * math.prod(sizes[i + 1:]) for i, start in enumerate(node.attrs["starts"]))
    if isinstance(place, View):
        return View(place.buffer, node.result.shape, place.offset + offset, place.terms)
    return View(place, node.result.shape, offset)


class Lowering:
    """Lowers graphs and their regions for one target; shared between the regions of one program."""

    def __init__(self, target: Target, subjects: Mapping[Value, str]):
        self.target, self.subjects = target, subjects
        self.numbers = itertools.count()
        self.constants: dict[int, Buffer] = {}

    def temp(self, v: Value, hint: str = "t") -> Buffer:
        return Buffer(f"{v.name or hint}_{next(self.numbers)}", v.shape, v.dtype, subject=self.subjects.get(v, ""))

    def region(self, graph: Graph, inputs: Sequence[Place], outputs: Sequence[Place]) -> list[Step]:
        """The steps that compute `outputs` (places to write) from `inputs`."""
        return _Region(self, without_dead(graph), inputs, outputs).run()

    def constant(self, node: Node) -> Buffer:
        array = np.ascontiguousarray(node.attrs["value"])
        if id(node) not in self.constants:
            self.constants[id(node)] = Buffer(f"c{next(self.numbers)}", array.shape, node.result.dtype, "constant",
                                              data=array)
        return self.constants[id(node)]

    def array(self, array: np.ndarray) -> Buffer:
        """A constant that is no value of the graph."""
        return Buffer(f"c{next(self.numbers)}", array.shape, str(array.dtype), "constant", data=array)


class _Region:
    """The lowering of one graph: where each value lies, and the steps so far."""

    def __init__(self, shared: Lowering, graph: Graph, inputs: Sequence[Place], outputs: Sequence[Place]):
        self.shared, self.graph, self.target = shared, graph, shared.target
        self.places: dict[Value, Place] = dict(zip(graph.inputs, inputs))
        self.outputs = list(outputs)
        self.steps: list[Step] = []
        self.copies: list[Step] = []
        self.saved: set[int] = set()
        self.readers = Counter(v for node in graph.nodes for v in node.operands)

    def run(self) -> list[Step]:
        self.save_inputs()
        groups = fuse(self.graph, self.target)
        owned = self.claim_outputs(groups)
        ordered, refused = in_order(groups, self.graph, owned)
        for v in refused:  # other readers of the input run later: the result waits in a buffer of its own
            self.defer(v, owned.pop(v))
        for group in ordered:
            self.emit(group)
        for i, v in enumerate(self.graph.outputs):
            if i not in self.saved and self.places.get(v) is not self.outputs[i]:
                self.copies.append(Copy(self.place(v), self.outputs[i]))
        return self.steps + self.copies

    def save_inputs(self) -> None:
        """An input that is an output as well is copied before another output takes over its memory."""
        taken = {id(place.alias_of): i for i, place in enumerate(self.outputs)
                 if isinstance(place, Buffer) and place.alias_of is not None}
        for i, v in enumerate(self.graph.outputs):
            if v in self.graph.inputs and taken.get(id(self.places[v]), i) != i:
                saved = self.shared.temp(v)
                self.steps.append(Copy(self.places[v], saved))
                self.copies.append(Copy(saved, self.outputs[i]))
                self.saved.add(i)

    def claim_outputs(self, groups: Sequence[Group]) -> dict[Value, Value]:
        """Gives outputs computed by a group their place at once; (output -> input) where it takes over an input."""
        made = {v: g for g in groups for v in g.outputs}
        owned: dict[Value, Value] = {}
        for i, v in enumerate(self.graph.outputs):
            while v not in self.places and v.producer is not None and v.producer.op.name == "reshape":
                v = v.producer.operands[0]
            if v in made and v not in self.places:
                source = self.source_of(self.outputs[i])
                if source is not None and not takes_over(made[v], v, source):
                    continue  # computed beside, copied at the end
                if v.shape != self.outputs[i].shape and source is not None:
                    continue
                self.places[v] = reshaped(self.outputs[i], v.shape)
                if source is not None:
                    owned[v] = source
        return owned

    def source_of(self, output: Place) -> Value | None:
        """The graph input whose storage an output takes over."""
        if not isinstance(output, Buffer) or output.alias_of is None:
            return None
        for v in self.graph.inputs:
            if self.places[v] is output.alias_of:
                return v
        return None

    def defer(self, v: Value, source: Value) -> None:
        self.places[v] = self.shared.temp(v)

    def place(self, v: Value) -> Place:
        """Where a value lies; a view of one that lies somewhere is another name for it."""
        if v not in self.places:
            node = v.producer
            assert node is not None, f"{v!r} is not of this graph"
            if node.op.name == "constant":
                self.places[v] = self.shared.constant(node)
            elif is_other_name(node):
                self.places[v] = other_name(node, self.place(node.operands[0]))
            else:
                self.places[v] = self.shared.temp(v)
        return self.places[v]

    # Groups --------------------------------------------------------------------------------------------------------

    def emit(self, group: Group) -> None:
        with explained(group.label, group.nodes):
            self.emit_steps(group)

    def emit_steps(self, group: Group) -> None:
        node = group.nodes[-1]
        if node.op.has("regions"):
            self.steps += lower_control(self.shared, node, [self.place(v) for v in node.operands],
                                        [self.place(v) for v in node.results])
        elif isinstance(node.op.slots.get("lower"), Kernel):
            self.emit_own(node, node.op.slots["lower"])
        elif isinstance(node.op.slots.get("lower"), Host):
            args: list[Arg] = [*map(self.place, node.operands), *map(self.place, node.results)]
            host = node.op.slots["lower"]
            self.steps.append(HostCall(host.name(node), args, range(len(node.operands), len(args)), label=node.op.name,
                                       kernel=host.fn(node, self.target, "kernel")))
        elif not self.is_alias(group):
            self.emit_group(group)

    def is_alias(self, group: Group) -> bool:
        """A reshape, or a constant, that needs no kernel: it is found by `place` (and copied if it is an output)."""
        last = group.nodes[-1]
        if last.op.name == "constant" or all(map(is_other_name, group.nodes)):
            self.places.pop(last.result, None)
            return True
        return False

    def emit_group(self, group: Group) -> None:
        inputs = list(group.inputs)
        if group.anchor is not None:
            inputs = list(dict.fromkeys([*group.anchor.operands, *inputs]))
        inplace = {}
        for v in group.outputs:
            place = self.place(v)
            source = self.source_of(place)
            if source is not None and source in inputs:
                inplace[v] = source
        signature = Signature(tuple(inputs), tuple(group.outputs), inplace)
        args: list[Arg] = [self.place(v) for v in signature.params]
        shift = 0
        if group.anchor is not None and is_anchor(group.anchor) and len(set(group.anchor.operands)) < 2 \
                and group.anchor.op.name not in ("matmul", "attention"):
            args, shift = [args[0], *args], 1  # both operands are one value, the kernel still has two parameters
        writes = [signature.position(v) + shift for v in group.outputs]
        for v in inplace:
            args[signature.position(v) + shift] = self.place(v)
        reads = [i for i in range(len(args)) if i not in writes or i - shift < len(inputs)]
        kernel = kernel_of(group, signature, self.target, "kernel")
        for v, array in group.packed.items():
            args[signature.position(v)] = self.shared.array(array)
        args += map(SizeArg, size_names(kernel))
        self.steps.append(KernelCall(kernel, args, writes, [i for i in reads if i < len(signature.params) + shift],
                                     group.label, float(hint(sum(n.flops for n in group.nodes))),
                                     Origin.of(group.nodes)))

    def reuse(self, operand: Value, result: Value) -> None:
        """Gives a result the memory of an operand that nothing else needs."""
        place = self.places[operand]
        own = isinstance(place, Buffer) and place.kind == "temp" and place.alias_of is None
        dies = operand.producer is not None and operand not in self.graph.outputs and self.readers[operand] == 1
        if own and dies and result not in self.places:
            assert isinstance(place, Buffer)
            self.places[result] = Buffer(f"{place.name}_kept", result.shape, result.dtype, alias_of=place)

    def emit_own(self, node: Node, lowering: Kernel) -> None:
        kernel = with_sizes(lowering.fn(node, self.target, "kernel"))
        shared = {result: operand for operand, result in lowering.inplace}
        operands: list[Place] = [self.place(v) for v in node.operands]
        for k, operand in shared.items():
            self.reuse(node.operands[operand], node.results[k])
        results = [self.place(v) for v in node.results]
        writes: list[int] = []
        args: list[Arg] = list(operands)
        for i, result in enumerate(results):
            if i in shared:
                if not (isinstance(result, Buffer) and result.alias_of is operands[shared[i]]):
                    self.steps.append(Copy(operands[shared[i]], result))
                args[shared[i]] = result
                writes.append(shared[i])
            else:
                writes.append(len(args))
                args.append(result)
        reads = range(len(operands))
        args += map(SizeArg, size_names(kernel))
        self.steps.append(KernelCall(kernel, args, writes, reads, node.op.name, float(hint(node.flops)),
                                     Origin.of([node])))


