"""Several programs that run as one: where shapes depend on data (`ir.phases`).

Each phase is an executable of its own. Between two of them the counts that the first gave become sizes of the next,
which is all that happens in Python; every phase was compiled once, for all sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..ir.dims import Size, evaluate
from ..ir.errors import ArgumentsError, CompileError, ShapeError
from ..ir.parse import parse_size
from .executable import BuildStats, Executable, KernelTime
from .signature import Signature, TensorInfo
from .sized import Layouts

Run = Callable[[Executable, list[Any]], list[np.ndarray]]


class Phased:
    """A sequence of executables that is called like one.

    Args:
        signature: of the whole: inputs, outputs, and the sizes that follow from the inputs.
        parts: the executables.
        plan: what each of them takes and gives (`ir.phases.to_json`).
    """

    def __init__(self, signature: Signature, parts: Sequence[Any], plan: dict[str, Any]):
        self.signature, self.parts, self.plan = signature, list(parts), plan
        self.tensors: dict[str, np.ndarray] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.stats: BuildStats | None = None
        self.profile_builder: Any = None
        made = [part.stats for part in parts if part.stats is not None]
        if made:
            self.stats = BuildStats(sum(s.kernels for s in made), sum(s.compiled for s in made),
                                    all(s.library_cached for s in made), None)
        self._layouts = Layouts(signature) if signature.sizes else None
        self._counts = [[(c["name"], c["slot"], _bound(c["most"]), c["what"]) for c in phase["counts"]]
                        for phase in plan["phases"]]
        self._last_use = self._uses()

    def _uses(self) -> list[list[int]]:
        """The slots that nobody reads after each phase."""
        last = {slot: k for k, phase in enumerate(self.plan["phases"]) for slot in phase["outputs"]}
        last.update((i, k) for k, phase in enumerate(self.plan["phases"]) for kind, i in phase["inputs"]
                    if kind == "slot")
        kept = set(self.plan["outputs"])
        return [[s for s, k in last.items() if k == phase and s not in kept] for phase in range(len(self.parts))]

    def __repr__(self) -> str:
        return f"<Phased {self.signature.name}: {len(self.parts)} programs for {self.signature.target}>"

    def prepare(self) -> None:
        """Loads the machine code; see `Executable.prepare`."""
        for part in self.parts:
            part.prepare()

    def run(self, arrays: Sequence[Any]) -> list[np.ndarray]:
        """Runs phase after phase; see `Executable.run`.

        Raises:
            ShapeError: a count is not what the graph says it can be.
        """
        return self._walk(arrays, lambda part, given: part.run(given))

    __call__ = run

    def _walk(self, arrays: Sequence[Any], run: Run) -> list[np.ndarray]:
        sizes = self._sizes(arrays)
        slots: list[Any] = [None] * self.plan["slots"]
        value = {"input": arrays.__getitem__, "slot": slots.__getitem__,
                 "size": lambda name: np.empty((sizes[name], 0), np.uint8)}
        for number, (part, phase) in enumerate(zip(self.parts, self.plan["phases"])):
            given = [value[kind](at) for kind, at in phase["inputs"]]
            for slot, array in zip(phase["outputs"], run(part, given)):
                slots[slot] = array
            for name, slot, most, what in self._counts[number]:
                sizes[name] = self._counted(int(slots[slot]), most, what, sizes)
            for slot in self._last_use[number]:
                slots[slot] = None
        return [slots[slot] for slot in self.plan["outputs"]]

    def _sizes(self, arrays: Sequence[Any]) -> dict[str, int]:
        """The sizes that follow from the shapes of the inputs."""
        signature = self.signature
        if len(arrays) != len(signature.inputs):
            names = ", ".join(info.name for info in signature.inputs)
            raise ArgumentsError(f"{signature.name} takes {len(signature.inputs)} inputs ({names}), got {len(arrays)}")
        if self._layouts is None:
            return {}
        shaped = [a if isinstance(a, np.ndarray) else np.asarray(a) for a in arrays]
        for i, (array, info) in enumerate(zip(shaped, signature.inputs)):
            if array.ndim != len(info.shape):
                raise ShapeError(f"input {i} ({info.name!r}) of {signature.name}: expected {info}, got an array of "
                                 f"shape {list(array.shape)}")
        return dict(zip(signature.sizes, self._layouts.sizes(shaped)))

    def _counted(self, count: int, most: Size | None, what: str, sizes: dict[str, int]) -> int:
        limit = count if most is None else evaluate(most, sizes)
        if 0 <= count <= limit:
            return count
        name = self.signature.name
        if most == 0:  # a condition: see `data_sizes.require_zero`
            raise ShapeError(f"{name}: {what}")
        expected = "a size is not negative" if most is None else f"expected 0 to {limit}"
        raise ShapeError(f"{name}: {what or 'a size that data decide'} is {count}; {expected}")

    def kernel_times(self, arrays: Sequence[Any], repeat: int = 10) -> list[KernelTime]:
        """Time of each kernel call, phase by phase; see `Executable.kernel_times`."""
        found: list[KernelTime] = []

        def run(part: Executable, given: list[Any]) -> list[np.ndarray]:
            found.extend(part.kernel_times(given, repeat))
            return part.run(given)

        self._walk(arrays, run)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes held between calls."""
        return sum(part.nbytes for part in self.parts)

    def release(self) -> None:
        """Frees what the parts hold; see `Executable.release`."""
        for part in self.parts:
            part.release()


def _bound(most: Any) -> Size | None:
    return parse_size(most) if isinstance(most, str) else most


def phased(graph: Any, parts: Sequence[Any], plan: dict[str, Any]) -> Phased:
    """The executables of the phases of a graph, as one.

    Raises:
        CompileError: there is none.
    """
    if not parts:
        raise CompileError(f"{graph.name}: it has no phases")
    names = _distinct([v.name or f"in{i}" for i, v in enumerate(graph.inputs)])
    inputs = [TensorInfo(name, v.shape, str(v.dtype), role) for name, v, role in zip(names, graph.inputs, graph.roles)]
    outputs = [TensorInfo(f"out{i}", v.shape, str(v.dtype), alias=graph.aliases.get(i))
               for i, v in enumerate(graph.outputs)]
    first = parts[0].signature
    features = sorted({f for p in parts for f in p.signature.features})
    kernels = [k for p in parts for k in p.signature.kernels]
    signature = Signature(name=graph.name, target=first.target, arch=first.arch, features=features, inputs=inputs,
                          outputs=outputs, constants=[], arena_bytes=sum(p.signature.arena_bytes for p in parts),
                          slots=0, host_functions=[], kernels=kernels, meta={}, sizes=sorted(graph.dims), temps=[])
    return Phased(signature, parts, plan)


def _distinct(names: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    found = []
    for name in names:
        given, count = name, 0
        while given in seen:
            count += 1
            given = f"{name}_{count}"
        seen.add(given)
        found.append(given)
    return found
