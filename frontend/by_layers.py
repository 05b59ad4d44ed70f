"""A loss whose layers are computed again in the backward pass: `Plan(recompute=True)` without a pipeline.

The loss is recorded as a graph of its own, cut where a pipeline would cut it at the finest (`distributed/stages.py`);
every layer becomes a region that keeps only what it was handed (Chen et al. 2016, arXiv:1604.06174).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..distributed.stages import chain_at, chain_of, regions, stage_at
from ..ir.builder import copy_into
from ..ir.decompose import INLINE
from ..ir.passes import TIDY
from ..ir.pipeline import Pipeline
from . import tree
from .control import Body, unpack
from .dispatch import as_tensor
from .recording import current_trace
from .tensor import Tensor
from .trace import leaf_type

KEEP_REGIONS = [p for p in TIDY if p is not INLINE]


def by_layers(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """`loss_fn(model, *batch)`, with the same results; what it computes between layers is not kept."""

    @functools.wraps(loss_fn, assigned=("__name__", "__doc__"), updated=())
    def recomputed(model: Any, *batch: Any) -> Any:
        parent = current_trace()
        leaves, structure = tree.flatten(batch)
        places = [i for i, leaf in enumerate(leaves) if leaf_type(leaf) is not None]
        if parent is None or not places:
            return loss_fn(model, *batch)
        tensors = [as_tensor(leaves[i]) for i in places]

        def inner(*given: Tensor) -> Any:
            filled = list(leaves)
            for i, tensor in zip(places, given):
                filled[i] = tensor
            return loss_fn(model, *tree.unflatten(structure, filled))

        flat = tree.Structure("tuple", tuple(range(len(tensors))), (tree.LEAF,) * len(tensors))
        body = Body("loss", parent, inner, tensors, flat)
        outside = [body.tensor(k) for k in body.captured]
        changed = dict(body.region.assigned)
        body.align(body.captured, {})
        graph = Pipeline(KEEP_REGIONS).run(body.close([*body.results, *(body.present(k) for k in changed)]))
        data = range(len(tensors))
        chain = chain_at(graph, data, regions(chain_of(graph, data)))
        stage = stage_at(chain, 0, len(chain.layers), again=True)
        values = [parent.lift(t) for t in (*tensors, *outside)]
        made = copy_into(stage.graph, [values[i] for i in stage.inputs])
        results = dict(zip((0, *stage.results), made))
        return unpack(parent, [Tensor._of(results[i], parent) for i in range(len(graph.outputs))], body.structure,
                      list(changed.values()))

    return recomputed
