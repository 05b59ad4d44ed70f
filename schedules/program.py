"""The program that lowering hands to the back half: kernels over buffers, loops and branches.

This is the border between the two halves of `schedules`. Fusion and lowering turn a graph
into a `Program`: plain data that says which buffers exist and which steps run over them in which
order. The back half (`plan`, `driver`, `build`, `executable`) gives every buffer
an address and turns the steps into one host function. Nothing here needs TVM except
to hold a kernel's PrimFunc.

    x = Buffer("x", (8, 4), "float32", "input")
    t = Buffer("t", (8, 4), "float32")                       # temp: lives in the arena
    y = Buffer("y", (8, 4), "float32", "output")
    Program([x], [y], [KernelCall(relu, [x, t], writes=[1]), KernelCall(neg, [t, y], writes=[1])])

What holds everywhere:

* A buffer is dense and row-major. Its identity is the object; names are for people.
* Storage is shared through `alias_of`: a reshape is `Buffer(.., alias_of=x)`; the result of an
  in-place kernel is `Buffer(.., alias_of=operand)`, and the kernel has ONE parameter for the two
  (listed in `writes` and in `reads`). An output that takes over an input is an output buffer whose
  `alias_of` chain ends at that input. Once an alias has been written, the old contents are gone: lowering
  orders the readers first (`verify` checks it).
* A `View` is a contiguous piece of a buffer at an offset that may depend on loop counters: element `i` of
  the stacked `xs` of a scan, rows 10..20 of a concatenation's result.
* Kernels may assume no alignment beyond that of an element, and (tirx.noalias) that their arguments do not overlap.
* Zero-size buffers are legal. A kernel or copy whose every written argument is empty is not run.
* Extents, offsets and strides may be symbolic sizes (`ir.dims.Dim`). `sizes` names what they are made of; the values
  follow from the shapes of the inputs at each call. A kernel that uses sizes gets them as `SizeArg`s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..ir.dims import Dim
from .abi import numpy_dtype
from .faults import Origin
from .signature import SizeCheck

KINDS = ("input", "output", "temp", "constant")


@dataclass(eq=False)
class Buffer:
    """A dense row-major array with one place in memory for the whole run.

    `kind` says who owns the bytes: the caller (`input`), a fresh result (`output`), the arena
    (`temp`), the executable (`constant`, with its value in `data`). With `alias_of` the buffer shares
    the storage of another, starting at the same byte, and must not be larger; a `temp` alias is just
    another name of its root, an `output` alias of an input is an in-place update of the caller's array.
    `subject` says what it is for (`ir/subjects.py`), "" if that is not known.
    """

    name: str
    shape: tuple[Any, ...]
    dtype: str
    kind: str = "temp"
    alias_of: Buffer | None = None
    data: np.ndarray | None = None
    subject: str = ""

    def __post_init__(self):
        self.shape = tuple(extent if isinstance(extent, Dim) else int(extent) for extent in self.shape)
        self.dtype = str(self.dtype)

    @property
    def size(self) -> Any:
        """Number of elements, a number or a symbolic size."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one element in memory (sub-byte types take one byte each)."""
        return numpy_dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> Any:
        return self.size * self.itemsize

    @property
    def root(self) -> Buffer:
        """The buffer whose storage this one uses: the end of the `alias_of` chain."""
        buffer = self
        while buffer.alias_of is not None:
            buffer = buffer.alias_of
        return buffer

    def __repr__(self) -> str:
        return f"%{self.name}:{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(eq=False)
class LoopVar:
    """The counter of a `Loop` or `While`: 0, 1, 2... (int64). Also a legal kernel argument (an int64 parameter)."""

    name: str

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Term:
    """One summand of a view's offset, in elements: `stride * (var + shift)`, or `stride * ((var + shift) % modulo)`.

    `modulo=2` double-buffers a loop carry: step i reads half `i % 2` and writes half `(i + 1) % 2`.
    """

    var: LoopVar
    stride: Any
    shift: int = 0
    modulo: int | None = None


