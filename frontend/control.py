"""Control flow over tensors: `cond`, `while_loop`, `scan`.

Inside a trace each is one op whose bodies are graphs of their own. What a body uses from outside becomes an operand
by itself; a state tensor that a body assigns (running statistics, the random generator) is carried through and has
its new value afterwards. Outside a trace they are ordinary Python control flow over what runs at once, so that a body
can be stepped through in a debugger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..ir.errors import ArgumentsError, ShapeError, TraceError
from ..ir.graph import Graph, Value
from ..ir.location import user_location
from . import tree
from .dispatch import apply, as_tensor
from .functions_elementwise import as_bool
from .functions_index import getitem
from .functions_shape import stack
from .grad_mode import enable_grad
from .recording import Region, Trace, current_trace
from .tensor import Tensor


class Body:
    """A function recorded as a region."""

    def __init__(self, name: str, parent: Trace, fn: Callable[..., Any], types: Sequence[Tensor],
                 structure: tree.Structure):
        self.region = Region(name, parent)
        with self.region, enable_grad():
            self.inputs = [self.region.input(t.type, t.name) for t in types]
            arguments = tree.unflatten(structure, [Tensor._of(v, self.region) for v in self.inputs])
            leaves, self.structure = tree.flatten(fn(*arguments))
            self.results = [self.region.lift(as_tensor(leaf)) for leaf in leaves]
            self.region.flush()

    @property
    def captured(self) -> list[Any]:
        """Keys of what the body uses from outside, in the order of first use."""
        return list(self.region.captures)

    def tensor(self, key: Any) -> Tensor:
        """The outside tensor of a key."""
        return self.region.captures[key][0]

    def align(self, keys: Sequence[Any], tensors: dict[Any, Tensor]) -> None:
        """Makes the region take exactly these captures, in this order, after its own inputs."""
        for key in keys:
            if key not in self.region.captures:
                with self.region:
                    self.region.lift(tensors[key])
        self.region.graph.inputs[:] = self.inputs + [self.region.captures[k][1] for k in keys]
        self.region.graph.roles[:] = ["data"] * len(self.region.graph.inputs)

    def close(self, outputs: Sequence[Value]) -> Graph:
        """The region's graph with these outputs."""
        self.region.graph.outputs[:] = outputs
        self.region.closed = True
        return self.region.graph

    def present(self, key: Any) -> Value:
        """The value that a captured tensor has at the end of the body."""
        return self.region.lifted[key]


def cond(pred: Any, then: Callable[..., Any], otherwise: Callable[..., Any], *operands: Any) -> Any:
    """`then(*operands)` if pred (a scalar) holds, else `otherwise(*operands)`; only one of the two runs.

    Both must return trees of the same structure, shapes and dtypes.

    Raises:
        ShapeError: pred is not a scalar, or the branches return different types.
        ArgumentsError: they return different trees.
    """
    pred = as_bool(pred)
    if pred.shape != ():
        raise ShapeError(f"cond: the predicate is a scalar, got {pred.type}", user_location())
    parent = current_trace()
    if parent is None:
        return (then if bool(pred) else otherwise)(*operands)
    leaves, structure = tree.flatten(operands)
    tensors = [as_tensor(leaf) for leaf in leaves]
    bodies = [Body(name, parent, fn, tensors, structure) for name, fn in (("then", then), ("else", otherwise))]
    _same_results(bodies[0], bodies[1])
    outside = {key: body.tensor(key) for body in bodies for key in body.captured}
    changed = {key: t for body in bodies for key, t in body.region.assigned.items()}
    keys = [*changed, *(k for k in outside if k not in changed)]
    graphs = []
    for body in bodies:
        body.align(keys, {**outside, **changed})
        graphs.append(body.close([*body.results, *(body.present(k) for k in changed)]))
    results = emit_node("cond", [pred, *tensors], [{**outside, **changed}[k] for k in keys], graphs)
    return unpack(parent, results, bodies[0].structure, list(changed.values()))


def _same_results(then: Body, otherwise: Body) -> None:
    if then.structure != otherwise.structure:
        raise ArgumentsError(f"cond: the branches return different trees: {then.structure} and {otherwise.structure}",
                             user_location())
    for a, b in zip(then.results, otherwise.results):
        if a.type != b.type:
            raise ShapeError(f"cond: the branches return different types: {a.type} and {b.type}", user_location())


