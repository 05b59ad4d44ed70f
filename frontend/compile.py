"""`compile`: functions of tensors as machine code.

A compiled function is traced at its first call, and again for arguments of another kind: other containers, shapes,
dtypes, other values of what is not a tensor, or another state of what the trace read besides (a module's training
mode). Each trace goes through `passes`, is lowered and built, and is kept. Calls with known arguments find their
program by a key and run it on the tensors' own memory: captured parameters are read where they lie, assigned state is
updated in place.

Compiled functions are not recorded: to train, compile the gradient (`td.compile(td.value_and_grad(fn))`, or
`td.train_step`).
"""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import numpy as np

from ..ir.dtypes import as_dtype
from ..ir.errors import ArgumentsError, CompileError, ShapeError, TreadleError
from ..ir.graph import Graph
from ..ir.location import user_location
from ..ir.types import TensorType
from ..schedules.target import Target
from . import dynamic as opened
from . import tree
from .building import build_executable as build_executable
from .building import passes as passes
from .dynamic import Arguments, Dynamic, Pattern
from .eager import array_type, builder, eager_builder
from .freeze import frozen
from .grad_mode import is_grad_enabled
from .logs import follow_environment
from .program import Program, Stats
from .signature import Description, Scanned, describe, difference, scan
from .specialize import bind_sizes, inline, specialize, with_sizes
from .tensor import Tensor
from .trace import record

log = logging.getLogger("treadle.recompiles")

VARIANTS = 8
"""Programs kept for one signature, told apart by their guards."""
SIGNATURES = 256
"""Signatures that a function keeps programs for; beyond that the oldest is dropped."""