@dataclass(frozen=True, eq=False)
class View:
    """A contiguous piece of `buffer`: `shape` elements from element `offset + sum(terms)` on."""

    buffer: Buffer
    shape: tuple[Any, ...]
    offset: Any = 0
    terms: tuple[Term, ...] = ()

    @property
    def dtype(self) -> str:
        return self.buffer.dtype

    @property
    def size(self) -> Any:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> Any:
        return self.size * self.buffer.itemsize

    def __repr__(self) -> str:
        parts = [str(self.offset)] if self.offset or not self.terms else []
        for t in self.terms:
            index = f"{t.var}{t.shift:+d}" if t.shift else f"{t.var}"
            parts.append(f"{t.stride}*({index}{f' % {t.modulo}' if t.modulo else ''})")
        return f"{self.buffer!r}@{'+'.join(parts)}[{','.join(map(str, self.shape))}]"


def element(buffer: Buffer, var: LoopVar, *, reverse_length: Any = None) -> View:
    """`buffer[i]` for loop counter i; with `reverse_length=n`, `buffer[n - 1 - i]`. Drops the leading axis."""
    stride = math.prod(buffer.shape[1:])
    if reverse_length is None:
        return View(buffer, buffer.shape[1:], 0, (Term(var, stride),))
    return View(buffer, buffer.shape[1:], (reverse_length - 1) * stride, (Term(var, -stride),))


@dataclass(frozen=True)
class SizeArg:
    """A named size as a kernel's argument (an int64 parameter)."""

    name: str


Arg = Buffer | View | LoopVar | SizeArg


def storage(arg: Buffer | View) -> Buffer:
    """The buffer behind a buffer or view."""
    return arg.buffer if isinstance(arg, View) else arg


def buffer_of(arg: Arg) -> Buffer | None:
    """The buffer behind an argument (None for a loop counter or a size)."""
    return None if isinstance(arg, (LoopVar, SizeArg)) else storage(arg)


@dataclass(eq=False)
class KernelCall:
    """Run one compiled PrimFunc. Arguments match its parameters one to one; `writes` and `reads` are positions.

    `reads` defaults to the complement of `writes`; an in-place parameter is listed in both. A kernel that writes only
    part of an argument (and leaves the rest as it was) lists it in both as well.
    `label` and the costs are for profiles and `inspect`, `origin` is for messages.
    """

    kernel: Any  # tvm.tirx.PrimFunc
    args: Sequence[Arg]
    writes: Sequence[int]
    reads: Sequence[int] = None  # type: ignore[assignment]  # made the complement of `writes`
    label: str = ""
    flops: float = 0.0
    origin: Origin | None = None

    def __post_init__(self) -> None:
        _settle(self)


@dataclass(eq=False)
class HostCall:
    """Call the Python function registered as `function` (host.register_host_function) with arrays over the arguments.

    For what is no kernel: a collective over MPI, a user's op written in Python. Positions as in `KernelCall`. `kernel`
    is None, or what runs first where the function was registered with a record: it takes the arguments and the record's
    address, and where it could not do all of it the function is called.
    """

    function: str
    args: Sequence[Arg]
    writes: Sequence[int]
    reads: Sequence[int] = None  # type: ignore[assignment]  # made the complement of `writes`
    label: str = ""
    kernel: Any = None  # tvm.tirx.PrimFunc
    origin: Origin | None = None

    def __post_init__(self) -> None:
        _settle(self)


def _settle(call: KernelCall | HostCall) -> None:
    call.args, call.writes = tuple(call.args), tuple(call.writes)
    if call.reads is None:
        call.reads = [i for i in range(len(call.args)) if i not in call.writes]
    call.reads = tuple(call.reads)


@dataclass(eq=False)
class Copy:
    """dst[...] = src: equal byte counts, storage that does not overlap (or is the same: then it is no work)."""

    src: Buffer | View
    dst: Buffer | View


@dataclass(eq=False)
class Loop:
    """`for var in range(extent): body`. Temps of the body are reused by every iteration and die with it, unless
    a step outside, or an earlier step of the next iteration, reads them (a carry)."""

    var: LoopVar
    extent: Any
    body: list[Step]


@dataclass(eq=False)
class While:
    """`for var in 0, 1...: condition; if not pred: break; body`. `pred` is one bool, written by `condition`."""

    var: LoopVar
    condition: list[Step]
    pred: Buffer
    body: list[Step]


@dataclass(eq=False)
class Branch:
    """`if pred: then else: orelse`. `pred` is one bool."""

    pred: Buffer
    then: list[Step]
    orelse: list[Step] = field(default_factory=list)


Step = KernelCall | HostCall | Copy | Loop | While | Branch