def emit_node(name: str, operands: Sequence[Tensor], captured: Sequence[Tensor], graphs: Sequence[Graph],
              **attrs: Any) -> list[Tensor]:
    """A node with regions; its results as a list."""
    results = apply(name, *operands, *captured, regions=graphs, **attrs)
    return list(results) if isinstance(results, tuple) else [results]


def unpack(parent: Trace, results: list[Tensor], structure: tree.Structure, changed: Sequence[Tensor]) -> Any:
    """The results proper; what the bodies assigned gets its new value."""
    count = structure.leaves
    for tensor, new in zip(changed, results[count:]):
        parent.assign(tensor, new)
    return tree.unflatten(structure, results[:count])


def while_loop(cond_fn: Callable[[Any], Any], body_fn: Callable[[Any], Any], init: Any) -> Any:
    """`state = init; while cond_fn(state): state = body_fn(state)`; gives the last state.

    Args:
        cond_fn: from the state to a bool scalar.
        body_fn: from the state to the next one: same tree, shapes and dtypes.
        init: a tree of tensors.

    There is no gradient through it in a trace, as the number of steps is not known; `scan` has one.

    Raises:
        ShapeError, ArgumentsError: the body returns another type or tree than it takes.
    """
    leaves, structure = tree.flatten(init)
    tensors = [as_tensor(leaf) for leaf in leaves]
    parent = current_trace()
    if parent is None:
        state = tree.unflatten(structure, tensors)
        while bool(as_bool(cond_fn(state))):
            state = _checked("while_loop", body_fn(state), tensors, structure)
        return state
    one = tree.Structure("tuple", (0,), (structure,))
    test = Body("cond", parent, lambda s: as_bool(cond_fn(s)), tensors, one)
    body = Body("body", parent, body_fn, tensors, one)
    if test.region.assigned:
        raise TraceError("while_loop: the condition must not assign state (or draw random numbers)", user_location())
    _check_carry("while_loop", body.structure, structure, [v.type for v in body.results], tensors)
    changed = dict(body.region.assigned)
    outside = {key: b.tensor(key) for b in (test, body) for key in b.captured}
    keys = [*changed, *(k for k in outside if k not in changed)]
    for b in (test, body):
        b.align(keys, {**outside, **changed})
    graphs = [test.close(test.results), body.close([*body.results, *(body.present(k) for k in changed)])]
    results = emit_node("while_loop", tensors, [{**outside, **changed}[k] for k in keys], graphs,
                    n_carry=len(tensors) + len(changed))
    return unpack(parent, results, structure, list(changed.values()))


def _checked(name: str, state: Any, before: Sequence[Tensor], structure: tree.Structure) -> Any:
    """A new state as tensors, of the types of the one before."""
    leaves, found = tree.flatten(state)
    tensors = [as_tensor(leaf) for leaf in leaves]
    _check_carry(name, found, structure, [t.type for t in tensors], before)
    return tree.unflatten(structure, tensors)


def _check_carry(name: str, found: tree.Structure, structure: tree.Structure, types: Sequence[Any],
                 before: Sequence[Tensor]) -> None:
    if found != structure:
        raise ArgumentsError(f"{name}: the body turns a state {structure} into {found}; the tree must stay the same",
                             user_location())
    for path, new, old in zip(structure.paths(), types, before):
        if new != old.type:
            raise ShapeError(f"{name}: the body turns the state{path} of type {old.type} into {new}; shape and dtype "
                             "must stay the same", user_location())