class Compiled:
    """A compiled function; made by `compile`.

    Attributes:
        fn: the function (or graph) it was made from.
        stats: see `Stats`.
        target, amp: as given to `compile`.
    """

    def __init__(self, fn: Any, target: str = "cpu", amp: Any = None, memory_budget: int | None = None):
        if not callable(fn) and not isinstance(fn, Graph):
            raise ArgumentsError(f"compile takes a function, a module or a graph, not {fn!r}", user_location())
        Target.parse(target)
        self.fn = fn
        self.target = target
        self.amp = amp if amp is None else as_dtype(amp)
        self.memory_budget = memory_budget
        self.stats = Stats()
        self._recordable = not isinstance(fn, Graph)
        self.dynamic: Dynamic | None = Dynamic(None)
        self.freeze = False
        self._programs: dict[Any, list[Program]] = {}
        # Programs that serve all sizes of a pattern; `_programs` lists them too.
        self._generic: dict[Any, list[tuple[Pattern, Program]]] = {}
        self._last: Program | None = None
        self._described: Description | None = None
        self._lock = threading.RLock()
        self.__name__ = getattr(fn, "__name__", None) or getattr(fn, "name", type(fn).__name__)
        self.__doc__ = getattr(fn, "__doc__", None)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Runs the program for these arguments, making it first if there is none.

        Raises:
            ArgumentsError: the function does not take such arguments.
            TreadleError: from tracing or compiling.
        """
        found = scan(args, keywords)
        if found.traced or builder() is not eager_builder():
            return self._inline(args, keywords)
        if found.tracked and self._recordable and is_grad_enabled():
            return self._recorded(args, keywords)
        return self._run(found, args, keywords)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """A method: the object it is looked up on is the first argument."""
        return self if instance is None else MethodType(self, instance)

    def _run(self, found: Scanned, args: Sequence[Any], keywords: dict[str, Any]) -> Any:
        for program in self._programs.get(found.key, ()):
            if program.valid():
                break
        else:
            self._refused: TreadleError | None = None
            program = self._for_all_sizes(found, args, keywords) or self._make(found, args, keywords)
            if self._refused is not None:
                log.warning("%s: compiled for each combination of sizes, since it is not one program for all: %s",
                            self.__name__, self._refused)
        self.stats.calls += 1
        self._last = program
        return program(found.arrays)

    def _inline(self, args: Sequence[Any], keywords: dict[str, Any]) -> Any:
        """Inside a trace a compiled function is part of what is traced."""
        if not isinstance(self.fn, Graph):
            return self.fn(*args, **keywords)
        return inline(self.fn, args, keywords)

    def _recorded(self, args: Sequence[Any], keywords: dict[str, Any]) -> Any:
        """Runs uncompiled, so that the gradient of an argument is recorded."""
        log.warning("%s: called with a tensor that requires a gradient, so it runs uncompiled and is recorded; call it "
                    "under td.no_grad(), or compile the gradient: td.compile(td.value_and_grad(fn))", self.__name__)
        return self.fn(*args, **keywords)

    def _open(self, args: Sequence[Any], keywords: dict[str, Any]) -> Arguments | None:
        """The arguments with specs for the tensors that have open sizes; None if none has."""
        return None if self.dynamic is None else self.dynamic.arguments(self.fn, args, keywords)

    def _for_all_sizes(self, found: Scanned, args: Sequence[Any], keywords: dict[str, Any]) -> Program | None:
        """The program for arguments like these of any size; None where all sizes are part of the program."""
        symbolic = isinstance(self.fn, Graph) and bool(self.fn.dims) and self.dynamic is not None
        arguments = None if symbolic or self.dynamic is None else self._open(args, keywords)
        if not symbolic and arguments is None:
            return None
        with self._lock:
            if symbolic:
                self.trace(*args, **keywords)  # the arguments fit, and their sizes agree
            sizes = {} if arguments is None else opened.sizes_of(arguments, args, keywords)
            kept = self._generic.setdefault(opened.generic_key(self.fn, arguments), [])
            for pattern, program in kept:
                if opened.fits(pattern, sizes) and program.valid() and self._keeps_budget(program, found):
                    break
            else:
                made = self._make_generic(arguments, sizes, args, keywords) if len(kept) < VARIANTS else None
                if made is None:
                    return None
                kept.append(made)
                program = made[1]
            self._keep(found.key, program)
            return program

    def _make_generic(self, arguments: Arguments | None, given: dict[str, int], args: Sequence[Any],
                      keywords: dict[str, Any]) -> tuple[Pattern, Program] | None:
        started, reason = time.perf_counter(), "first call" if not self.stats.compiles else "other arguments"
        follow_environment()
        self._check(args, keywords)
        implied = self.dynamic is not None and self.dynamic.declared is None
        failure: TreadleError | None = None
        for pattern in opened.patterns(given) if implied else [{}]:
            try:
                graph = self.fn if arguments is None else self._trace_under(pattern, arguments)
                sizes = bind_sizes(graph, opened.types_of((args, keywords))) if graph.dims else {}
                program = self._compile_sized(graph, sizes)
            except TreadleError as error:
                if not implied or self._hopeless(error):
                    raise
                failure = failure or error
                continue
            taken = ", ".join(f"{name} = {size}" for name, size in pattern.items())
            self._count(started, reason + (f"; for sizes with {taken}, since otherwise: {failure}" if taken else ""))
            return pattern, program
        self._refused = failure
        return None

    def _hopeless(self, error: TreadleError) -> bool:
        """Whether a function that cannot be traced with open sizes cannot with fixed ones either."""
        return False

    def _keeps_budget(self, program: Program, found: Scanned) -> bool:
        return self.memory_budget is None or program.arena_bytes(found.arrays) <= self.memory_budget

    def _compile_sized(self, graph: Graph, sizes: Mapping[str, int]) -> Program:
        """A program for all sizes, made for about the given ones. A memory budget is kept up to the rounded sizes, or,
        where that cannot be, up to these; a call with larger ones asks for another program."""
        try:
            return self._compile_graph(graph, opened.expected(graph, sizes))
        except CompileError:
            if self.memory_budget is None or not sizes:
                raise
            return self._compile_graph(graph, sizes)

    def _trace_under(self, pattern: Pattern, arguments: Arguments) -> Graph:
        positional, keywords = opened.under(pattern, arguments)
        return self.trace(*positional, **keywords)

    def _count(self, started: float, reason: str) -> None:
        seconds = time.perf_counter() - started
        self.stats.compiles += 1
        self.stats.seconds += seconds
        self.stats.reasons.append(reason)
        log.info("%s: compiled in %.2f s: %s", self.__name__, seconds, reason)

    def _keep(self, key: Any, program: Program) -> None:
        kept = self._programs.setdefault(key, [])
        kept.append(program)
        del kept[:-VARIANTS]
        if len(self._programs) > SIGNATURES:
            if not self._generic:
                log.warning("%s: called with more than %d kinds of arguments; the oldest program is dropped. Pad to "
                            "fewer shapes, open sizes with dynamic=, or pass numbers as tensors", self.__name__,
                            SIGNATURES)
            self._programs.pop(next(iter(self._programs)))

    def specialize(self, **sizes: int) -> Compiled:
        """The same function with some open sizes fixed; without any, each combination is a program of its own."""
        fn = with_sizes(self.fn, sizes) if isinstance(self.fn, Graph) and sizes else self.fn
        made = type(self)(fn, self.target, self.amp, self.memory_budget)
        made.dynamic = self.dynamic.fixing(sizes) if sizes and self.dynamic is not None else None
        made.freeze = self.freeze
        return made

    def _make(self, found: Scanned, args: Sequence[Any], keywords: dict[str, Any]) -> Program:
        with self._lock:
            for program in self._programs.get(found.key, ()):  # another thread may have made it
                if program.valid():
                    return program
            follow_environment()
            started = time.perf_counter()
            self._check(args, keywords)
            described = describe(self._names(len(args)), args, keywords)
            reason = self._reason(found, described)
            self._described = described
            program = self._compile(args, keywords)
            self._keep(found.key, program)
            self._count(started, reason)
            return program

    def _reason(self, found: Scanned, described: Description) -> str:
        if self._described is None:
            return "first call"
        if found.key in self._programs:
            return "a module's mode or parts, or a captured scalar, changed"
        return difference(self._described, described) or "other containers"

    def _check(self, args: Sequence[Any], keywords: dict[str, Any]) -> None:
        """That the function takes such arguments at all."""
        if isinstance(self.fn, Graph):
            return
        try:
            signature = inspect.signature(getattr(self.fn, "forward", self.fn))
        except (TypeError, ValueError):
            return
        try:
            signature.bind(*args, **keywords)
        except TypeError as error:
            raise ArgumentsError(f"{self.__name__}{signature} cannot be called so: {error}", user_location()) from None

    def _names(self, count: int) -> list[str]:
        if isinstance(self.fn, Graph):
            return []
        try:
            return list(inspect.signature(getattr(self.fn, "forward", self.fn)).parameters)[:count]
        except (TypeError, ValueError):
            return []

    def trace(self, *args: Any, **keywords: Any) -> Graph:
        """The graph that a call with these arguments runs, before the passes."""
        if not isinstance(self.fn, Graph):
            return record(self.fn, args, keywords)
        leaves, structure = tree.flatten((tuple(args), keywords))
        declared = self.fn.meta.get("in_structure")
        if declared is not None and declared != structure:
            raise ArgumentsError(f"{self.__name__}: called with the arguments {structure}, but the graph was "
                                 f"traced with {declared}", user_location())
        return specialize(self.fn, [array_type(np.asarray(leaf)) for leaf in leaves])

    def _compile(self, args: Sequence[Any], keywords: dict[str, Any]) -> Program:
        graph = self.trace(*args, **keywords)
        if graph.dims:
            raise ShapeError(f"{self.__name__}: the sizes {', '.join(sorted(graph.dims))} are still symbolic")
        return self._compile_graph(graph)

    def _compile_graph(self, graph: Graph, sizes: Mapping[str, int] | None = None) -> Program:
        meta = graph.meta
        captures: dict[int, Tensor] = dict(meta.get("captures", {}))
        assigns: dict[int, Tensor] = dict(meta.get("assigns", {}))
        if self.freeze:
            graph, captures = frozen(graph, captures, assigns)
        count = len(graph.outputs) - len(assigns)
        out_structure = meta.get("out_structure") or _plain(count)
        static = {str(i): text for i, text in meta.get("static", {}).items()}
        in_structure = meta.get("in_structure") or _plain_arguments(graph, captures)
        header = {"static": static, "in_structure": tree.to_json(in_structure),
                  "out_structure": tree.to_json(out_structure), "results": count, "bound": len(captures)}
        executable = build_executable(graph, self.target, self.amp, header, self.memory_budget, sizes,
                                      self.freeze)
        made = getattr(executable, "stats", None)
        if made is not None:
            self.stats.kernels, self.stats.compiled_kernels = made.kernels, self.stats.compiled_kernels + made.compiled
        return Program(executable, captures, [assigns[i] for i in sorted(assigns)], meta.get("guards", ()),
                       out_structure, [v.type for v in graph.outputs[:count]])

    def save(self, path: Any) -> None:
        """Writes the program of the last call, with the tensors it is bound to, to one file that `load` reads.

        Raises:
            CompileError: the function was not called yet.
            ArtifactError: the file cannot be written.
        """
        from ..schedules import artifact

        if self._last is None:
            raise CompileError(f"{self.__name__} was not compiled yet: call it once with the arguments it is to be "
                               "saved for", user_location())
        program = self._last
        names = [info.name for info in program.executable.signature.inputs]
        tensors = {names[i]: t.numpy() for i, t in program.captures.items()}
        artifact.save(program.executable, path, tensors)

    def __repr__(self) -> str:
        return f"<compiled {self.__name__} for {self.target}: {self.stats.compiles} programs>"


class Loaded:
    """A compiled function read from a file: runs without tracing and compiling. Made by `load`.

    Attributes:
        executable: the program.
        tensors: the captured tensors by name; what the program assigns is updated in them.
    """

    def __init__(self, executable: Any):
        signature = executable.signature
        header = signature.meta
        self.executable = executable
        self.__name__ = signature.name
        self.in_structure = tree.from_json(header["in_structure"])
        self.static = {int(i): text for i, text in header["static"].items()}
        out_structure = tree.from_json(header["out_structure"])
        first = len(signature.inputs) - header["bound"]
        self.inputs = signature.inputs[:first]
        self.tensors = {info.name: Tensor(executable.tensors[info.name], role="state")
                        for info in signature.inputs[first:]}
        types = [TensorType(info.shape, info.dtype) for info in signature.outputs[:header["results"]]]
        self._program = Program(executable, {first + i: t for i, t in enumerate(self.tensors.values())}, [], [],
                                out_structure, types)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Runs the program.

        Raises:
            ArgumentsError: the arguments have another tree than the program was saved with.
            ShapeError, DTypeError: an argument has another type.
        """
        leaves, structure = tree.flatten((tuple(args), keywords))
        if structure != self.in_structure:
            raise ArgumentsError(f"{self.__name__}: called with the arguments {structure}; the program was saved for "
                                 f"{self.in_structure}", user_location())
        arrays = []
        for i, (leaf, path) in enumerate(zip(leaves, structure.paths())):
            if i not in self.static:
                arrays.append(leaf._elements("its memory", "the function itself") if isinstance(leaf, Tensor) else leaf)
            elif repr(leaf) != self.static[i]:
                raise ArgumentsError(f"{self.__name__}: the argument {path} was {self.static[i]} when the program was "
                                     f"saved and is part of it; got {leaf!r}", user_location())
        return self._program(arrays)

    def __repr__(self) -> str:
        return f"<loaded {self.__name__}({', '.join(f'{i.name}: {i}' for i in self.inputs)})>"


