"""A stage of a pipeline as two compiled programs.

A stage is differentiated as one graph of forward and backward pass, partitioned over the other axes of the mesh like
any graph, and taken apart. So a pipeline of data- and tensor-parallel stages is nothing special: ZeRO splits what a
stage holds, mixed precision and recomputation are decided on the joint graph, and collectives stand in the programs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..autodiff import backward
from ..autodiff.amp import amp_pass
from ..autodiff.save_less import save_less
from ..distributed import Sharding
from ..distributed.buckets import bucket
from ..distributed.casts import casts, casts_apart
from ..distributed.halves import overwriting
from ..distributed.partition import Partitioned, partition
from ..distributed.pipeline import Task
from ..distributed.plans import split_over
from ..distributed.regather import gather_at_use, in_groups
from ..distributed.stage_run import Program, StageProgram
from ..distributed.stages import Stage, moved_with_data, reached
from ..ir.builder import GraphBuilder, copy_into
from ..ir.context import emit
from ..ir.dtypes import DType, as_dtype, float32
from ..ir.graph import Graph, Value
from ..ir.passes import TIDY
from ..ir.pipeline import Pipeline
from ..ir.types import TensorType
from .building import arena_bytes, build_executable
from .eager import empty_aligned
from .parallel import aligned, register
from .pipeline_memory import Programs, RankGraph, Source, within
from .pipeline_memory import held as most_held
from .tensor import Tensor

if TYPE_CHECKING:
    from .pipelined import PipelineStep

Run = Callable[[Sequence[Any]], list[np.ndarray]]


@dataclass(frozen=True)
class LossGraph:
    """The loss of a micro-batch: its graph, and what its inputs are.

    Attributes:
        batch: how many of the inputs are the batch; captures: the tensors behind the others.
        trained: numbers of the inputs that the optimizer moves.
        moving: values that depend on these: their gradients are wanted.
        alike: numbers of the inputs, state, that every stage moves for itself.
    """

    graph: Graph
    batch: int
    captures: Mapping[int, Tensor]
    trained: frozenset[int]
    moving: frozenset[Value]
    alike: frozenset[int]

    @classmethod
    def of(cls, graph: Graph, batch: int, captures: Mapping[int, Tensor], params: Sequence[Tensor]) -> LossGraph:
        """Looks through the graph."""
        ids = {id(p) for p in params}
        trained = frozenset(i for i, t in captures.items() if id(t) in ids)
        moving = frozenset(reached(graph, [graph.inputs[i] for i in trained]))
        moved = moved_with_data(graph, range(batch))
        alike = frozenset(i for i in graph.aliases.values() if graph.inputs[i] not in moved)
        return cls(graph, batch, captures, trained, moving, alike)

    def wants(self, v: Value) -> bool:
        """Whether the backward pass goes through a value that is handed on."""
        return v in self.moving and bool(v.dtype.is_float)


@dataclass(frozen=True)
class Joint:
    """Forward and backward pass of a stage as one graph.

    Its inputs: those of the stage, cotangents of what it hands on, sums of gradients. Its outputs: those of the stage,
    cotangents of what it was handed, new sums.

    Attributes:
        back, returned: which of what it was handed, and hands on, have cotangents.
        params: the inputs whose gradients are summed: (number in this graph, number in the whole graph).
        cotangents, sums: the first inputs of these kinds.
    """

    graph: Graph
    stage: Stage
    back: tuple[int, ...]
    returned: tuple[int, ...]
    params: tuple[tuple[int, int], ...]
    cotangents: int
    sums: int

    @property
    def ahead(self) -> int:
        """How many outputs the forward pass has."""
        return len(self.stage.graph.outputs)


def join(loss: LossGraph, stage: Stage) -> Joint:
    """Differentiates a stage."""
    graph = stage.graph
    first = len(stage.handed)
    back = tuple(i for i, v in enumerate(stage.handed) if loss.wants(v))
    returned = tuple(i for i, v in enumerate(stage.out) if loss.wants(v))
    with GraphBuilder(graph.name) as builder:
        inputs = [builder.input(v.type, v.name, role) for v, role in zip(graph.inputs, graph.roles)]
        outputs = copy_into(graph, inputs)
        cotangents = [builder.input(outputs[i].type, f"cotangent{i}") for i in returned]
        params = [(first + k, i) for k, i in enumerate(stage.inputs) if i in loss.trained]
        grads = backward([outputs[i] for i in returned], cotangents,
                         [*(inputs[i] for i in back), *(inputs[k] for k, _ in params)])
        found = grads[len(back):]
        params = [p for p, g in zip(params, found) if g is not None]
        sums = [builder.input(_sum_type(inputs[k].type), f"{inputs[k].name}.grad", "state") for k, _ in params]
        for i, v in enumerate(outputs):
            builder.output(v, alias=inputs[graph.aliases[i]] if i in graph.aliases else None)
        for i, grad in zip(back, grads):
            builder.output(_zeros(inputs[i].type) if grad is None else grad)
        for total, grad in zip(sums, (g for g in found if g is not None)):
            grad = grad if grad.dtype == total.dtype else builder.emit("cast", [grad], {"dtype": total.dtype})[0]
            builder.output(total + grad, alias=total)
    at = len(inputs)
    return Joint(builder.graph, stage, back, returned, tuple(params), at, at + len(returned))


def _sum_type(type: TensorType) -> TensorType:
    """Gradients add up in 32 bits at least, as on one process."""
    return type if type.dtype.bits >= 32 else TensorType(type.shape, float32)


def _zeros(type: TensorType) -> Value:
    made: Value = emit("broadcast_to", emit("constant", value=np.zeros((), type.dtype.np)), shape=type.shape)
    return made


@dataclass(frozen=True)
class Draft:
    """A stage of a rank, before it is taken apart.

    Attributes:
        whole, made: before and after it was partitioned; `joint`: as it is taken apart, with weights cast elsewhere.
        fixed: number of an input -> the array that is there for all micro-batches.
    """

    number: int
    whole: Joint
    made: Partitioned
    fixed: dict[int, np.ndarray]
    joint: RankGraph


class StageBuilder:
    """Makes this rank's programs of stages, for a `PipelineStep`.

    Attributes:
        sums: id of a parameter -> the array in which its gradients add up; stages of one device share it.
        cleared: those of them that have to be zero when a step begins; added: those that the last new programs add to.
        copies: state that every stage moves for itself: (stage, id of the tensor) -> (tensor, the stage's copy).
        narrow: (id of a parameter, dtype) -> (its array, the copy of it that programs read).
        cast: makes these copies; once for a step.
        kept_bytes: stage -> bytes that it keeps of a micro-batch.
        activations: the most bytes of these, of temporaries and of what is handed over, that the device has at a time;
            messages: of what it sends, and gets ready to receive, meanwhile.
    """

    def __init__(self, step: PipelineStep):
        self.step, self.plan, self.mesh = step, step.plan, step.mesh
        self.sums: dict[int, np.ndarray] = {}
        self.copies: dict[tuple[int, int], tuple[Tensor, np.ndarray]] = {}
        self.cleared: dict[int, np.ndarray] = {}
        self.added: set[int] = set()
        self.narrow: dict[tuple[int, DType], tuple[np.ndarray, np.ndarray]] = {}
        self.cast: Callable[[], Any] = lambda: None
        self.kept_bytes: dict[int, int] = {}
        self.activations = self.messages = 0
        self.arenas: dict[int, int] = {}  # id of a program's graph -> bytes of its temporaries
        self._executables: list[Any] = []

    # How things lie ---------------------------------------------------------------------------------------------

    def boundary(self, v: Value, examples: Sequence[int]) -> Sharding:
        """How a value of the batch, or one that stages hand each other, lies: its first dimension is split where that
        counts examples (or, as tokens do, a multiple of them)."""
        data = self.plan.data_axis
        if data in self.mesh and v.rank and v.shape[0] % self.mesh[data] == 0:  # type: ignore[index]
            if any(n and v.shape[0] % n == 0 for n in examples):
                return Sharding((data, *(None,) * (v.rank - 1)))
        return Sharding.whole(v.rank)

    def parameter(self, tensor: Tensor) -> Sharding:
        """How a parameter lies between steps."""
        own = self.plan.of(self.step.names.get(id(tensor), ""), tensor.ndim)
        return self._over_data(own, tensor) if self.plan.zero >= 3 else own

    def gradient(self, tensor: Tensor) -> Sharding:
        """How the sum of a parameter's gradients lies: as the parameter, and a partial sum over the data; from ZeRO-2
        on in parts."""
        own, data = self.plan.of(self.step.names.get(id(tensor), ""), tensor.ndim), self.plan.data_axis
        if data not in self.mesh:
            return own
        split = self._over_data(own, tensor) if self.plan.zero >= 2 else own
        return split if split != own else Sharding(own.dims, (data,))  # type: ignore[arg-type]

    def _over_data(self, own: Sharding, tensor: Tensor) -> Sharding:
        data = self.plan.data_axis
        assert data is not None
        return split_over(own, tensor.type, data, self.mesh)

    # One stage --------------------------------------------------------------------------------------------------

    def build(self, loss: LossGraph, stages: Mapping[int, Stage], tasks: Sequence[Task], held: int,
              starts: Collection[int]) -> dict[int, StageProgram]:
        """The programs of this rank's stages.

        Args:
            tasks: of this device; held: micro-batches whose activations it keeps at most.
            starts: numbers of the inputs whose sums of gradients no other stage of this device adds to.

        Raises:
            CompileError: they cannot keep to the step's memory budget.
        """
        drafts = {s: self.draft(loss, stage, s) for s, stage in stages.items()}
        joints = {s: draft.joint for s, draft in drafts.items()}
        found = within(joints, tasks, self.step.inner.memory_budget, self.arena)
        made = {s: self.assembled(loss, draft, found[s], held, starts) for s, draft in drafts.items()}
        self.activations = max(self.activations, most_held(tasks, found, lambda graph: self.arenas[id(graph)]))
        self.messages = max(self.messages, 2 * max(p.crossing for p in found.values()))
        return made

    def draft(self, loss: LossGraph, stage: Stage, number: int) -> Draft:
        """A stage of this rank as one graph."""
        whole = join(loss, stage)
        made = self.partitioned(loss, whole, number + 1 == self.step.count)
        varying = [i for i in range(len(made.graph.inputs)) if not self._stays(loss, whole, i)]
        fixed = self.arrays(loss, whole, made, number)
        numbers = {i: n for i in fixed if (n := self._number(whole, i)) is not None}
        graph, narrow = casts_apart(made.graph, [i for i, n in numbers.items() if n in loss.trained])
        fixed.update((len(made.graph.inputs) + k, self.copy(loss.captures[numbers[i]], fixed[i], dtype))
                     for k, (i, dtype) in enumerate(narrow))
        inputs = graph.inputs
        joint = RankGraph(save_less(graph).graph, whole.ahead, len(stage.out), inputs[:len(stage.handed)],
                          inputs[whole.cotangents:whole.sums], len(whole.back), varying, self.plan.schedule == "zb-h1")
        return Draft(number, whole, made, fixed, joint)

    def assembled(self, loss: LossGraph, draft: Draft, made: Programs, held: int,
                  starts: Collection[int]) -> StageProgram:
        """The programs of a stage, compiled, with where their inputs come from."""
        whole, stage, parts = draft.whole, draft.whole.stage, made.forward
        self.kept_bytes[draft.number] = made.kept

        def program(graph: Graph, sources: Sequence[Source], most: int) -> Program:
            return _program(self.compiled(graph, most), sources, whole, loss, draft.fixed)

        first, left = self.starting(made.backward, made.sources, whole, starts)
        self.cleared.update((id(loss.captures[i]), self.sums[id(loss.captures[i])]) for i in left)
        starting = program(first, made.sources, 2)
        adding = program(made.backward, made.sources, 2)
        self.arenas[id(made.backward)] = max(self.arenas[id(made.backward)], self.arenas[id(first)])
        two = made.cotangents
        cotangents = None if two is None else program(two.forward, made.cotangent_sources, held + 1)
        return StageProgram(
            program(parts.forward, parts.forward_inputs, held + 1), adding, starting, cotangents,
            self.cutter(loss, whole, draft.made),
            [v.type for v in draft.made.graph.inputs[:len(stage.handed)]],
            [v.type for v in draft.made.graph.outputs[:len(stage.out)]],
            list(whole.back), list(whole.returned), list(parts.kept),
            {number: len(stage.out) + k for k, number in enumerate(stage.results)
             if number not in loss.graph.aliases})

    def starting(self, graph: Graph, sources: Sequence[Source], joint: Joint,
                 starts: Collection[int]) -> tuple[Graph, set[int]]:
        """The backward program of the first micro-batch, and the inputs whose sums it adds to all the same."""
        own: dict[Source, int] = {joint.sums + k: i for k, (_, i) in enumerate(joint.params)}
        at = {v: own[source] for source, v in zip(sources, graph.inputs) if source in own}
        made, left = overwriting(graph, [v for v, i in at.items() if i in starts])
        return made, {i for v, i in at.items() if v in left or i not in starts}

    def _stays(self, loss: LossGraph, joint: Joint, i: int) -> bool:
        """Whether an input is the same for all micro-batches."""
        number = self._number(joint, i)
        assigned = {loss.graph.aliases[r] for r in joint.stage.results if r in loss.graph.aliases}
        return number is not None and number >= loss.batch and number not in assigned

    @staticmethod
    def _number(joint: Joint, i: int) -> int | None:
        """The number in the whole graph of an input; None for what is not of it."""
        first = len(joint.stage.handed)
        return joint.stage.inputs[i - first] if first <= i < joint.cotangents else None

    def partitioned(self, loss: LossGraph, joint: Joint, last: bool) -> Partitioned:
        """The joint graph of a rank, in mixed precision if the step is."""
        amp, stage = self.step.inner._compiled.amp, joint.stage
        graph = Pipeline([*TIDY, *([amp_pass(amp), *TIDY] if amp is not None else [])]).run(joint.graph)
        examples = [v.shape[0] for v in loss.graph.inputs[:loss.batch] if v.rank]
        inputs = {i: self.boundary(v, examples) for i, v in enumerate(graph.inputs[:len(stage.handed)])}
        gathered = []
        for i in range(len(stage.handed), joint.cotangents):
            v, number = graph.inputs[i], self._number(joint, i)
            assert number is not None
            tensor = loss.captures.get(number)
            if tensor is None:
                inputs[i] = self.boundary(v, examples)
            elif number in loss.trained or id(tensor) in self.step.names:
                inputs[i] = self.parameter(tensor)
                if inputs[i] != self.plan.of(self.step.names.get(id(tensor), ""), tensor.ndim):
                    gathered.append(v)
            elif id(tensor) in self.step._placed:
                inputs[i] = self.step._placed[id(tensor)]
            elif number in loss.alike:
                inputs[i] = Sharding.whole(v.rank)
        outputs = {i: Sharding.whole(v.rank) for i, v in enumerate(graph.outputs[:joint.ahead])
                   if i not in graph.aliases}
        if not last:
            outputs.update((i, self.boundary(v, examples)) for i, v in enumerate(graph.outputs[:len(stage.out)]))
        for k, i in enumerate(joint.returned):
            inputs[joint.cotangents + k] = outputs[i]
        for k, i in enumerate(joint.back):
            outputs[joint.ahead + k] = inputs[i]
        inputs.update({joint.sums + k: self.gradient(loss.captures[i]) for k, (_, i) in enumerate(joint.params)})
        if gathered:
            assert self.plan.data_axis is not None
            graph = gather_at_use(graph, gathered, self.plan.data_axis)
        return partition(graph, self.mesh, inputs, outputs)

    def compiled(self, graph: Graph, held: int = 1) -> Run:
        """A per-rank program, ready to run, of whose results so many are in use at a time."""
        step = self.step
        if not graph.outputs:
            self.arenas[id(graph)] = 0
            return lambda inputs: []
        joined = self.joined(graph)
        if step.job is not None:
            register(joined, step.job)
        executable = build_executable(joined, step.inner._compiled.target)
        executable.keep_results(held)
        self.arenas[id(graph)] = executable.signature.arena_bytes
        self._executables.append(executable)
        run: Run = executable.run
        return run

    def joined(self, graph: Graph) -> Graph:
        """A per-rank program whose collectives go together."""
        most = self.plan.message_bytes(sum(int(p.type.nbytes) for p in self.step.inner.opt.params))
        return bucket(in_groups(graph, most), most, keep=(self.step.pipe,))

    def arena(self, graph: Graph) -> int:
        """Bytes of temporaries of a program that is not compiled."""
        return arena_bytes(self.joined(graph), self.step.inner._compiled.target) if graph.outputs else 0

    def share_arena(self) -> None:
        """The programs, of which one runs at a time, use the same memory for their temporaries."""
        memory = empty_aligned((max(e.signature.arena_bytes for e in self._executables),), np.uint8)
        for executable in self._executables:
            executable.place_temps(memory)

    def arrays(self, loss: LossGraph, joint: Joint, made: Partitioned, number: int) -> dict[int, np.ndarray]:
        """The inputs that stay: input of the joint graph -> this rank's part."""
        found = {}
        for k, i in enumerate(joint.stage.inputs, start=len(joint.stage.handed)):
            if i not in loss.captures:
                continue
            tensor = loss.captures[i]
            if i in loss.alike:
                key = number, id(tensor)
                self.copies.setdefault(key, (tensor, aligned(tensor.numpy())))
                found[k] = self.copies[key][1]
            else:
                found[k] = self.step._place(tensor, made.inputs[k])
        for k, (_, trained) in enumerate(joint.params, start=joint.sums):
            type, of = made.graph.inputs[k].type, id(loss.captures[trained])
            self.added.add(of)
            if of not in self.sums:
                self.sums[of] = aligned(np.zeros(type.shape, type.dtype.np))
            found[k] = self.sums[of]
        return found

    def copy(self, tensor: Tensor, array: np.ndarray, dtype: DType) -> np.ndarray:
        """The narrow copy of a parameter, of which this rank has this array."""
        made = self.narrow.setdefault((id(tensor), dtype), (array, aligned(np.zeros(array.shape, dtype.np))))
        return made[1]

    def prepare(self) -> None:
        """Makes the program of all the copies."""
        if self.narrow:
            arrays = [array for both in zip(*self.narrow.values()) for array in both]
            types = [TensorType(a.shape, as_dtype(a.dtype)) for a in arrays]
            run = self.compiled(casts(list(zip(types[:len(self.narrow)], types[len(self.narrow):]))))
            self.cast = lambda: run(arrays)

    def cutter(self, loss: LossGraph, joint: Joint, made: Partitioned,
               ) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
        """What takes this rank's parts out of a micro-batch's arrays."""
        wanted = [(i, made.inputs[k]) for k, i in enumerate(joint.stage.inputs, start=len(joint.stage.handed))
                  if i < loss.batch]
        mesh, rank = self.mesh, self.step.rank
        return lambda arrays: [arrays[i] if s.is_whole else s.cut(arrays[i], mesh, rank) for i, s in wanted]


def _program(run: Run, sources: Sequence[Source], joint: Joint, loss: LossGraph,
             fixed: Mapping[int, np.ndarray]) -> Program:
    """A program with where its inputs come from."""
    made, stage = Program(run, [None] * len(sources)), joint.stage
    batch = {k: n for n, k in enumerate(k for k, i in enumerate(stage.inputs, start=len(stage.handed))
                                        if i < loss.batch)}
    for position, source in enumerate(sources):
        if isinstance(source, tuple):
            (made.kept if source[0] == "kept" else made.middle).append((position, source[1]))
        elif source in fixed:
            made.fixed[position] = fixed[source]
        elif source < len(stage.handed):
            made.handed.append((position, source))
        elif source in batch:
            made.batch.append((position, batch[source]))
        else:
            made.cotangents.append((position, source - joint.cotangents))
    return made
