"""Loop nests for elementwise groups.

The iteration domain is the shape of the outputs. Axes that every access walks through as one are collapsed; the
innermost is cut into vectors; what is outside runs in parallel when there is work enough. All outputs of an element
are computed before the first is stored, so that an output may take over the memory of an input.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from ..ir.dims import Dim, Size
from ..ir.graph import Node, Value
from ..ir.opdef import rule
from .loops_eval import Access, Evaluator, Idx, InMemory, Recorder, count_uses
from .loops_index import Axis, Index, Merged, flatten, opaque, unflatten
from .loops_turn import emit_turned, find_turn
from .lower_slots import Reduce, compute_dtype, let, storage_dtype
from .sizes import exact, expression, expressions, hint, is_dynamic

SERIAL_WORK = 40_000  # element operations below which waking other threads costs more than it saves
MOST_PARTS = 8        # of a concatenation that have loops of their own
BLOCK = 4096          # elements per step of a parallel loop over one long axis


@dataclass(frozen=True)
class Signature:
    """The parameters of a kernel: inputs, then outputs; an output listed in `inplace` has its input's parameter."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    inplace: dict[Value, Value]

    @property
    def params(self) -> tuple[Value, ...]:
        return (*self.inputs, *(v for v in self.outputs if v not in self.inplace))

    def position(self, output: Value) -> int:
        """The parameter an output is written to."""
        return self.params.index(self.inplace.get(output, output))

    @property
    def wide(self) -> bool:
        """Whether offsets need 64 bits."""
        return self.dynamic or any(v.type.size >= 1 << 31 for v in self.params)

    @property
    def dynamic(self) -> bool:
        """Whether a size is known only at run time."""
        return is_dynamic(*(v.type.size for v in self.params))


class KernelFrame:
    """An open PrimFunc: declares the parameters, gives their places, returns the function at the end."""

    def __init__(self, name: str, signature: Signature):
        self.name, self.signature = name, signature
        self.places: dict[Value, InMemory] = {}
        self.function: Any = None

    @contextmanager
    def building(self) -> Iterator[KernelFrame]:
        _indices.wide, _indices.dynamic = self.signature.wide, self.signature.dynamic
        with IRBuilder() as builder:
            with T.prim_func(s_tir=True):
                T.func_name(self.name)
                T.func_attr({"global_symbol": self.name, "tirx.noalias": True})
                declared = [parameter(f"p{i}", v) for i, v in enumerate(self.signature.params)]
                for v, buffer in zip(self.signature.params, declared):
                    self.places[v] = InMemory(v, flat(buffer, v), self.signature.wide)
                for output, source in self.signature.inplace.items():
                    self.places[output] = InMemory(output, self.places[source].buffer, self.signature.wide)
                yield self
        self.function = builder.get()


def parameter(name: str, v: Value) -> Any:
    """Declares a kernel parameter. No alignment beyond an element's is assumed."""
    dtype = storage_dtype(v.dtype)
    return T.arg(name, tirx.decl_buffer(expressions(v.shape), dtype, name, data_alignment=v.dtype.itemsize))


def flat(buffer: Any, v: Value) -> Any:
    """The same memory as one row."""
    if v.rank == 1:
        return buffer
    return T.decl_buffer((expression(v.type.size),), buffer.dtype, data=buffer.data, align=v.dtype.itemsize)


