"""Collectives call the host: the function of that name sends the program's own memory (distributed/comm.py).

Where the ranks share memory and the tensors are small, the way out into Python takes longer than the exchange. So these
have a kernel as well that makes the round by itself (`ir/rounds.py`); the host is called only if another rank is late.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import tirx
from tvm.ir import PrimType
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from ..ir.graph import Node, Value
from ..ir.opdef import fill
from ..ir.ops_collective import COMMUNICATION, host_name
from ..ir.rounds import MOST_RANKS, RECORD, places
from .lower_elementwise import add, is_bool, maximum, minimum
from .lower_kernel import Row, at_most, each_vector, index, lane_loop, lanes_of, when
from .lower_slots import Host, is_nan, read, storage_dtype
from .rounds_llvm import BEGIN, END, MEET, SLOT, rounds_ir
from .target import Target

Combine = Callable[[Any, Any], Any]


def all_reduce_kernel(node: Node, target: Target, name: str) -> Any:
    """The round in which everybody sums everything, in the order of the ranks; None if it is none."""
    ranks = node.attrs["size"]
    static = all(isinstance(n, int) for v in node.operands for n in v.shape)
    starts = places(_nbytes(v) for v in node.operands) if static else None
    if starts is None or target.kind != "cpu" or not 1 < ranks <= MOST_RANKS or not any(map(_nbytes, node.operands)):
        return None

    def fill_slot(operands: list[Any], own: Any) -> None:
        for x, v, start in zip(operands, node.operands, starts):
            T.evaluate(T.call_extern("handle", "memcpy", _pointer(own + index(start), "uint8"), x.data,
                                     index(_nbytes(v))))

    def take(results: list[Any], slots: list[Any]) -> None:
        for out, v, start in zip(results, node.operands, starts):
            if v.type.size:
                _fold(out, v, [slot + index(start) for slot in slots], combination(node.attrs["reduce"], v), target)

    return _round(node, target, name, fill_slot, take)


def combination(reduce: str, v: Value) -> Combine:
    """Two elements into one, with NumPy's bits (see `comm.zeros_like_programs` for the zeros of a maximum)."""
    if str(v.dtype) == "float16" and reduce != "sum":  # of equals NumPy takes the first here, and else the second
        return lambda x, y: tirx.Select(tirx.Or(x >= y if reduce == "max" else x <= y, is_nan(x)), x, y)
    return {"sum": lambda x, y: maximum(x, y) if is_bool(x) else add(x, y), "max": maximum, "min": minimum}[reduce]


def _round(node: Node, target: Target, name: str, fill_slot: Callable[[list[Any], Any], None],
           take: Callable[[list[Any], list[Any]], None]) -> Any:
    """The kernel of one round: `fill_slot(operands, address of the own slot)`, the ranks meet, `take(results, addresses
    of all slots)`. Its last parameter is the record."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tirx.noalias": True})
            operands, results = [[_parameter(f"{kind}{i}", v) for i, v in enumerate(values)]
                                 for kind, values in (("p", node.operands), ("r", node.results))]
            record = T.arg("record", tirx.decl_buffer((RECORD,), "int64", "record")).data
            with T.attr(0, "pragma_import_llvm", rounds_ir(target.arch)):
                own = T.bind(T.call_extern("int64", BEGIN, record))
                with when(own != index(0)):
                    fill_slot(operands, own)
                    ranks = node.attrs["size"]
                    met = T.bind(T.call_extern("int32", MEET, record, index(ranks)))
                    with when(met != tirx.const(0, "int32")):
                        take(results, [T.bind(T.call_extern("int64", SLOT, record, index(r))) for r in range(ranks)])
                        T.evaluate(T.call_extern("void", END, record))
    return builder.get()


def _fold(out: Any, v: Value, addresses: list[Any], combine: Combine, target: Target) -> None:
    """The elements at some addresses, combined in order, into a result; narrow floats in f32, rounded once."""
    size = v.type.size
    parts = [T.decl_buffer((size,), out.dtype, data=_pointer(address, out.dtype), align=v.dtype.itemsize)
             for address in addresses]

    def step(start: Any, lanes: int) -> None:
        with lane_loop(lanes) as lane:
            total = read(parts[0][start + lane], v.dtype)
            for part in parts[1:]:
                total = combine(total, read(part[start + lane], v.dtype))
            Row(v, out).store(start + lane, total)

    each_vector(size, at_most(lanes_of([v], target), size), step)


def _parameter(name: str, v: Value) -> Any:
    return T.arg(name, tirx.decl_buffer((v.type.size,), storage_dtype(v.dtype), name, data_alignment=v.dtype.itemsize))


def _pointer(address: Any, dtype: Any) -> Any:
    return T.bind(T.reinterpret(tvm.ir.PointerType(PrimType(str(dtype)), "global"), address))


def _nbytes(v: Value) -> int:
    return v.type.size * v.dtype.itemsize


KERNELS = {"all_reduce": all_reduce_kernel}
for _name in COMMUNICATION:
    fill("lower", _name, Host(host_name, **({"fn": KERNELS[_name]} if _name in KERNELS else {})))
