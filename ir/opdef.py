"""Ops are declared once, as records; rules are attached to their slots.

`ir/ops_*.py` declares every op with `register`. The folder that owns a transform fills a slot of the
record: `fill("vjp", "mul", rule)` in autodiff/, `fill("lower", "mul", rule)` in schedules/, and so on.
Grepping an op's name turns up everything that is known of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import AttributeValueError, MissingRuleError, RegistryError
from .types import TensorType

# What each slot is for; `rule` names this in its message when a rule is missing.
SLOTS = {
    "vjp": "differentiate",
    "decompose": "rewrite into simpler ops",
    "lower": "compile",
    "shard": "partition",
    "amp": "choose a precision for",
    "onnx": "export to ONNX",
}

REQUIRED = object()
"""Default of an attribute that has none."""

TRAITS = frozenset({
    "elementwise",     # result element i depends on operand elements i only (after broadcasting)
    "commutative",
    "reduction",       # has attributes `axes`, `keepdims`
    "view",            # moves elements without computing (reshape, transpose...)
    "regions",         # has nested graphs; infer and reference receive them as `regions=`
    "random",          # draws from an explicit counter: still pure
    "contraction",     # matmul, conv: anchors of fusion
    "constant",        # no operands, value known when compiling
    "barrier",         # passes must not merge or move it (recomputation)
    "plugin",          # registered from outside the package
    "effect",          # must not be removed or reordered (collectives)
})


def _no_flops(node: Any) -> int:
    return 0


def _io_bytes(node: Any) -> Any:
    return sum(v.type.nbytes for v in (*node.operands, *node.results))


@dataclass(frozen=True)
class OpDef:
    """The record of one op.

    Attributes:
        name: stem of everything about the op (`add`, `add_vjp`, `add_lower`).
        operands: names of the operands; a last name that starts with `*` takes any number.
        infer: `infer(*operand_types, **attrs) -> TensorType | tuple[TensorType, ...]`; raises ShapeError,
            DTypeError or AttributeValueError with a message for the user. Ops with the trait `regions`
            also receive `regions=(Graph, ...)`.
        reference: `reference(*arrays, **attrs) -> array | tuple`: the NumPy meaning of the op, the oracle
            of its tests and the engine of eager mode. Ops with regions receive `regions=` as callables
            `(*arrays) -> tuple of arrays`.
        attrs: attribute name -> default, or REQUIRED.
        traits: see TRAITS.
        flops, nbytes: cost of a node, in operations and in bytes moved when it runs alone.
        undifferentiable: why the op has no VJP, if it has none ("integer result"...).
        unlowered: why the op has no lowering, if it has none (e.g. it always decomposes).
        doc: one line.
    """

    name: str
    operands: tuple[str, ...]
    infer: Callable[..., TensorType | tuple[TensorType, ...]]
    reference: Callable[..., Any]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    traits: frozenset[str] = frozenset()
    flops: Callable[[Any], Any] = _no_flops
    nbytes: Callable[[Any], Any] = _io_bytes
    undifferentiable: str | None = None
    unlowered: str | None = None
    doc: str = ""
    slots: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if unknown := set(self.traits) - TRAITS:
            raise RegistryError(f"op {self.name}: unknown traits {sorted(unknown)}; known: {sorted(TRAITS)}")

    @property
    def variadic(self) -> bool:
        return bool(self.operands) and self.operands[-1].startswith("*")

    def has(self, trait: str) -> bool:
        return trait in self.traits

    def complete_attrs(self, attrs: Mapping[str, Any]) -> dict[str, Any]:
        """The attributes in the order of the declaration, defaults filled in."""
        if unknown := set(attrs) - set(self.attrs):
            raise AttributeValueError(f"{self.name} has no attribute {', '.join(sorted(unknown))}; "
                                      f"it has: {', '.join(self.attrs) or 'none'}")
        full = {}
        for name, default in self.attrs.items():
            value = attrs.get(name, default)
            if value is REQUIRED:
                raise AttributeValueError(f"{self.name} needs the attribute {name}")
            full[name] = value
        return full

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    # Ops are singletons of the registry: copying a graph must not copy them.
    def __deepcopy__(self, memo: dict[int, Any]) -> OpDef:
        return self


_REGISTRY: dict[str, OpDef] = {}


def register(opdef: OpDef) -> OpDef:
    """Adds an op to the registry.

    Raises:
        RegistryError: an op of this name exists.
    """
    if opdef.name in _REGISTRY:
        raise RegistryError(f"the op {opdef.name!r} is registered already; choose another name")
    _REGISTRY[opdef.name] = opdef
    return opdef


def unregister(name: str) -> None:
    """Removes an op that a plugin registered (tests and notebooks re-run their cells)."""
    _REGISTRY.pop(name, None)


def op(name: str) -> OpDef:
    """The record of an op, by name."""
    try:
        return _REGISTRY[name]
    except KeyError:
        raise RegistryError(f"there is no op {name!r}; register it with treadle.plugins.register_op") from None


def all_ops() -> dict[str, OpDef]:
    """Every registered op by name, a copy."""
    return dict(_REGISTRY)


def fill(slot: str, name: str, rule: Any) -> Any:
    """Attaches a rule to a slot of an op; returns the rule.

    Raises:
        RegistryError: the slot does not exist or is filled already.
    """
    if slot not in SLOTS:
        raise RegistryError(f"there is no slot {slot!r}; slots: {', '.join(SLOTS)}")
    record = op(name)
    if slot in record.slots:
        raise RegistryError(f"the slot {slot!r} of op {name!r} is filled already")
    record.slots[slot] = rule
    return rule


def rule(slot: str, opdef: OpDef, where: Any = None) -> Any:
    """The rule in a slot.

    Raises:
        MissingRuleError: it is empty; the message names op, transform, the user's line and the remedy.
    """
    found = opdef.slots.get(slot)
    if found is None:
        reason = opdef.undifferentiable if slot == "vjp" else opdef.unlowered if slot == "lower" else None
        because = f" ({reason})" if reason else ""
        raise MissingRuleError(
            f"cannot {SLOTS[slot]} the op {opdef.name!r}{because}: its slot {slot!r} is empty. "
            f"Attach a rule with fill({slot!r}, {opdef.name!r}, rule), or use another op.", where)
    return found
