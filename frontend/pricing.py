"""What a model's layers cost a device, from the programs that it would run: the prices of `treadle plan`.

A run of layers is differentiated, partitioned over the tensor axis and taken apart into its forward and backward
program, by the code that does it for a real step (`pipeline_stages.py`, `distributed/`). Then things are counted in
those programs: operations and memory traffic of every kernel, by how elementwise work joins its neighbours; bytes of
the collectives; what the backward program reads of the forward pass; the most that is in memory at a time. Operations
become seconds by the cluster's figures, or by times measured on this machine (`measured.py`).

Equal layers are priced once: a run is looked up by the structure of its graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..autodiff.amp import amp_pass
from ..autodiff.budget import kernels, timeline
from ..autodiff.save_less import save_less
from ..distributed.buckets import bucket
from ..distributed.cost import Cluster, sent_bytes
from ..distributed.halves import halves
from ..distributed.mesh import Mesh, MeshError
from ..distributed.partition import kind_of, partition
from ..distributed.sharding import Sharding
from ..distributed.stages import Chain, Stage, stage_at
from ..ir.dce import sweep
from ..ir.decompose import INLINE
from ..ir.errors import ShapeError
from ..ir.graph import Graph
from ..ir.hashing import graph_hash
from ..ir.passes import TIDY
from ..ir.pipeline import Pipeline
from .pipeline_stages import Joint, LossGraph, join

TENSOR = "tensor"
MESSAGE = 25 << 20  # bytes of joined collectives, as of `Plan.bucket_bytes`
Dims = tuple["str | None", ...]


@dataclass(frozen=True)
class Work:
    """What a program does once: seconds of computing and of collectives, and bytes that it sends."""

    seconds: float
    talk: float
    sent: float


@dataclass(frozen=True)
class Price:
    """A run of layers on one device of a tensor group, for one micro-batch.

    Attributes:
        parameters, gradients: bytes of each parameter's part, by its number in the loss's graph.
        kept: bytes that the forward program keeps, but for what it was handed and hands on.
        reads_handed, reads_out: whether the backward pass reads these.
        placed: how the parameters lie, by number. gathered: the result is made in parts and brought together.
    """

    forward: Work
    backward: Work
    parameters: Mapping[int, float]
    gradients: Mapping[int, float]
    kept: float
    work: float
    handed: float
    output: float
    reads_handed: bool
    reads_out: bool
    placed: Mapping[int, Dims]
    gathered: bool

    @property
    def seconds(self) -> float:
        """Forwards and backwards."""
        return self.forward.seconds + self.forward.talk + self.backward.seconds + self.backward.talk


class Pricer:
    """Prices runs of layers of one chain, over a tensor axis of some size.

    Args:
        loss: the loss of a micro-batch; chain: its layers. known: prices by structure, shared between pricers.
    """

    def __init__(self, loss: LossGraph, chain: Chain, cluster: Cluster, amp: str | None = None,
                 known: dict[Any, Price] | None = None):
        self.loss, self.chain, self.cluster, self.amp = loss, chain, cluster, amp
        self.known: dict[Any, Price] = {} if known is None else known
        self.joints: dict[tuple[str, bool], Joint] = {}
        self.stages: dict[tuple[int, int], tuple[Stage, str]] = {}

    def stage(self, first: int, end: int) -> tuple[Stage, str]:
        """Layers first to end - 1 as a stage, and what identifies its structure."""
        if (first, end) not in self.stages:
            stage = stage_at(self.chain, first, end)
            wanted = [self.loss.wants(v) for v in (*stage.handed, *stage.out)]
            trained = [i in self.loss.trained for i in stage.inputs]
            self.stages[first, end] = stage, f"{graph_hash(stage.graph)} {wanted} {trained}"
        return self.stages[first, end]

    def price(self, first: int, end: int, ranks: int, dims: Mapping[int, Dims], again: bool = False,
              free: bool = False) -> Price:
        """The price of layers first to end - 1.

        Args:
            dims: how parameters lie, by their number in the loss's graph. The others are whole; with `free` they lie
                as the partitioner likes.

        Raises:
            MeshError, ShapeError: they cannot lie so.
        """
        stage, key = self.stage(first, end)
        places = tuple(dims.get(i) for i in stage.inputs)
        known = key, ranks, places, again, free
        if known not in self.known:
            if (key, again) not in self.joints:
                run = stage_at(self.chain, first, end, again=True) if again else stage
                joint = join(self.loss, run)
                steps = [*TIDY, *([amp_pass(self.amp), *TIDY] if self.amp is not None else [])]
                self.joints[key, again] = replace(joint, graph=Pipeline(steps).run(joint.graph))
            joint = self.joints[key, again]
            own = dict(zip(joint.stage.inputs, places))  # of the run that was priced first, whose numbers count
            self.known[known] = self._price(joint, ranks, own, free)
        found = self.known[known]
        numbers = dict(zip(_numbers(found), (i for i in stage.inputs if i in self.loss.trained)))
        return _renumbered(found, numbers)

    def _price(self, joint: Joint, ranks: int, dims: Mapping[int, Dims | None], free: bool) -> Price:
        stage = joint.stage
        made, shardings = self._partitioned(joint, ranks, dims, free)
        varying = [k for k in range(len(made.inputs)) if not self._stays(joint, k)]
        parts = halves(save_less(made).graph, joint.ahead, varying)
        forward, backward = (bucket(g, MESSAGE) for g in (parts.forward, parts.backward))
        outs = len(stage.out)
        inner = [parts.forward.outputs[k] for k in parts.kept if k >= outs]
        kept = sum(_nbytes(v) for v in inner)
        output = sum(_nbytes(v) for v in made.outputs[:outs])
        ahead, behind = _peak(forward), _peak(backward)
        local = dict(zip(stage.inputs, made.inputs[len(stage.handed):]))
        trained = [i for i in stage.inputs if i in self.loss.trained]
        placed = {i: s.dims for i, s in zip(stage.inputs, shardings[len(stage.handed):])}
        sums = {i: _nbytes(made.inputs[joint.sums + k]) for k, (_, i) in enumerate(joint.params)}
        return Price(
            self._work(forward), self._work(backward), {i: _nbytes(local[i]) for i in trained},
            {i: sums.get(i, 0.0) for i in trained}, kept, max(ahead - kept - output, behind, 0.0),
            sum(_nbytes(v) for v in stage.handed), output,
            any(k < len(stage.handed) for k in parts.backward_inputs), any(k < outs for k in parts.kept),
            {i: placed[i] for i in trained}, _gathered(made, outs))

    def _partitioned(self, joint: Joint, ranks: int, dims: Mapping[int, Dims | None],
                     free: bool) -> tuple[Graph, list[Sharding]]:
        graph, stage = joint.graph, joint.stage
        if ranks == 1:
            return sweep(INLINE.run(graph).graph).graph, [Sharding.whole(v.rank) for v in graph.inputs]
        inputs = {k: Sharding.whole(v.rank) for k, v in enumerate(graph.inputs[:joint.sums])}
        own = {i: k for k, i in enumerate(stage.inputs, start=len(stage.handed))}
        for i in stage.inputs:
            if (wish := dims.get(i)) is not None:
                inputs[own[i]] = Sharding(wish)
            elif free and i in self.loss.trained:
                del inputs[own[i]]
        for k, (number, _) in enumerate(joint.params):
            if number in inputs:
                inputs[joint.sums + k] = inputs[number]
        outputs = {k: Sharding.whole(v.rank) for k, v in enumerate(graph.outputs[:joint.ahead + len(joint.back)])
                   if k not in graph.aliases}
        made = partition(graph, Mesh({TENSOR: ranks}), inputs, outputs)
        return made.graph, made.inputs

    def _stays(self, joint: Joint, k: int) -> bool:
        """Whether an input of the joint graph is the same for all micro-batches."""
        first = len(joint.stage.handed)
        return first <= k < joint.cotangents and joint.stage.inputs[k - first] >= self.loss.batch

    def _work(self, graph: Graph) -> Work:
        seconds = talk = sent = 0.0
        for group in kernels(graph):
            if (kind := kind_of(group[-1])) is None:
                flops = sum(float(n.flops) for n in group)
                seconds += max(flops / self.cluster.flops, self.cluster.touch(_traffic(group)))
                continue
            node = group[-1]
            size, whole = node.attrs["size"], sum(_nbytes(v) for v in node.operands)
            if kind in ("all_gather", "all_to_all"):
                whole *= size
            talk += getattr(self.cluster, kind)(TENSOR, size, whole)
            sent += sent_bytes(kind, size, whole)
        return Work(seconds, talk, sent)


def _nbytes(v: Any) -> float:
    return float(v.type.nbytes)


def _traffic(group: Sequence[Any]) -> float:
    """Bytes that a kernel reads and writes: what comes from outside and what its last node makes."""
    if len(group) == 1:
        return float(group[0].nbytes)
    inner = {v for n in group[:-1] for v in n.results}
    read = {v for n in group for v in n.operands} - inner
    return sum(map(_nbytes, read)) + sum(map(_nbytes, group[-1].results))


def _peak(graph: Graph) -> float:
    return float(timeline(graph).peak)


def _gathered(graph: Graph, outs: int) -> bool:
    """Whether a result is brought together from parts at the very end."""
    for v in graph.outputs[:outs]:
        node = v.producer
        while node is not None and node.op.name in ("identity", "reshape", "cast"):
            node = node.operands[0].producer
        if node is not None and kind_of(node) == "all_gather":
            return True
    return False


def _numbers(price: Price) -> list[int]:
    return list(price.placed)


def _renumbered(price: Price, numbers: Mapping[int, int]) -> Price:
    """The price of an equal run, whose parameters have other numbers."""
    if all(a == b for a, b in numbers.items()):
        return price

    def moved(table: Mapping[int, Any]) -> dict[int, Any]:
        return {numbers[i]: x for i, x in table.items()}

    return Price(price.forward, price.backward, moved(price.parameters), moved(price.gradients), price.kept, price.work,
                 price.handed, price.output, price.reads_handed, price.reads_out, moved(price.placed), price.gathered)


# Which parameters are split ------------------------------------------------------------------------------------------

LONGEST = 3  # layers that are split together


@dataclass(frozen=True)
class Run:
    """Layers that are not cut, and how their parameters lie."""

    first: int
    end: int
    dims: Mapping[int, Dims]


class Annotator:
    """Finds which parameters to split over a tensor axis.

    A parameter is split along the dimension that makes its layer cheapest; the partitioner says how the others lie
    then (a query weight that is split by columns pulls key, value and, by rows, the output along: Megatron-LM). If the
    result of a layer is left in parts that have to be gathered, the layers behind it are tried together with it: so a
    column-split matrix finds its row-split partner in a plain net. A parameter that several layers read is settled by
    the most costly of them.

    Args:
        per_byte: seconds of a step that a byte of parameter costs, by its update and by the sum of its gradients.
        given: how parameters lie, if that is not to be found.
    """

    def __init__(self, pricer: Pricer, ranks: int, per_byte: float,
                 given: Callable[[int], Dims | None] | None = None):
        self.pricer, self.ranks, self.per_byte, self.given = pricer, ranks, per_byte, given
        self.settled: dict[int, Dims] = {}

    def runs(self) -> list[Run]:
        """The layers in runs, in order."""
        count = len(self.pricer.chain.layers)
        if self.ranks == 1 or self.given is not None:
            fixed = {i: d for i in self.pricer.loss.trained if self.given and (d := self.given(i)) is not None}
            found = [Run(i, i + 1, fixed) for i in range(count)]
            return self.joined(found) if fixed else found
        made: dict[int, Run] = {}
        for first in [*self._tied(), *range(count)]:
            if not any(r.first <= first < r.end for r in made.values()):
                stop = min((r.first for r in made.values() if r.first > first), default=count)
                run = self.run(first, stop)
                made[run.first] = run
                self.settled.update((i, run.dims.get(i, (None,) * self._rank(i)))
                                    for i in self.pricer.stage(run.first, run.end)[0].inputs
                                    if i in self.pricer.loss.trained)
        return [made[k] for k in sorted(made)]

    def _rank(self, i: int) -> int:
        return self.pricer.loss.graph.inputs[i].rank

    def _tied(self) -> list[int]:
        """Of every parameter that several layers read, the layer that computes most with it."""
        readers: dict[int, list[tuple[float, int]]] = {}
        for layer in range(len(self.pricer.chain.layers)):
            stage = self.pricer.stage(layer, layer + 1)[0]
            for i, v in zip(stage.inputs, stage.graph.inputs[len(stage.handed):]):
                if i in self.pricer.loss.trained:
                    flops = sum(float(n.flops) for n in stage.graph.nodes if v in n.operands)
                    readers.setdefault(i, []).append((flops, layer))
        return [max(layers)[1] for layers in readers.values() if len(layers) > 1]

    def value(self, price: Price) -> tuple[float, float]:
        """What is made small."""
        nbytes = sum(price.parameters.values())
        return price.seconds + self.per_byte * nbytes, nbytes

    def run(self, first: int, stop: int) -> Run:
        """The best run that starts at a layer."""
        dims, price, split = self.split(first, first + 1)
        best, value = Run(first, first + 1, dims), self.value(price)
        end = first + 1
        while split is not None and split.gathered and end < min(stop, first + LONGEST):
            alone = self.split(end, end + 1)[1]
            value = (value[0] + self.value(alone)[0], value[1] + self.value(alone)[1])
            end += 1
            dims, price, split = self.split(first, end, split)
            if self.value(price) < value:
                best, value = Run(first, end, dims), self.value(price)
        return best

    def split(self, first: int, end: int, before: Price | None = None) -> tuple[dict[int, Dims], Price, Price | None]:
        """How the parameters of some layers lie best, the price of that, and of the best that splits something.

        `before`: how those of the first of these layers lie already.
        """
        stage = self.pricer.stage(first, end)[0]
        own = [i for i in stage.inputs if i in self.pricer.loss.trained]
        dims = {i: self.settled[i] for i in own if i in self.settled}
        dims.update(before.placed if before is not None else {})
        whole = self.pricer.price(first, end, self.ranks, dims)
        best, some = whole, None if before is None else whole
        alike = {self._multiplied(stage, i): i for i in reversed(own) if i not in dims}
        waiting = sorted(i for key, i in alike.items() if key is not None)
        batches = [waiting, *([i] for i in waiting)]  # the best of all first, then what is left
        for batch in batches:
            tried = [p for i in batch if i not in dims for k in range(self._rank(i))
                     if (p := self._try(first, end, dims, i, k)) is not None]
            if not tried:
                continue
            found = min(tried, key=self.value)
            if some is None or self.value(found) < self.value(some):
                some = found
            if self.value(found) < self.value(best):
                best = found
                dims.update((j, d) for j, d in found.placed.items() if any(d))
        placed = {i: d for i, d in best.placed.items() if any(d)}
        return placed, best, some

    @staticmethod
    def _multiplied(stage: Stage, i: int) -> Any:
        """What a parameter is a factor with, or rows are taken by: equal for those of a kind, as query, key and value;
        None for others."""
        v = stage.graph.inputs[len(stage.handed) + stage.inputs.index(i)]
        for node in stage.graph.nodes:
            if v.rank >= 2 and v in node.operands and (node.op.has("contraction") or node.op.name == "take"):
                return node.op.name, v.shape, tuple(x for x in node.operands if x is not v)
        return None

    def _try(self, first: int, end: int, dims: Mapping[int, Dims], i: int, k: int) -> Price | None:
        shape = self.pricer.loss.graph.inputs[i].shape
        if shape[k] % self.ranks:
            return None
        wish = tuple(TENSOR if d == k else None for d in range(len(shape)))
        try:
            return self.pricer.price(first, end, self.ranks, {**dims, i: wish}, free=True)
        except (MeshError, ShapeError):
            return None

    def again(self, runs: Sequence[Run]) -> list[Run]:
        """The same runs for another number of ranks: split as before where that fits and pays."""
        found = []
        for run in runs:
            dims = {i: d for i, d in run.dims.items()
                    if all(a is None or n % self.ranks == 0 for a, n in zip(d, self.pricer.loss.graph.inputs[i].shape))}
            dims.update((i, d) for i, d in self.settled.items() if i in run.dims and any(d))
            ways = [{}, dims] if dims and not any(i in self.settled for i in run.dims) else [dims]
            best = min(ways, key=lambda w: self.value(self.pricer.price(run.first, run.end, self.ranks, w)))
            found.append(Run(run.first, run.end, best))
        return found

    def joined(self, runs: Sequence[Run]) -> list[Run]:
        """Runs between which nothing is left in parts."""
        found: list[Run] = []
        for run in runs:
            if found and found[-1].end - found[-1].first < LONGEST:
                last = found[-1]
                if self.pricer.price(last.first, last.end, self.ranks, last.dims).gathered:
                    found[-1] = Run(last.first, run.end, last.dims)
                    continue
            found.append(run)
        return found
