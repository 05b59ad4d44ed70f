"""The registry of rules: what each ONNX op is in terms of our functions of tensors.

    @onnx_rule("Gemm", since=1)
    def gemm(node, a, b, c=None):
        ...
        return y

A rule gets the node and its operands (see `values`) and gives one value, or a tuple for several results. The rule with
the highest `since` that is not above the model's opset is used. Rules are in the files `rules_*.py` of this folder,
which are imported when the first one is looked up.

Where every operand is known, the rule runs at once, on NumPy arrays, and its results are known too (`fold`).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...ir.errors import RegistryError

RuleFunction = Callable[..., Any]
CONTRIB = "com.microsoft"
TRAINING = "ai.onnx.preview.training"


@dataclass(frozen=True)
class OnnxRule:
    """A rule with what its declaration says.

    Attributes:
        op_type, domain, since: what it is for, and from which opset on.
        function: called with the node and its operands.
        static: numbers of operands that must be known while tracing (shapes, axes, repeats...); an initializer
            that feeds one is never a parameter.
        fold: whether it may run at once where every operand is known.
        weights: numbers of operands that are weights if they are float initializers, even with a single element.
        state: numbers of operands that are statistics: buffers that no gradient reaches.
    """

    op_type: str
    domain: str
    since: int
    function: RuleFunction
    static: frozenset[int]
    fold: bool
    weights: frozenset[int]
    state: frozenset[int]


_rules: dict[tuple[str, str], list[OnnxRule]] = {}
_loaded: list[str] = []


def onnx_rule(op_type: str | Sequence[str], since: int = 1, domain: str = "", *, static: Sequence[int] = (),
              fold: bool = True, weights: Sequence[int] = (), state: Sequence[int] = (),
              ) -> Callable[[RuleFunction], RuleFunction]:
    """Declares the function below as the rule of an op (or of several); see `OnnxRule` for the arguments.

    Raises:
        RegistryError: there is one for this op, domain and version.
    """

    def declare(function: RuleFunction) -> RuleFunction:
        for one in [op_type] if isinstance(op_type, str) else op_type:
            known = _rules.setdefault((domain, one), [])
            if any(rule.since == since for rule in known):
                raise RegistryError(f"the ONNX op {one} has a rule since {since} already")
            known.append(OnnxRule(one, domain, since, function, frozenset(static), fold, frozenset(weights),
                                  frozenset(state)))
            known.sort(key=lambda rule: -rule.since)
        return function

    return declare


def load_rules() -> None:
    """Imports the files that hold rules."""
    if _loaded:
        return
    found = [m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name.startswith("rules_")]
    for name in found:
        importlib.import_module(f".{name}", __package__)
    _loaded.extend(found)


def find_rule(op_type: str, domain: str, opset: int) -> OnnxRule | None:
    """The rule for an op at an opset; None if there is none."""
    load_rules()
    for rule in _rules.get((domain if domain != "ai.onnx" else "", op_type), ()):
        if rule.since <= opset:
            return rule
    return None


def all_rules() -> list[OnnxRule]:
    """Every rule, sorted by domain, op and version."""
    load_rules()
    return sorted((r for rs in _rules.values() for r in rs), key=lambda r: (r.domain, r.op_type, r.since))
