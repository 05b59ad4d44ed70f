"""Compiling models that are more than one program.

Sizes that data decide are symbolic sizes of one program (`frontend.data_sizes`). Where the elements themselves decide
how a program looks (the condition of an `If` whose branches have different shapes, an axis, a loop that changes the
type of its state), the model is cut: the part before the node that asks is one compiled program that also gives what
the rest reads, and the rest is a program for each answer, kept under it. Nothing is computed by NumPy, and nothing
twice but the node at the cut. Every part serves all sizes.

A part that cannot be compiled with open sizes (an axis is squeezed that data make 1...) asks for them as for other
elements, and is compiled for each.

Inputs that decide shapes (`Reshape`'s second) need no cut: their elements are part of the key, as those of any argument
that is no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...ir.dims import Dim
from ...ir.errors import CompileError, OnnxError, TreadleError
from ...ir.graph import Value
from ...ir.phases import names_in
from .. import functions as F
from .. import tree
from ..compile import Compiled, log
from ..dispatch import as_tensor
from ..dynamic import Dynamic, generic_key
from ..recording import current_trace
from ..signature import Scanned
from ..tensor import Tensor
from ..trace import Spec
from .node import NeedsValue
from .run import Frame, concrete, eager_limit, open_sizes
from .uses import names_used
from .values import is_symbolic, is_text

ANSWER_ELEMENTS = 4096
"""A program cannot depend on more elements than this."""
STATIC_ELEMENTS = 64
PROGRAMS = 256
"""Programs kept behind one cut."""


class Fixed:
    """Elements of an argument that are part of the program."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fixed) and _key(self.array) == _key(other.array)

    def __hash__(self) -> int:
        return hash(_key(self.array))

    def __repr__(self) -> str:
        return f"{self.array.dtype}{self.array.tolist()}"


def _key(array: np.ndarray) -> tuple[Any, ...]:
    elements = tuple(array.reshape(-1)) if array.dtype == object else array.tobytes()
    return (array.shape, array.dtype.str, elements)


@dataclass
class Cut:
    """Where a program ends and the next begins.

    Attributes:
        node: what asked.
        position: its number.
        structure, leaves: the values that the rest reads; a traced tensor's place is taken by None.
        traced: which leaves those are.
        answers: what the node has been told before.
        programs: the rest, by the answer.
        specs: the types of the tensors that the rest is given, with their symbolic sizes.
    """

    node: str
    position: int
    structure: tree.Structure
    leaves: list[Any]
    traced: list[int]
    answers: list[np.ndarray]
    programs: dict[Any, Compiled]
    specs: list[Spec]


class Part:
    """A part of a model as a function to compile, which knows what sizes of its arguments are open."""

    def __init__(self, function: Callable[..., Any], dynamic_specs: Callable[..., Any]):
        self.function, self.dynamic_specs = function, dynamic_specs
        self.__name__ = "part"

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.function(*args, **keywords)


