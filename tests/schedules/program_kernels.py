"""Small hand-made kernels and programs for the tests of the back half (driver, plan, cache, executable)."""

from __future__ import annotations

import functools

import numpy as np
from tvm.script import from_source
from tvm.script import tirx as T

from treadle.schedules.program import Buffer, KernelCall, Program


def prim_func(text: str):
    return from_source(text, {"T": T})


@functools.cache
def elementwise(name: str, expression: str, shape: tuple[int, ...], operands: int = 1, dtype: str = "float32",
                out: str | None = None, parallel: bool = False):
    """out[i] = expression over a, b... (each an element), as a loop over the flat index."""
    size = int(np.prod(shape))
    names = "abcd"[:operands]
    params = ", ".join(f'{n.upper()}: T.Buffer(({size},), "{dtype}")' for n in names)
    loads = {n: f"{n.upper()}[i]" for n in names}
    for n, load in loads.items():
        expression = expression.replace(f"<{n}>", load)
    return prim_func(f'''
@T.prim_func(s_tir=True)
def {name}({params}, OUT: T.Buffer(({size},), "{out or dtype}")):
    T.func_attr({{"global_symbol": "{name}", "tirx.noalias": True}})
    for i in T.{"parallel" if parallel else "serial"}({size}):
        OUT[i] = {expression}
''')


def add_one(shape=(8,), **options):
    return elementwise("add_one", "<a> + T.float32(1)", shape, **options)


def double(shape=(8,), **options):
    return elementwise("double", "<a> * T.float32(2)", shape, **options)


def add(shape=(8,), **options):
    return elementwise("add", "<a> + <b>", shape, operands=2, **options)


@functools.cache
def in_place_add_one(shape=(8,)):
    size = int(np.prod(shape))
    return prim_func(f'''
@T.prim_func(s_tir=True)
def bump(A: T.Buffer(({size},), "float32")):
    T.func_attr({{"global_symbol": "bump", "tirx.noalias": True}})
    for i in T.serial({size}):
        A[i] = A[i] + T.float32(1)
''')


@functools.cache
def less_than(limit: float):
    """flag = a[0] < limit."""
    return prim_func(f'''
@T.prim_func(s_tir=True)
def less(A: T.Buffer((8,), "float32"), FLAG: T.Buffer((1,), "bool")):
    T.func_attr({{"global_symbol": "less", "tirx.noalias": True}})
    FLAG[0] = A[0] < T.float32({limit})
''')


def buffer(name: str, kind: str = "temp", shape=(8,), dtype: str = "float32", **more) -> Buffer:
    return Buffer(name, shape, dtype, kind, **more)


def call(kernel, *args, writes=None, reads=None, label="") -> KernelCall:
    """A kernel call whose last argument is written, unless told otherwise."""
    return KernelCall(kernel, args, writes or [len(args) - 1], reads, label or str(kernel.attrs["global_symbol"]))


def chain(length: int = 3, shape=(8,)) -> Program:
    """y = x + 1 + 1 ... through temps."""
    x, y = buffer("x", "input", shape), buffer("y", "output", shape)
    steps, previous = [], x
    for i in range(length):
        target = y if i == length - 1 else buffer(f"t{i}", shape=shape)
        steps.append(call(add_one(shape), previous, target))
        previous = target
    return Program([x], [y], steps, name="chain")


def many_kernels(count: int, shape=(64,)) -> Program:
    """y = x + 1 + 1 ... by kernels that differ in an attribute, so that each is compiled for itself."""
    buffers = [buffer("x", "input", shape), *(buffer(f"t{i}", shape=shape) for i in range(count - 1)),
               buffer("y", "output", shape)]  # fmt: skip
    kernels = [add_one(shape).with_attr("variant", i) for i in range(count)]
    steps = [call(kernel, buffers[i], buffers[i + 1]) for i, kernel in enumerate(kernels)]
    return Program([buffers[0]], [buffers[-1]], steps)
