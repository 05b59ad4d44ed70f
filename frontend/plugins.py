"""Ops of your own: registered from outside the package, they work eagerly, traced, differentiated and compiled.

    swish = td.plugins.register_op(
        "swish", operands="x", attrs={"beta": 1.0},
        infer=lambda x, beta: x,                                     # types in, type out
        reference=lambda x, beta: x / (1 + np.exp(-beta * x)),       # NumPy: eager mode, and the oracle of tests
        vjp=lambda ct, out, x, beta: ct * (beta * out + td.sigmoid(beta * x) * (1 - beta * out)),
        decompose=lambda x, beta: x * td.sigmoid(beta * x))          # or lower=...: a kernel of its own

    y = swish(x, beta=2.0)

Layers, optimizers and losses need no registration: derive from `td.nn.Module` and `td.optim.Optimizer`, and a loss is a
function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..autodiff.reverse import Cotangents
from ..distributed.rules import Shard, whole
from ..distributed.shard_elementwise import elementwise_factors
from ..distributed.shard_notation import shard_rule
from ..ir import context
from ..ir.errors import GradientError, RegistryError
from ..ir.graph import Node, Value
from ..ir.opdef import OpDef, fill, register, unregister
from . import eager
from .dispatch import apply, as_tensor, lift_into
from .tensor import Tensor

_registered: set[str] = set()


def register_op(name: str, operands: str, infer: Callable[..., Any], reference: Callable[..., Any], *,
                vjp: Any = None, lower: Any = None, decompose: Callable[..., Any] | None = None,
                attrs: Mapping[str, Any] | None = None, traits: Sequence[str] = (), doc: str = "",
                shard: Any = None) -> Callable[..., Any]:
    """Registers an op; gives the function of tensors that applies it.

    Args:
        name: of the op, not taken yet.
        operands: their names, separated by blanks; a last one `*xs` takes any number.
        infer: `infer(*types, **attrs)`: the result's `TensorType`, or a tuple of them; raises `ShapeError` or
            `DTypeError` for operands it does not take. `type.with_shape(...)`, `type.with_dtype(...)` make new ones.
        reference: `reference(*arrays, **attrs)`: the result as NumPy array(s).
        vjp: `vjp(ct, out, *operands, **attrs)` in tensors, `ct` and `out` being tuples for an op with several
            results: the cotangent of each operand (a tensor, or a tuple; None: no gradient). Or a list of such
            functions, one per operand. None: the op has no gradient.
        lower: how to compile it: `schedules.lower_slots.Pointwise`, `Reduce` or `Kernel`.
        decompose: `decompose(*operands, **attrs)` in tensors: how to compute it with other ops, where `lower` is not
            given.
        attrs: attribute names with their defaults.
        traits: see `ir.opdef.TRAITS`; "elementwise" lets fusion treat it as such.
        doc: one line.
        shard: how it is split over the ranks of a mesh, as labels of the dimensions of operands and results: in
            `"b k, k n -> b n"` equal labels are split together, the op sums over one that no result has (k), `.` is a
            dimension that has to be whole, and a leading `...` is any number that go together. Every rank runs the op
            on its parts. (Or a `distributed.rules.Shard`, which can change what a rank runs.) None: an elementwise op
            is split in any dimension, one with `decompose` as the simpler ops are, others run whole on every rank.

    Raises:
        RegistryError: the name is taken, a trait unknown, or `shard` does not read so.
    """
    names = operands.split()
    split = shard_rule(shard, name, len(names), "*" in operands) if isinstance(shard, str) else shard
    record = register(OpDef(
        name, tuple(names), infer, reference, dict(attrs or {}), frozenset(traits) | {"plugin"}, doc=doc,
        undifferentiable=None if vjp is not None else "registered without a vjp",
        unlowered=None if lower is not None or decompose is not None else "registered without lower or decompose"))
    _registered.add(name)
    fill("amp", name, "follow")
    if vjp is not None:
        fill("vjp", name, _vjp_rule(vjp))
    if lower is not None:
        fill("lower", name, lower)
    if decompose is not None:
        fill("decompose", name, _decompose_rule(decompose))
    if split is None and record.has("elementwise"):
        split = Shard(elementwise_factors)
    if split is not None or decompose is None:
        fill("shard", name, split or Shard(whole))

    def function(*tensors: Any, **given: Any) -> Any:
        return apply(name, *(as_tensor(t) for t in tensors), **given)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc or f"The op {name}({', '.join(record.operands)})."
    return function


def unregister_op(name: str) -> None:
    """Removes an op that `register_op` added (a notebook runs its cell again).

    Raises:
        RegistryError: it is not one of those.
    """
    if name not in _registered:
        raise RegistryError(f"{name!r} is no op that was registered as a plugin")
    _registered.discard(name)
    unregister(name)


def _tensor(value: Value) -> Tensor:
    builder = context.current()
    return Tensor._of(value, None if builder is eager.eager_builder() else builder)


def _value(x: Any) -> Value:
    return lift_into(context.current(), as_tensor(x))


def _vjp_rule(vjp: Any) -> Callable[[Node, Cotangents, tuple[bool, ...]], list[Value | None]]:
    def rule(node: Node, cotangents: Cotangents, needed: tuple[bool, ...]) -> list[Value | None]:
        cts = tuple(None if c is None else _tensor(c) for c in cotangents)
        outs = tuple(_tensor(v) for v in node.results)
        first = (cts[0], outs[0]) if len(outs) == 1 else (cts, outs)
        operands = [_tensor(v) for v in node.operands]
        if isinstance(vjp, (list, tuple)):
            grads: Any = [f(*first, *operands, **node.attrs) if f is not None and wanted else None
                          for f, wanted in zip(vjp, needed)]
        else:
            grads = vjp(*first, *operands, **node.attrs)
            grads = list(grads) if isinstance(grads, (tuple, list)) else [grads]
        if len(grads) != len(operands):
            raise GradientError(f"the vjp of {node.op.name} gave {len(grads)} cotangents for {len(operands)} operands",
                                node.loc)
        return [None if g is None else _value(g) for g in grads]

    return rule


def _decompose_rule(decompose: Callable[..., Any]) -> Callable[..., Any]:
    def rule(*operands: Value, **attrs: Any) -> Any:
        results = decompose(*(_tensor(v) for v in operands), **attrs)
        return tuple(map(_value, results)) if isinstance(results, (tuple, list)) else _value(results)

    return rule
