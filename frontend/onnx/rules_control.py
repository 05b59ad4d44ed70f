"""`If`, `Loop` and `Scan`.

A condition or trip count that is known while tracing decides now. Otherwise these become `cond`, `while_loop` and
`scan` of the IR, whose bodies are traced once. That needs values whose types stay the same from step to step and in
both branches; where they do not (a tensor or a sequence grows, a body asks for elements that decide a shape) the
branch is chosen, or the loop unrolled, by conditions that are asked for: the program is cut there (see `staged`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...ir.dims import Dim
from ...ir.errors import TreadleError
from .. import functions as td
from ..control import cond, scan, while_loop
from ..dispatch import as_tensor
from ..recording import current_trace
from .elements import elements
from .node import NeedsValue, OnnxNode, array_of
from .rules import onnx_rule
from .sizes import numbers
from .values import is_known, require_known, tensor

UNROLLED = 4096
"""A loop that cannot be compiled as one may be unrolled this often."""
FOREVER = 1 << 40
"""Exporters write the largest integer for a loop without a trip count."""


def attempt(node: OnnxNode, compute: Callable[[], Any]) -> Any:
    """What compute() gives; None if it cannot be traced as it is."""
    try:
        return compute()
    except NeedsValue as error:
        if node.frame.context.is_outermost(error.value):
            raise
        return None
    except TreadleError:
        return None  # the other way meets the same error, or none


def tensors(values: Sequence[Any]) -> list[Any]:
    """Values as they leave a body: known ones as tensors, those in sequences too."""
    return [tensors(v) if isinstance(v, list) else v if v is None else tensor(v) for v in values]


def scalar(value: Any) -> Any:
    """A condition or count of one element as a tensor without axes."""
    value = tensor(value)
    return td.reshape(value, ()) if value.shape != () else value


@onnx_rule("If", fold=False)
def if_node(node: OnnxNode, condition: Any) -> Any:
    """One of two subgraphs."""
    then, otherwise = node.require("then_branch"), node.require("else_branch")
    if not is_known(condition) and current_trace() is not None:
        both = attempt(node, lambda: cond(scalar(condition), lambda: tensors(then()), lambda: tensors(otherwise())))
        if both is not None:
            return tuple(both)
    chosen = bool(require_known(node, condition, "cond").reshape(-1)[0])
    return tuple((then if chosen else otherwise)())


# Loop ---------------------------------------------------------------------------------------------------------------


@onnx_rule("Loop", fold=False)
def loop(node: OnnxNode, count: Any = None, condition: Any = None, *state: Any) -> Any:
    """A loop over a count, while a condition holds; gives the last state and what was collected, stacked."""
    body = node.require("body")
    if len(body.inputs) != len(state) + 2 or len(body.outputs) <= len(state):
        raise node.fail(f"its body takes {len(body.inputs)} values and gives {len(body.outputs)}, which does not fit "
                        f"a state of {len(state)}")
    steady = stays_true(body, condition)
    collects = len(body.outputs) - 1 - len(state)
    trips = None if count is None else numbers(node, count, "M")[0] if is_known(count) else elements(tensor(count))
    trips = trips.reshape(-1)[0] if isinstance(trips, np.ndarray) else trips
    if isinstance(trips, int) and trips >= FOREVER:
        count = trips = None
    if current_trace() is not None:
        result = None
        if steady and count is not None:  # a `scan` has a gradient
            result = attempt(node, lambda: counted(body, steps_of(node, count) if trips is None else trips, state))
        if result is None and trips is None and (not steady or collects == 0):
            result = attempt(node, lambda: conditional(node, body, count, condition, state, collects))
        if result is not None:
            return result
    return unrolled(node, body, count, condition, state, steady)


def steps_of(node: OnnxNode, count: Any) -> Any:
    """The trip count that data decide, as a size."""
    return node.size(td.maximum(scalar(count), 0), "the number of steps")


def stays_true(body: Any, condition: Any) -> bool:
    """Whether the condition of a loop holds for ever, as the graph shows it."""
    if condition is not None and not (is_known(condition) and bool(condition.reshape(-1)[0])):
        return False
    name, makers = body.outputs[0], {o: n for n in body.graph.node for o in n.output}
    while name in makers and makers[name].op_type == "Identity":
        name = makers[name].input[0]
    if name == body.inputs[1]:
        return True
    for stored in body.graph.initializer:
        if stored.name == name:
            return bool(array_of(stored).reshape(-1)[0])
    maker = makers.get(name)
    value = next((a for a in maker.attribute if a.name == "value"), None) if maker is not None else None
    if maker is not None and maker.op_type == "Constant" and value is not None:
        return bool(array_of(value.t).reshape(-1)[0])
    if maker is None:  # from around the loop
        found = body.frame.lookup(name)
        return is_known(found) and bool(found.reshape(-1)[0])
    return False


def counted(body: Any, trips: Any, state: Sequence[Any]) -> tuple[Any, ...]:
    """A loop of a known number of steps, as a `scan`."""
    true = np.array(True)

    def step(carry: list[Any], i: Any) -> tuple[list[Any], list[Any]]:
        results = tensors(body(i, true, *carry)[1:])
        return results[:len(state)], results[len(state):]

    steps = trips if isinstance(trips, Dim) else max(trips, 0)
    last, collected = scan(step, tensors(state), td.arange(steps, dtype="int64"))
    return (*last, *collected)


def conditional(node: OnnxNode, body: Any, count: Any, condition: Any, state: Sequence[Any],
                collects: int) -> tuple[Any, ...]:
    """A loop whose number of steps depends on data, as a `while_loop`.

    What it collects has as many rows as it makes steps. So it runs once to count them, and again, as a `scan` of that
    length, to collect.
    """
    limit = None if count is None else scalar(count)

    def goes_on(carry: Any) -> Any:
        i, holds, _ = carry
        return holds if limit is None else td.logical_and(holds, td.less(i, limit))

    def step(carry: Any) -> Any:
        i, holds, values = carry
        results = tensors(body(i, holds, *values))
        return i + 1, scalar(results[0]), results[1:1 + len(state)]

    start = scalar(True if condition is None else condition)
    steps, _, last = while_loop(goes_on, step, (as_tensor(np.int64(0)), start, tensors(state)))
    if not collects:
        return tuple(last)
    return counted(body, node.size(steps, "the number of steps"), state)


def unrolled(node: OnnxNode, body: Any, count: Any, condition: Any, state: Sequence[Any],
             steady: bool) -> tuple[Any, ...]:
    """The loop, step by step."""
    limit = None if count is None else int(require_known(node, count, "M").reshape(-1)[0])
    holds = condition is None or bool(require_known(node, condition, "cond").reshape(-1)[0])
    values, rows, step = list(state), [], 0
    while holds and (limit is None or step < limit):
        if step >= UNROLLED and current_trace() is not None:
            raise node.fail(f"the types of its state change from step to step, so it has to be unrolled, and it makes "
                            f"more than {UNROLLED:,} steps")
        results = body(np.int64(step), np.array(True), *values)
        values = results[1:1 + len(state)]
        rows.append(results[1 + len(state):])
        step += 1
        if not steady:
            holds = bool(require_known(node, results[0], "cond").reshape(-1)[0])
    if not rows and len(body.outputs) > 1 + len(state):
        return counted(body, 0, state)
    return (*values, *(td.stack([tensor(row[i]) for row in rows]) for i in range(len(body.outputs) - 1 - len(state))))


# Scan ---------------------------------------------------------------------------------------------------------------


@onnx_rule("Scan", since=9, fold=False)
def scan_node(node: OnnxNode, *operands: Any) -> Any:
    """A loop over slices of tensors."""
    body, count = node.require("body"), int(node.require("num_scan_inputs"))
    n = len(operands) - count
    if n < 0 or len(body.inputs) != len(operands) or len(body.outputs) < n:
        raise node.fail(f"its body takes {len(body.inputs)} values and gives {len(body.outputs)}, which does not fit "
                        f"{len(operands)} operands, {count} of them scanned")
    collects = len(body.outputs) - n
    columns = [tensor(x) for x in operands[n:]]
    axes = _numbers(node, "scan_input_axes", count)
    columns = [td.moveaxis(x, axis, 0) for x, axis in zip(columns, axes)]
    columns = [td.flip(x, 0) if back else x
               for x, back in zip(columns, _numbers(node, "scan_input_directions", count))]
    last, rows = _scan(node, body, list(operands[:n]), columns)
    rows = [td.flip(y, 0) if back else y for y, back in zip(rows, _numbers(node, "scan_output_directions", collects))]
    rows = [td.moveaxis(y, 0, axis) for y, axis in zip(rows, _numbers(node, "scan_output_axes", collects))]
    return (*last, *rows)


def _numbers(node: OnnxNode, name: str, count: int) -> list[int]:
    given = node.attr(name, None) or [0] * count
    if len(given) != count:
        raise node.fail(f"{name} has {len(given)} entries for {count} values")
    return list(given)


def _scan(node: OnnxNode, body: Any, state: list[Any], columns: list[Any]) -> tuple[list[Any], list[Any]]:
    n = len(state)

    def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        results = tensors(body(*carry, *slices))
        return results[:n], results[n:]

    compact = attempt(node, lambda: scan(step, tensors(state), columns))
    if compact is not None:
        return compact
    values, rows = state, []
    for i in range(columns[0].shape[0]):
        results = body(*values, *(x[i] for x in columns))
        values = results[:n]
        rows.append(results[n:])
    return values, [td.stack([tensor(row[k]) for row in rows]) for k in range(len(body.outputs) - n)]


@onnx_rule("Scan", since=8, fold=False)
def scan_node_8(node: OnnxNode, lengths: Any, *operands: Any) -> Any:
    """The first version of `Scan`: over axis 1, for every element of a batch along axis 0."""
    if lengths is not None:
        raise node.fail("sequence_lens of Scan, opset 8, is not supported: no exporter writes it")
    body, count = node.require("body"), int(node.require("num_scan_inputs"))
    n = len(operands) - count
    given = [tensor(x) for x in operands]
    results = []
    for b in range(given[0].shape[0]):
        columns = [td.flip(x[b], 0) if back else x[b]
                   for x, back in zip(given[n:], _numbers(node, "directions", count))]
        last, rows = _scan(node, body, [x[b] for x in given[:n]], columns)
        results.append([*last, *rows])
    return tuple(td.stack(column) for column in zip(*results))
