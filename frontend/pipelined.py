"""A training step on a mesh with a pipeline axis; `parallelize` makes it when the plan names one.

The loss of one micro-batch is traced, cut into stages of equal cost (`distributed/stages.py`), and each stage
differentiated on its own: a forward program that keeps what its backward program needs, and a backward program that
adds to the gradients. Both are partitioned over the other axes of the mesh like any graph, so a pipeline of data-
and tensor-parallel stages is nothing special. A schedule (`distributed/pipeline.py`) says in which order a device
runs them; what stages hand each other goes over MPI while they compute. Gradients stay partial sums until the
update, which reduces them once.

Micro-batches are those of `train_step(accumulate=)`: the result is that of one process that accumulates so many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..autodiff import backward
from ..distributed import Mesh, MeshError, Sharding
from ..distributed.buckets import bucket
from ..distributed.chain import Cut
from ..distributed.comm import as_bytes
from ..distributed.partition import partition
from ..distributed.pipeline import BACKWARD, FORWARD, Task, schedule, stash_bound
from ..distributed.plans import Source, annotate
from ..distributed.stages import Halves, Stage, chain_of, halves, stages_of
from ..ir.builder import GraphBuilder, copy_into
from ..ir.dtypes import as_dtype
from ..ir.errors import ArgumentsError, AttributeValueError
from ..ir.graph import Graph, Value
from ..ir.location import user_location
from ..ir.passes import TIDY
from ..ir.pipeline import Pipeline
from ..ir.types import TensorType
from . import functions as F
from . import tree
from .compile import build_executable
from .dispatch import apply
from .optim.clip import global_norm
from .parallel import ParallelStep, Plan, aligned, register
from .tensor import Tensor
from .trace import Spec, record
from .train import CLIP, FLAG, TrainStep, _replace


@dataclass
class _StageProgram:
    """One stage on this rank.

    Attributes:
        captured: number of an input of the joint graph -> its array (parameters and constants).
        batch: number of an input -> the leaf of the batch, and how it lies.
        sums: the gradients, by the numbers of their inputs.
        kept: by micro-batch, what the forward pass left.
    """

    halves: Halves
    forward: Any
    backward: Any
    handed: TensorType | None
    out: TensorType
    cotangent: int
    captured: dict[int, np.ndarray]
    batch: dict[int, tuple[int, Sharding]]
    sums: dict[int, np.ndarray]
    kept: dict[int, list[np.ndarray]] = field(default_factory=dict)


class PipelineStep(ParallelStep):
    """A training step whose model is cut into stages.

    Attributes:
        cut: where, after the first step.
        most_kept: the most micro-batches whose activations this rank held at a time in the last step.
    """

    def __init__(self, step: TrainStep, mesh: Mesh, plan: Plan):
        super().__init__(step, mesh, plan)
        assert plan.pipe is not None
        self.stage_axis = plan.pipe
        self.pipe, self.devices, self.micro = plan.pipe, mesh[plan.pipe], step.accumulate
        if plan.zero > 2:
            raise MeshError("ZeRO stage 3 gathers parameters for every micro-batch of a pipeline; use stage 2 or less")
        self.here = mesh.coordinates(self.rank)[self.pipe]
        self.stage_mesh = Mesh({name: size for name, size in mesh.axes if name != self.pipe})
        self.stage_comm = self.job.world.Split(self.here, self.rank) if self.job is not None else None
        self.count = self.devices * plan.chunks
        self.order = schedule(plan.schedule, self.devices, self.micro, plan.chunks)[self.here]
        self.cut: Cut | None = None
        self.most_kept = 0
        self.shares = np.zeros(0)
        self.holders: dict[int, list[int]] = {}  # id of a parameter -> its stages
        self.sums: dict[int, np.ndarray] = {}
        self.sum_types: dict[int, Sharding] = {}
        self._pending: list[Any] = []
        self._local: dict[tuple[Any, ...], np.ndarray] = {}

    # Building ---------------------------------------------------------------------------------------------------

    def _loss_graph(self, batch: Sequence[Any]) -> tuple[Graph, int]:
        """The loss of a micro-batch, and how many of the inputs are the batch."""
        leaves, structure = tree.flatten(tuple(batch))
        specs = [self._micro_spec(np.asarray(x.numpy() if isinstance(x, Tensor) else x)) for x in leaves]
        graph = record(lambda *b: self.inner.loss_fn(self.inner.model, *b), tree.unflatten(structure, specs))
        if len(graph.outputs) != 1 or graph.meta["assigns"]:
            raise ArgumentsError("under a pipeline the loss function returns the loss alone, and may not draw random "
                                 "numbers or move running statistics: this one returns or assigns "
                                 f"{len(graph.outputs)} values", user_location())
        tidy = Pipeline(list(TIDY)).run(graph)
        tidy.meta.update(graph.meta)
        tidy.name = "loss"
        return tidy, len(leaves)

    def _micro_spec(self, array: np.ndarray) -> Spec:
        if array.ndim == 0 or array.shape[0] % self.micro:
            raise AttributeValueError(f"a tensor {array.dtype}{list(array.shape)} of the batch does not divide into "
                                      f"{self.micro} micro-batches along its first dimension", user_location())
        return Spec(TensorType((array.shape[0] // self.micro, *array.shape[1:]), as_dtype(array.dtype)))

    def _build(self, batch: Sequence[Any],
               numbers: Mapping[str, np.ndarray]) -> Callable[[Sequence[Any], Mapping[str, np.ndarray]], Any]:
        graph, leaves = self._loss_graph(batch)
        captures: dict[int, Tensor] = graph.meta["captures"]
        chain = chain_of(graph, range(leaves))
        kept = [stash_bound(self.plan.schedule, self.devices, self.micro, s % self.devices, self.plan.chunks)
                for s in range(self.count)]
        stages, self.cut = stages_of(chain, self.count, kept=kept)
        if self.job is not None:
            self.job.agree("the model and its cut", f"{graph}\n{self.cut}\n{self.plan}")
        trained = {id(p) for p in self.inner.opt.params}
        self.holders = {}
        for s, stage in enumerate(stages):
            for i in stage.inputs:
                if i in captures and id(captures[i]) in trained:
                    self.holders.setdefault(id(captures[i]), []).append(s)
        own = {s: self._stage(stage, captures, s == self.count - 1)
               for s, stage in enumerate(stages) if s % self.devices == self.here}
        update = self._update(numbers)
        return lambda arrays, given: Tensor(self._run([np.asarray(a) for a in arrays], given, own, update))

    def _boundary(self, v: Value) -> Sharding:
        """How what stages hand each other lies: split along its first dimension where that is the batch's."""
        data = self.plan.data
        if data in self.mesh and v.rank and v.shape[0] % self.mesh[data] == 0:  # type: ignore[index]
            return Sharding((data, *(None,) * (v.rank - 1)))
        return Sharding.whole(v.rank)

    def _joint(self, stage: Stage, captures: dict[int, Tensor]) -> tuple[Graph, list[Tensor]]:
        """Forward and backward pass: (handed, inputs, cotangent, sums) -> (out, cotangent of handed, new sums)."""
        trained = {id(p) for p in self.inner.opt.params}
        with GraphBuilder(stage.graph.name) as builder:
            inputs = [builder.input(v.type, v.name, role) for v, role in zip(stage.graph.inputs, stage.graph.roles)]
            (out,) = copy_into(stage.graph, inputs)
            cotangent = builder.input(out.type, "cotangent")
            params = [(captures[i], inputs[k + stage.handed]) for k, i in enumerate(stage.inputs)
                      if i in captures and id(captures[i]) in trained]
            sums = [builder.input(v.type, f"{v.name}.grad", "state") for _, v in params]
            wrt = [*inputs[:stage.handed], *(v for _, v in params)]
            grads = backward([out], [cotangent], wrt)
            builder.output(out)
            if stage.handed:
                assert grads[0] is not None
                builder.output(grads[0])
            for total, grad in zip(sums, grads[stage.handed:]):
                builder.output(builder.emit("identity", [total], {})[0] if grad is None else total + grad, alias=total)
        return Pipeline(list(TIDY)).run(builder.graph), [t for t, _ in params]

    def _grad_sharding(self, tensor: Tensor) -> Sharding:
        """A gradient lies as its parameter, and is a partial sum over the data."""
        own = self.plan.of(self.names.get(id(tensor), ""), tensor.ndim)
        return Sharding(own.dims, (self.plan.data,)) if self.plan.data in self.mesh else own  # type: ignore[arg-type]

    def _stage(self, stage: Stage, captures: dict[int, Tensor], last: bool) -> _StageProgram:
        joint, params = self._joint(stage, captures)
        first = len(joint.inputs) - len(params)  # of the sums
        out, shardings = joint.outputs[0], {}
        if stage.handed:
            shardings[0] = self._boundary(joint.inputs[0])
        for k, i in enumerate(stage.inputs, start=int(stage.handed)):
            v = joint.inputs[k]
            tensor = captures.get(i)
            shardings[k] = self._boundary(v) if tensor is None else self.plan.of(self.names.get(id(tensor), ""), v.rank)
        ends = Sharding.whole(out.rank) if last else self._boundary(out)
        shardings[first - 1] = ends
        shardings.update({first + j: self._grad_sharding(t) for j, t in enumerate(params)})
        made = partition(joint, self.mesh, shardings, {0: ends, **({1: shardings[0]} if stage.handed else {})})
        parts = halves(made.graph)
        forward, backward_graph = (self._compile(g) for g in (parts.forward, parts.backward))
        captured, batch = {}, {}
        for k, i in enumerate(stage.inputs, start=int(stage.handed)):
            if i in captures:
                captured[k] = self._place(captures[i], made.inputs[k])
            else:
                batch[k] = (i, made.inputs[k])
        sums = {first + j: self._sum(t, made.graph.inputs[first + j].type) for j, t in enumerate(params)}
        return _StageProgram(parts, forward, backward_graph, made.graph.inputs[0].type if stage.handed else None,
                             made.graph.outputs[0].type, first - 1, captured, batch, sums)

    def _sum(self, tensor: Tensor, type: TensorType) -> np.ndarray:
        """The gradient's array; stages of one device that share a parameter share it."""
        if id(tensor) not in self.sums:
            self.sums[id(tensor)] = aligned(np.zeros(type.shape, type.dtype.np))
        return self.sums[id(tensor)]

    def _compile(self, graph: Graph) -> Any:
        graph = bucket(graph, self.plan.bucket_bytes, keep=(self.pipe,))
        if self.job is not None:
            register(graph, self.job)
        return build_executable(graph, self.inner._compiled.target, self.inner._compiled.amp)

    # The update -------------------------------------------------------------------------------------------------

    def _shared(self) -> list[Tensor]:
        """Parameters that stages of several devices hold (tied weights), in the order of the optimizer's."""
        return [p for p in self.inner.opt.params if len({s % self.devices for s in self.holders.get(id(p), ())}) > 1]

    def _update(self, numbers: Mapping[str, np.ndarray]) -> Any:
        """The compiled update of this device's parameters: a function of the numbers."""
        own = [p for p in self.inner.opt.params if id(p) in self.sums]
        specs = [Spec(p.type, f"grad{i}") for i, p in enumerate(own)]
        graph = record(lambda grads, given: self._updated(own, grads, given), (
            specs, {k: Spec(TensorType((), as_dtype(v.dtype)), k) for k, v in numbers.items()}))
        meta = graph.meta
        graph = Pipeline(list(TIDY)).run(graph)
        captures = meta["captures"]
        states = {id(t): p for p, slots in zip(self.inner.opt.params, self.inner.opt.state) for t in slots.values()}
        sources = []
        for i in range(len(graph.inputs)):
            t = captures.get(i)
            if t is None:
                sources.append(Source("other" if i < len(own) else "scalar"))
            else:
                kind = "state" if id(t) in states else "parameter"
                sources.append(Source(kind, self.names.get(id(states.get(id(t), t)), "")))
        graph, shardings = annotate(graph, self.mesh, self.plan, sources)
        shardings.update({i: self._grad_sharding(p) for i, p in enumerate(own)})
        self.partitioned = partition(graph, self.mesh, shardings)
        executable = self._compile(self.partitioned.graph)
        bound = [self._place(captures[i], self.partitioned.inputs[i]) for i in sorted(captures)]
        names = list(numbers)
        return lambda given: executable.run([*(self.sums[id(p)] for p in own), *(given[n] for n in names), *bound])

    def _updated(self, own: list[Tensor], grads: list[Tensor], numbers: dict[str, Tensor]) -> Tensor:
        """Traced: tied gradients are added up, all are clipped by the norm over all stages, parameters move."""
        opt, params = self.inner.opt, self.inner.opt.params
        found: dict[int, Tensor] = {id(p): g for p, g in zip(own, grads)}
        group: dict[str, Any] = {"axis": self.pipe, "size": self.devices, "reduce": "sum"}
        for p in self._shared():
            total = apply("all_reduce", found.get(id(p), F.zeros(p.shape, p.dtype)), **group)
            if id(p) in found:
                found[id(p)] = total
        if CLIP in numbers:
            mine = [g for p, g in zip(own, (found[id(p)] for p in own))
                    if min(self.holders[id(p)]) % self.devices == self.here]
            square = F.square(global_norm(mine)).astype("float64" if self.inner._wide == np.float64 else "float32")
            norm = F.sqrt(apply("all_reduce", square, **group) if self.devices > 1 else square)
            scale = F.minimum(numbers[CLIP].astype("float32").astype(norm.dtype) / (norm + 1e-6), 1.0)
            found = {k: g * scale.astype(g.dtype) for k, g in found.items()}
        flags = [numbers.get(f"{FLAG}{i}") for i in range(len(params))]
        listed = [found.get(id(p)) for p in params]
        hyper = {k: v for k, v in numbers.items() if k != CLIP and not k.startswith(FLAG)}
        new_params, new_state = opt.update(list(params), listed, opt.state, hyper)
        for p, new, grad, slots, new_slots, flag in zip(params, new_params, listed, opt.state, new_state, flags):
            if grad is not None:
                _replace(p, new, flag)
                for name, value in new_slots.items():
                    _replace(slots[name], value, flag)
        return F.zeros(())

    # Running ----------------------------------------------------------------------------------------------------

    def _run(self, arrays: list[np.ndarray], numbers: Mapping[str, np.ndarray], own: dict[int, _StageProgram],
             update: Any) -> np.ndarray:
        for total in self.sums.values():
            total.fill(0)
        cut = [a.reshape(self.micro, a.shape[0] // self.micro, *a.shape[1:]) for a in arrays]
        loss, held, self.most_kept = np.zeros((), self.inner._wide), 0, 0
        self.shares = self._weights(cut)
        for task in self.order:
            program = own[task.stage]
            if task.phase == FORWARD:
                loss = loss + self._forward(program, task, cut) * self.shares[task.micro]
                held += 1
                self.most_kept = max(self.most_kept, held)
            else:
                self._backward(program, task, cut)
                held -= 1
        bound = stash_bound(self.plan.schedule, self.devices, self.micro, self.here, self.plan.chunks)
        assert self.most_kept <= bound, f"kept {self.most_kept} micro-batches, the schedule promises {bound}"
        for request, _ in self._pending:
            assert self.job is not None
            self.job.watch.wait(request)
        self._pending.clear()
        update(numbers)
        return self._from_last(loss)

    def _weights(self, cut: list[np.ndarray]) -> np.ndarray:
        """The part of each micro-batch in the loss: equal, or by what the plan's `weight` counts in it."""
        if self.plan.weight is None:
            return np.full(self.micro, 1 / self.micro)
        counts = np.array([float(self.plan.weight(*(a[m] for a in cut))) for m in range(self.micro)])
        if not counts.sum() > 0:
            raise ArgumentsError(f"the plan's weight gives {counts.tolist()} for the micro-batches; they have to "
                                 "add up to more than 0", user_location())
        return counts / counts.sum()

    def _inputs(self, program: _StageProgram, task: Task, cut: list[np.ndarray], wanted: Sequence[int],
                more: dict[int, np.ndarray]) -> list[np.ndarray]:
        batch = {k: s.cut(cut[leaf][task.micro], self.mesh, self.rank)
                 for k, (leaf, s) in program.batch.items() if k in wanted}
        known = {**program.captured, **program.sums, **batch, **more}
        return [known[k] for k in wanted]

    def _forward(self, program: _StageProgram, task: Task, cut: list[np.ndarray]) -> Any:
        more = {}
        if program.handed is not None:
            more[0] = self._receive(program.handed, task, task.stage - 1)
        out, *kept = program.forward.run(self._inputs(program, task, cut, program.halves.forward_inputs, more))
        program.kept[task.micro] = [*kept, *more.values()]
        if task.stage + 1 == self.count:
            return out
        self._send(out, task, task.stage + 1)
        return 0

    def _backward(self, program: _StageProgram, task: Task, cut: list[np.ndarray]) -> None:
        kept = program.kept.pop(task.micro)
        more = {0: kept.pop()} if program.handed is not None else {}
        if task.stage + 1 == self.count:
            more[program.cotangent] = np.full(program.out.shape, self.shares[task.micro], program.out.dtype.np)
        else:
            more[program.cotangent] = self._receive(program.out, task, task.stage + 1)
        outputs = program.backward.run([*kept, *self._inputs(program, task, cut, program.halves.backward_inputs, more)])
        if program.handed is not None:
            self._send(outputs[0], task, task.stage - 1)

    def _tag(self, task: Task, stage: int) -> int:
        """Of the message that the receiving stage waits for."""
        return ((task.phase == BACKWARD) * self.count + stage) * self.micro + task.micro

    def _send(self, array: np.ndarray, task: Task, stage: int) -> None:
        other, tag = stage % self.devices, self._tag(task, stage)
        if other == self.here:
            self._local[tag,] = array
            return
        assert self.job is not None
        data = as_bytes(array)
        self._pending.append((self.job.groups[self.pipe].Isend(data, other, tag), data))
        self._pending = [(r, a) for r, a in self._pending if not r.Test()]

    def _receive(self, type: TensorType, task: Task, stage: int) -> np.ndarray:
        other, tag = stage % self.devices, self._tag(task, task.stage)
        if other == self.here:
            return self._local.pop((tag,))
        assert self.job is not None
        into = np.empty(type.shape, type.dtype.np)
        self.job.watch.enter(f"recv {task} from stage {stage}")
        self.job.watch.wait(self.job.groups[self.pipe].Irecv(into.reshape(-1).view(np.uint8), other, tag))
        self.job.watch.leave()
        return into

    def _from_last(self, value: np.ndarray) -> np.ndarray:
        return self._broadcast(np.array(value), (self.count - 1) % self.devices)

    def _broadcast(self, array: np.ndarray, device: int) -> np.ndarray:
        """The array of one device's rank on all ranks along the pipeline."""
        if self.job is not None and self.devices > 1:
            self.job.watch.enter("broadcast:" + self.pipe)
            self.job.watch.wait(self.job.groups[self.pipe].Ibcast(array.reshape(-1).view(np.uint8), device))
            self.job.watch.leave()
        return array

    def holds(self, tensor: Tensor) -> bool:
        """Of what the model shares between stages and of the rest, the first device has it."""
        for p, slots in zip(self.inner.opt.params, self.inner.opt.state):
            if tensor is p or any(tensor is t for t in slots.values()):
                return min(self.holders.get(id(p), [0])) % self.devices == self.here
        return self.here == 0

    def gather(self) -> None:
        """As of a step without pipeline; every stage's tensors come to every rank."""
        if self.job is None:
            return
        assert self.stage_comm is not None
        for p, slots in zip(self.inner.opt.params, self.inner.opt.state):
            device = min(self.holders[id(p)]) % self.devices if id(p) in self.holders else self.here
            for tensor in (p, *slots.values()):
                whole = np.array(tensor.numpy())
                if id(tensor) in self.parts and device == self.here:
                    _, sharding, part = self.parts[id(tensor)]
                    into = np.empty((self.stage_mesh.size, part.nbytes), np.uint8)
                    self.job.watch.wait(self.stage_comm.Iallgather(part.reshape(-1).view(np.uint8), into))
                    whole = sharding.join([r.view(part.dtype).reshape(part.shape) for r in into], self.stage_mesh)
                tensor.assign(self._broadcast(np.ascontiguousarray(whole), device))