class Stages:
    """A model as compiled parts; called with its arguments."""

    def __init__(self, owner: OnnxCompiled, open_sizes: bool = True):
        self.owner, self.module, self.open_sizes = owner, owner.fn, open_sizes
        self.cuts: list[Cut] = []
        self.texts: list[dict[int, np.ndarray]] = []  # outputs that are strings, by place
        self.first = self._compiled(Part(self._begin, self.module.dynamic_specs))

    def __call__(self, args: Sequence[Any], keywords: dict[str, Any]) -> Any:
        """Runs part after part."""
        result = self.first(*args, **keywords)
        while "outputs" not in result:
            (number,) = (int(k[4:]) for k in result if k.startswith("cut:"))
            cut = self.cuts[number]
            result = self._rest(cut, result["answer"].numpy())(result["live"])
        outputs = list(result["outputs"])
        for name in result:
            if name.startswith("text:"):
                for place, text in self.texts[int(name[5:])].items():
                    outputs[place] = text
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _rest(self, cut: Cut, answer: np.ndarray) -> Compiled:
        key = _key(answer)
        if key not in cut.programs:
            if len(cut.programs) >= PROGRAMS:
                cut.programs.pop(next(iter(cut.programs)))
            cut.programs[key] = self._compiled(Part(lambda live: self._continue(cut, live, answer),
                                                    lambda args, keywords: ((cut.specs,), {})))
        return cut.programs[key]

    def _compiled(self, part: Part) -> Compiled:
        made = Compiled(part, self.owner.target, self.owner.amp)
        made.freeze, made.stats = self.owner.freeze, self.owner.stats
        made.dynamic = None if self.owner.dynamic is None else Dynamic(None, self.owner.dynamic.fixed)
        return made

    def _begin(self, *args: Any, **keywords: Any) -> Any:
        with open_sizes(self.open_sizes):
            frame = self.module.frame(self.module.bind(args, keywords))
        return self._advance(frame, 0, [])

    def _continue(self, cut: Cut, live: list[Tensor], answer: np.ndarray) -> Any:
        leaves = list(cut.leaves)
        for place, tensor in zip(cut.traced, live):
            leaves[place] = tensor
        with open_sizes(self.open_sizes):
            frame = self.module.frame({})
        frame.env.update(tree.unflatten(cut.structure, leaves))
        return self._advance(frame, cut.position, [*cut.answers, answer])

    def _advance(self, frame: Frame, position: int, answers: list[np.ndarray]) -> Any:
        """Runs nodes from `position` on, up to the end or the next cut."""
        with eager_limit(self.module.max_elements):
            return self._walk(frame, position, answers)

    def _walk(self, frame: Frame, position: int, answers: list[np.ndarray]) -> Any:
        context, nodes = frame.context, self.module.nodes
        context.answers = answers
        for i in range(position, len(nodes)):
            try:
                frame.step(nodes[i])
            except NeedsValue as error:
                if error.value._trace not in (None, current_trace()):  # None: a buffer
                    raise
                return self._cut(frame, i, context.answers, error)
            context.answers, context.asked = [], 0
        values = [frame.lookup(name) for name in self.module.output_names]
        texts = {i: v for i, v in enumerate(values) if is_text(v) or self.module.output_names[i] in self.module.text}
        outputs = [None if i in texts else concrete(v) for i, v in enumerate(values)]
        if not texts:
            return {"outputs": outputs}
        self.texts.append(texts)
        return {"outputs": outputs, f"text:{len(self.texts) - 1}": as_tensor(0)}  # a program has an output

    def _cut(self, frame: Frame, position: int, answers: list[np.ndarray], error: NeedsValue) -> Any:
        value = error.value
        if value.type.is_static and value.size > ANSWER_ELEMENTS:
            raise OnnxError(f"{error.message}. A program for every value of {value.size:,} elements is out of reach")
        wanted = names_used(self.module.nodes[position:]) | set(self.module.output_names)
        live = {name: v for name, v in frame.env.items()
                if name in wanted and name not in self.module.stored_names}
        leaves, structure = tree.flatten(live)
        traced = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_tracer]
        tensors = [leaves[i] for i in traced]
        for i in traced:
            leaves[i] = None
        tensors += [_witness(name) for name in _unnamed(leaves, tensors)]
        specs = [Spec(t.type) for t in tensors]
        self.cuts.append(Cut(error.message.split(': ')[0], position, structure, leaves, traced, answers, {}, specs))
        return {f"cut:{len(self.cuts) - 1}": None, "live": tensors, "answer": value}


def _unnamed(leaves: Sequence[Any], tensors: Sequence[Tensor]) -> list[str]:
    """The names of sizes that known values hold, or tensors have in formulas, and no tensor has as an axis."""
    held = {name for leaf in leaves if is_symbolic(leaf) for name in names_in(tuple(leaf.reshape(-1)))}
    held |= {name for t in tensors for name in names_in(t.shape)}
    return sorted(held - {str(n) for t in tensors for n in t.shape})


def _reads_data(value: Value) -> bool:
    """Whether a traced value depends on elements of inputs, not on their sizes alone."""
    seen, pending = {value}, [value]
    while pending:
        node = pending.pop().producer
        if node is None:
            return True
        pending += [v for v in node.operands if v not in seen]
        seen.update(node.operands)
    return False


