"""Collectives call the host: the function of that name sends the program's own memory (distributed/comm.py).

Where the ranks share memory and the tensors are small, the way out into Python takes longer than the exchange. So these
have a kernel as well that makes the round by itself (`ir/rounds.py`); the host is called only if another rank is late.
"""

from __future__ import annotations

import math
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
from ..ir.rounds import MOST_RANKS, RECORD, places, room
from .lower_elementwise import add, is_bool, maximum, minimum
from .lower_kernel import Row, around, at_most, each_vector, index, lane_loop, lanes_of, loop, when
from .lower_slots import Host, is_nan, read, storage_dtype
from .rounds_llvm import BEGIN, END, GET, MEET, PLACE, PUT, SLOT, rounds_ir
from .target import Target

Combine = Callable[[Any, Any], Any]


def all_reduce_kernel(node: Node, target: Target, name: str) -> Any:
    """Everybody's tensors to everybody, who combines them in the order of the ranks. None: it takes several rounds."""
    starts = _starts(node, target, _nbytes)
    return starts and _Round(node, target, starts).all_reduce(name)


def all_gather_kernel(node: Node, target: Target, name: str) -> Any:
    """Everybody's tensors to everybody, who puts them one after the other. None: it takes several rounds."""
    starts = _starts(node, target, _nbytes)
    return starts and _Round(node, target, starts).all_gather(name)


