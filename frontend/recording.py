"""The builder behind a trace: tensors in, a graph out.

While a `Trace` is open, functions of tensors become nodes of its graph. A concrete tensor that is used is *captured*
once, as an input that the compiled function binds to the tensor's own memory; `assign` on it becomes an output that
takes over that input. A `Region` is the body of a branch or loop: it is a closed graph, so what it uses from outside
becomes its input, and an operand of its node.

What a trace reads of the Python world besides tensors (a module's training mode, a scalar tensor that was written
into the graph) it can leave a *guard* for: `guard(read)` notes `read()`, and a compiled function is traced anew when
a guard reads differently. Guards are looked at only after `changed()` was called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ..ir import context
from ..ir.builder import Builder, GraphBuilder
from ..ir.errors import TraceError
from ..ir.graph import Graph, Value
from ..ir.location import user_location
from . import grad_mode
from .eager import array_type
from .tensor import Tensor, _hooks

SYMBOLIC_DRAW = 1 << 36
"""Philox blocks set aside for a draw whose size is known only at run time."""


class _World:
    """Counts the changes to what guards read: modes of modules, scalars written into graphs."""

    changes = 0


world = _World()


def changed() -> None:
    """Tells compiled functions to look at their guards again."""
    world.changes += 1


_hooks["changed"] = changed


def read(tensor: Tensor, what: str) -> None:
    """A traced function looks at the elements of a concrete tensor: what follows from them is frozen into the graph.

    That is noted for a tensor that only `assign` can change, and refused for parameters and state.
    """
    trace = current_trace()
    if trace is None:
        return
    if tensor.role is not None:
        raise TraceError(f"while {trace.graph.name!r} is traced, Python asks a {tensor.role} tensor {tensor.type} for "
                         f"{what}: the graph would keep the present value for ever. Compute with the tensor itself "
                         "(td.where, td.cond...), or read it outside", user_location())
    tensor._baked = True
    trace.guards.append((lambda: tensor._value, tensor._value))


_hooks["read"] = read


def current_trace() -> Trace | None:
    """The innermost trace of this thread, or None outside."""
    builder = context.current_or_none()
    return builder if isinstance(builder, Trace) else None


def guard(read: Callable[[], Any]) -> None:
    """Notes in the trace (if one is open) that it depends on `read()`; see the module's text.

    The object that calls this must call `changed()` whenever what `read` gives may have changed.
    """
    trace = current_trace()
    if trace is not None:
        trace.guards.append((read, read()))


class Guards:
    """What traces read besides their inputs, to be looked at again before their programs run."""

    def __init__(self, reads: Iterable[tuple[Callable[[], Any], Any]]):
        self.reads = list(reads)
        self.checked = world.changes

    def hold(self) -> bool:
        """Whether everything is as it was."""
        if self.checked == world.changes:
            return True
        now = world.changes
        for read, then in self.reads:
            if read() is not then and read() != then:
                return False
        self.checked = now
        return True


class Trace(GraphBuilder):
    """Records a graph from functions of tensors."""

    def __init__(self, name: str = "main"):
        super().__init__(name)
        self.closed = False
        self.lifted: dict[Any, Value] = {}            # the present value of each captured tensor
        self.captures: dict[Any, tuple[Tensor, Value]] = {}  # tensor, the input that stands for it
        self.assigned: dict[Any, Tensor] = {}
        self.drawn: dict[Any, tuple[Tensor, int]] = {}
        self.literals: dict[int, tuple[np.ndarray, Tensor]] = {}
        self.counted: Any = None  # the sizes that the graph counts itself: see `data_sizes`
        self._guards: list[tuple[Callable[[], Any], Any]] = []

    @property
    def guards(self) -> list[tuple[Callable[[], Any], Any]]:
        """(read, value when tracing) of what the graph depends on besides its inputs."""
        return self._guards

    # From tensors to values -------------------------------------------------------------------------------------

    def lift(self, tensor: Tensor) -> Value:
        """The value in this graph that stands for a tensor; captures concrete ones.

        Raises:
            TraceError: the tensor belongs to a trace that is over, or to none of the open ones.
        """
        if tensor._trace is self:
            value: Value = tensor._value
            return value
        key = _key(tensor)
        if key in self.lifted:
            return self.lifted[key]
        return self._capture(key, tensor)

    def _capture(self, key: Any, tensor: Tensor) -> Value:
        if tensor._trace is not None:
            tensor._trace.leaked(tensor)
        if not tensor.shape and tensor.role is None and not tensor.requires_grad:
            return self._bake(key, tensor)
        role = tensor.role or ("parameter" if tensor.requires_grad else "constant")
        value = self.input(tensor.type, tensor.name, role)
        self.captures[key] = (tensor, value)
        self.lifted[key] = value
        return value

    def _bake(self, key: Any, tensor: Tensor) -> Value:
        """Writes a scalar into the graph, under the guard that it stays what it is."""
        (value,) = self.emit("constant", (), {"value": tensor._value.array.copy()})
        self.lifted[key] = value
        tensor._baked = True
        self.guards.append((lambda: tensor._value, tensor._value))
        return value

    def literal(self, source: np.ndarray | None, array: np.ndarray) -> Tensor:
        """A tensor for a NumPy array used in the traced function: captured once, however often it is used."""
        key = id(array if source is None else source)
        if key not in self.literals:
            self.literals[key] = (array if source is None else source, Tensor(array))
        return self.literals[key][1]

    def shielded(self, values: tuple[Value, ...]) -> tuple[Value, ...]:
        """Values that no gradient passes, if recording is off (`no_grad`)."""
        if grad_mode.is_grad_enabled():
            return values
        return tuple(self.emit("stop_gradient", (v,), {})[0] if v.dtype.is_float and v.producer is not None else v
                     for v in values)

    # State ------------------------------------------------------------------------------------------------------

    def assign(self, tensor: Tensor, value: Tensor) -> None:
        """The tensor has a new value from here on; the compiled function writes it back."""
        key = _key(tensor)
        new = self.lift(value)
        if key in self.lifted and key not in self.captures:
            raise TraceError("assign() to a scalar tensor that the trace has used as a constant already; give it a "
                             "role: td.tensor(0.0, role='state')", user_location())
        if key not in self.captures:
            captured = self.input(tensor.type, tensor.name, tensor.role or "state")
            self.captures[key] = (tensor, captured)
        self.lifted[key] = new
        self.assigned[key] = tensor

    def offset(self, state: Tensor) -> int:
        """Where the next draw from a Philox state starts, in blocks of four words after its counter."""
        self.lift(state)
        return self.drawn.get(_key(state), (state, 0))[1]

    def advance(self, state: Tensor, count: Any) -> None:
        """Notes a draw of `count` blocks; the state itself moves once, by `flush`."""
        step = count if isinstance(count, int) else SYMBOLIC_DRAW
        self.drawn[_key(state)] = (state, self.offset(state) + step)

    def flush(self) -> None:
        """Moves every Philox state past what was drawn from it."""
        drawn, self.drawn = self.drawn, {}
        for state, count in drawn.values():
            (step,) = self.emit("constant", (), {"value": np.array([0, count], np.uint64)})
            (moved,) = self.emit("add", (self.lift(state), step), {})
            self.assign(state, Tensor._of(moved, self))

    # Its end ----------------------------------------------------------------------------------------------------

    def finish(self, results: list[Value]) -> Graph:
        """The graph with these outputs, followed by the new values of the assigned tensors."""
        self.flush()
        self.output(*results)
        index = {v: i for i, v in enumerate(self.graph.inputs)}
        assigns = {}
        for key, tensor in self.assigned.items():
            assigns[len(self.graph.outputs)] = tensor
            self.output(self._own(self.lifted[key], results), alias=self.captures[key][1])
        self.graph.meta.update(captures={index[v]: t for t, v in self.captures.values()}, assigns=assigns,
                               guards=self.guards)
        self.closed = True
        return self.graph

    def _own(self, value: Value, results: list[Value]) -> Value:
        """The value itself, or a copy where an input or another output is the same value: storage is given once."""
        if value.producer is None or value in results or value in self.graph.outputs:
            (value,) = self.emit("identity", (value,), {})
        return value

    # Misuse -----------------------------------------------------------------------------------------------------

    def leaked(self, tensor: Tensor) -> None:
        """Raises: a tracer is used where its trace is not open."""
        made = tensor._value.producer.loc if tensor._value.producer is not None else None
        origin = f" made at {made}" if made else ""
        over = "is over" if self.closed else "is not the one that is recording"
        raise TraceError(f"the traced tensor {tensor.type}{origin} belongs to the trace of {self.graph.name!r}, which "
                         f"{over}. Return it from the traced function, or keep it with assign() on a state tensor.",
                         user_location())

    def refuse(self, tensor: Tensor, what: str, instead: str) -> None:
        """Raises: Python asks for the elements of a tensor that has none yet."""
        if self.closed:
            self.leaked(tensor)
        raise TraceError(f"a traced tensor {tensor.type} has no elements while {self.graph.name!r} is being traced, so "
                         f"Python cannot ask for {what}. Use instead: {instead}.", user_location())


class Region(Trace):
    """Records the body of a branch or loop inside an open builder.

    Attributes:
        parent: the builder that the node will go to.
    """

    def __init__(self, name: str, parent: Builder):
        super().__init__(name)
        self.parent: Any = parent
        if isinstance(parent, Trace):
            parent.flush()

    @property
    def guards(self) -> list[tuple[Callable[[], Any], Any]]:
        """Those of the whole trace."""
        guards: list[tuple[Callable[[], Any], Any]] = self.parent.guards if isinstance(self.parent, Trace) else []
        return guards

    def _capture(self, key: Any, tensor: Tensor) -> Value:
        if tensor._trace is None and not tensor.shape and tensor.role is None and not tensor.requires_grad:
            return self._bake(key, tensor)
        outer = self.parent.lift(tensor)  # raises if the tensor belongs to none of the open traces
        value = self.input(outer.type, tensor.name)
        self.captures[key] = (tensor, value)
        self.lifted[key] = value
        return value

    def literal(self, source: np.ndarray | None, array: np.ndarray) -> Tensor:
        """As in a trace: kept by the outermost one."""
        if isinstance(self.parent, Trace):
            return self.parent.literal(source, array)
        return super().literal(source, array)

    def assign(self, tensor: Tensor, value: Tensor) -> None:
        """The new value leaves the region as a result of its node."""
        self.parent.lift(tensor)
        super().assign(tensor, value)


def _key(tensor: Tensor) -> Any:
    """One key per tensor: concrete ones by identity, tracers by the value they stand for."""
    return tensor if tensor._trace is None else tensor._value


__all__ = ["Guards", "Region", "Trace", "array_type", "changed", "current_trace", "guard", "world"]
