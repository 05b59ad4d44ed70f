"""Measured times of a model's layers, for whoever cuts or plans by them.

Every layer's forward and backward program is compiled as a stage's would be and timed on this machine. Equal layers are
measured once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..autodiff.amp import amp_pass
from ..distributed.cost import Cluster
from ..distributed.halves import halves
from ..distributed.stages import Chain, stage_at
from ..ir.dce import sweep
from ..ir.decompose import INLINE
from ..ir.graph import Graph
from ..ir.hashing import graph_hash
from ..ir.passes import TIDY
from ..ir.pipeline import Pipeline
from .building import build_executable
from .eager import empty_aligned
from .pipeline_stages import LossGraph, join

if TYPE_CHECKING:
    from .planning import Planned

REPEAT, AT_LEAST = 3, 0.02  # runs, and seconds, of which the fastest run counts


def layer_seconds(loss: LossGraph, chain: Chain, amp: str | None = None, target: str = "cpu",
                  ) -> list[tuple[float, float]]:
    """Seconds of each layer's forward and backward program on this machine."""
    known: dict[str, tuple[float, float]] = {}
    found = []
    for layer in range(len(chain.layers)):
        stage = stage_at(chain, layer, layer + 1)
        key = f"{graph_hash(stage.graph)} {[loss.wants(v) for v in (*stage.handed, *stage.out)]} " \
              f"{[i in loss.trained for i in stage.inputs]}"
        if key not in known:
            joint = join(loss, stage)
            steps = [*TIDY, *([amp_pass(amp), *TIDY] if amp is not None else [])]
            graph = sweep(INLINE.run(Pipeline(steps).run(joint.graph)).graph).graph
            first = len(stage.handed)
            varying = [k for k in range(len(graph.inputs)) if not first <= k < joint.cotangents
                       or stage.inputs[k - first] < loss.batch]
            parts = halves(graph, joint.ahead, varying)
            known[key] = seconds_of(parts.forward, target), seconds_of(parts.backward, target)
        found.append(known[key])
    return found


def seconds_of(graph: Graph, target: str) -> float:
    """The fastest of some runs of a graph on made-up inputs; whole numbers are zeros, so that they index anything."""
    run = build_executable(graph, target).run
    arrays = [_made_up(v) for v in graph.inputs]
    best, spent, runs = float("inf"), 0.0, 0
    run(arrays)
    while runs < REPEAT or spent < AT_LEAST:
        started = time.perf_counter()
        run(arrays)
        taken = time.perf_counter() - started
        best, spent, runs = min(best, taken), spent + taken, runs + 1
    return best


def _made_up(v: Any) -> np.ndarray:
    array = empty_aligned(v.shape, v.dtype.np)
    array[...] = np.random.default_rng(0).random(v.shape, np.float32) if v.dtype.is_float else 0
    return array


def measure(model: Planned, cluster: Cluster) -> Sequence[tuple[float, float]]:
    """How much longer each layer takes on this machine, forwards and backwards, than the cluster's figures say."""
    from .pricing import Pricer

    loss, chain = model.traced(model.sample)
    pricer = Pricer(loss, chain, cluster, model.amp)
    found = []
    for layer, (forward, backward) in enumerate(layer_seconds(loss, chain, model.amp)):
        price = pricer.price(layer, layer + 1, 1, {})
        found.append((forward / max(price.forward.seconds, 1e-12), backward / max(price.backward.seconds, 1e-12)))
    return found
