"""Control flow: ops with regions.

A region is a closed graph: what it needs from outside is an operand of its node. Regions reach the references as
callables from arrays to a tuple of arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .dims import Dim
from .errors import AttributeValueError
from .ops_common import (
    REQUIRED,
    TensorType,
    check_flag,
    check_ints,
    define,
    fail_attr,
    fail_shape,
    same_size,
)


def region_flops(region: Any) -> Any:
    return sum(node.flops for node in region.nodes)


def region_bytes(region: Any) -> Any:
    return sum(node.nbytes for node in region.nodes)


# Why these ops have no kernel of their own.
UNLOWERED = "control flow: the driver of a compiled program branches and loops over the kernels of its regions"


def _types(types: Any) -> str:
    return "(" + ", ".join(map(str, types)) + ")"


def check_regions(regions: Any, *names: str) -> None:
    if len(regions) != len(names):
        raise AttributeValueError(f"takes {len(names)} regions, {' and '.join(names)}; got {len(regions)}")


def check_region(name: str, what: str, got: Any, expected: Any) -> None:
    """The types a region takes or returns."""
    if tuple(got) != tuple(expected):
        fail_shape(f"the {name} region {what} {_types(got)}; expected {_types(expected)}")


# cond ------------------------------------------------------------------------------------------------------------

def cond_infer(pred: TensorType, *operands: TensorType, regions: Any) -> tuple[TensorType, ...]:
    check_regions(regions, "then", "else")
    check_scalar_bool(pred, "the predicate")
    for name, region in zip(("then", "else"), regions):
        check_region(name, "takes", region.input_types, operands)
    check_region("else", "returns", regions[1].output_types, regions[0].output_types)
    return regions[0].output_types


def check_scalar_bool(t: TensorType, what: str) -> None:
    if t.rank or not t.dtype.is_bool:
        fail_shape(f"{what} is a bool scalar, got {t}")


def cond_reference(pred: Any, *operands: Any, regions: Any) -> Any:
    return tuple(regions[0 if pred else 1](*operands))


define("cond", "pred *operands", cond_infer, cond_reference,
       "The results of the region `then` if pred holds, else of `else`, both called with the operands.",
       traits=["regions"], unlowered=UNLOWERED, flops=lambda node: _larger(*map(region_flops, node.regions)),
       nbytes=lambda node: _larger(*map(region_bytes, node.regions)))


def _larger(x: Any, y: Any) -> Any:
    return x if isinstance(x, Dim) else y if isinstance(y, Dim) else max(x, y)


# while_loop ------------------------------------------------------------------------------------------------------

def while_infer(*operands: TensorType, n_carry: Any, regions: Any) -> tuple[TensorType, ...]:
    check_regions(regions, "cond", "body")
    check_counts(operands, n_carry=n_carry)
    carries = operands[:n_carry]
    for name, region in zip(("cond", "body"), regions):
        check_region(name, "takes", region.input_types, operands)
    if len(regions[0].outputs) != 1:
        fail_shape(f"the cond region returns {_types(regions[0].output_types)}; expected one bool scalar")
    check_scalar_bool(regions[0].output_types[0], "what the cond region returns")
    check_region("body", "returns", regions[1].output_types, carries)
    return carries


def check_counts(operands: Any, **counts: Any) -> None:
    for name, count in counts.items():
        check_ints(f"({name},)", (count,), 1, least=0)
    if sum(counts.values()) > len(operands):
        fail_attr(f"{' + '.join(f'{n}={c}' for n, c in counts.items())} is more than the {len(operands)} operands")


def while_reference(*operands: Any, n_carry: Any, regions: Any) -> Any:
    condition, body = regions
    carries, consts = operands[:n_carry], operands[n_carry:]
    while condition(*carries, *consts)[0]:
        carries = body(*carries, *consts)
    return tuple(carries)


define("while_loop", "*operands", while_infer, while_reference,
       "Operands are carries (the first n_carry) and constants. While cond(carries, constants) holds, the carries "
       "become body(carries, constants). Gives the final carries.", attrs={"n_carry": REQUIRED}, traits=["regions"],
       unlowered=UNLOWERED, flops=lambda node: sum(map(region_flops, node.regions)),
       nbytes=lambda node: sum(map(region_bytes, node.regions)),
       undifferentiable="the number of steps, and so what to keep for the way back, is not known; use scan")


# scan ------------------------------------------------------------------------------------------------------------

def scan_infer(*operands: TensorType, n_carry: Any, n_xs: Any, length: Any, reverse: Any,
               regions: Any) -> tuple[TensorType, ...]:
    check_regions(regions, "body")
    check_flag(reverse=reverse)
    check_counts(operands, n_carry=n_carry, n_xs=n_xs)
    if not isinstance(length, Dim):
        check_ints("(length,)", (length,), 1, least=0)
    carries, xs, consts = split(operands, n_carry, n_xs)
    for x in xs:
        if not x.rank or not same_size(x.shape[0], length):
            fail_shape(f"{x} is scanned along its first axis, which needs the size {length}")
    body = regions[0]
    check_region("body", "takes", body.input_types, (*carries, *(x.with_shape(x.shape[1:]) for x in xs), *consts))
    if len(body.outputs) < n_carry:
        fail_shape(f"the body region returns {_types(body.output_types)}; expected {n_carry} carries first")
    check_region("body", "returns as its carries", body.output_types[:n_carry], carries)
    return (*carries, *(y.with_shape((length, *y.shape)) for y in body.output_types[n_carry:]))


def split(operands: Any, n_carry: int, n_xs: int) -> tuple[Any, Any, Any]:
    """Carries, scanned arrays, constants."""
    return operands[:n_carry], operands[n_carry:n_carry + n_xs], operands[n_carry + n_xs:]


def scan_reference(*operands: Any, n_carry: Any, n_xs: Any, length: Any, reverse: Any, regions: Any) -> Any:
    (body,) = regions
    carries, xs, consts = split(operands, n_carry, n_xs)
    steps: list[Any] = []
    for i in reversed(range(length)) if reverse else range(length):
        results = body(*carries, *(x[i] for x in xs), *consts)
        carries = results[:n_carry]
        steps.append(results[n_carry:])
    if not length:  # the body is pure: one call on zeros tells the shapes of what is stacked
        results = body(*carries, *(np.zeros(x.shape[1:], x.dtype) for x in xs), *consts)
        return (*carries, *(np.empty((0, *np.shape(y)), np.asarray(y).dtype) for y in results[n_carry:]))
    return (*carries, *(np.stack(ys) for ys in zip(*(steps[::-1] if reverse else steps))))


define("scan", "*operands", scan_infer, scan_reference,
       "Operands are carries (n_carry), arrays with a first axis of `length` (n_xs), constants. Step i (from the last "
       "with reverse) calls body(carries, x[i] of each, constants) -> (carries, y[i] of each). Gives the final carries "
       "and the stacked ys.",
       attrs={"n_carry": REQUIRED, "n_xs": REQUIRED, "length": REQUIRED, "reverse": False}, traits=["regions"],
       unlowered=UNLOWERED, flops=lambda node: region_flops(node.regions[0]) * node.attrs["length"],
       nbytes=lambda node: region_bytes(node.regions[0]) * node.attrs["length"])
