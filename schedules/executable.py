"""A compiled program that can be called.

A call fills a table of pointers and makes one call of the driver. An argument that is the very array of the last call
(a parameter of a training step, say) is recognised by identity and costs next to nothing; only a new array is
checked and entered. Results are new arrays that belong to the caller; their memory is taken up again once
the caller has dropped every view of it, so a loop does not pay for fresh pages in each step.

One call runs at a time (a lock), because temps live in one arena. The GIL is released while it runs.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..ir.errors import ArgumentsError, CompileError, DTypeError, ShapeError, TargetError
from .abi import ALIGNMENT, ENTRY, PROFILE_HEADER, numpy_dtype
from .host import HostFunction, resolve
from .link import Library, load
from .runtime import prepare_thread
from .signature import Signature, TensorInfo
from .sized import Layouts
from .target import host_arch, host_features

if TYPE_CHECKING:
    from .plan import MemoryPlan


class BuildStats(NamedTuple):
    """What a build did: distinct kernels, how many of them were compiled now, whether the linked library was cached.

    `library` is the name under which the cache keeps it (None: it does not).
    """

    kernels: int
    compiled: int
    library_cached: bool
    library: str | None = None


class KernelTime(NamedTuple):
    """Time that one call site took in one run: how often it ran, and seconds in total."""

    label: str
    calls: int
    seconds: float
    flops: float

    @property
    def gflops(self) -> float:
        """Billions of floating-point operations a second (0 if the kernel has no known cost)."""
        return self.flops * self.calls / self.seconds / 1e9 if self.seconds else 0.0


def empty_aligned(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An uninitialised array whose first byte lies on a 64-byte boundary: what kernels read fastest."""
    dtype = np.dtype(dtype)
    raw, offset, _ = _raw(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
    return np.ndarray(tuple(shape), dtype, raw, offset)


def _raw(nbytes: int) -> tuple[np.ndarray, int, int]:
    """Bytes with an aligned place among them: (array, offset of the place, its address)."""
    try:
        raw = np.empty(max(nbytes, 1) + ALIGNMENT, np.uint8)
    except MemoryError:
        raise ShapeError(f"{nbytes:,} bytes of memory for results or temporaries are not to be had: pass smaller "
                         "arrays") from None
    address = raw.ctypes.data
    offset = -address % ALIGNMENT
    return raw, offset, address + offset


def _address(array: np.ndarray) -> int:
    """Where the data of a contiguous array lie. (`array.ctypes.data` says the same in four times the time.)"""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]
    except (
        TypeError,
        ValueError,
        BufferError,
    ):  # read-only, empty, or a dtype that the buffer protocol lacks
        return array.ctypes.data


class _Result:
    """Where one output of each call goes: memory that is used again as soon as nobody holds a view of it."""

    def __init__(self, info: TensorInfo, position: int, slot: int):
        self.dtype = numpy_dtype(info.dtype)
        self.position, self.slot = position, slot  # among the outputs; in the table
        self.held = -1  # bytes of `raw`
        self.offset = self.address = 0  # where the aligned place among them begins
        self.most = 1  # memories that are kept
        self.others: list[tuple[Any, ...]] = []  # of earlier results that may still be held
        self.resize(info.shape if all(isinstance(n, int) for n in info.shape) else (0,))
        self.raw: np.ndarray | None = np.empty(0, np.uint8)
        self.idle = sys.getrefcount(self.raw)  # references while no caller holds a view
        self.raw = None

    def resize(self, shape: Sequence[int]) -> None:
        """The shape of the next result."""
        self.shape = tuple(shape)
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize

    def array(self) -> np.ndarray:
        """A fresh array; afterwards `address` is where its data lie."""
        if self.raw is None or self.held < self.nbytes or sys.getrefcount(self.raw) != self.idle:
            self._another()
        return np.ndarray(self.shape, self.dtype, self.raw, self.offset)

    def _another(self) -> None:
        """Takes up the memory of an earlier result that nobody holds any more, or fresh one."""
        for _ in range(len(self.others)):
            self.others.append((self.raw, self.offset, self.address, self.held))
            self.raw, self.offset, self.address, self.held = self.others.pop(0)
            if self.held >= self.nbytes and sys.getrefcount(self.raw) == self.idle:
                return
        if self.raw is not None and len(self.others) + 1 < self.most:
            self.others.append((self.raw, self.offset, self.address, self.held))
        self.raw, self.offset, self.address = _raw(self.nbytes)
        self.held = self.nbytes