@dataclass(eq=False)
class Program:
    """One entry point: `outputs = program(inputs)`.

    `inputs` in calling order. `outputs` are distinct buffers of kind `output`, each written by some step
    (a pass-through or constant or repeated output is a `Copy` that lowering adds); one that aliases an input
    is returned as the caller's own array. `roles`, parallel to `inputs` ("data", "parameter", "state",
    "scalar"...), and `meta` (free JSON) travel with the saved file.
    """

    inputs: list[Buffer]
    outputs: list[Buffer]
    steps: list[Step]
    name: str = "main"
    roles: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    checks: list[SizeCheck] = field(default_factory=list)

    @property
    def sizes(self) -> list[str]:
        """The named sizes that the shapes of the inputs decide, in the order of their names."""
        return sorted({n for b in self.inputs for s in b.shape if isinstance(s, Dim) for n in s.names})

    @property
    def aliases(self) -> dict[int, int]:
        """{output index: index of the input whose storage it takes over}."""
        position = {id(buffer): i for i, buffer in enumerate(self.inputs)}
        return {i: position[id(b.root)] for i, b in enumerate(self.outputs) if id(b.root) in position}

    @property
    def constants(self) -> list[Buffer]:
        """Constants in use, in order of first use."""
        return [b for b in self.buffers if b.kind == "constant"]

    @property
    def buffers(self) -> list[Buffer]:
        """Every root buffer: inputs, outputs, then in order of first use. Aliases are left out."""
        seen: dict[int, Buffer] = {}
        for buffer in [*self.inputs, *self.outputs]:
            seen.setdefault(id(buffer.root), buffer.root)
        for step in walk(self.steps):
            for buffer, _ in accesses(step):
                seen.setdefault(id(buffer.root), buffer.root)
        return list(seen.values())

    @property
    def kernel_calls(self) -> list[KernelCall]:
        """Every kernel call, nested ones included, in program order."""
        return [step for step in walk(self.steps) if isinstance(step, KernelCall)]

    @property
    def compiled_calls(self) -> list[KernelCall | HostCall]:
        """Every call that has a kernel to compile."""
        calls = [step for step in walk(self.steps) if isinstance(step, (KernelCall, HostCall))]
        return [call for call in calls if call.kernel is not None]

    @property
    def host_functions(self) -> list[str]:
        """What `HostCall`s call, sorted."""
        return sorted({step.function for step in walk(self.steps) if isinstance(step, HostCall)})

    @property
    def recorded(self) -> list[str]:
        """Those whose records a kernel needs, sorted."""
        return sorted({call.function for call in self.compiled_calls if isinstance(call, HostCall)})


def walk(steps: Sequence[Step]) -> Iterator[Step]:
    """Every step, outer before inner, in program order."""
    for step in steps:
        yield step
        for inner in children(step):
            yield from walk(inner)


def children(step: Step) -> tuple[list[Step], ...]:
    """The nested step lists of a step, in the order they run."""
    if isinstance(step, Loop):
        return (step.body,)
    if isinstance(step, While):
        return (step.condition, step.body)
    if isinstance(step, Branch):
        return (step.then, step.orelse)
    return ()


def accesses(step: Step) -> list[tuple[Buffer, str]]:
    """What the step itself (not its nested steps) touches: (buffer, "r" | "w" | "rw") in argument order."""
    if isinstance(step, (KernelCall, HostCall)):
        found = []
        for i, arg in enumerate(step.args):
            buffer = buffer_of(arg)
            mode = "r" * (i in step.reads) + "w" * (i in step.writes)
            if buffer is not None and mode:
                found.append((buffer, mode))
        return found
    if isinstance(step, Copy):
        return [(storage(step.src), "r"), (storage(step.dst), "w")]
    if isinstance(step, (While, Branch)):
        return [(step.pred, "r")]
    return []


def written(step: KernelCall | HostCall) -> list[Buffer | View]:
    """The arguments that a call writes."""
    found = [step.args[i] for i in step.writes]
    return [arg for arg in found if not isinstance(arg, (LoopVar, SizeArg))]


def runs(step: Step) -> bool:
    """False for a kernel or copy that could only write empty buffers."""
    return bool(extent_of(step) != 0)


def extent_of(step: Step) -> Any:
    """Elements that a kernel or copy writes (1 for what always runs): nothing is run for none."""
    if isinstance(step, KernelCall):
        return max((arg.size for arg in written(step) if isinstance(arg.size, int)), default=0) or sum(
            arg.size for arg in written(step))
    return step.dst.size if isinstance(step, Copy) else 1
