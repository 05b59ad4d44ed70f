"""Gradients of functions: `grad`, `value_and_grad`, `vjp`, `jvp`, `checkpoint`; and `Tensor.backward`.

All are one mechanism. The arguments to differentiate by are given fresh values, the function runs under whichever
builder is open, and `autodiff.reverse.backward` emits the cotangents into the same builder: at once outside a trace,
into the graph inside. What the function uses from outside is a constant to it, and a gradient taken around it sees
through, so `grad(grad(f))` and gradients of closures need no further care.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from ..autodiff import backward as reverse
from ..ir import context
from ..ir.builder import Builder
from ..ir.context import emit
from ..ir.errors import ArgumentsError, GradientError, TraceError
from ..ir.graph import Value
from ..ir.location import user_location
from . import eager, tree
from .control import Body, emit_node, unpack
from .dispatch import as_tensor
from .eager import Concrete
from .grad_mode import enable_grad, is_grad_enabled, set_grad_enabled
from .recording import current_trace
from .tensor import Tensor, _hooks
from .trace import leaf_type


def grad(fn: Callable[..., Any], argnums: Any = 0, has_aux: bool = False) -> Callable[..., Any]:
    """A function that gives the gradient of `fn`, whose result is a scalar.

    Args:
        fn: returns a floating scalar tensor, or with `has_aux` a pair (scalar, anything).
        argnums: which positional arguments to differentiate by: an int, or several. Each may be a tree of tensors.

    Returns:
        A function of the same arguments: the gradient, of the tree of that argument (a tuple of them for several
        argnums); with `has_aux` a pair (gradient, aux).

    Raises:
        GradientError: (when called) the result is not a floating scalar, or an argument is not floating.
    """
    both = value_and_grad(fn, argnums, has_aux)

    @functools.wraps(fn, assigned=("__name__", "__doc__"), updated=())
    def gradient(*args: Any, **keywords: Any) -> Any:
        value, grads = both(*args, **keywords)
        return (grads, value[1]) if has_aux else grads

    return gradient


def value_and_grad(fn: Callable[..., Any], argnums: Any = 0, has_aux: bool = False) -> Callable[..., Any]:
    """As `grad`, but gives (value, gradient), with `has_aux` ((value, aux), gradient)."""

    @functools.wraps(fn, assigned=("__name__", "__doc__"), updated=())
    def gradient(*args: Any, **keywords: Any) -> Any:
        chosen = _positions(argnums, len(args))
        fresh, structures, call = _with_fresh(args, chosen)
        recording = is_grad_enabled()
        with enable_grad():
            result = fn(*call, **keywords)
        loss, aux = _loss_of(result, has_aux)
        builder = eager.builder()
        value = builder.lift(loss)
        grads = _pull_back(builder, [value], [_one(builder, value)], [builder.lift(f) for f in fresh], recording)
        parts = _regroup([_result(builder, g, f) for g, f in zip(grads, fresh)], structures)
        given = _settled(loss, fresh)
        out = parts if isinstance(argnums, (tuple, list)) else parts[0]
        return ((given, aux), out) if has_aux else (given, out)

    return gradient


def vjp(fn: Callable[..., Any], *args: Any, has_aux: bool = False) -> tuple[Any, ...]:
    """(results of `fn(*args)`, a function from their cotangents to a tuple of those of the arguments).

    The function may be called any number of times. Cotangents of integer results are ignored.
    """
    fresh, structures, call = _with_fresh(args, tuple(range(len(args))))
    recording = is_grad_enabled()
    with enable_grad():
        result = fn(*call)
    result, aux = (result[0], result[1:]) if has_aux else (result, ())
    outputs, out_structure = tree.flatten(result)
    outputs = [as_tensor(o) for o in outputs]
    origin = eager.builder()

    def pull(cotangents: Any) -> tuple[Any, ...]:
        given, structure = tree.flatten(cotangents)
        if structure != out_structure:
            raise ArgumentsError(f"the cotangents have the structure {structure}; the results have {out_structure}",
                                 user_location())
        builder = eager.builder()
        if builder is not origin:
            raise TraceError("the function that vjp gave must be called where vjp was called: both inside one trace or "
                             "both outside", user_location())
        pairs = [(o, c) for o, c in zip(outputs, given) if o.dtype.is_float]
        cts = [_fitting(c, o) for o, c in pairs]
        grads = _pull_back(builder, [builder.lift(o) for o, _ in pairs], [builder.lift(c) for c in cts],
                           [builder.lift(f) for f in fresh], recording)
        return tuple(_regroup([_result(builder, g, f) for g, f in zip(grads, fresh)], structures))

    shown = tree.unflatten(out_structure, [_settled(o, fresh) for o in outputs])
    return (shown, pull, *aux)


def jvp(fn: Callable[..., Any], args: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """(results of `fn(*args)`, their derivatives in the direction of the tangents).

    Forward mode from two reverse passes: the cotangents that `vjp` gives are linear in its argument, and the
    transpose of that linear map is the derivative wanted (Townsend, "A new trick for calculating Jacobian vector
    products", 2017).
    """
    if len(args) != len(tangents):
        raise ArgumentsError(f"jvp: {len(args)} arguments need as many tangents, got {len(tangents)}", user_location())
    fresh, _, call = _with_fresh(tuple(args), tuple(range(len(args))))
    directions, _ = tree.flatten(tuple(tangents))
    recording = is_grad_enabled()
    with enable_grad():
        result = fn(*call)
        leaves, structure = tree.flatten(result)
        outputs = [as_tensor(o) for o in leaves]
        builder = eager.builder()
        floats = [o for o in outputs if o.dtype.is_float]
        zeros = [_fresh(_zero(builder, builder.lift(o))) for o in floats]
        inner = _pull_back(builder, [builder.lift(o) for o in floats], [builder.lift(z) for z in zeros],
                           [builder.lift(f) for f in fresh], recording=True)
        ways = [(g, builder.lift(_fitting(d, f))) for g, d, f in zip(inner, directions, fresh) if g is not None]
    out = _pull_back(builder, [g for g, _ in ways], [d for _, d in ways], [builder.lift(z) for z in zeros], recording,
                     [builder.lift(f) for f in fresh])
    moved = iter(_result(builder, t, o) for t, o in zip(out, floats))
    derivatives = [next(moved) if o.dtype.is_float else _zero(builder, builder.lift(o))
                   for o in outputs]
    return (tree.unflatten(structure, [_settled(o, fresh) for o in outputs]), tree.unflatten(structure, derivatives))


def checkpoint(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that gives what `fn` gives and keeps only its arguments for the backward pass, which runs it again.

    Trades a second forward run of `fn` for the memory of what it computes in between (Chen et al., "Training deep
    nets with sublinear memory cost", 2016). Random numbers drawn inside come out the same again. Outside a trace it
    just calls `fn`: what runs eagerly is kept anyway.
    """

    @functools.wraps(fn, assigned=("__name__", "__doc__"), updated=())
    def recomputed(*args: Any, **keywords: Any) -> Any:
        parent = current_trace()
        if parent is None:
            return fn(*args, **keywords)
        leaves, structure = tree.flatten((args, keywords))
        places = [i for i, leaf in enumerate(leaves) if leaf_type(leaf) is not None]
        tensors = [as_tensor(leaves[i]) for i in places]

        def inner(*given: Tensor) -> Any:
            filled = list(leaves)
            for i, tensor in zip(places, given):
                filled[i] = tensor
            call, named = tree.unflatten(structure, filled)
            return fn(*call, **named)

        flat = tree.Structure("tuple", tuple(range(len(tensors))), (tree.LEAF,) * len(tensors))
        body = Body("checkpoint", parent, inner, tensors, flat)
        outside = [body.tensor(k) for k in body.captured]
        changed = dict(body.region.assigned)
        body.align(body.captured, {})
        graph = body.close([*body.results, *(body.present(k) for k in changed)])
        if not graph.outputs:
            return tree.unflatten(body.structure, [])
        results = emit_node("remat", tensors, outside, [graph])
        return unpack(parent, results, body.structure, list(changed.values()))

    return recomputed


def backward(tensor: Tensor, gradient: Any = None) -> None:
    """`Tensor.backward`: walks the record back and adds to `.grad` of the leaves that require one."""
    if tensor.is_tracer or current_trace() is not None:
        raise TraceError("backward() walks what ran eagerly. Use instead, inside a trace: td.grad, td.value_and_grad; "
                         "for a whole training step td.train_step", user_location())
    value: Concrete = tensor._value
    leaves = [v for v in _leaves(value) if v.owner is not None]
    if not leaves:
        raise GradientError("the tensor was not computed from one that requires a gradient: set requires_grad=True on "
                            "a parameter first. Compiled functions are not recorded: compile the gradient itself, "
                            "td.compile(td.value_and_grad(fn)), or use td.train_step", user_location())
    builder = eager.eager_builder()
    ct = _one(builder, value) if gradient is None else builder.lift(_fitting(gradient, tensor))
    with set_grad_enabled(False):
        for leaf, found in zip(leaves, _run(builder, [value], [ct], leaves)):
            owner = leaf.owner() if leaf.owner is not None else None
            if owner is not None and found is not None:
                new = Tensor._of(found)
                owner.grad = new if owner.grad is None else owner.grad + new


_hooks["backward"] = backward


def gradients(loss: Tensor, wrt: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of a scalar with respect to tensors that it was computed from, in the open trace (or eagerly).

    None where the loss does not depend on one. What `train_step` is made of; `grad` is for functions.
    """
    builder = eager.builder()
    value = builder.lift(loss)
    found = _run(builder, [value], [_one(builder, value)], [builder.lift(t) for t in wrt])
    return [None if g is None else _wrap(builder, g) for g in found]


# Parts ---------------------------------------------------------------------------------------------------------


def _positions(argnums: Any, count: int) -> tuple[int, ...]:
    chosen = tuple(argnums) if isinstance(argnums, (tuple, list)) else (argnums,)
    for position in chosen:
        if not isinstance(position, int) or not -count <= position < count:
            raise ArgumentsError(f"argnums names the argument {position!r}, but the function was called with {count} "
                                 "positional arguments", user_location())
    return tuple(p % count for p in chosen)


def _with_fresh(args: tuple[Any, ...], chosen: tuple[int, ...],
                ) -> tuple[list[Tensor], list[tree.Structure], list[Any]]:
    """Fresh tensors for the leaves of the chosen arguments, their structures, and the arguments with them in place."""
    fresh: list[Tensor] = []
    structures: list[tree.Structure] = []
    call = list(args)
    for position in chosen:
        leaves, structure = tree.flatten(args[position])
        new = [_fresh(_differentiable(leaf, position)) for leaf in leaves]
        call[position] = tree.unflatten(structure, new)
        fresh += new
        structures.append(structure)
    return fresh, structures, call


def _differentiable(leaf: Any, position: int) -> Tensor:
    try:
        tensor = as_tensor(leaf)
    except TypeError as error:
        raise GradientError(f"argument {position} holds {leaf!r}, which is not a tensor: {error}",
                            user_location()) from None
    if not tensor.dtype.is_float:
        raise GradientError(f"argument {position} has the type {tensor.type}: only floating dtypes have gradients. "
                            "Cast it, or leave it out of argnums", user_location())
    return tensor


def _fresh(tensor: Tensor) -> Tensor:
    """A tensor of the same elements that starts a record of its own."""
    builder = eager.builder()
    value = builder.lift(tensor)
    if isinstance(value, Concrete) and not value.tracked:
        leaf = Concrete(value.array, value.type)
        leaf.tracked = True
        leaf.mutable = value.mutable
        return Tensor._of(leaf)
    with enable_grad():
        (value,) = builder.emit("identity", (value,), {})
    return _wrap(builder, value)


def _wrap(builder: Builder, value: Value) -> Tensor:
    return Tensor._of(value, None if builder is eager.eager_builder() else builder)


def _loss_of(result: Any, has_aux: bool) -> tuple[Tensor, Any]:
    if has_aux:
        if not isinstance(result, tuple) or len(result) != 2:
            raise GradientError("with has_aux the function returns a pair (loss, aux)", user_location())
        loss, aux = result
    else:
        loss, aux = result, None
    if not isinstance(loss, Tensor):
        raise GradientError(f"the function to differentiate returned {loss!r}; it must return a scalar tensor"
                            + ("" if has_aux else ", or a pair with has_aux=True"), user_location())
    return loss, aux


def _one(builder: Builder, loss: Value) -> Value:
    """The cotangent 1 of a scalar."""
    if not loss.dtype.is_float or loss.shape != ():
        what = f"has the dtype {loss.dtype}" if not loss.dtype.is_float else f"has the shape {loss.shape}"
        raise GradientError(f"a gradient was asked of a tensor {loss.type}, but it {what}: only a floating scalar has "
                            "one. Reduce it first (sum, mean), or give cotangents: td.vjp, backward(gradient)",
                            user_location())
    return _filled(builder, loss, 1)


def _filled(builder: Builder, like: Value, number: float) -> Value:
    with builder:
        scalar = context.as_value(number, like.dtype)
        return emit("broadcast_to", scalar, shape=like.shape) if like.shape else scalar


def _zero(builder: Builder, like: Value) -> Any:
    value = _filled(builder, like, 0)
    return _wrap(builder, value)


def _fitting(cotangent: Any, output: Tensor) -> Tensor:
    ct = as_tensor(cotangent, output.dtype) if not isinstance(cotangent, Tensor) else cotangent
    if ct.type != output.type:
        raise GradientError(f"a cotangent or tangent of type {ct.type} does not fit {output.type}: shape and dtype "
                            "must be the same", user_location())
    return ct


def _run(builder: Builder, outputs: Sequence[Value], cts: Sequence[Value], wrt: Sequence[Value]) -> list[Any]:
    with builder:
        return reverse(outputs, cts, wrt)


def _pull_back(builder: Builder, outputs: Sequence[Value], cts: Sequence[Value], wrt: Sequence[Value],
               recording: bool, others: Sequence[Value] = ()) -> list[Any]:
    """`reverse.backward`; recorded only if a gradient around this one could want it.

    `others` are values, besides wrt, that nobody outside holds.
    """
    if not isinstance(builder, eager.EagerBuilder):
        return _run(builder, outputs, cts, wrt)
    mine = {*wrt, *others}
    outer = recording and any(leaf not in mine for v in (*outputs, *cts) for leaf in _leaves(v))
    with set_grad_enabled(outer):
        return _run(builder, outputs, cts, wrt)


def _leaves(value: Any) -> list[Concrete]:
    """The tracked values without producer that a value was computed from."""
    found: dict[Any, None] = {}
    seen: set[Any] = set()
    stack = [value]
    while stack:
        v = stack.pop()
        if v.producer is None:
            if getattr(v, "tracked", False):
                found[v] = None
        elif v.producer not in seen:
            seen.add(v.producer)
            stack.extend(v.producer.operands)
    return list(found)


def _result(builder: Builder, gradient: Value | None, like: Tensor) -> Tensor:
    if gradient is None:
        zero: Tensor = _zero(builder, like._value)
        return zero
    return _wrap(builder, gradient)


def _settled(tensor: Tensor, fresh: Sequence[Tensor]) -> Tensor:
    """The tensor; without its record if that leads nowhere but to the fresh tensors, which nobody else holds."""
    if tensor.is_tracer or not tensor._value.tracked:
        return tensor
    mine = {f._value for f in fresh if f._value.producer is None}
    if all(leaf in mine for leaf in _leaves(tensor._value)):
        return Tensor._from_array(tensor._value.array)
    return tensor


def _regroup(grads: list[Tensor], structures: Sequence[tree.Structure]) -> tuple[Any, ...]:
    parts, at = [], 0
    for structure in structures:
        parts.append(tree.unflatten(structure, grads[at:at + structure.leaves]))
        at += structure.leaves
    return tuple(parts)
