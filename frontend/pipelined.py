"""A training step on a mesh with a pipeline axis; `parallelize` makes it when the plan names one.

The loss of one micro-batch is traced and cut into stages of equal cost (`distributed/stages.py`); each device makes the
programs of its own (`pipeline_stages.py`) and runs them in the order of a schedule (`distributed/pipeline.py`,
`stage_run.py`), handing tensors to the next device while it goes on. Gradients stay partial sums until the update
(`pipeline_update.py`), which reduces them once; ZeRO-2 and 3 reduce them after every micro-batch, into parts.

Micro-batches are those of `train_step(accumulate=)`: the result is that of one process that accumulates so many. Random
numbers and running statistics go from micro-batch to micro-batch as there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..distributed import Mesh, MeshError
from ..distributed.buffers import as_bytes
from ..distributed.chain import Cut, cut
from ..distributed.messages import Messages
from ..distributed.pipeline import schedule, stash_bound
from ..distributed.stage_run import Runner, StageProgram
from ..distributed.stages import (
    Chain,
    Stage,
    chain_at,
    chain_of,
    cut_at_home,
    cut_graph,
    regions,
    stages_of,
    unwrapped,
)
from ..ir.decompose import INLINE
from ..ir.dtypes import as_dtype
from ..ir.errors import ArgumentsError, AttributeValueError
from ..ir.location import user_location
from ..ir.passes import TIDY
from ..ir.pipeline import Pipeline
from ..ir.types import TensorType
from . import tree
from .measured import layer_seconds
from .parallel import ParallelStep, Plan, Run
from .pending import parked
from .pipeline_stages import LossGraph, StageBuilder
from .pipeline_update import build_update
from .random import default_generator
from .recording import Guards
from .tensor import Tensor
from .trace import Spec, leaf_type, record
from .train import TrainStep

WIDEST = 1 << 20  # tensors that cross a cut: any number
FORWARD_TIDY = [p for p in TIDY if p is not INLINE]  # checkpointed code stays apart until it is differentiated


class PipelineStep(ParallelStep):
    """A training step whose model is cut into stages.

    Attributes:
        cut: where, after the first step; as text a table of the stages.
        most_kept: the most micro-batches whose activations this rank held at a time in the last step.
        shares: what each micro-batch counted in the loss of the last step.
    """

    def __init__(self, step: TrainStep, mesh: Mesh, plan: Plan):
        super().__init__(step, mesh, plan)
        assert plan.pipe is not None
        self.stage_axis = plan.pipe
        self.pipe, self.devices, self.micro = plan.pipe, mesh[plan.pipe], step.accumulate
        self.here = mesh.coordinates(self.rank)[self.pipe]
        self.stage_mesh = Mesh({name: size for name, size in mesh.axes if name != self.pipe})
        self.stage_comm = self.job.world.Split(self.here, self.rank) if self.job is not None else None
        self.count = self.devices * plan.chunks
        order = schedule(plan.schedule, self.devices, self.micro, plan.chunks)[self.here]
        messages = None
        if self.job is not None:
            messages = Messages(self.job.groups[self.pipe], self.job.watch, self.pipe in self.job.apart)
        self.runner = Runner(order, self.here, self.devices, self.count, self.micro, messages)
        self.stages = StageBuilder(self)
        self.cut: Cut | None = None
        self.shares: Sequence[float] = ()
        self.homes: dict[int, int] = {}  # id of a tensor that is moved -> the device that has it
        self.moved: list[Tensor] = []    # state that stages move, in one order on all ranks
        self.stations: dict[int, frozenset[int]] = {}  # id of a tensor -> the devices whose stages read it
        self._ends: tuple[tuple[int, ...], tuple[str, ...]] | None = None

    @property
    def most_kept(self) -> int:
        """The most micro-batches whose activations this rank held at a time in the last step."""
        return self.runner.most_kept

    # Building ---------------------------------------------------------------------------------------------------

    def _build(self, batch: Sequence[Any], numbers: Mapping[str, np.ndarray]) -> tuple[Run, Guards]:
        leaves, structure = tree.flatten(tuple(batch))
        tensors = [i for i, leaf in enumerate(leaves) if leaf_type(leaf) is not None]
        sizes = [micro_sizes(leaf_type(leaves[i]), self.micro, self._ranks()) for i in tensors]
        found: dict[tuple[int, ...], tuple[LossGraph, Any, list[Stage]]] = {}
        self.stages.added.clear()
        guards: list[Any] = []
        for kind in dict.fromkeys(zip(*sizes)):
            specs = list(leaves)
            for i, n in zip(tensors, kind):
                specs[i] = _micro_spec(leaf_type(leaves[i]), n)
            loss, results, read = self._loss_graph(tree.unflatten(structure, specs), len(tensors))
            guards += read
            stages = stages_of(*self._cut(loss), again=self.plan.recompute)
            self._settle_down(loss, stages)
            found[kind] = loss, results, stages
        widths = [len(stage.out) for _, _, stages in found.values() for stage in stages]
        self.runner.widest = max(self.runner.widest, *widths)
        if self.job is not None:
            texts = [str(loss.graph) for loss, _, _ in found.values()]
            self.job.agree("the model and its cut", "\n".join([*texts, repr(self.cut), str(self.plan)]))
        programs = {kind: self._own(loss, stages) for kind, (loss, _, stages) in found.items()}
        self.stages.prepare()
        owner, tied = self._held(next(iter(found.values()))[::2])
        update = build_update(self, numbers, owner)
        self.stages.share_arena()
        self._leave_to_others()
        run = _Steps(self, [programs[kind] for kind in zip(*sizes)], list(zip(*sizes)), update, tied,
                     _Results([(loss, results, stages) for loss, results, stages in found.values()], self))
        return run, Guards(guards)

    def _own(self, loss: LossGraph, stages: Sequence[Stage]) -> dict[int, StageProgram]:
        """The programs of this device's stages."""
        own = [s for s in range(self.count) if s % self.devices == self.here]
        readers = Counter(i for s in own for i in stages[s].inputs)
        starts = {i for i, count in readers.items() if count == 1}
        return self.stages.build(loss, {s: stages[s] for s in own}, self.runner.order, self._bound(self.here), starts)

    def _bound(self, device: int) -> int:
        """Micro-batches whose activations the schedule lets a device keep."""
        return stash_bound(self.plan.schedule, self.devices, self.micro, device, self.plan.chunks)

    def _ranks(self) -> int:
        data = self.plan.data_axis
        return self.mesh[data] if data is not None and data in self.mesh else 1

    def _loss_graph(self, batch: tuple[Any, ...], count: int) -> tuple[LossGraph, Any, list[Any]]:
        """The loss of a micro-batch, the structure of what the loss function returns, and what the trace guards."""
        inner = self.inner
        graph = record(lambda *b: inner.loss_fn(inner.model, *b), batch)
        meta, structure = graph.meta, graph.meta["out_structure"]
        loss = graph.outputs[0]
        if loss.shape != () or not loss.dtype.is_float or structure.kind not in ("leaf", "tuple"):
            raise ArgumentsError("train_step: loss_fn must return a floating scalar, or (loss, aux); this one returns "
                                 f"{structure} that starts with {loss.type}", user_location())
        tidy = unwrapped(Pipeline(FORWARD_TIDY).run(graph), range(count))
        tidy = Pipeline(FORWARD_TIDY).run(tidy)
        tidy.name = "loss"
        for tensor in meta["assigns"].values():
            tensor.role = tensor.role or "state"
        trained = [p for p, trains in zip(inner.opt.params, inner._trainable) if trains or not inner.prune_frozen]
        return LossGraph.of(tidy, count, meta["captures"], trained), structure, meta["guards"]

    def _cut(self, loss: LossGraph) -> tuple[Chain, Cut]:
        """The chain of a graph's layers and the cut; all graphs of a step are cut at the same places."""
        data = range(loss.batch)
        if self._ends is None and self.plan.cut is not None:
            self._ends, self.cut = self._given_cut(loss, self.plan.cut)
        if self._ends is None:
            kept = [self._bound(s % self.devices) for s in range(self.count)]
            memory = float("inf") if self.plan.memory is None else self.plan.memory
            chain, self.cut = cut_graph(loss.graph, data, self.count, memory, kept)
            if self.plan.measure:
                chain = self._measured(loss, chain)
                self.cut = cut(chain.layers, self.count, memory, kept)
            self._ends = chain.ends, chain.ops
            return chain, self.cut
        assert self.cut is not None
        ends, ops = self._ends
        chain, homes = chain_at(loss.graph, data, ends), self._homes(loss)
        if not self.cut.layers:
            self.cut = replace(self.cut, layers=chain.layers)
        if chain.ops == ops and (not self.stations or all(
                home.issuperset(stage.inputs) for home, stage in zip(homes, stages_of(chain, self.cut)))):
            return chain, self.cut
        found = cut_at_home(loss.graph, data, homes)
        if found is None:
            raise AttributeValueError("for a batch of this shape, or in this mode, the model reads its parameters in "
                                      "another order than for the first one, so they cannot stay in their stages: give "
                                      "it a step of its own", user_location())
        return found

    def _homes(self, loss: LossGraph) -> list[set[int]]:
        """Of each stage the inputs that it may read: not what lies on other devices only."""
        trained = {id(p) for p in self.inner.opt.params}
        everywhere = frozenset(range(self.devices))
        lies = {i: self.stations.get(id(t), frozenset((0,)) if id(t) in trained else everywhere)
                for i, t in loss.captures.items() if i not in loss.alike}
        return [{i for i in range(len(loss.graph.inputs)) if s % self.devices in lies.get(i, everywhere)}
                for s in range(self.count)]

    def _settle_down(self, loss: LossGraph, stages: Sequence[Stage]) -> None:
        """Notes which devices read what, from the first graph on; what they move or train stays there."""
        for s, stage in enumerate(stages):
            for i in stage.inputs:
                if i in loss.captures and i not in loss.alike:
                    key = id(loss.captures[i])
                    self.stations[key] = self.stations.get(key, frozenset()) | {s % self.devices}

    def _measured(self, loss: LossGraph, chain: Chain) -> Chain:
        """The chain with the times that its layers take here, all ranks at once: the median of what they find."""
        compiled = self.inner._compiled
        mine = layer_seconds(loss, chain, None if compiled.amp is None else str(compiled.amp), compiled.target)
        every = [mine] if self.job is None else self.job.gather_all(mine)
        layers = [replace(layer, forward=float(ahead), backward=float(behind))
                  for layer, (ahead, behind) in zip(chain.layers, np.median(np.array(every), axis=0))]
        return replace(chain, layers=tuple(layers))

    def _given_cut(self, loss: LossGraph, ends: Sequence[int]) -> tuple[tuple[tuple[int, ...], tuple[str, ...]], Cut]:
        """Where layers end under the plan's cut, and the steps of the graph; and the cut."""
        everywhere = chain_of(loss.graph, range(loss.batch), widest=WIDEST)
        if len(ends) + 1 != self.count or not set(ends) < set(everywhere.ends):
            raise MeshError(f"the plan's cut {list(ends)} is not one of this model into {self.count} stages: make the "
                            "plan anew for this model and mesh, or leave `cut` out", user_location())
        layers = sorted({*ends, *regions(chain_of(loss.graph, range(loss.batch)))})
        return (tuple(layers), everywhere.ops), Cut((0, *(layers.index(e) + 1 for e in ends)), 0.0)

    def _held(self, found: Any) -> tuple[dict[int, int], list[Callable[[], None]]]:
        """Which device has which tensor; and what adds up the sums that several devices have."""
        loss, stages = found
        for s, stage in enumerate(stages):
            for r in stage.results:
                if r in loss.graph.aliases:
                    tensor = loss.captures[loss.graph.aliases[r]]
                    if all(tensor is not t for t in self.moved):
                        self.moved.append(tensor)
                    self.homes.setdefault(id(tensor), s % self.devices)
        params = self.inner.opt.params
        mine = [[i for i, p in enumerate(params) if id(p) in some] for some in (self.stages.sums, self.stages.added)]
        every = [mine] if self.job is None else self.job.gather_all(mine)
        devices = [self.mesh.coordinates(r)[self.pipe] for r in range(self.mesh.size)]
        holders = [sorted({d for d, (own, _) in zip(devices, every) if i in own}) for i in range(len(params))]
        read = {i for _, added in every for i in added}
        owner, tied = {}, []
        for i, (p, own) in enumerate(zip(params, holders)):
            if i not in read:  # nor has it a gradient on one process
                continue
            if id(p) in self.stages.sums and id(p) not in self.stages.added:
                self.stages.cleared[id(p)] = self.stages.sums[id(p)]
            if own:
                owner[id(p)] = self.homes[id(p)] = own[0]
            if len(own) > 1:
                assert self.job is not None
                group = self.job.groups[self.pipe].Split(0 if self.here in own else self.job.mpi.UNDEFINED, self.here)
                if self.here in own:
                    total = [self.stages.sums[id(p)]]
                    tied.append(self.job.transport(group).all_reduce(total, total, "sum"))
        return owner, tied

    # What ranks have --------------------------------------------------------------------------------------------

    def broadcast(self, array: np.ndarray, device: int) -> np.ndarray:
        """The array of one device's rank on all ranks along the pipeline."""
        if self.job is not None and self.devices > 1:
            self.job.watch.enter("broadcast:" + self.pipe)
            self.job.watch.wait(self.job.groups[self.pipe].Ibcast(as_bytes(array), device))
            self.job.watch.leave()
        return array

    def _tensors(self) -> Iterator[tuple[Tensor, int]]:
        """What a step changes, and the device that has it; in the same order on all ranks."""
        for p, slots in zip(self.inner.opt.params, self.inner.opt.state):
            for tensor in (p, *slots.values()):
                yield tensor, self.homes.get(id(p), 0)
        for tensor in self.moved:
            yield tensor, self.homes[id(tensor)]

    @property
    def memory(self) -> dict[str, int]:
        """Bytes on this rank, as of a step without pipeline; activations are those of all micro-batches under way."""
        own = self.local_bytes
        return {"parameters": own["parameter"] + sum(copy.nbytes for _, copy in self.stages.narrow.values()),
                "gradients": sum(total.nbytes for total in self.stages.sums.values()), "states": own["state"],
                "activations": self.stages.activations, "messages": self.stages.messages}

    def holds(self, tensor: Tensor) -> bool:
        """Of what the model shares between stages and of the rest, the first device has it."""
        return next((home for t, home in self._tensors() if t is tensor), 0) == self.here

    def moves(self, tensor: Tensor) -> bool:
        """As of a step without pipeline."""
        return any(tensor is t for t in self.moved)

    def settle(self) -> None:
        """As of a step without pipeline; and elements of what other stages train are given up."""
        super().settle()
        self._leave_to_others()

    def _leave_to_others(self) -> None:
        """Gives up what is trained, but not read, by this device: it would be as it was at the last `gather`."""
        for tensor, device in self._tensors() if self.homes else ():
            foreign = device != self.here and id(tensor) not in self._placed
            if foreign and tensor is not default_generator().state and not parked(tensor._value):
                tensor._park(f"lives on the ranks of another stage ({self.pipe}={device}) while it is trained; call "
                             "step.gather() on every rank to have it here")

    def gather(self) -> None:
        """As of a step without pipeline; every stage's tensors come to every rank."""
        if self.job is None:
            return
        assert self.stage_comm is not None
        self.settle()
        for tensor, device in self._tensors():
            if device != self.here:
                whole = np.empty(tensor.shape, tensor.dtype.np)
            elif id(tensor) not in self.parts:
                whole = tensor.numpy()
            else:
                _, sharding, part = self.parts[id(tensor)]
                into = np.empty((self.stage_mesh.size, part.nbytes), np.uint8)
                self.job.watch.wait(self.stage_comm.Iallgather(part.reshape(-1).view(np.uint8), into))
                rows = [r.view(part.dtype).reshape(part.shape) for r in into]
                whole = sharding.join(rows, self.stage_mesh, tensor.shape)
            tensor.assign(self.broadcast(np.ascontiguousarray(whole), device))


