"""What a user says of a training step, as annotations of its graph.

`Plan(shard={"*.up": (None, "tensor"), "*.down": ("tensor", None)}, zero=1)`: the batch lies along the axis "data",
parameters whose names match lie as told, their optimizer states with them. ZeRO (Rajbhandari et al. 2020,
arXiv:1910.02054) is annotations, too. Stages 1 and 2: states are split along the batch's axis, so gradients are
reduced and scattered instead of reduced everywhere, each rank updates its part, and the new parameters are gathered.
Stage 3: the parameters stay split between steps; each op of the forward and backward passes that reads one gathers
it for itself.

Since a gradient goes from partial sums straight to its parts, no rank ever holds whole reduced gradients: stage 1 does
what stage 2 promises.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..ir.errors import AttributeValueError
from ..ir.graph import Graph, Value
from ..ir.types import TensorType
from .mesh import Mesh
from .plan_checks import check_fields, check_fit
from .regather import gather_at_use
from .sharding import Sharding

Dims = tuple["str | None", ...]
FORMAT = "plan 1"
PIECES = 64  # under ZeRO joined messages are at most this part of the parameters


@dataclass(frozen=True)
class Plan:
    """How a training step is laid out.

    Attributes:
        data: the mesh axis along which the batch's first dimension is split, or several; None: every rank has all of
            it.
        shard: pattern of parameter names (as of `fnmatch`) -> a mesh axis or None for each dimension. The first match
            counts; what matches none is whole. `"tensor:3"`: the dimension holds three parts, such as query, key and
            value, each of which is split; `("data", "tensor")`: it is split over both.
        zero: ZeRO stage, 0 to 3, over the axis `data`.
        zero_over: of several axes `data` those over which ZeRO splits, along others it repeats: `data=("hosts",
            "data"), zero_over="data"` keeps parts within a host. None: all of them.
        pipe: the mesh axis along which the model is cut into stages; None, or an axis that the mesh lacks: it is not.
            `accumulate` of the training step is the number of micro-batches.
        schedule: "gpipe", "1f1b", "zb-h1" (1F1B with less of a bubble) or "interleaved", with `chunks` stages on each
            device.
        overlap: between hosts, gradients are sent while the backward pass runs, and waited for by the update.
        weight: what a micro-batch counts in the loss: `lambda x, y: (y != -100).sum()` makes a mean over tokens that of
            the whole batch, however they are spread. None: as `train_step(weight=)` says, or its examples.
        reduce_dtype: "bfloat16" or "float16": gradients travel and are summed over `data` so; None: in their own dtype,
            which is float32 under mixed precision. Not in a pipeline, whose sums stay as they are.
        recompute: layers keep only what they were handed, and are computed again in the backward pass.
        measure: a pipeline is cut by the times that the layers take on this machine, measured once when the step is
            built, and not by the cost model's.
        memory: bytes that a stage of a pipeline may take, for which it is cut: parameters with their gradients and
            states, and the activations that the schedule keeps, before other axes of the mesh divide them. None: any.
        mesh: axes and their ranks that the plan was made for; `parallelize` takes them where no mesh is given.
        accumulate: the micro-batches that it was made for: those of `train_step(accumulate=)`.
        cut: where the stages of a pipeline end but for the last, counted in the steps of the loss's graph, as
            `treadle plan --out` writes it. None: found.
        bucket_bytes: collectives of one kind that may go together are joined into messages of at most so many bytes.

    Raises:
        AttributeValueError, MeshError: a field is not of its kind.
    """

    data: str | tuple[str, ...] | None = "data"
    shard: Mapping[str, Dims] = field(default_factory=dict)
    zero: int = 0
    bucket_bytes: int = 25 << 20
    overlap: bool = True
    pipe: str | None = "pipe"
    schedule: str = "1f1b"
    chunks: int = 1
    weight: Callable[..., Any] | None = field(default=None, repr=False)
    reduce_dtype: str | None = None
    recompute: bool = False
    measure: bool = False
    memory: float | None = None
    mesh: Mapping[str, int] | None = None
    accumulate: int | None = None
    cut: tuple[int, ...] | None = None
    zero_over: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def save(self, path: Any) -> None:
        """Writes the plan as JSON.

        Raises:
            AttributeValueError: its `weight` is a function, which a file cannot hold; or the file cannot be written.
        """
        if self.weight is not None:
            raise AttributeValueError("a plan with a `weight` cannot be saved: it is a function. Save the plan without "
                                      "it, and give it where the plan is loaded: dataclasses.replace(plan, weight=...)")
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "weight"}
        try:
            Path(path).write_text(json.dumps({"treadle": FORMAT, **found}, indent=2) + "\n")
        except OSError as error:
            raise AttributeValueError(f"the plan cannot be written to {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: Any) -> Plan:
        """Reads what `save`, or `treadle plan --out`, wrote.

        Raises:
            AttributeValueError: there is no such file, or it holds no plan of this version.
        """
        try:
            found = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise AttributeValueError(f"{path} holds no plan ({error}); `treadle plan ... --out` writes one") from None
        known = {f.name for f in fields(cls)} - {"weight"}
        if not isinstance(found, dict) or found.pop("treadle", None) != FORMAT or not found.keys() <= known:
            raise AttributeValueError(f"{path} holds no plan that this version reads ({FORMAT!r}); write it anew with "
                                      "`treadle plan ... --out`")
        found["shard"] = {name: tuple(dims) for name, dims in found.get("shard", {}).items()}
        for name in ("cut", "data", "zero_over"):
            found[name] = tuple(found[name]) if isinstance(found.get(name), list) else found.get(name)
        return cls(**found)

    def of(self, name: str, rank: int) -> Sharding:
        """The sharding of a parameter between ranks that differ in tensors, not in data."""
        for pattern, dims in self.shard.items():
            if fnmatch.fnmatchcase(name, pattern):
                return Sharding(tuple(dims))
        return Sharding.whole(rank)

    @property
    def data_axis(self) -> str | None:
        """The mesh axis of the batch, where there can be no more than one: under a pipeline."""
        return self.data if isinstance(self.data, str) else None

    def batch_axes(self, mesh: Mesh) -> tuple[str, ...]:
        """The axes of a mesh along which the batch is split."""
        return tuple(axis for axis in axes_of(self.data) if axis in mesh)

    def zero_axes(self, mesh: Mesh) -> tuple[str, ...]:
        """Those of them over which ZeRO splits."""
        over = axes_of(self.data if self.zero_over is None else self.zero_over)
        return tuple(axis for axis in self.batch_axes(mesh) if axis in over)

    def in_parts(self, sharding: Sharding, type: TensorType, mesh: Mesh) -> Sharding:
        """How ZeRO lays what would lie so."""
        for axis in self.zero_axes(mesh):
            sharding = split_over(sharding, type, axis, mesh)
        return sharding

    def alone(self) -> Plan:
        """The plan of one process, on whatever mesh."""
        return replace(self, shard={}, zero=0, cut=None)

    def message_bytes(self, parameters: int) -> int:
        """How large a joined message may become, of a model with so many bytes of parameters.

        Tensors that wait for their message are whole on every rank, which is what ZeRO promises to avoid.
        """
        return min(self.bucket_bytes, parameters // PIECES) if self.zero else self.bucket_bytes

    def check(self, mesh: Mesh, names: Sequence[str]) -> None:
        """That the plan fits the mesh and the model.

        Raises:
            MeshError: it names an axis that is not there, or a pattern matches no parameter, or only such as an
                earlier one matches, too.
        """
        check_fit(self, mesh, names)


def axes_of(names: str | Sequence[str] | None) -> tuple[str, ...]:
    """One axis, several or none."""
    return (names,) if isinstance(names, str) else tuple(names or ())


@dataclass(frozen=True)
class Source:
    """What an input of a step's graph is: `kind` batch, scalar, parameter, state or other; `name` of its parameter."""

    kind: str
    name: str = ""


