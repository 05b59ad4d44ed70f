"""All ranks of a mesh interpreted in one process, node by node: the oracle of what partitioning makes.

Each rank has its own arrays; at a collective they meet. No processes, no MPI: a plan for 64 ranks is checked on a
laptop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ..ir import interp
from ..ir.errors import VerifyError
from ..ir.graph import Graph, Node, Value
from .mesh import Mesh
from .partition import Partitioned
from .regions import LOOPS

Arrays = list[np.ndarray]


def run(graph: Graph, mesh: Mesh, arrays: Sequence[Sequence[Any]]) -> list[Arrays]:
    """The outputs of every rank, from the inputs of every rank."""
    inputs = [[np.asarray(a) for a in own] for own in arrays]
    for own in inputs:
        interp.bind_sizes(graph, own)
    envs: list[dict[Value, np.ndarray]] = [dict(zip(graph.inputs, own, strict=True)) for own in inputs]
    boxes: dict[Any, Any] = {}  # what was sent or started, until it is asked for
    for node in graph.nodes:
        given = [[env[v] for v in node.operands] for env in envs]
        for env, results in zip(envs, _run_node(node, mesh, given, boxes)):
            env.update(zip(node.results, results, strict=True))
    return [[env[v] for v in graph.outputs] for env in envs]


def run_whole(made: Partitioned, arrays: Sequence[Any]) -> Arrays:
    """The outputs of a partitioned graph as of one process: inputs cut, all ranks run, outputs joined.

    Raises:
        VerifyError: ranks that should have the same have not.
    """
    mesh = made.mesh
    cut = [[s.cut(a, mesh, rank) for s, a in zip(made.inputs, arrays, strict=True)] for rank in range(mesh.size)]
    ranks = run(made.graph, mesh, cut)
    joined = []
    for i, sharding in enumerate(made.outputs):
        parts = [own[i] for own in ranks]
        whole = sharding.join(parts, mesh, made.plan.graph.outputs[i].shape)
        for rank, part in enumerate(parts):
            same = sharding.partial or all(np.array_equal(part[own], whole[at], equal_nan=part.dtype.kind in "fc")
                                           for own, at in sharding.pieces(mesh, rank, whole.shape))
            if not same:
                raise VerifyError(f"output {i} of {made.graph.name}: rank {rank} has another value than its twins")
        joined.append(whole)
    return joined


def _run_node(node: Node, mesh: Mesh, given: list[Arrays], boxes: dict[Any, Any]) -> list[Arrays]:
    name = node.op.name
    if name in LOOPS:
        return _loop(node, mesh, given)
    if name == "axis_index":
        return [[np.asarray(mesh.coordinates(rank)[node.attrs["axis"]], np.int64)] for rank in range(mesh.size)]
    if name == "start":
        boxes[node.attrs["tag"],] = _together(TOGETHER[node.attrs["kind"]], node, mesh, given)
        return [[np.zeros((), np.int64)] for _ in given]
    if name == "wait":
        return boxes.pop((node.attrs["tag"],))
    if name in ("send", "recv"):
        return [_post(node, mesh, rank, own, boxes) for rank, own in enumerate(given)]
    if name not in TOGETHER:
        return [interp.run_node(node, own) for own in given]
    return _together(TOGETHER[name], node, mesh, given)


def _loop(node: Node, mesh: Mesh, given: list[Arrays]) -> list[Arrays]:
    """All ranks go through the regions together."""
    attrs = node.attrs
    if node.op.name == "cond":
        return run(node.regions[0 if _agreed(own[0] for own in given) else 1], mesh, [own[1:] for own in given])
    n_carry = attrs["n_carry"]
    state, rest = [own[:n_carry] for own in given], [own[n_carry:] for own in given]
    if node.op.name == "while_loop":
        while _agreed(out[0] for out in run(node.regions[0], mesh, [s + r for s, r in zip(state, rest)])):
            state = run(node.regions[1], mesh, [s + r for s, r in zip(state, rest)])
        return state
    n_xs, rows = attrs["n_xs"], []
    for i in reversed(range(attrs["length"])) if attrs["reverse"] else range(attrs["length"]):
        found = run(node.regions[0], mesh, [[*s, *(x[i] for x in r[:n_xs]), *r[n_xs:]] for s, r in zip(state, rest)])
        state = [own[:n_carry] for own in found]
        rows.append([own[n_carry:] for own in found])
    if not rows:
        return [interp.run_node(node, own) for own in given]
    ordered = rows[::-1] if attrs["reverse"] else rows
    return [[*own, *(np.stack(ys) for ys in zip(*(row[rank] for row in ordered)))] for rank, own in enumerate(state)]


def _agreed(conditions: Iterable[np.ndarray]) -> bool:
    found = {bool(c) for c in conditions}
    if len(found) != 1:
        raise VerifyError("the ranks do not agree on a condition")
    return found.pop()


def _together(collective: Callable[[Arrays, int, dict[str, Any]], Arrays], node: Node, mesh: Mesh,
              given: list[Arrays]) -> list[Arrays]:
    """What each rank gets, group by group."""
    results: list[Arrays] = [[] for _ in given]
    for rank in range(mesh.size):
        group = mesh.group(rank, node.attrs["axis"])
        if group[0] != rank:
            continue
        for k in range(len(node.operands)):
            for other, made in zip(group, collective([given[r][k] for r in group], k, node.attrs)):
                results[other].append(np.asarray(made, node.operands[k].dtype.np))
    return results


def _post(node: Node, mesh: Mesh, rank: int, own: Arrays, boxes: dict[Any, Any]) -> Arrays:
    """Messages wait in boxes: all ranks send before any receives what a later node asks for."""
    here, axis, shift, tag = mesh.coordinates(rank), node.attrs["axis"], node.attrs["shift"], node.attrs["tag"]
    other = mesh.rank({**here, axis: here[axis] + shift})
    if node.op.name == "send":
        boxes.setdefault((rank, other, tag), []).append(own[0].copy())
        return [np.zeros((), np.int64)]
    waiting = boxes.get((other, rank, tag))
    if not waiting:
        raise VerifyError(f"rank {rank} receives from rank {other} what was not sent (tag {tag}): a deadlock", node.loc)
    return [waiting.pop(0)]


def _sum(parts: Arrays) -> np.ndarray:
    total = parts[0].copy()
    for part in parts[1:]:
        with np.errstate(all="ignore"):
            total = total + part
    return total


def _all_reduce(parts: Arrays, k: int, attrs: dict[str, Any]) -> Arrays:
    fold = {"sum": _sum, "max": lambda p: np.maximum.reduce(p), "min": lambda p: np.minimum.reduce(p)}[
        attrs.get("reduce", "sum")]
    return [fold(parts)] * len(parts)


def _all_gather(parts: Arrays, k: int, attrs: dict[str, Any]) -> Arrays:
    return [np.concatenate(parts, attrs["dims"][k])] * len(parts)


def _reduce_scatter(parts: Arrays, k: int, attrs: dict[str, Any]) -> Arrays:
    return np.split(_sum(parts), len(parts), attrs["dims"][k])


def _all_to_all(parts: Arrays, k: int, attrs: dict[str, Any]) -> Arrays:
    cut = [np.split(p, len(parts), attrs["split"]) for p in parts]
    return [np.concatenate([own[i] for own in cut], attrs["concat"]) for i in range(len(parts))]


TOGETHER: dict[str, Callable[[Arrays, int, dict[str, Any]], Arrays]] = {
    "all_reduce": _all_reduce, "all_gather": _all_gather, "reduce_scatter": _reduce_scatter, "all_to_all": _all_to_all,
}
