"""What is known about a compiled program without its code: plain data, saved as JSON.

These are named tuples because every start from a saved program makes their classes anew, and those of dataclasses take
five times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..ir.dims import Dim, Size
from ..ir.parse import parse_size


class TensorInfo(NamedTuple):
    """One input, output or constant. `alias`: the input whose storage an output takes over."""

    name: str
    shape: tuple[Any, ...]
    dtype: str
    role: str = ""
    alias: int | None = None

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class TempInfo(NamedTuple):
    """A temporary of a program with symbolic sizes, and its life (`plan.Interval`)."""

    shape: tuple[Size, ...]
    itemsize: int
    first: int
    last: int


class KernelInfo(NamedTuple):
    """One kernel call of a program: its label and its cost in floating-point operations (0 if unknown)."""

    label: str
    flops: float


class SizeCheck(NamedTuple):
    """What has to hold of the sizes of a call: `rest` is at least 0; otherwise the program would read `what`."""

    rest: Size
    what: str


class Signature(NamedTuple):
    """What a program takes and gives, what it needs, what it is made of."""

    name: str
    target: str
    arch: str
    features: list[str]
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    constants: list[TensorInfo]
    arena_bytes: int
    slots: int
    host_functions: list[str]
    kernels: list[KernelInfo]
    meta: dict[str, Any]
    sizes: list[str]  # the symbolic ones, in the order of their cells in the table
    temps: list[TempInfo]  # of a program with symbolic sizes
    checks: list[SizeCheck] = []
    recorded: list[str] = []  # those of the host functions whose records the program needs

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data; `from_json` takes it back."""
        data = self._asdict()
        for key in ("inputs", "outputs", "constants", "temps"):
            data[key] = [{**info._asdict(), "shape": shape_to_json(info.shape)} for info in data[key]]
        data["checks"] = [[*shape_to_json([check.rest]), check.what] for check in self.checks]
        return {**data, "kernels": [kernel._asdict() for kernel in self.kernels]}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Signature:
        """The signature that `to_json` wrote. Raises TypeError or KeyError for anything else."""
        tensors: dict[str, Any] = {
            key: [TensorInfo(**{**t, "shape": shape_from_json(t["shape"])}) for t in data[key]]
            for key in ("inputs", "outputs", "constants")
        }
        tensors["temps"] = [TempInfo(**{**t, "shape": shape_from_json(t["shape"])}) for t in data.get("temps", ())]
        tensors["checks"] = [SizeCheck(shape_from_json([rest])[0], what) for rest, what in data.get("checks", ())]
        kernels = [KernelInfo(**k) for k in data["kernels"]]
        return Signature(**{"sizes": [], **data, **tensors, "kernels": kernels})


def shape_to_json(shape: Sequence[Size]) -> list[Any]:
    """Numbers as they are, symbolic sizes as text."""
    return [str(n) if isinstance(n, Dim) else n for n in shape]


def shape_from_json(shape: Sequence[Any]) -> tuple[Size, ...]:
    """What `shape_to_json` wrote."""
    return tuple(parse_size(n) if isinstance(n, str) else int(n) for n in shape)