class _Results:
    """Puts together what a step returns: the loss, and of each other output the micro-batches' values."""

    def __init__(self, found: Sequence[tuple[LossGraph, Any, list[Stage]]], step: PipelineStep):
        self.step = step
        (first, self.structure, stages) = found[0]
        self.loss = first.graph.outputs[0].dtype.np
        self.numbers = [i for i in range(1, len(first.graph.outputs)) if i not in first.graph.aliases]
        self.types = {i: first.graph.outputs[i].type for i in self.numbers}
        self.devices = {r: s % step.devices for s, stage in enumerate(stages) for r in stage.results}
        for loss, _, others in found[1:]:
            for i in self.numbers:
                if all(i not in stage.results for s, stage in enumerate(others)
                       if s % step.devices == self.devices[i]):
                    raise ArgumentsError(f"result {i} of the loss function is made by another stage for each size of "
                                         f"micro-batch: give a batch that divides into {step.micro} equal parts",
                                         user_location())
                if loss.graph.outputs[i].type != self.types[i]:
                    raise ArgumentsError(
                        f"result {i} of the loss function has another shape for each size of micro-batch "
                        f"({self.types[i]}, {loss.graph.outputs[i].type}), so they cannot be stacked: return what does "
                        f"not depend on the size, or a batch that divides into {step.micro} equal parts",
                        user_location())

    def __call__(self, loss: float, results: Mapping[int, Mapping[int, np.ndarray]]) -> Any:
        """The results of one process that accumulates: aux keeps an axis of micro-batches."""
        step = self.step
        found = [step.broadcast(np.array(loss, np.float64), (step.count - 1) % step.devices).astype(self.loss)]
        for i in self.numbers:
            type = self.types[i]
            rows = np.zeros((step.micro, *type.shape), type.dtype.np)
            for m, row in results.get(i, {}).items():
                rows[m] = row
            rows = step.broadcast(rows, self.devices[i])
            found.append(rows if step.micro > 1 else rows[0])
        return tree.unflatten(self.structure, [Tensor(a) for a in found])


