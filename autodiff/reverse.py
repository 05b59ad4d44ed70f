"""Reverse-mode differentiation of the IR.

A gradient is more nodes: `backward` walks from the outputs back to the values of interest, asks each op's
`vjp` rule for the cotangents of its operands, and emits them into the current builder. That builder may
record a graph or run each node at once, so the same rules serve compiled and eager gradients, and
differentiating twice is only calling `backward` again.

A rule is `rule(node, cotangents, needed) -> list of cotangents, one per operand`:

* `cotangents` has one entry per result; None stands for zero (that result does not reach the outputs);
* `needed` says which operands want a cotangent; the entries of the others are ignored;
* a returned None stands for zero.

A rule gives the cotangent in the shape that the op works in, after broadcasting: the walk below sums it
down to (or spreads it over) the operand's own shape, once, for every op.

The walk follows Griewank & Walther, "Evaluating Derivatives" (2nd ed.), section 3.2, at the level of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..ir import context
from ..ir import ops as _declared  # noqa: F401  (a rule fills a slot of a record that exists)
from ..ir.builder import GraphBuilder, copy_into
from ..ir.context import emit
from ..ir.errors import GradientError, TreadleError
from ..ir.graph import Graph, Node, Value
from ..ir.opdef import fill, rule
from ..ir.types import TensorType, shape_text

Cotangents = tuple[Value | None, ...]
VjpRule = Callable[[Node, Cotangents, tuple[bool, ...]], Sequence[Value | None]]


def backward(outputs: Sequence[Value], cotangents: Sequence[Value | None],
             wrt: Sequence[Value]) -> list[Value | None]:
    """The cotangents of `wrt`, given those of `outputs`; emitted into the current builder.

    Args:
        outputs: values of floating dtype.
        cotangents: one per output, of its shape and dtype; None stands for zero.
        wrt: values of floating dtype, anywhere upstream of the outputs. One may be computed from another.

    Returns:
        For each value of `wrt` its cotangent, of its own shape and dtype, or None where no output depends on it.

    Raises:
        GradientError: an output or a value of `wrt` is not floating, a cotangent does not fit its output, or
            a rule returned something else than one fitting cotangent per operand, or an op on the way says that
            it has no gradient (while_loop).
        MissingRuleError: an op on the way has no `vjp` rule; the message names the op and the user's line.
    """
    _check_request(outputs, cotangents, wrt)
    active = set(wrt)
    nodes = _active_nodes(outputs, active)
    sums: dict[Value, Value] = {}
    for out, ct in zip(outputs, cotangents):
        if ct is not None and out in active:
            _accumulate(sums, out, ct)
    for node in reversed(nodes):
        arriving = tuple(sums.get(r) for r in node.results)
        if all(ct is None for ct in arriving):
            continue
        needed = tuple(v in active for v in node.operands)
        with context.current().at(node.loc):
            for operand, wanted, ct in zip(node.operands, needed, _apply(node, arriving, needed)):
                if wanted and ct is not None:
                    _accumulate(sums, operand, fit(ct, operand.type))
    return [sums.get(v) for v in wrt]


def _check_request(outputs: Sequence[Value], cotangents: Sequence[Value | None], wrt: Sequence[Value]) -> None:
    if len(outputs) != len(cotangents):
        raise GradientError(f"{len(outputs)} outputs need as many cotangents, got {len(cotangents)}")
    for out, ct in zip(outputs, cotangents):
        _require_float(out, "the output")
        if ct is not None and ct.type != out.type:
            raise GradientError(f"the cotangent {ct.type} does not fit its output {out!r}: "
                                "shape and dtype must be the same", _where(out))
    for value in wrt:
        _require_float(value, "the value")


def _require_float(value: Value, what: str) -> None:
    if not value.dtype.is_float:
        raise GradientError(f"{what} {value!r} has no gradient: {value.dtype} is not a floating dtype. "
                            "Cast it to a floating dtype, or leave it out.", _where(value))


def _where(value: Value) -> Any:
    return value.producer.loc if value.producer else None


def _active_nodes(outputs: Sequence[Value], active: set[Value]) -> list[Node]:
    """Nodes between the values in `active` and the outputs, in an order in which they can run.

    Adds to `active` every floating value that depends on those already in it.
    """
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(v.producer, False) for v in reversed(outputs) if v.producer]
    while stack:
        node, operands_done = stack.pop()
        if operands_done:
            if any(v in active for v in node.operands) and node.op.slots.get("vjp") is not no_gradient:
                floats = [r for r in node.results if r.dtype.is_float]
                active.update(floats)
                if floats:
                    order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((v.producer, False) for v in node.operands
                         if v.producer and v.dtype.is_float and v.producer not in seen)
    return order


def _apply(node: Node, arriving: Cotangents, needed: tuple[bool, ...]) -> Sequence[Value | None]:
    if node.op.undifferentiable and "vjp" not in node.op.slots:
        raise GradientError(f"{node.op.name} has no gradient: {node.op.undifferentiable}", node.loc)
    vjp: VjpRule = rule("vjp", node.op, node.loc)
    cotangents = vjp(node, arriving, needed)
    if len(cotangents) != len(node.operands):
        raise GradientError(f"the vjp rule of {node.op.name} gave {len(cotangents)} cotangents for "
                            f"{len(node.operands)} operands", node.loc)
    for operand, wanted, ct in zip(node.operands, needed, cotangents):
        if wanted and ct is not None and ct.dtype != operand.dtype:
            raise GradientError(f"the vjp rule of {node.op.name} gave a cotangent {ct.type} "
                                f"for the operand {operand!r}", node.loc)
    return cotangents


def _accumulate(sums: dict[Value, Value], value: Value, ct: Value) -> None:
    sums[value] = sums[value] + ct if value in sums else ct


def fit(ct: Value, target: TensorType) -> Value:
    """A cotangent in the shape of the operand it belongs to: the transpose of NumPy's broadcasting.

    Axes along which the operand was repeated are summed; axes that the cotangent lacks are filled.

    Raises:
        GradientError: the shapes are not related by broadcasting.
    """
    if ct.shape == target.shape:
        return ct
    try:
        extra = max(ct.rank - target.rank, 0)
        aligned = (1,) * (ct.rank - target.rank) + target.shape[max(target.rank - ct.rank, 0):]
        summed = tuple(i for i, (size, wanted) in enumerate(zip(ct.shape, aligned))
                       if i < extra or (wanted == 1 and size != 1))
        if summed:
            ct = emit("reduce_sum", ct, axes=summed, keepdims=True)
        if extra:
            ct = emit("reshape", ct, shape=ct.shape[extra:])
        return ct if ct.shape == target.shape else emit("broadcast_to", ct, shape=target.shape)
    except TreadleError as error:
        raise GradientError(f"a cotangent of shape {shape_text(ct.shape)} does not fit an operand of shape "
                            f"{shape_text(target.shape)}: {error.message}") from error


# Constructors of rules


def per_operand(*rules: Callable[..., Value] | None) -> VjpRule:
    """The rule of an op with one result, from one function per operand: `f(ct, out, *operands, **attrs)`.

    `per_operand(lambda ct, out, x, y: ct * y, lambda ct, out, x, y: ct * x)` is multiplication. None stands for
    an operand without a gradient.
    """
    def vjp(node: Node, cotangents: Cotangents, needed: tuple[bool, ...]) -> list[Value | None]:
        (ct,) = cotangents
        return [f(ct, node.results[0], *node.operands, **node.attrs) if f and wanted else None
                for f, wanted in zip(rules, needed)]
    return vjp


def no_gradient(node: Node, cotangents: Cotangents, needed: tuple[bool, ...]) -> list[Value | None]:
    """The rule of an op that no cotangent passes: stop_gradient, and steps (floor, sign...), flat almost everywhere."""
    return [None] * len(node.operands)


def vjp(name: str, *rules: Callable[..., Value] | None) -> None:
    """Fills the slot `vjp` of an op from one function per operand; see `per_operand`."""
    fill("vjp", name, per_operand(*rules))


# Gradients of whole graphs


def ones_like(value: Value) -> Value:
    """A cotangent of ones: what the gradient of a scalar starts from."""
    return filled(value.type, 1.0)


def zeros_like(value: Value) -> Value:
    return filled(value.type, 0.0)


def filled(type: TensorType, number: float) -> Value:
    """A tensor of the type, every element the number. Symbolic sizes are fine."""
    scalar = context.as_value(number, type.dtype)
    return scalar if not type.shape else emit("broadcast_to", scalar, shape=type.shape)


def scalar_cotangent(loss: Value) -> Value:
    """The cotangent 1 of a loss.

    Raises:
        GradientError: the loss is not a scalar of floating dtype.
    """
    _require_float(loss, "the loss")
    if loss.shape != ():
        raise GradientError(f"the gradient of {loss!r} was asked for, but only a scalar has one: reduce it first "
                            "(sum, mean), or use vjp with a cotangent", _where(loss))
    return ones_like(loss)


def grad_graph(graph: Graph, wrt: Sequence[int], output: int = 0, keep_outputs: bool = True) -> Graph:
    """Forward and backward in one graph: the gradient of the scalar output number `output`.

    Args:
        graph: any graph; its inputs (and roles) become those of the result.
        wrt: numbers of the inputs to differentiate by; one that the output does not depend on gets zeros.
        keep_outputs: whether the outputs of `graph` come before the gradients.
    """
    with GraphBuilder(f"{graph.name}_grad") as builder:
        inputs = [builder.input(v.type, v.name, role) for v, role in zip(graph.inputs, graph.roles)]
        outputs = copy_into(graph, inputs)
        loss, chosen = outputs[output], [inputs[i] for i in wrt]
        grads = backward([loss], [scalar_cotangent(loss)], chosen)
        if keep_outputs:
            builder.output(*outputs)
            builder.graph.aliases.update(graph.aliases)
        builder.output(*(zeros_like(v) if g is None else g for v, g in zip(chosen, grads)))
    return builder.graph


def vjp_graph(graph: Graph, wrt: Sequence[int]) -> Graph:
    """The graph `(*inputs, *cotangents of the floating outputs) -> cotangents of the inputs numbered in wrt`."""
    with GraphBuilder(f"{graph.name}_vjp") as builder:
        inputs = [builder.input(v.type, v.name, role) for v, role in zip(graph.inputs, graph.roles)]
        outputs = [v for v in copy_into(graph, inputs) if v.dtype.is_float]
        cotangents = [builder.input(v.type, f"ct{i}") for i, v in enumerate(outputs)]
        chosen = [inputs[i] for i in wrt]
        grads = backward(outputs, cotangents, chosen)
        builder.output(*(zeros_like(v) if g is None else g for v, g in zip(chosen, grads)))
    return builder.graph
