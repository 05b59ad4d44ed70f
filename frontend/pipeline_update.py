"""The update of the parameters that one device of a pipeline holds, as a compiled program.

It is the update of a training step on one process (`TrainStep.update`), traced with sums of gradients as inputs and
partitioned; what is of the whole model, the norm that gradients are clipped by, is added up over the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..distributed.partition import partition
from ..distributed.plans import Source, annotate
from ..ir.dtypes import as_dtype
from ..ir.passes import TIDY
from ..ir.pipeline import Pipeline
from ..ir.types import TensorType
from . import functions as F
from .dispatch import apply
from .optim.clip import global_norm
from .tensor import Tensor
from .trace import Spec, record

if TYPE_CHECKING:
    from .pipelined import PipelineStep


def build_update(step: PipelineStep, numbers: Mapping[str, np.ndarray],
                 owner: Mapping[int, int]) -> Callable[[Mapping[str, np.ndarray]], Any]:
    """The compiled update: a function of a step's numbers.

    Args:
        owner: id of a parameter -> the device that counts it in the norm.
    """
    inner, stages = step.inner, step.stages
    own = [p for p in inner.opt.params if id(p) in stages.sums and id(p) in owner]
    specs = [Spec(TensorType(p.shape, as_dtype(stages.sums[id(p)].dtype)), f"grad{i}") for i, p in enumerate(own)]
    given = {k: Spec(TensorType((), as_dtype(v.dtype)), k) for k, v in numbers.items()}

    def traced(grads: Sequence[Tensor], hyper: Mapping[str, Tensor]) -> Tensor:
        found = {id(p): g for p, g in zip(own, grads)}
        mine = [p for p in own if owner[id(p)] == step.here]
        inner.update([found.get(id(p)) for p in inner.opt.params], hyper,
                     lambda listed, most: _clipped(step, listed, {id(p) for p in mine}, most))
        return F.zeros(())

    graph = record(traced, (specs, given))
    captures = graph.meta["captures"]
    graph = Pipeline(list(TIDY)).run(graph)
    graph, shardings = annotate(graph, step.mesh, step.plan, _sources(step, graph, captures, len(own)))
    shardings.update({i: stages.gradient(p) for i, p in enumerate(own)})
    step.partitioned = partition(graph, step.mesh, shardings)
    run = stages.compiled(step.partitioned.graph)
    bound = [step._place(captures[i], step.partitioned.inputs[i]) for i in sorted(captures)]
    sums, names = [stages.sums[id(p)] for p in own], list(numbers)
    return lambda now: run([*sums, *(now[n] for n in names), *bound])


def _sources(step: PipelineStep, graph: Any, captures: Mapping[int, Tensor], grads: int) -> list[Source]:
    """What each input of the update is."""
    opt = step.inner.opt
    states = {id(t): p for p, slots in zip(opt.params, opt.state) for t in slots.values()}
    found = []
    for i in range(len(graph.inputs)):
        tensor = captures.get(i)
        if tensor is None:
            found.append(Source("other" if i < grads else "scalar"))
        else:
            kind = "state" if id(tensor) in states else "parameter"
            found.append(Source(kind, step.names.get(id(states.get(id(tensor), tensor)), "")))
    return found


def _clipped(step: PipelineStep, grads: Sequence[Tensor | None], mine: set[int], most: Tensor) -> tuple[list[Any], Any]:
    """The gradients of this device, scaled down where the norm of the whole model's exceeds `most`."""
    params = step.inner.opt.params
    norm = global_norm([g for p, g in zip(params, grads) if id(p) in mine])
    if step.devices > 1:
        square = F.square(norm).astype("float64" if step.inner._wide == np.float64 else "float32")
        others = tuple(axis for axis in step.mesh.names if axis != step.pipe)
        whole = apply("annotate", square, dims=(), whole=others)
        norm = F.sqrt(apply("all_reduce", whole, axis=step.pipe, size=step.devices, reduce="sum"))
    scale = F.minimum(most.astype(norm.dtype) / (norm + 1e-6), 1.0)
    return [None if g is None else g * scale.astype(g.dtype) for g in grads], norm