def split_over(sharding: Sharding, type: TensorType, axis: str, mesh: Mesh) -> Sharding:
    """The sharding with one more axis over the first dimension that divides, a whole one if there is one.

    As it is if none does, or if the axis has one rank.
    """
    if mesh[axis] == 1:
        return sharding
    for dim in sorted(range(type.rank), key=lambda d: sharding.dims[d] is not None):
        split = sharding.placed(axis, dim)
        if type.shape[dim] and split.fits(dim, type.shape[dim], mesh):
            return split
    return sharding


def annotate(graph: Graph, mesh: Mesh, plan: Plan, sources: Sequence[Source],
             micro: Collection[int] = ()) -> tuple[Graph, dict[int, Sharding]]:
    """The graph of a step and the shardings of its inputs, by number, under a plan.

    `micro`: inputs whose second dimension is the batch's, as the first counts micro-batches.

    Raises:
        MeshError, ShapeError: the plan does not fit the mesh, the model or the batch.
    """
    found: dict[int, Sharding] = {}
    gathered: list[Value] = []
    zero = set(plan.zero_axes(mesh))
    own = {s.name: v.shape for s, v in zip(sources, graph.inputs) if s.kind == "parameter"}
    for i, (source, v) in enumerate(zip(sources, graph.inputs)):
        if source.kind == "batch":
            found[i] = _examples(v, int(i in micro), plan.batch_axes(mesh), mesh)
            found[i].check(v.type, mesh, f"the batch's {v.name}" if v.name else "a tensor of the batch", padded=True)
        elif source.kind == "scalar":
            found[i] = Sharding.whole(v.rank)
        elif source.kind in ("parameter", "state") and (source.kind == "parameter" or v.shape == own.get(source.name)):
            found[i] = plan.of(source.name, v.rank)
            found[i].check(v.type, mesh, source.name, padded=True)
            if plan.zero >= (3 if source.kind == "parameter" else 1):
                found[i] = plan.in_parts(found[i], v.type, mesh)
                if source.kind == "parameter" and not zero.isdisjoint(found[i].split_axes):
                    gathered.append(v)
        elif source.kind == "state":
            found[i] = Sharding.whole(v.rank)
    if gathered:
        graph = gather_at_use(graph, gathered, *plan.zero_axes(mesh))
    return graph, found


def _examples(v: Value, dim: int, axes: Sequence[str], mesh: Mesh) -> Sharding:
    """How a tensor of the batch lies: over all axes, or if it does not divide over the largest alone, padded."""
    over = whole = Sharding.whole(v.rank)
    for axis in axes if v.rank else ():
        over = over.placed(axis, dim)
    if v.rank and len(axes) > 1 and not over.fits(dim, v.shape[dim], mesh):
        return whole.placed(max(axes, key=lambda axis: mesh[axis]), dim)
    return over