def scan(body: Callable[[Any, Any], tuple[Any, Any]], init: Any, xs: Any = None, length: int | None = None,
         reverse: bool = False) -> tuple[Any, Any]:
    """A loop over the first axis of xs: `state, y[i] = body(state, x[i])`; gives the last state and the stacked ys.

    Args:
        body: from (state, x) to (state, y), both trees of tensors; y may be None.
        init: the first state.
        xs: a tree of tensors with the same first axis, or None.
        length: how many steps; needed if xs is None.
        reverse: go from the last to the first; y[i] still belongs to x[i].

    Raises:
        ShapeError, ArgumentsError: the body changes the state's type or tree, or the lengths of xs differ.
    """
    carry_leaves, carry_structure = tree.flatten(init)
    x_leaves, x_structure = tree.flatten(xs)
    carries, columns = [as_tensor(c) for c in carry_leaves], [as_tensor(x) for x in x_leaves]
    count = _length(columns, length)
    parent = current_trace()
    if parent is None and count > 0:
        return _scan_now(body, carries, carry_structure, columns, x_structure, count, reverse)
    if parent is None:  # no step: the types of the ys are known from tracing the body only
        return _scan_empty(body, init, xs, count, reverse)
    rows = [_row(x) for x in columns]
    both = tree.Structure("tuple", (0, 1), (carry_structure, x_structure))
    recorded = Body("body", parent, body, carries + rows, both)
    if recorded.structure.kind != "tuple" or len(recorded.structure.children) != 2:
        raise ArgumentsError(f"scan: the body returns a pair (state, y), not {recorded.structure}", user_location())
    y_structure = recorded.structure.children[1]
    n = len(carries)
    _check_carry("scan", recorded.structure.children[0], carry_structure, [v.type for v in recorded.results[:n]],
                 carries)
    changed = dict(recorded.region.assigned)
    consts = [k for k in recorded.captured if k not in changed]
    tensors = {k: recorded.tensor(k) for k in recorded.captured}
    recorded.align([*changed, *consts], tensors)
    inputs, graph = recorded.region.graph.inputs, recorded.region.graph
    first, states = inputs[:n], inputs[n + len(rows):n + len(rows) + len(changed)]
    graph.inputs[:] = [*first, *states, *inputs[n:n + len(rows)], *inputs[n + len(rows) + len(changed):]]
    recorded.close([*recorded.results[:n], *(recorded.present(k) for k in changed), *recorded.results[n:]])
    results = emit_node("scan", [*carries, *changed.values(), *columns], [tensors[k] for k in consts], [graph],
                    n_carry=n + len(changed), n_xs=len(columns), length=count, reverse=bool(reverse))
    for tensor, new in zip(changed.values(), results[n:n + len(changed)]):
        parent.assign(tensor, new)
    return (tree.unflatten(carry_structure, results[:n]), tree.unflatten(y_structure, results[n + len(changed):]))


def _length(columns: Sequence[Tensor], length: Any) -> Any:
    for x in columns:
        if x.ndim == 0:
            raise ShapeError("scan: xs have a first axis that is gone over, got a scalar", user_location())
        if length is not None and x.shape[0] != length:
            raise ShapeError(f"scan: {x.type} does not have the length {length} of the loop along its first axis",
                             user_location())
        length = x.shape[0]
    if length is None:
        raise ArgumentsError("scan: give xs, or the length of the loop", user_location())
    return length


def _row(x: Tensor) -> Tensor:
    """Something of the type of x[0]."""
    return Tensor._of(Value(x.type.with_shape(x.shape[1:])), x._trace)


def _scan_now(body: Callable[[Any, Any], tuple[Any, Any]], carries: list[Tensor], carry_structure: tree.Structure,
              columns: list[Tensor], x_structure: tree.Structure, count: int, reverse: bool) -> tuple[Any, Any]:
    state = tree.unflatten(carry_structure, carries)
    steps: list[list[Tensor]] = []
    y_structure = tree.NONE
    for i in reversed(range(count)) if reverse else range(count):
        result = body(state, tree.unflatten(x_structure, [getitem(x, i) for x in columns]))
        if not isinstance(result, tuple) or len(result) != 2:
            raise ArgumentsError(f"scan: the body returns a pair (state, y), not {result!r}", user_location())
        state = _checked("scan", result[0], carries, carry_structure)
        leaves, y_structure = tree.flatten(result[1])
        steps.append([as_tensor(leaf) for leaf in leaves])
    if reverse:
        steps.reverse()
    return state, tree.unflatten(y_structure, [stack(ys) for ys in zip(*steps)])


def _scan_empty(body: Callable[[Any, Any], tuple[Any, Any]], init: Any, xs: Any, count: int,
                reverse: bool) -> tuple[Any, Any]:
    from_types = Trace("scan")
    with from_types:
        shape_only = scan(body, init, xs, count, reverse)
    leaves, structure = tree.flatten(shape_only[1])
    empties = [apply("broadcast_to", as_tensor(0, leaf.dtype), shape=leaf.shape) for leaf in leaves]
    return init, tree.unflatten(structure, empties)