class Executable:
    """A program ready to run: `outputs = executable.run(inputs)`.

    `signature` lists inputs and outputs; `plan` is the memory plan (None for a loaded file), `stats` what the build
    compiled (None for a loaded file).
    """

    def __init__(
        self,
        signature: Signature,
        library: Library,
        constants: dict[str, np.ndarray],
        plan: MemoryPlan | None = None,
        own_constants: bool = False,
    ):
        self.signature, self.library, self.plan = signature, library, plan
        self.stats: BuildStats | None = None
        self.tensors: dict[str, np.ndarray] = {}  # values for inputs, of a program that was saved with them
        self.profile_builder: Callable[[], tuple[Any, list[tuple[str, float]]]] | None = None
        self._entry: Callable[[int], Any] | None = None
        self._lock = threading.Lock()
        self._bound: list[Any] = [None] * len(signature.inputs)
        self._dtypes = [numpy_dtype(info.dtype) for info in signature.inputs]
        self._written = {o.alias for o in signature.outputs if o.alias is not None}
        self._transient = [
            i for i, info in enumerate(signature.inputs) if info.role in ("data", "scalar", "")
        ]
        self.constants = {
            info.name: _aligned(constants[info.name], numpy_dtype(info.dtype), own_constants)
            for info in signature.constants
        }
        self._layouts = Layouts(signature) if signature.sizes else None
        self._values: tuple[int, ...] | None = None  # of the sizes, in the last call
        self._arena_bytes = 0 if signature.sizes else signature.arena_bytes
        self._dynamic = [not all(isinstance(n, int) for n in info.shape) for info in signature.inputs]
        self._in_place = np.array(sorted(self._written), np.intp)
        self._ends = np.zeros(len(signature.inputs), np.int64)  # where each bound input ends, 0 if unbound
        self._table = np.zeros(signature.slots, np.int64)
        self._address = self._table.ctypes.data
        self._cells = memoryview(self._table)  # type: ignore[arg-type]  # the same, quicker to set
        self._arena: np.ndarray | None = None
        first = 1 + len(signature.inputs)
        # Per output: the input that it is, or None.
        self._taken_over = [info.alias for info in signature.outputs]
        fresh = [i for i, alias in enumerate(self._taken_over) if alias is None]
        self._results = [_Result(signature.outputs[i], i, first + k) for k, i in enumerate(fresh)]
        for i, info in enumerate(signature.constants):
            self._cells[first + len(fresh) + i] = self.constants[info.name].ctypes.data
        self._first_function = first + len(fresh) + len(signature.constants)
        self._functions: list[HostFunction] = []

    def __repr__(self) -> str:
        s = self.signature
        ins, outs = ", ".join(f"{i.name}: {i}" for i in s.inputs), ", ".join(map(str, s.outputs))
        return f"<Executable {s.name}({ins}) -> ({outs}) for {s.target}, {len(s.kernels)} kernels>"

    # -- running ------------------------------------------------------------------------------------------

    def keep_results(self, calls: int) -> None:
        """The caller will hold the results of so many calls at a time: their memory is used again all the same."""
        for result in self._results:
            result.most = calls

    def place_temps(self, memory: np.ndarray) -> None:
        """Temporaries lie in this aligned memory of `signature.arena_bytes` at least, as may those of other programs
        that never run at the same time."""
        self._arena, self._cells[0] = memory, memory.ctypes.data

    def prepare(self) -> None:
        """Load the machine code. `run` does it by itself; `build` and `load` call it to fail early.

        Raises:
            TargetError: this machine cannot execute the code.
            RegistryError: it calls host functions that this process has not registered.
            CompileError: the code cannot be loaded.
        """
        if self._entry is None:
            _check_machine(self.signature)
            self._enter_functions()
            self._entry = load(self.library)[ENTRY]

    def _enter_functions(self) -> None:
        """The numbers of host functions, and the addresses of the records that kernels need."""
        names = self.signature.host_functions
        self._functions = resolve(names)
        records = [self._functions[names.index(name)].record for name in self.signature.recorded]
        addresses = [0 if record is None else record.ctypes.data for record in records]
        for i, cell in enumerate([*(function.number for function in self._functions), *addresses]):
            self._cells[self._first_function + i] = cell

    def run(self, arrays: Sequence[Any]) -> list[np.ndarray]:
        """Run once.

        `arrays` match `signature.inputs` in order, shape and dtype: NumPy arrays, anything with `__dlpack__` on the
        CPU, or a Python number for a 0-d input. Non-contiguous data are copied first. An input that an output takes
        over is updated in place, and that very array is the output; it has to be contiguous and writable.
        Other outputs are new arrays.

        Raises:
            ArgumentsError: another number of inputs, or one that cannot be updated in place.
            ShapeError, DTypeError: an input of another type than the program was compiled for.
        """
        with self._lock:
            entry = self._entry
            if entry is None:
                self.prepare()
                entry = self._entry
                assert entry is not None
            prepare_thread()
            outputs = self._enter(arrays)
            try:
                entry(self._address)
            finally:
                self._leave()
            return outputs

    __call__ = run

    def _enter(self, arrays: Sequence[Any]) -> list[np.ndarray]:
        """Fill the table; the outputs of this call."""
        bound = self._bound
        if len(arrays) != len(bound):
            names = ", ".join(info.name for info in self.signature.inputs)
            raise ArgumentsError(
                f"{self.signature.name} takes {len(bound)} inputs ({names}), got {len(arrays)}"
            )
        for i, array in enumerate(arrays):
            if array is not bound[i]:
                self._bind(i, array)
        if self._layouts is not None:
            self._settle_sizes(self._layouts)
        if self._arena is None:
            self._arena, _, self._cells[0] = _raw(self._arena_bytes)
        outputs: list[Any] = [None if i is None else bound[i] for i in self._taken_over]
        for result in self._results:
            outputs[result.position] = result.array()
            self._cells[result.slot] = result.address
        return outputs

    def _settle_sizes(self, layouts: Layouts) -> None:
        """Enter what depends on the sizes of this call: their values, the places of temps, the shapes of results."""
        values = layouts.sizes(self._bound)
        if values == self._values:
            return
        layout = layouts.at(values)
        first = len(self._table) - 1 - len(layout.cells)
        self._table[first:-1] = layout.cells
        for result in self._results:
            result.resize(layout.outputs[result.position])
        if layout.arena_bytes > self._arena_bytes:
            self._arena, self._arena_bytes = None, layout.arena_bytes
        self._spare = [np.zeros(nbytes + ALIGNMENT, np.uint8) for nbytes in layout.spare.values()]
        for i, spare in zip(layout.spare, self._spare):
            self._cells[1 + i] = spare.ctypes.data
        self._values = values if not layout.spare else None  # an empty input is seen to have memory, at each call

    def _leave(self) -> None:
        """Let go of what the caller passes anew each time: a batch must not live until the next one comes."""
        for i in self._transient:
            self._bound[i] = None
        if self._written:
            self._ends[self._transient] = 0

    def _bind(self, i: int, given: Any) -> None:
        """Check input i and enter its address."""
        info, dtype = self.signature.inputs[i], self._dtypes[i]
        array = given
        if type(array) is not np.ndarray:
            array = _as_array(given, info, dtype)
        if array.dtype != dtype:
            raise DTypeError(
                f"input {i} ({info.name!r}) of {self.signature.name}: expected {info}, got {_type(array)}"
            )
        if array.shape != info.shape and not (self._dynamic[i] and _fits(array.shape, info.shape)):
            raise ShapeError(
                f"input {i} ({info.name!r}) of {self.signature.name}: expected {info}, got {_type(array)}"
            )
        flags = array.flags
        if i in self._written:
            if not (flags.c_contiguous and flags.aligned and flags.writeable):
                raise ArgumentsError(
                    f"input {i} ({info.name!r}) of {self.signature.name} is updated in place: it must be a "
                    "contiguous, aligned, writable array (pass np.array(x, order='C'))"
                )
        elif not (flags.c_contiguous and flags.aligned):
            array = _aligned_copy(array, dtype)
        address = _address(array)
        self._cells[1 + i] = address
        self._bound[i] = array
        if self._written:
            self._ends[i] = 0
            self._check_overlap(i, address, address + array.nbytes)
            self._ends[i] = address + array.nbytes

    def _check_overlap(self, i: int, start: int, end: int) -> None:
        """Kernels assume that what they write overlaps nothing else they are given."""
        others = slice(None) if i in self._written else self._in_place
        starts, ends = self._table[1 : 1 + len(self._bound)][others], self._ends[others]
        meeting = np.flatnonzero((starts < end) & (ends > start))
        if len(meeting) and start < end:
            j = int(meeting[0]) if i in self._written else int(self._in_place[meeting[0]])
            self._bound[i] = None
            first, second = (self.signature.inputs[k].name for k in sorted((i, j)))
            raise ArgumentsError(
                f"inputs {first!r} and {second!r} of {self.signature.name} share memory, and one of them is "
                "updated in place: pass separate arrays"
            )

    # -- looking ------------------------------------------------------------------------------------------

    def kernel_times(self, arrays: Sequence[Any], repeat: int = 10) -> list[KernelTime]:
        """Time of each kernel call, in program order: the mean over `repeat` runs, after one to warm up.

        The program really runs `repeat + 1` times: inputs that it updates in place are updated as often.

        Raises:
            CompileError: the executable was loaded from a file, which carries no profiling code.
        """
        if self.profile_builder is None:
            raise CompileError(
                "kernel times need the compiler: profile the program where it was compiled, not a loaded file"
            )
        self.prepare()
        entry, described = self.profile_builder()
        cells = np.zeros(PROFILE_HEADER + 2 * len(described), np.int64)
        with self._lock:
            prepare_thread()
            self._enter(arrays)
            self._cells[-1] = cells.ctypes.data
            try:
                entry(self._address)
                cells[:] = 0
                for _ in range(repeat):
                    entry(self._address)
            finally:
                self._leave()
        found = cells[PROFILE_HEADER:].reshape(-1, 2)
        return [
            KernelTime(label, int(count) // repeat, float(ns) * 1e-9 / repeat, flops)
            for (ns, count), (label, flops) in zip(found, described)
        ]

    def arena_bytes(self, arrays: Sequence[np.ndarray]) -> int:
        """Bytes that the temporaries take in a call with arrays of these shapes."""
        if self._layouts is None:
            return self.signature.arena_bytes
        return self._layouts.at(self._layouts.sizes(arrays)).arena_bytes

    @property
    def nbytes(self) -> int:
        """Bytes that the executable holds between calls: arena, constants, code, spare results."""
        held = self._arena_bytes + sum(r.nbytes for r in self._results)
        return (
            held + sum(c.nbytes for c in self.constants.values()) + sum(map(len, self.library.files.values()))
        )

    def release(self) -> None:
        """Free the arena, the spare results and the references to bound inputs. The next call takes them up again."""
        with self._lock:
            self._arena = None
            self._bound = [None] * len(self._bound)
            for result in self._results:
                result.raw = None


def _check_machine(signature: Signature) -> None:
    """Refuse code that this processor would trap on."""
    lacking = sorted(set(signature.features) - host_features())
    if signature.arch != host_arch():
        lacking = [f"an {signature.arch} processor"]
    if lacking:
        raise TargetError(
            f"{signature.name} was compiled for {signature.target!r}, and this machine lacks {', '.join(lacking)}: "
            "save it for a machine that has them, or compile for a target that this one has, e.g. target='cpu:avx2'"
        )


def _as_array(given: Any, info: TensorInfo, dtype: np.dtype) -> np.ndarray:
    """A NumPy view of another library's tensor, or a Python number as a 0-d array."""
    if isinstance(given, np.ma.MaskedArray):
        raise ArgumentsError(f"input {info.name!r}: a masked array; its mask would be lost (pass x.filled(...))")
    if isinstance(given, np.ndarray):
        return given.view(np.ndarray)
    if isinstance(given, np.generic):
        return np.asarray(given)
    if isinstance(given, (bool, int, float)) and not info.shape:
        return np.asarray(given, dtype)
    if hasattr(given, "__dlpack__"):
        return np.from_dlpack(given)
    raise ArgumentsError(f"input {info.name!r}: expected an array of {info}, got {type(given).__name__}")


def _fits(shape: Sequence[int], declared: Sequence[Any]) -> bool:
    """Whether a shape has the axes that are declared, as far as these are numbers."""
    return len(shape) == len(declared) and all(
        not isinstance(want, int) or have == want for have, want in zip(shape, declared)
    )


def _type(array: np.ndarray) -> str:
    return f"{array.dtype.name}[{','.join(map(str, array.shape))}]"


def _aligned(array: np.ndarray, dtype: np.dtype, own: bool) -> np.ndarray:
    """The array where kernels can read it: itself if it is nobody else's and lies well, or a copy."""
    lies_well = array.dtype == dtype and array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0
    return array if own and lies_well else _aligned_copy(array, dtype)


def _aligned_copy(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    copy = empty_aligned(array.shape, dtype)
    copy[...] = array
    return copy