def lanes_for(values: Sequence[Value], vector_bits: int) -> int:
    """Elements of a vector: by the widest float computed with, else by the widest integer."""
    floats = [v.dtype for v in values if v.dtype.is_float]
    bits = [64 if d == "float64" else 32 for d in floats] or [v.dtype.bits for v in values] or [32]
    return max(vector_bits // max(bits), 1)


# Functions that TVM cannot write for a vector: f64 ones of the C library, and the remainder of floats.
SCALAR_F64 = frozenset("expm1 log2 log1p cbrt hypot asin acos atan atan2 sinh cosh asinh acosh atanh erf erfc "
                       "softplus".split())
SCALAR_FLOAT = frozenset(("fmod", "remainder", "floor_divide"))


def vectorizable(nodes: Iterable[Node]) -> bool:
    """Whether loops over these nodes may be vector loops."""
    for node in nodes:
        dtype = node.operands[0].dtype if node.operands else None
        if dtype is not None and dtype.is_float and (
                node.op.name in SCALAR_FLOAT or dtype == "float64" and node.op.name in SCALAR_F64):
            return False
    return True


class _Indices(threading.local):
    wide = False
    dynamic = False


_indices = _Indices()


def loop(extent: Any, kind: str = "serial") -> Any:
    """A loop context giving its variable; a loop of one step gives 0 and no loop. Counts in 64 bits in a kernel with a
    parameter of 2**31 elements or more, or of a size that is known only at run time."""
    if isinstance(extent, int):
        if extent == 1:
            return nullcontext(0)
        if _indices.dynamic or _indices.wide and kind in ("serial", "parallel"):
            extent = tirx.const(extent, "int64")
    return getattr(T, kind)(expression(extent))


def each_vector(extent: Size, lanes: int, body: Any) -> None:
    """`body(start, lanes)` over an axis in whole vectors, then for the rest: at once if its size is known, else in
    narrower vectors and single elements."""
    if isinstance(extent, int):
        lanes = min(lanes, extent)
        vectors, tail = divmod(extent, lanes)
        if vectors:
            with loop(vectors) as j:
                body(j * lanes, lanes)
        if tail:
            body(vectors * lanes, tail)
        return
    whole = expression(extent)
    done: Any = None
    for width in narrowing(lanes):
        count = T.bind(tirx.truncdiv(whole if done is None else whole - done, tirx.const(width, "int64")))
        with T.serial(count) as j:
            body(j * width if done is None else done + j * width, width)
        done = T.bind(count * width if done is None else done + count * width)


def narrowing(lanes: int) -> list[int]:
    """Widths of the vectors that an axis of unknown size is cut into."""
    return [lanes, *([lanes // 4] if lanes >= 8 else []), *([1] if lanes > 1 else [])]


def work_per_element(nodes: Sequence[Node]) -> float:
    """Rough operations per element of a group, to tell light kernels from heavy ones."""
    total = 1.0
    for node in nodes:
        lowering = rule("lower", node.op, node.loc)
        total += 1.0 if isinstance(lowering, Reduce) else lowering.cost
    return total


def collapse(axes: Sequence[Axis], strides: Sequence[dict[Axis, Any]], fixed: frozenset[Axis],
             may_join: Any = lambda a, b: True) -> list[Axis]:
    """Axes with neighbours joined wherever every access goes through the two as through one."""
    groups: list[list[Axis]] = []
    for axis in axes:
        if axis.extent == 1:
            continue
        last = groups[-1][-1] if groups else None
        if last is not None and not fixed & {last, axis} and may_join(last, axis) and all(
                s.get(last, 0) == s.get(axis, 0) * axis.extent for s in strides):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return [group[0] if len(group) == 1 else Merged(group) for group in groups]


def linear(position: Index) -> tuple[dict[Axis, Any], frozenset[Axis]]:
    """The strides of a position in the axes, and the axes that it depends on in other ways."""
    strides = {a: c for a, c in position.terms.items() if isinstance(a, Axis)}
    other: frozenset[Axis] = frozenset().union(*(a.axes for a in position.terms if not isinstance(a, Axis)))
    return strides, other


@dataclass
class Domain:
    """Axes of an elementwise group, collapsed, and the index of each output."""

    loops: list[Axis]
    indices: dict[Value, Idx]
    accesses: list[Access]


def domain_of(shape: Sequence[Size], nodes: Sequence[Node], outputs: Sequence[Value],
              recorder: Recorder | None = None) -> Domain:
    """The collapsed iteration domain over `shape` of a group without reductions."""
    axes = [Axis(n, f"i{k}") for k, n in enumerate(shape)]
    position = flatten([Index.of(a) for a in axes], shape)
    indices = {v: unflatten(position, v.shape) for v in outputs}
    recorder = recorder or Recorder(nodes, {})
    for v in outputs:
        recorder.value(v, indices[v])
    seen = [linear(access.position) for access in recorder.accesses]
    fixed = frozenset(recorder.exposed).union(*(other for _, other in seen))
    strides = [s for s, _ in seen] + [linear(position)[0]]
    return Domain(collapse(axes, strides, fixed), indices, recorder.accesses)


def refine(shapes: Sequence[Sequence[Size]]) -> tuple[Size, ...]:
    """The coarsest shape that every given shape (all of one size) is a grouping of, or the first if there is none."""
    cuts: set[Any] = set()
    total: Any = math.prod(shapes[0])
    if total == 0 or all(tuple(shape) == tuple(shapes[0]) for shape in shapes) and is_dynamic(total):
        return tuple(shapes[0])
    if is_dynamic(total):
        return _refine_dynamic(shapes, total)
    for shape in shapes:
        step: Any = 1
        for size in reversed(shape):
            step *= size
            cuts.add(step)
    ordered = sorted(cuts | {1, total})
    if any(b % a for a, b in zip(ordered, ordered[1:])):
        return tuple(shapes[0])
    sizes = [b // a for a, b in zip(ordered, ordered[1:])]
    return tuple(reversed(sizes))


def _refine_dynamic(shapes: Sequence[Sequence[Size]], total: Size) -> tuple[Size, ...]:
    cuts: set[Size] = {1, total}
    for shape in shapes:
        step: Size = 1
        for size in reversed(shape):
            step = step * size
            cuts.add(step)
    ordered = sorted(cuts, key=_large)
    sizes = [exact(b, a) for a, b in zip(ordered, ordered[1:])]
    if any(size is None for size in sizes):
        return tuple(shapes[0])
    return tuple(size for size in reversed(sizes) if size is not None)


def _large(size: Size) -> int:
    """An order of sizes in which a factor stands before what it divides."""
    return size if isinstance(size, int) else size.evaluate({n: 10_007 + 1_000 * i for i, n in
                                                             enumerate(sorted(size.names))})


class ElementwiseKernel:
    """Writes the kernel of an elementwise group; see `elementwise_kernel`."""

    def __init__(self, frame: KernelFrame, nodes: Sequence[Node], outputs: Sequence[Value], target: Any):
        self.outputs = outputs
        self.evaluator = Evaluator(frozenset(nodes), dict(frame.places), count_uses(nodes, outputs))
        self.sinks = {v: frame.places[v] for v in outputs}
        for v in outputs:
            self.evaluator.places.pop(v)
        self.lanes = lanes_for([v for node in nodes for v in node.results], target.vector_bits)
        if not vectorizable(nodes):
            self.lanes = 1
        self.domain = domain_of(refine([v.shape for v in outputs]), nodes, outputs)
        self.joints = self.find_joints(nodes) if self.domain.loops else {}
        self.work = work_per_element(nodes)
        self.parallel = target.threads > 1 and hint(outputs[0].type.size) * self.work > SERIAL_WORK

    def element(self) -> None:
        """Computes every output at the current indices, then stores them."""
        self.evaluator.fresh()
        indices = self.domain.indices
        values = [let(self.evaluator.value(v, indices[v])) for v in self.outputs]
        for v, value in zip(self.outputs, values):
            self.sinks[v].store(indices[v], value)

    def vector(self, axis: Axis, start: Any, lanes: int) -> None:
        with loop(lanes, "vectorized") as lane:
            axis.bind(start + lane)
            self.element()

    def emit(self) -> None:
        size = self.outputs[0].type.size
        turned = self.lanes > 1 and find_turn(self.domain.loops, self.domain.accesses, self.lanes) is not None
        if self.parallel and isinstance(size, Dim) and not turned:
            alone_if_small(self, size, self.work, self.emit_loops)
        else:
            self.emit_loops()

    def emit_loops(self) -> None:
        loops = self.domain.loops
        if not loops:
            self.element()
        elif len(loops) == 1:
            self.emit_flat(loops[0])
        else:
            self.emit_nest(loops)

    def emit_flat(self, axis: Axis) -> None:
        """One long axis: parallel blocks of vectors, and the tail."""
        if isinstance(axis.extent, Dim):
            return self.emit_flat_dynamic(axis)
        lanes = min(self.lanes, axis.extent)
        vectors, tail = divmod(axis.extent, lanes)
        per_block = max(BLOCK // lanes, 1)
        blocks = -(-vectors // per_block) if self.parallel else 1
        with loop(blocks, "parallel") as b:
            count: Any = vectors if blocks == 1 else tirx.min(per_block, vectors - b * per_block)
            if isinstance(count, int) or vectors % per_block == 0:
                count = vectors if blocks == 1 else per_block
            with loop(count) as j:
                self.vector(axis, (b * per_block + j) * lanes, lanes)
        if tail:
            self.vector(axis, vectors * lanes, tail)
        return None

    def emit_flat_dynamic(self, axis: Axis) -> None:
        lanes, whole = self.lanes, expression(axis.extent)
        block = max(BLOCK // lanes, 1)
        vectors = T.bind(tirx.truncdiv(whole, tirx.const(lanes, "int64")))
        blocks = tirx.truncdiv(vectors + (block - 1), tirx.const(block, "int64"))
        with loop(blocks if self.parallel else 1, "parallel") as b:
            with loop(tirx.min(vectors - b * block, block) if self.parallel else vectors) as j:
                self.vector(axis, (b * block + j) * lanes, lanes)
        if lanes > 1:
            with loop(whole - vectors * lanes) as j:
                self.vector(axis, vectors * lanes + j, 1)

    def emit_nest(self, loops: list[Axis]) -> None:
        """Several axes: the outer ones as one parallel loop, the innermost in vectors."""
        turn = find_turn(loops, self.domain.accesses, self.lanes) if self.lanes > 1 else None
        if turn is not None:
            emit_turned(self, turn)
            return
        *outer, inner = loops
        with self.steps(math.prod(a.extent for a in outer)) as row:
            self.bind_outer(outer, row)
            self.row(inner)

    def steps(self, count: Any) -> Any:
        """The loop over independent steps."""
        return loop(count, "parallel" if self.parallel else "serial")

    def bind_outer(self, axes: Sequence[Axis], position: Any) -> None:
        bind_flat(axes, position)

    def row(self, inner: Axis) -> None:
        """The innermost axis at the current place of the others."""
        if not self.joints.get(inner):
            each_vector(inner.extent, self.lanes, lambda start, lanes: self.vector(inner, start, lanes))
            return
        for first, stop in itertools.pairwise([0, *self.joints[inner], inner.extent]):
            inner.lo, inner.hi = first, stop - 1
            each_vector(stop - first, self.lanes, lambda start, lanes, first=first: self.vector(
                inner, first + start, lanes))
        inner.lo, inner.hi = 0, inner.extent - 1

    def find_joints(self, nodes: Sequence[Node]) -> dict[Axis, list[int]]:
        """Where along an innermost axis the parts of a concatenation meet: each part then has a loop of its own, that
        reads one operand and need not choose."""
        found: dict[Axis, set[int]] = {}
        for node in nodes:
            parts = [v.shape[node.attrs["axis"]] for v in node.operands] if node.op.name == "concat" else []
            same = [v for v in self.outputs if parts and v.shape == node.result.shape]
            if not same or len(parts) > MOST_PARTS or is_dynamic(*parts):
                continue
            place = self.domain.indices[same[0]][node.attrs["axis"]]
            if place.const == 0 and len(place.terms) == 1 and place.terms.get(self.domain.loops[-1]) == 1:
                meet = found.setdefault(self.domain.loops[-1], set())
                meet.update(itertools.accumulate(parts))
        return {axis: sorted(m for m in meet if 0 < m < axis.extent) for axis, meet in found.items()
                if isinstance(axis.extent, int)}


def alone_if_small(kernel: Any, size: Size, work: float, emit: Callable[[], None]) -> None:
    """The code of a kernel twice: in parallel, and for sizes at which waking other threads would take longer."""
    with T.If(expression(size) > tirx.const(int(SERIAL_WORK / work), "int64")):
        with T.Then():
            emit()
        with T.Else():
            kernel.parallel = False
            emit()


def bind_flat(axes: Sequence[Axis], position: Any) -> None:
    """Gives each axis its part of a row-major position."""
    whole: Any = math.prod(a.extent for a in axes)
    index = Index({}, 0) if isinstance(position, int) else opaque(position, 0, whole - 1, ())
    for axis, part in zip(axes, unflatten(index, [a.extent for a in axes])):
        value = part.expr()
        axis.bind(value if isinstance(value, int) else let(value))


def elementwise_kernel(name: str, signature: Signature, nodes: Sequence[Node], target: Any) -> Any:
    """The PrimFunc of a group of pointwise nodes whose outputs all have the same number of elements."""
    frame = KernelFrame(name, signature)
    with frame.building():
        if signature.outputs[0].type.size:
            ElementwiseKernel(frame, nodes, signature.outputs, target).emit()
        else:
            T.evaluate(0)
    return frame.function


__all__ = ["ElementwiseKernel", "KernelFrame", "Signature", "collapse", "compute_dtype", "elementwise_kernel"]