class _Steps:
    """Steps on batches of one kind."""

    def __init__(self, step: PipelineStep, programs: Sequence[Mapping[int, StageProgram]],
                 sizes: Sequence[tuple[int, ...]], update: Callable[[Mapping[str, np.ndarray]], Any],
                 tied: Sequence[Callable[[], None]], results: _Results):
        self.step, self.programs, self.sizes, self.update, self.tied = step, programs, sizes, update, tied
        self.results = results
        self.ends = [np.cumsum([s[i] for s in sizes]).tolist() for i in range(len(sizes[0]))]

    def __call__(self, arrays: Sequence[Any], numbers: Mapping[str, np.ndarray]) -> Any:
        """One step."""
        step, stages = self.step, self.step.stages
        for total in stages.cleared.values():
            total.fill(0)
        for tensor, copy in stages.copies.values():
            copy[...] = tensor.numpy(copy=False)
        stages.cast()
        starts = [[0, *ends[:-1]] for ends in self.ends]
        cut = [[np.asarray(a)[s[m]:e[m]] for a, s, e in zip(arrays, starts, self.ends)] for m in range(step.micro)]
        step.shares = self.weights(cut)
        loss = step.runner.step(self.programs, cut, step.shares)
        self.check()
        for tensor, copy in stages.copies.values():
            tensor._pin()[...] = copy
        self.add_tied()
        self.update(numbers)
        return self.results(loss, step.runner.results)

    def weights(self, cut: Sequence[Sequence[np.ndarray]]) -> Sequence[float]:
        """The part of each micro-batch in the loss: of its examples, or by what a `weight` counts in it."""
        weight, of_tensors = self.step.plan.weight, self.step.inner.weight
        if weight is not None:
            counts = np.array([float(weight(*arrays)) for arrays in cut])
        elif of_tensors is not None:
            counts = np.array([float(np.asarray(of_tensors(*map(Tensor, arrays)))) for arrays in cut])
        else:
            counts = np.array([float(s[0]) for s in self.sizes])
        if not counts.sum() > 0:
            raise ArgumentsError(f"the weights of the micro-batches are {counts.tolist()}; they have to add up to more "
                                 "than 0", user_location())
        shares: list[float] = (counts / counts.sum()).tolist()
        return shares

    def check(self) -> None:
        """That the device held no more activations than the schedule promises."""
        step = self.step
        bound = step._bound(step.here)
        assert step.most_kept <= bound, f"kept {step.most_kept} micro-batches, the schedule promises {bound}"

    def add_tied(self) -> None:
        """Adds up the gradients of parameters that several devices hold."""
        job = self.step.job
        for add in self.tied:
            assert job is not None
            job.watch.enter("all_reduce of a tied parameter:" + self.step.pipe)
            add()
            job.watch.leave()


def micro_sizes(type: TensorType | None, micro: int, ranks: int) -> list[int]:
    """Examples of each micro-batch: as equal as can be (10 by 4: 3, 3, 2, 2), in multiples of the data axis' ranks.

    Raises:
        AttributeValueError: there are too few, or they do not divide over the ranks.
    """
    assert type is not None
    if not type.rank or type.shape[0] % ranks or type.shape[0] < micro * ranks:
        over = f" of multiples of {ranks} examples, one for each data-parallel rank" if ranks > 1 else ""
        raise AttributeValueError(f"a tensor {type} of the batch cannot be cut into {micro} micro-batches{over} along "
                                  "its first dimension; give a larger batch, or fewer micro-batches (accumulate)",
                                  user_location())
    most, more = divmod(int(type.shape[0]) // ranks, micro)
    return [(most + (m < more)) * ranks for m in range(micro)]


def _micro_spec(type: TensorType | None, size: int) -> Spec:
    assert type is not None
    return Spec(TensorType((size, *type.shape[1:]), as_dtype(type.dtype)))
