"""`td.distributed`: a training step on the ranks of a mesh.

    mesh = td.distributed.make_mesh({"data": -1, "tensor": 2})       # -1: whatever the job has left
    step = td.distributed.parallelize(td.train_step(model, loss_fn, opt), mesh, td.distributed.Plan(
        shard={"*.up.weight": ("tensor", None), "*.down.weight": (None, "tensor")}, zero=1))
    loss = step(x, y)                                                # the whole batch; each rank takes its part

The step is traced as for one process, differentiated and clipped as for one process, and then partitioned: so losses,
gradients, clipping by the global norm, means over tokens and dropout are those of one process up to the order of sums.
The same script runs without mpiexec on a mesh of one rank.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..autodiff.amp import amp_pass
from ..distributed import Mesh, MeshError, Sharding
from ..distributed.buckets import ahead, bucket
from ..distributed.comm import Job, mpi_available
from ..distributed.cost import Cluster
from ..distributed.errors import DistributedError, LaunchError
from ..distributed.narrow import narrow_sums
from ..distributed.partition import Partitioned, partition
from ..distributed.plans import Plan, Source, annotate
from ..distributed.regather import in_groups
from ..distributed.unroll import micro_batches, unroll
from ..ir.dtypes import as_dtype
from ..ir.errors import ArgumentsError, AttributeValueError
from ..ir.graph import Graph
from ..ir.location import user_location
from ..ir.ops_collective import COLLECTIVES, host_name
from ..ir.passes import TIDY
from ..ir.pipeline import Pass, PassResult, Pipeline
from ..ir.subjects import SUBJECTS
from . import tree
from .accumulate import ALONE, Spread, parts_of
from .agreeing import elsewhere, starting_point
from .by_layers import by_layers
from .compile import build_executable
from .dispatch import apply, as_tensor
from .eager import ALIGNMENT
from .pending import waiting
from .random import default_generator
from .ranks import all_gather, all_reduce, barrier, broadcast, is_main, make_mesh, rank, world_size
from .recording import Guards
from .signature import scan
from .tensor import Tensor
from .train import TrainStep

__all__ = ["DistributedError", "Job", "LaunchError", "Mesh", "MeshError", "ParallelStep", "Plan", "Sharding",
           "all_gather", "all_reduce", "barrier", "broadcast", "constrain", "find_plan", "is_main", "make_mesh",
           "mpi_available", "parallelize", "rank", "world_size"]

Run = Callable[[Sequence[Any], Mapping[str, np.ndarray]], Any]
UNROLL = Pass("unroll", lambda graph: PassResult(made := unroll(graph), made is not graph, {}))


def constrain(x: Any, *dims: str | tuple[str, ...] | None) -> Tensor:
    """`x`, of which the dimensions are to be split over these mesh axes (None: as it comes) when it is partitioned.

    Sequence parallelism is `x = td.distributed.constrain(x, None, "tensor", None)` on the residual stream. Without a
    mesh it does nothing.

    Args:
        dims: for each dimension of `x` a mesh axis, a tuple of several, or None.

    Raises:
        ArgumentsError: there are more or fewer of them than dimensions. MeshError, ShapeError: when the step is built,
            the mesh lacks an axis, or a dimension cannot be split over several.
    """
    value = as_tensor(x)
    if len(dims) != value.ndim or not all(d is None or isinstance(d, (str, tuple)) for d in dims):
        raise ArgumentsError(f"constrain: {dims} for a tensor of {value.ndim} dimensions; give a mesh axis or None for "
                             "each of them", user_location())
    made: Tensor = apply("annotate", value, dims=tuple(",".join(d) if isinstance(d, tuple) else d or "" for d in dims))
    return made


def parallelize(step: TrainStep, mesh: Mesh | Mapping[str, int] | None = None,
                plan: Plan | None = None) -> ParallelStep:
    """The training step, run by all ranks of the mesh together. Called by every rank.

    Args:
        step: what `td.train_step` returned. The model and the optimizer in it are the ones that are trained.
        mesh: from `make_mesh`, or what it takes; default: the mesh of the plan, if it has one, as plans from `treadle
            plan --out` do.
        plan: how batch, parameters and states lie; default: the batch is split along the axis `data`, nothing else.

    Returns:
        A function of the whole batch, which every rank gives: the loss (and aux) of one process, before the update, on
        every rank. It traces and compiles at the first batch of each shape.

    Raises:
        MeshError: the job has another number of processes than the mesh, or the plan does not fit the model.
        ArgumentsError: `step` is no training step, or `plan` no plan.
        LaunchError: mpi4py is missing.
        DistributedError: the ranks have other meshes, or other versions of what is installed.
    """
    plan = Plan() if plan is None else plan
    if not isinstance(plan, Plan):
        raise ArgumentsError(f"parallelize: plan is {plan!r}; expected a td.distributed.Plan", user_location())
    if mesh is None:
        if plan.mesh is None:
            raise MeshError("give parallelize a mesh, as of td.distributed.make_mesh, or a plan that has one")
        mesh = plan.mesh
    if not isinstance(mesh, Mesh):
        mesh = make_mesh(mesh)
    if mesh.size > 1 and plan.accumulate not in (None, step.accumulate):
        raise MeshError(f"the plan counts {plan.accumulate} micro-batches, the training step {step.accumulate}: make "
                        f"it with td.train_step(..., accumulate={plan.accumulate})")
    if plan.pipe is not None and plan.pipe in mesh:
        from .pipelined import PipelineStep  # a subclass of what this module makes

        if mesh[plan.pipe] > 1 and step.accumulate == 1 and is_main():
            warnings.warn(f"a pipeline of {mesh[plan.pipe]} devices and one micro-batch: only one of them computes at "
                          "a time; give the training step more, td.train_step(..., accumulate=8)", stacklevel=2)
        return PipelineStep(step, mesh, plan)
    return ParallelStep(step, mesh, plan)


def find_plan(step: TrainStep, *batch: Any, devices: int | None = None, memory: float = math.inf,
              cluster: Cluster | None = None) -> Plan:
    """The fastest plan for a training step, searched offline: what `treadle plan` finds. It has a mesh.

    Args:
        batch: arrays, tensors or `td.spec`s of a whole batch; its examples are the first dimension of the first.
        devices: default: the processes of this job. memory: bytes of each.
        cluster: what devices compute and send: `treadle.distributed.cost.Cluster`, with seconds and bytes a second.

    Raises:
        AttributeValueError: no layout fits in memory; the message gives the least that would do. Or `devices` or
            `memory` is no positive number.
        ArgumentsError: `step` is no training step, or cannot be traced for parts of the batch.
    """
    if not isinstance(step, TrainStep):
        raise ArgumentsError(f"find_plan takes what td.train_step returned, not {type(step).__name__}", user_location())
    devices = world_size() if devices is None else devices
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise AttributeValueError(f"find_plan: devices is {devices!r}; expected a whole number >= 1", user_location())
    if isinstance(memory, bool) or not isinstance(memory, (int, float)) or not memory > 0:
        raise AttributeValueError(f"find_plan: memory is {memory!r}; expected bytes, such as 24e9", user_location())
    from .planning import best_plan  # which makes plans for what is defined here

    return best_plan(step, batch, devices, memory, cluster or Cluster())


class ParallelStep:
    """A training step on a mesh; made by `parallelize`.

    Attributes:
        inner: the training step of one process; `inner.model`, `inner.opt`.
        mesh, plan: as given; rank: this process's number.
        partitioned: the program of the last new kind of batch: its per-rank graph, shardings, counts of collectives.
        executable: the same as machine code.
        job: this process in the mesh; None on a mesh of one rank.
    """

    def __init__(self, step: TrainStep, mesh: Mesh, plan: Plan):
        if not isinstance(step, TrainStep):
            raise ArgumentsError(f"parallelize takes what td.train_step returned, not {type(step).__name__}",
                                 user_location())
        self.inner, self.mesh, self.plan = step, mesh, plan
        self.names = {id(p): name for name, p in step.model.named_parameters()} \
            if hasattr(step.model, "named_parameters") else {}
        plan.check(mesh, list(self.names.values()))
        if mesh.size == 1:
            self.plan = plan.alone()
        self.job = Job(mesh) if mesh.size > 1 else None
        if self.job is None:
            mesh.check_world(world_size())
        self.rank = self.job.rank if self.job is not None else 0
        self.partitioned: Partitioned | None = None
        self.executable: Any = None
        self.parts: dict[int, tuple[Tensor, Sharding, np.ndarray]] = {}  # tensors of which this rank has a part
        self._whole: dict[int, tuple[Tensor, np.ndarray]] = {}  # tensors that programs update where they lie
        self._given_up: dict[int, Any] = {}  # the values, without elements, of tensors in parts
        self._placed: dict[int, Sharding] = {}
        self._programs: dict[Any, list[tuple[Guards, Run]]] = {}

    def __call__(self, *batch: Any) -> Any:
        """One step on the whole batch (every rank gives the same); the loss of one process, on every rank.

        Raises:
            DistributedError: another rank failed, or was given another batch.
        """
        step = self.inner
        self.settle()
        numbers, structure = step._scalars(), step._structure()
        found = scan(batch, {})
        key = (found.key, structure, tuple(numbers))
        programs, job = self._programs.setdefault(key, []), self.job
        mode = next((i for i, (guards, _) in enumerate(programs) if guards.hold()), len(programs))
        if job is not None:
            job.step = step.opt.steps
            job.batches.begin(found.arrays, list(numbers.values()), step.opt.steps, mode, self._drawn_from())
        if mode == len(programs):
            if job is not None:
                job.batches.finish()  # before ranks of different batches go different ways
                if not any(self._programs.values()):
                    absent = set().union(*job.gather_all(elsewhere(self)))
                    job.agree("what they start from", starting_point(self, absent))
            run, guards = self._build(batch, numbers)
            if job is not None:
                run = job.watch.paced(run)
            programs.append((guards, run))
        try:
            result = programs[mode][1](found.arrays, numbers)
        except RuntimeError:
            if job is not None and job.error is not None:
                raise job.error from None
            raise
        if job is not None:
            job.batches.finish()
        step.opt.steps += 1
        if step._any_frozen:
            step.opt.skip(step._trainable)
        return result

    def _drawn_from(self) -> np.ndarray | None:
        """The random state, if steps draw from it."""
        state = default_generator().state
        return state.numpy(copy=False) if self.moves(state) else None

    def moves(self, tensor: Tensor) -> bool:
        """Whether steps read, or change, a tensor of no optimizer; the same on every rank."""
        return id(tensor) in self._placed

    def trace(self, *batch: Any) -> Partitioned:
        """The per-rank program for such a batch, before it is compiled."""
        data = self.plan.batch_axes(self.mesh)
        ranks = math.prod(self.mesh[axis] for axis in data)
        self.inner.spread = Spread(ranks, self._lies, self.plan.weight)
        loss_fn = self.inner.loss_fn
        self.inner.loss_fn = by_layers(loss_fn) if self.plan.recompute else loss_fn
        try:
            graph = self.inner.trace(*batch)
        finally:
            self.inner.spread, self.inner.loss_fn = ALONE, loss_fn
        meta = graph.meta
        amp = self.inner._compiled.amp
        narrow = [] if amp is None else [amp_pass(amp), *TIDY]  # decided as on one process, before anything is split
        tidy = Pipeline([*TIDY, *narrow, UNROLL, *TIDY]).run(graph)
        tidy.meta.update(meta)
        sources = self._sources(tidy)
        alike = [i for i, (s, v) in enumerate(zip(sources, tidy.inputs)) if s.kind == "batch" and v.rank
                 and len(parts_of(v.shape[0], self.inner.accumulate, ranks)) == 1]
        tidy, shapes = micro_batches(tidy, alike)
        annotated, shardings = annotate(tidy, self.mesh, self.plan, sources, shapes)
        for i, tensor in meta["captures"].items():
            if id(tensor) in self._placed:
                shardings[i] = self._placed[id(tensor)]
        made = partition(annotated, self.mesh, shardings)
        most = self.plan.message_bytes(sum(int(p.type.nbytes) for p in self.inner.opt.params))
        for axis in data if self.plan.reduce_dtype is not None else ():
            made.graph = narrow_sums(made.graph, axis, as_dtype(self.plan.reduce_dtype))
        apart = () if not self.plan.overlap else self.mesh.names if self.job is None else self.job.apart
        made.graph = bucket(in_groups(made.graph, most), most, overlap=apart)
        if self.inner.memory_budget is None:  # what has been started cannot be computed again
            made.graph = ahead(made.graph, apart)
        made.graph.meta.update(meta)
        return made

    def _lies(self, parameter: Tensor) -> tuple[str, ...] | None:
        """How a gradient lies while parts of a batch add to it: ZeRO-2 and 3 keep parts of it, others sum at last."""
        if self.plan.zero < 2 or self.mesh.size == 1:
            return None
        own = self.plan.of(self.names.get(id(parameter), ""), parameter.ndim)
        dims = self.plan.in_parts(own, parameter.type, self.mesh).dims
        return tuple(",".join(d) if isinstance(d, tuple) else d or "" for d in dims)

    def _sources(self, graph: Graph) -> list[Source]:
        """What each input is."""
        states = {id(t): p for p, slots in zip(self.inner.opt.params, self.inner.opt.state) for t in slots.values()}
        found = []
        for i, role in enumerate(graph.roles):
            tensor = graph.meta["captures"].get(i)
            if tensor is None:
                found.append(Source("scalar" if role == "scalar" else "batch"))
            elif id(tensor) in states:
                found.append(Source("state", self.names.get(id(states[id(tensor)]), "")))
            elif id(tensor) in self.names:
                found.append(Source("parameter", self.names[id(tensor)]))
            else:
                found.append(Source("other"))
        return found

    def _build(self, batch: Sequence[Any], numbers: Mapping[str, np.ndarray]) -> tuple[Run, Guards]:
        """What runs steps on batches like this one: a function of the arrays and this step's numbers. As long as its
        guards hold: what modes the model was in, for one."""
        made = self.partitioned = self.trace(*batch)
        if self.job is not None:
            self.job.agree_on_program(made.graph)
            register(made.graph, self.job)
        target = self.inner._compiled.target
        self.executable = executable = build_executable(made.graph, target, memory_budget=self.inner.memory_budget)
        captures = made.graph.meta["captures"]
        first = len(made.graph.inputs) - len(captures)
        bound = []
        for i in sorted(captures):
            bound.append(self._place(captures[i], made.inputs[i]))
        shapes = [v.shape for v in made.whole.inputs[:first]]
        run = _Bound(self, executable, made.inputs[:first], shapes, bound, made.graph.meta)
        return run, Guards(made.graph.meta["guards"])

    def _place(self, tensor: Tensor, sharding: Sharding) -> np.ndarray:
        """This rank's part of a tensor: the tensor's own memory if that is all of it."""
        self._placed[id(tensor)] = sharding
        if sharding.is_whole:
            if tensor.role is None:
                return tensor._value.array
            array = tensor._pin()
            self._whole[id(tensor)] = tensor, array
            return array
        if id(tensor) not in self.parts:
            self.parts[id(tensor)] = (tensor, sharding, self._part(tensor, sharding))
            self._give_up(tensor)
        return self.parts[id(tensor)][2]

    def _part(self, tensor: Tensor, sharding: Sharding) -> np.ndarray:
        """This rank's part; of a parameter that was not drawn yet no more than that is drawn."""
        if waiting(tensor._value) and not sharding.partial:
            return aligned(sharding.assemble(self.mesh, self.rank, tensor.type, tensor._value.source.part))
        return aligned(sharding.cut(tensor.numpy(copy=False), self.mesh, self.rank))

    def _give_up(self, tensor: Tensor) -> None:
        tensor._park(f"lives in parts on the ranks of the mesh ({self.mesh}) while it is trained; call step.gather() "
                     "on every rank to have it whole")
        self._given_up[id(tensor)] = tensor._value

    def settle(self) -> None:
        """Takes over what was assigned to tensors that live in parts, and gives up their elements; no rank waits.

        Every step begins with it. After `gather` the tensors hold their elements until then.

        Raises:
            ArgumentsError: another step has moved a tensor meanwhile, and has it in parts.
        """
        for tensor, array in self._whole.values():
            if tensor._value.array is not array:  # another step had it in parts, or elsewhere, until it was gathered
                array[...] = tensor._value.array
                tensor._renew(array)
        for tensor, sharding, part in self.parts.values():
            if waiting(tensor._value) and tensor._value is not self._given_up[id(tensor)]:
                tensor.numpy()  # says who has it
            if not waiting(tensor._value):
                part[...] = sharding.cut(tensor.numpy(copy=False), self.mesh, self.rank)
                self._give_up(tensor)

    def gather(self) -> None:
        """Brings the model's (and optimizer's) tensors to every rank whole; called by all of them.

        A tensor that is split lives in parts while it is trained: from the first step on it has no elements, and
        whoever asks for them is told to gather. They are given up again by the next step, which sees what was assigned.
        """
        if self.job is None:
            return
        self.settle()
        for tensor, sharding, part in self.parts.values():
            into = np.empty((self.mesh.size, part.nbytes), np.uint8)
            self.job.watch.enter("gather")
            self.job.watch.wait(self.job.world.Iallgather(part.reshape(-1).view(np.uint8), into))
            self.job.watch.leave()
            rows = [row.view(part.dtype).reshape(part.shape) for row in into]
            tensor.assign(sharding.join(rows, self.mesh, tensor.shape))

    stage_axis: str | None = None
    """The mesh axis whose ranks have other tensors, if there is one."""

    def holds(self, tensor: Tensor) -> bool:
        """Whether this rank keeps the present value (or part) of a tensor."""
        return True

    def save(self, path: Any, metadata: Mapping[str, str] | None = None, data: Any = None) -> None:
        """Writes a checkpoint that any mesh, or one process, can load. Called by every rank.

        Args:
            path: a folder, seen by all hosts. A checkpoint in it is replaced at once when the new one is complete.
            metadata: strings of the caller.
            data: what feeds the step and has `state_dict()`: the position in the data (`td.finetune.Cursor`).

        Raises:
            CheckpointError: a rank cannot write. DistributedError: a rank failed, or did not come.
        """
        from .parallel_checkpoint import save

        save(path, self, metadata, data)

    def load(self, path: Any, data: Any = None) -> dict[str, str]:
        """Restores, in place, what any mesh, or `td.save_checkpoint`, wrote; gives its metadata. Called by every rank.

        Raises:
            CheckpointError: it is missing, damaged, or does not fit the model; nothing was changed.
            DistributedError: a rank failed, or did not come.
        """
        from .parallel_checkpoint import load

        return load(path, self, data)

    def resume(self, folder: Any, data: Any = None) -> dict[str, str] | None:
        """Restores the newest checkpoint in a folder, or of the folders in it; gives its metadata, or None if there is
        none. Called by every rank; raises as `load`."""
        from .parallel_checkpoint import resume

        return resume(folder, self, data)

    def _built(self) -> Partitioned:
        """The program of the last new kind of batch.

        Raises:
            ArgumentsError: there is none yet.
        """
        if self.partitioned is None:
            raise ArgumentsError("the step has no program yet, of which to say what it takes: run it on a batch first",
                                 user_location())
        return self.partitioned

    def __repr__(self) -> str:
        return f"<{type(self).__name__} on {self.mesh}, rank {self.rank}: {self.inner.opt.steps} steps done>"

    @property
    def memory(self) -> dict[str, int]:
        """Bytes on this rank where its last new program holds most: "parameters", "gradients", "states" and
        "activations", whether kept between steps or made in one, and "messages" under way.

        Static accounting: inputs, the arena's plan, and the copies that started collectives hold.
        """
        made, found = self._built(), dict.fromkeys(SUBJECTS, 0)
        for subject, nbytes in self.executable.signature.meta["at_peak"].items():
            found[subject] += nbytes
        for role, v in zip(made.graph.roles, made.graph.inputs):
            found[{"parameter": "parameters", "state": "states"}.get(role, "activations")] += int(v.type.nbytes)
        return {**found, "messages": made.under_way()}

    @property
    def local_bytes(self) -> dict[str, int]:
        """Bytes of parameters and of optimizer state that this rank keeps between steps."""
        found = {"parameter": 0, "state": 0}
        made = self._built()
        for source, v in zip(self._sources(made.graph), made.graph.inputs):
            if source.kind in found:
                found[source.kind] += int(v.type.nbytes)
        return found