def _witness(name: str) -> Tensor:
    """A tensor without elements that has a size as an axis."""
    return F.broadcast_to(F.zeros((1, 1), "uint8")[:, :0], (Dim(name), 0))


class OnnxCompiled(Compiled):
    """A compiled model; in parts where shapes depend on data."""

    def __init__(self, fn: Any, target: str = "cpu", amp: Any = None, memory_budget: int | None = None):
        super().__init__(fn, target, amp, memory_budget)
        self._stages: dict[Any, Stages] = {}

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Runs the program for these arguments; see `Compiled`."""
        names = self.fn.input_names
        rest = names[len(args):]
        if keywords and all(name in keywords for name in rest):  # by name or by place: one program
            args, keywords = (*args, *(keywords[n] for n in rest)), {k: v for k, v in keywords.items() if k not in rest}
        args = tuple(self._fix(name, value) for name, value in zip(names, args)) + args[len(names):]
        keywords = {name: self._fix(name, value) for name, value in keywords.items()}
        return super().__call__(*args, **keywords)

    def _fix(self, name: str, value: Any) -> Any:
        """The argument with its elements as part of the program, where it decides shapes."""
        if isinstance(value, np.ndarray) and value.dtype.kind in "OUS":
            return Fixed(value.astype(object))
        if name not in self.fn.static_inputs or isinstance(value, Fixed) or value is None:
            return value
        if isinstance(value, Tensor):
            if value.is_tracer:
                return value
            value = value.numpy()
        array = np.asarray(value, self.fn.input_dtype(name))
        return Fixed(array) if array.size <= STATIC_ELEMENTS else array

    def _make_generic(self, *args: Any, **keywords: Any) -> Any:
        try:
            return super()._make_generic(*args, **keywords)
        except NeedsValue:
            raise
        except OnnxError as error:
            self._refused = error
            return None

    def _hopeless(self, error: TreadleError) -> bool:
        return isinstance(error, NeedsValue) and _reads_data(error.value._value)

    def _run(self, found: Scanned, args: Sequence[Any], keywords: dict[str, Any]) -> Any:
        key = generic_key(self.fn, self._open(args, keywords)) if self._stages else None
        stages = self._stages.get(key)
        if stages is None:
            try:
                if not self.fn.text:
                    return super()._run(found, args, keywords)
                failure: TreadleError | None = None
            except NeedsValue:
                failure = None
            except TreadleError as error:  # perhaps because of sizes that data decide: without them, then
                if found.key in self._programs or not self.fn.counted:  # not while tracing or compiling
                    raise
                failure = error
            key = generic_key(self.fn, self._open(args, keywords))
            stages = Stages(self, failure is None)
            if failure is not None:
                return self._closed(stages, key, failure, args, keywords)
            self._stages[key] = stages
        self.stats.calls += 1
        try:
            return stages(args, keywords)
        except TreadleError as error:
            if not stages.open_sizes:
                raise
            return self._closed(Stages(self, False), key, error, args, keywords)

    def _closed(self, stages: Stages, key: Any, failure: TreadleError, args: Sequence[Any],
                keywords: dict[str, Any]) -> Any:
        """Tries a program for each of the sizes that data decide; the failure is raised again if that fails too."""
        try:
            result = stages(args, keywords)
        except TreadleError:
            raise failure from None
        if stages.cuts:
            log.warning("%s: compiled for each of the sizes that data decide, since one program cannot serve all: %s",
                        self.__name__, failure)
        self._stages[key] = stages
        return result

    def save(self, path: Any) -> None:
        """Writes the program of the last call to a file; see `Compiled.save`.

        Raises:
            CompileError: elements decide how it looks, so it is several programs.
        """
        if self._stages and self._last is None:
            nodes = sorted({str(cut.node) for stages in self._stages.values() for cut in stages.cuts})
            raise CompileError(f"{self.__name__}: data decide how the program looks at {', '.join(nodes)}, so it is "
                               "compiled in parts, and an artifact holds one program. End the model before that node "
                               "(select_outputs), or give the node's operand as a constant")
        super().save(path)
