"""The shard rule of an op as a line of text, for ops from outside the package.

`"b k, k n -> b n"` labels the dimensions of operands and results: equal labels are split together, and one that no
result has (k) is summed over, so that splitting it leaves a partial sum. `.` is a dimension that has to be whole; a
leading `...` stands for any number of them that go together (as in NumPy's einsum). Every rank then runs the op on its
parts of the operands.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..ir.errors import RegistryError, ShapeError
from ..ir.graph import Node, Value
from .rules import Factors, Label, Labels, Shard

LABEL = re.compile(r"[A-Za-z_]\w*|\.")


def shard_rule(text: str, name: str, operands: int, variadic: bool = False) -> Shard:
    """The rule that a notation says.

    Args:
        name: of the op, for errors; operands: how many it has. variadic: the last one stands for any number.

    Raises:
        RegistryError: the text does not read so, or labels another number of operands.
    """
    left, arrow, right = text.partition("->")
    given, made = ([part.split() for part in side.split(",")] for side in (left, right))
    parts = (*given, *made)
    words = [w for part in parts for w in part]
    wrong = [w for part in parts for i, w in enumerate(part) if not (LABEL.fullmatch(w) or w == "..." and i == 0)]
    twice = [w for part in parts for w in part if w != "." and part.count(w) > 1]
    unknown = {w for part in made for w in part if w != "."} - {w for part in given for w in part}
    problem = "there is no ->" if not arrow else f"{wrong[0]!r} is no label" if wrong else \
        f"{twice[0]!r} stands twice in one place" if twice else \
        f"{sorted(unknown)[0]!r} is in no operand" if unknown else \
        f"it labels {len(given)} operands, the op has {operands}" if len(given) != operands else ""
    if problem:
        raise RegistryError(f"the shard rule of {name!r} is {text!r}: {problem}. Expected labels of the dimensions of "
                            "each operand and result, such as 'b k, k n -> b n'")
    summed = frozenset(w for w in words if w not in (".", "...") and not any(w in part for part in made))

    def factors(node: Node) -> Factors:
        repeated = [*given, *[given[-1]] * (len(node.operands) - len(given))] if variadic else given
        if len(made) != len(node.results):
            raise ShapeError(f"the shard rule {text!r} labels {len(made)} results, the op {name} has "
                             f"{len(node.results)}: correct the rule", node.loc)
        sizes = {label: size for part, v in zip(made, node.results) for label, size in zip(_labels(part, v), v.shape)}
        found = [_fitting(_labels(part, v, node, text), v, sizes) for part, v in zip(repeated, node.operands)]
        return Factors(tuple(found), tuple(_labels(part, v, node, text) for part, v in zip(made, node.results)), summed)

    return Shard(factors)


def _labels(part: Sequence[str], value: Value, node: Node | None = None, text: str = "") -> Labels:
    """A label for each dimension; those of `...` are counted from the right."""
    own: list[Label] = [None if w == "." else w for w in part if w != "..."]
    lead = value.rank - len(own)
    if node is not None and (lead < 0 or lead and "..." not in part):
        raise ShapeError(f"the shard rule {text!r} of the op {node.op.name} labels {len(own)} dimensions of a "
                         f"{value.type}: correct the rule, or write a leading ... in it", node.loc)
    return (*(("...", i) for i in range(lead, 0, -1)), *own)


def _fitting(labels: Labels, value: Value, sizes: dict[Label, object]) -> Labels:
    """What broadcasts has to be whole."""
    return tuple(None if size == 1 and sizes.get(label, 1) != 1 else label for label, size in zip(labels, value.shape))