def reduce_scatter_kernel(node: Node, target: Target, name: str) -> Any:
    """To each rank its parts of the others' tensors, which it adds to its own. None: it takes several rounds."""
    ranks = node.attrs["size"]
    starts = _starts(node, target, lambda v: (ranks - 1) * room(_nbytes(v) // ranks))
    return starts and _Round(node, target, starts).reduce_scatter(name)


def _starts(node: Node, target: Target, nbytes: Callable[[Value], int]) -> list[int] | None:
    """Where each operand's part of a slot begins, if a kernel is to make the exchange."""
    fitting = target.kind == "cpu" and 1 < node.attrs["size"] <= MOST_RANKS
    static = all(isinstance(n, int) for v in node.operands for n in v.shape)
    if not (fitting and static and any(map(_nbytes, node.operands))):
        return None
    return places(map(nbytes, node.operands), node.attrs["size"])


class _Round:
    """Writes the kernel of one round: each rank fills its slot, they meet, each takes from all slots.

    Its parameters are the operands, the results and the record. Slots are laid out as in `distributed/near.py`.
    """

    def __init__(self, node: Node, target: Target, starts: list[int]):
        self.node, self.target, self.starts, self.ranks = node, target, starts, node.attrs["size"]

    def write(self, name: str, fill_slot: Callable[[Any], None], take: Callable[[], None]) -> Any:
        """The PrimFunc; `fill_slot(address of the own slot)`, and after the ranks have met, `take()`."""
        with IRBuilder() as builder:
            with T.prim_func(s_tir=True):
                T.func_name(name)
                T.func_attr({"global_symbol": name, "tirx.noalias": True})
                self.operands, self.results = (
                    [_parameter(f"{kind}{i}", v) for i, v in enumerate(values)]
                    for kind, values in (("p", self.node.operands), ("r", self.node.results)))
                self.record = T.arg("record", tirx.decl_buffer((RECORD,), "int64", "record")).data
                with T.attr(0, "pragma_import_llvm", rounds_ir(self.target.arch)):
                    own = T.bind(T.call_extern("int64", BEGIN, self.record))
                    with when(own != index(0)):
                        fill_slot(own)
                        met = T.bind(T.call_extern("int32", MEET, self.record, index(self.ranks)))
                        with when(met != tirx.const(0, "int32")):
                            take()
                            T.evaluate(T.call_extern("void", END, self.record))
        return builder.get()

    def slot(self, rank: Any) -> Any:
        """The address of a rank's slot."""
        return T.bind(T.call_extern("int64", SLOT, self.record, index(rank) if isinstance(rank, int) else rank))

    def place(self) -> Any:
        """This rank's number."""
        return T.bind(T.call_extern("int64", PLACE, self.record))

    def fill_whole(self, own: Any) -> None:
        for x, v, start in zip(self.operands, self.node.operands, self.starts):
            _put(own + index(start), x, index(0), _nbytes(v))

    def all_reduce(self, name: str) -> Any:
        def take() -> None:
            slots = [self.slot(r) for r in range(self.ranks)]
            for out, v, start in zip(self.results, self.node.operands, self.starts):
                rows = [_row(slot + index(start), v) for slot in slots]
                _fold(out, v, 1, v.type.size, [_element(row, 0) for row in rows],
                      combination(self.node.attrs["reduce"], v), self.target)

        return self.write(name, self.fill_whole, take)

    def all_gather(self, name: str) -> Any:
        def take() -> None:
            for r in range(self.ranks):
                slot = self.slot(r)
                for out, v, start, dim in zip(self.results, self.node.operands, self.starts, self.node.attrs["dims"]):
                    before = math.prod(v.shape[:dim])
                    run = _nbytes(v) // max(before, 1)
                    with loop(before) as b:
                        _get(out, (b * self.ranks + r) * run, slot + index(start) + b * run, run)

        return self.write(name, self.fill_whole, take)

    def reduce_scatter(self, name: str) -> Any:
        parts = [(*(around(part.shape, dim)[0::2]), part.type.size)
                 for part, dim in zip(self.node.results, self.node.attrs["dims"])]

        def fill_slot(own: Any) -> None:
            place = self.place()
            for x, v, start, (before, _, size) in zip(self.operands, self.node.operands, self.starts, parts):
                width = v.dtype.itemsize
                run = size * width // max(before, 1)
                for r in range(self.ranks):
                    with when(place != index(r)):
                        at = own + index(start) + (index(r) - tirx.Cast("int64", place < r)) * room(size * width)
                        with loop(before) as b:
                            _put(at + b * run, x, (b * self.ranks + r) * run, run)

        def take() -> None:
            place = self.place()
            after = [tirx.Cast("int64", index(i) >= place) for i in range(self.ranks - 1)]  # 1: a rank behind this one
            slots = [self.slot(i + behind) for i, behind in enumerate(after)]
            for k, (out, v, start, (before, _, size)) in enumerate(
                    zip(self.results, self.node.operands, self.starts, parts)):
                x, run = self.operands[k], size // max(before, 1)
                rows = [_row(slot + index(start) + (place - 1 + behind) * room(size * v.dtype.itemsize), v)
                        for slot, behind in zip(slots, after)]
                elements = [_element(x, self.ranks * run, place * run), *(_element(row, run) for row in rows)]
                _fold(out, v, before, run, elements, combination("sum", v), self.target)

        return self.write(name, fill_slot, take)


def combination(reduce: str, v: Value) -> Combine:
    """Two elements into one, with NumPy's bits (see `comm.zeros_like_programs` for the zeros of a maximum)."""
    if str(v.dtype) == "float16" and reduce != "sum":  # of equals NumPy takes the first here, and else the second
        return lambda x, y: tirx.Select(tirx.Or(x >= y if reduce == "max" else x <= y, is_nan(x)), x, y)
    return {"sum": lambda x, y: maximum(x, y) if is_bool(x) else add(x, y), "max": maximum, "min": minimum}[reduce]


def _element(row: Any, stride: Any, start: Any = 0) -> Callable[[Any, Any], Any]:
    """Element j of block b of a row of elements."""
    return lambda b, j: row[b * stride + start + j]


def _fold(out: Any, v: Value, before: Any, run: Any, parts: list[Callable[[Any, Any], Any]], combine: Combine,
          target: Target) -> None:
    """`before` rows of `run` elements of a result: the parts' `(row, element)` in order; narrow floats in f32, rounded
    once."""
    if not before * run:
        return
    with loop(before) as b:
        def step(start: Any, lanes: int) -> None:
            with lane_loop(lanes) as lane:
                total = read(parts[0](b, start + lane), v.dtype)
                for part in parts[1:]:
                    total = combine(total, read(part(b, start + lane), v.dtype))
                Row(v, out).store(b * run + start + lane, total)

        each_vector(run, at_most(lanes_of([v], target), run), step)


def _put(address: Any, x: Any, offset: Any, nbytes: int) -> None:
    """Bytes of an operand, from an offset on, into a slot."""
    if nbytes:
        T.evaluate(T.call_extern("void", PUT, address, x.data, offset, index(nbytes)))


def _get(out: Any, offset: Any, address: Any, nbytes: int) -> None:
    """Bytes of a slot into a result, from an offset on."""
    if nbytes:
        T.evaluate(T.call_extern("void", GET, out.data, offset, address, index(nbytes)))


def _parameter(name: str, v: Value) -> Any:
    return T.arg(name, tirx.decl_buffer((v.type.size,), storage_dtype(v.dtype), name, data_alignment=v.dtype.itemsize))


def _row(address: Any, v: Value) -> Any:
    """The elements at an address, of an operand's dtype."""
    dtype = storage_dtype(v.dtype)
    pointer = T.bind(T.reinterpret(tvm.ir.PointerType(PrimType(dtype), "global"), address))
    return T.decl_buffer((v.type.size,), dtype, data=pointer, align=v.dtype.itemsize)


def _nbytes(v: Value) -> int:
    return v.type.size * v.dtype.itemsize


KERNELS = {"all_reduce": all_reduce_kernel, "all_gather": all_gather_kernel, "reduce_scatter": reduce_scatter_kernel}
for _name in COMMUNICATION:
    fill("lower", _name, Host(host_name, **({"fn": KERNELS[_name]} if _name in KERNELS else {})))