class _Bound:
    """An executable with this rank's parts of the tensors that it reads and updates."""

    def __init__(self, owner: ParallelStep, executable: Any, shardings: Sequence[Sharding],
                 shapes: Sequence[tuple[int, ...]], arrays: list[np.ndarray], meta: Mapping[str, Any]):
        self.mesh, self.rank = owner.mesh, owner.rank
        self.executable, self.shardings, self.shapes, self.arrays = executable, list(shardings), list(shapes), arrays
        self.structure, self.results = meta["out_structure"], len(executable.signature.outputs) - len(meta["assigns"])

    def __call__(self, given: Sequence[Any], numbers: Mapping[str, np.ndarray]) -> Any:
        whole = [np.asarray(a).reshape(shape) for a, shape in zip([*given, *numbers.values()], self.shapes)]
        parts = [a if s.is_whole else s.cut(a, self.mesh, self.rank) for a, s in zip(whole, self.shardings)]
        outputs = self.executable.run([*parts, *self.arrays])
        return tree.unflatten(self.structure, [Tensor(np.array(a)) for a in outputs[:self.results]])


def register(graph: Graph, job: Job) -> None:
    """Lets the programs of this process call the job's collectives."""
    from ..schedules.host import register_host_function

    called = (*COLLECTIVES, "axis_index", "send", "recv", "start", "wait")
    names = {host_name(n) for n in graph.walk() if n.op.name in called}
    for name in sorted(names):
        register_host_function(name, job.host_function(name), binds=True, record=job.record(name))


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy whose memory compiled programs may update."""
    raw = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    made = raw[start:start + array.nbytes].view(array.dtype).reshape(array.shape)
    made[...] = array
    return made