def compile(fn: Any = None, *, target: str = "cpu", amp: Any = None, dynamic: Mapping[str, Any] | None = None,
            specialize: bool = False, freeze: bool = False) -> Any:
    """Compiles a function of tensors, a module, or a graph. Also a decorator, with or without options.

    Args:
        fn: called with tensors or arrays, nested in tuples, lists and dicts; other arguments are part of the program.
            A function may be called with arguments of any kind, each kind is compiled once; a graph takes its inputs,
            in the tree it was traced with.
        target: "cpu" (this machine), "cpu:avx2"...; see `schedules.target`.
        amp: "bfloat16" computes matrix products and convolutions in that dtype.
        dynamic: which sizes of arguments are open, so that one program serves them all: parameter name -> shape with
            names for what is open, `{"x": ("batch", 784)}`, or -> axis and name, `{"x": {0: "batch"}}`; for a
            parameter that holds several tensors it counts for each. Graphs with symbolic sizes and imported models
            know theirs.
        specialize: no size is open: each combination of sizes is compiled, once.
        freeze: parameters, and whatever else the function uses from outside and does not assign, become constants with
            the values that they have when a program is made. What depends on them alone is then computed at once,
            batch norms are folded into the weights before them, and weights are laid out as kernels read them: for
            serving. Later changes of parameters do not show, and results differ in the last bits.

    Returns:
        A `Compiled` function of the same arguments.

    Raises:
        TargetError: no such target, or this machine cannot run it.
    """
    if fn is None:
        return lambda function: compile(function, target=target, amp=amp, dynamic=dynamic, specialize=specialize,
                                         freeze=freeze)
    kind = getattr(fn, "compiled_as", Compiled)  # a module may bring a way of its own
    made = kind(fn, target, amp)
    made.dynamic = None if specialize else Dynamic(dynamic)
    made.freeze = freeze
    return made


def load(path: Any) -> Loaded:
    """Reads a compiled function that `Compiled.save` wrote; needs no compiler.

    Raises:
        ArtifactError: the file is missing, damaged, or of a newer version.
        TargetError: it was compiled for another machine.
    """
    from ..schedules import artifact

    return Loaded(artifact.load(path))


def _plain(count: int) -> tree.Structure:
    """What a graph gives that was not traced from a function: a tensor, or a tuple of several."""
    return tree.LEAF if count == 1 else tree.Structure("tuple", tuple(range(count)), (tree.LEAF,) * count)


def _plain_arguments(graph: Graph, captures: dict[int, Tensor]) -> tree.Structure:
    count = len(graph.inputs) - len(captures)
    positional = tree.Structure("tuple", tuple(range(count)), (tree.LEAF,) * count)
    return tree.Structure("tuple", (0, 1), (positional, tree.Structure("dict")))
