"""An executable with the tensors that it is bound to (parameters, state, what else a function used from outside); and
what a compiled function did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..ir.errors import CompileError
from ..ir.types import TensorType
from . import tree
from .eager import Concrete, array_type, interned, records
from .recording import Guards
from .tensor import Tensor


@dataclass
class Stats:
    """What a compiled function did.

    Attributes:
        calls: how often it was called.
        compiles: how many programs were made.
        hits: calls that found their program.
        kernels: distinct kernels of the last program made.
        compiled_kernels: how many of them were compiled, not found in the cache on disk.
        seconds: time spent tracing and compiling.
        reasons: why each program was made.
    """

    calls: int = 0
    compiles: int = 0
    kernels: int = 0
    compiled_kernels: int = 0
    seconds: float = 0.0
    reasons: list[str] = field(default_factory=list)

    @property
    def hits(self) -> int:
        """Calls that found their program."""
        return self.calls - self.compiles


class Program:
    """An executable with the tensors it is bound to."""

    def __init__(self, executable: Any, captures: dict[int, Tensor], assigned: Sequence[Tensor],
                 guards: Sequence[tuple[Callable[[], Any], Any]], out_structure: tree.Structure,
                 out_types: Sequence[TensorType]):
        self.executable = executable
        self.run = executable.run
        self.captures = captures
        self.assigned = list(assigned)
        self.guards = Guards(guards)
        self.out_structure = out_structure
        # A type with symbolic sizes is that of the array, at each call.
        self.out_types = [interned(t) if t.is_static else None for t in out_types]
        self.single = out_structure is tree.LEAF or out_structure == tree.LEAF
        self.records = -1  # records made before this program count too
        first = min(captures, default=0)
        if sorted(captures) != list(range(first, first + len(captures))):
            raise CompileError("captured tensors must be the last inputs of a graph")
        for tensor in self.assigned:
            tensor.role = tensor.role or "state"
        tensors = [captures[i] for i in sorted(captures)]
        # Tensors with a role stay where they are; others may be given another array by assign().
        self.bound = [t._pin() if t.role is not None else t._value.array for t in tensors]
        self.loose = [(k, t) for k, t in enumerate(tensors) if t.role is None]

    def valid(self) -> bool:
        """Whether everything that the trace read besides its inputs is as it was."""
        return self.guards.hold()

    def arena_bytes(self, arrays: list[np.ndarray]) -> int:
        """Bytes of what waits between kernels in a call with these arguments."""
        return int(self.executable.arena_bytes(arrays + self.bound))

    def __call__(self, arrays: list[np.ndarray]) -> Any:
        """Runs on the arrays of the arguments; gives the tree of tensors that the function returns."""
        bound = self.bound
        if self.loose:
            for k, tensor in self.loose:
                bound[k] = tensor._value.array
        outputs = self.run(arrays + bound)
        if self.assigned:
            self._written()
        if self.single:
            return Tensor._of(Concrete(outputs[0], self.out_types[0] or array_type(outputs[0])))
        results = [Tensor._of(Concrete(a, t or array_type(a))) for a, t in zip(outputs, self.out_types)]
        return tree.unflatten(self.out_structure, results)

    def _written(self) -> None:
        """Tells records that have read an updated tensor that its old elements are gone."""
        if self.records == records.leaves:
            return
        self.records = records.leaves
        for tensor in self.assigned:
            if tensor._value.recorded:
                tensor._renew(tensor._value.array)
