"""Pooling over windows, either layout.

Vectors run over channels when they lie last, over the last spatial axis otherwise. Gradients are written as sums
over what a place contributed to, not as scatters, so that every place is computed once and by one thread; only
`max_pool_grad` must scatter, since its indices are data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from ..ir.graph import Node
from ..ir.opdef import fill
from ..ir.ops_layout import spatial_sizes
from .lower_kernel import (
    Row,
    at_most,
    each_vector,
    index,
    join_index,
    lane_loop,
    lanes_of,
    local,
    loop,
    parallel,
    split_index,
    when,
    write_kernel,
)
from .lower_slots import NARROW_FLOATS, Kernel, cast, compute_dtype, const, is_nan, let
from .sizes import expression, is_dynamic


@dataclass(frozen=True)
class Images:
    """An activation: batch, channels and spatial sizes, and how they lie in memory."""

    batch: Any
    channels: Any
    spatial: tuple[Any, ...]
    channels_last: bool

    @classmethod
    def of(cls, shape: Sequence[Any], channels_last: bool) -> Images:
        channels = shape[-1] if channels_last else shape[1]
        return cls(shape[0], channels, tuple(spatial_sizes(tuple(shape), channels_last)), channels_last)

    def at(self, image: Any, channel: Any, place: Sequence[Any]) -> Any:
        """The flat position of an element."""
        if self.channels_last:
            return join_index([image, *place, channel], [self.batch, *self.spatial, self.channels])
        return join_index([image, channel, *place], [self.batch, self.channels, *self.spatial])


def _every_vector(images: Images, node: Node, work: int, target: Any,
                  body: Callable[[Any, Callable[[Any], tuple[Any, list[Any]]], int], None]) -> None:
    """Runs `body(image, places, lanes)` for every vector of elements of `images`.

    `places(lane)` gives channel and spatial coordinates of a lane.
    """
    lanes = lanes_of([*node.operands, *node.results], target)
    *rest, last = (*images.spatial, images.channels) if images.channels_last else (images.channels, *images.spatial)
    rows: Any = math.prod(rest)
    total = images.batch * rows * last * work
    with parallel(images.batch * rows, total, target) as step:
        image, *outer = (let(i) for i in split_index(step, (images.batch, *rest)))

        def vector(start: Any, count: int) -> None:
            def places(lane: Any) -> tuple[Any, list[Any]]:
                if images.channels_last:
                    return start + lane, outer
                return outer[0], [*outer[1:], start + lane]

            body(image, places, count)

        each_vector(last, at_most(lanes, last), vector)


@contextmanager
def _window(window: Sequence[int]) -> Iterator[list[Any]]:
    """Loops over the offsets of a window."""
    with ExitStack() as stack:
        yield [stack.enter_context(loop(n)) for n in window]


def _inside(places: Sequence[Any], sizes: Sequence[Any], may_leave: Sequence[bool]) -> Any:
    """Whether a place lies inside, axis by axis where it may not; None if it always does."""
    found = None
    for place, size, leaves in zip(places, sizes, may_leave):
        if leaves:
            inside = tirx.And(place >= 0, place < size)
            found = inside if found is None else tirx.And(found, inside)
    return found


def _clamped(places: Sequence[Any], sizes: Sequence[Any], may_leave: Sequence[bool]) -> list[Any]:
    return [tirx.max(tirx.min(p, index(n - 1)), index(0)) if leaves else p
            for p, n, leaves in zip(places, sizes, may_leave)]


def _taken(place: Sequence[Any], offset: Sequence[Any], attrs: Any, dilation: Sequence[int]) -> list[Any]:
    """Where in the input an offset of the window of a result lies."""
    return [p * s + k * d - lo for p, k, s, d, (lo, _) in zip(place, offset, attrs["stride"], dilation,
                                                            attrs["padding"])]


def _lowest(dtype: str) -> Any:
    if dtype.startswith("float"):
        return const(float("-inf"), dtype)
    return tirx.const(0, dtype) if dtype.startswith("uint") else tirx.min_value(dtype)


def _max_pool(node: Node, target: Any, name: str) -> Any:
    attrs, last = node.attrs, node.attrs["channels_last"]
    source, result = Images.of(node.operands[0].shape, last), Images.of(node.results[0].shape, last)
    dtype = compute_dtype(node.operands[0].dtype)
    floating, padded = dtype.startswith("float"), [lo > 0 or hi > 0 for lo, hi in attrs["padding"]]

    def body(operands: list[Row], results: list[Row]) -> None:
        (x,), (y, places) = operands, results

        def vector(image: Any, coordinates: Any, count: int) -> None:
            best, found = local(count, dtype), local(count, "int32")
            with lane_loop(count) as lane:
                T.buffer_store(best, _lowest(dtype), [lane])
                T.buffer_store(found, tirx.const(-1, "int32"), [lane])
            with _window(attrs["window"]) as offset, lane_loop(count) as lane:
                channel, place = coordinates(lane)
                taken = _taken(place, offset, attrs, attrs["dilation"])
                near = _clamped(taken, source.spatial, padded)
                element, held = let(x.load(source.at(image, channel, near))), let(best[lane])
                wins = tirx.Or(found[lane] < 0, element > held)
                if floating:
                    wins = tirx.Or(wins, tirx.And(is_nan(element), tirx.Not(is_nan(held))))
                inside = _inside(taken, source.spatial, padded)
                wins = wins if inside is None else tirx.And(inside, wins)
                T.buffer_store(found, tirx.Select(wins, cast(join_index(near, source.spatial), "int32"), found[lane]),
                               [lane])
                T.buffer_store(best, tirx.Select(wins, element, held), [lane])
            with lane_loop(count) as lane:
                at = result.at(image, *coordinates(lane))
                y.store(at, best[lane])
                places.store(at, found[lane])

        _every_vector(result, node, math.prod(attrs["window"]), target, vector)

    return write_kernel(node, name, body)


def _max_pool_grad(node: Node, target: Any, name: str) -> Any:
    last = node.attrs["channels_last"]
    given, result = Images.of(node.operands[0].shape, last), Images.of(node.results[0].shape, last)
    plane, windows = math.prod(result.spatial), math.prod(given.spatial)
    dtype = compute_dtype(node.results[0].dtype)
    # Channels that one thread scatters at a time.
    width = min(given.channels, 64) if last and not is_dynamic(given.channels) else 1
    narrow = str(node.results[0].dtype) in NARROW_FLOATS

    def put(sums: Any, dx: Row, at: Any, element: Any) -> None:
        if sums is None:
            dx.store(at, element)
        else:
            T.buffer_store(sums, element, [at])

    def body(operands: list[Row], results: list[Row]) -> None:
        (dy, places), (dx,) = operands, results
        step_in, step = (given.channels, result.channels) if last else (1, 1)

        def planes(image: Any, first: Any, count: int) -> None:
            base = let(image * plane * result.channels + first * (1 if last else plane))
            base_in = let(image * windows * given.channels + first * (1 if last else windows))
            # sums of narrow floats are kept in f32 until they are complete
            sums: Any = T.alloc_buffer((expression(plane * count),), dtype, scope="global") if narrow else None
            at = (lambda p, c: p * count + c) if narrow else (lambda p, c: base + p * step + c)
            with loop(plane) as p, lane_loop(count) as c:
                put(sums, dx, at(p, c), const(0, dtype))
            with loop(windows) as w, loop(count) as c:
                given_at = base_in + w * step_in + c
                place = let(cast(places.load(given_at), "int64"))
                with when(place >= 0):
                    to = at(place, c)
                    put(sums, dx, to, (sums[to] if narrow else dx.load(to)) + dy.load(given_at))
            if narrow:
                with loop(plane) as p, lane_loop(count) as c:
                    dx.store(base + p * step + c, sums[at(p, c)])

        whole, rest = given.channels // width, given.channels % width
        with parallel(given.batch * whole, given.batch * given.channels * (plane + windows), target) as s:
            planes(let(s // whole), let(s % whole * width), width)
        if rest:
            with parallel(given.batch, given.batch * rest * (plane + windows), target) as image:
                planes(image, index(whole * width), rest)

    return write_kernel(node, name, body)


def _count(place: Sequence[Any], attrs: Any, spatial: Sequence[Any]) -> Any:
    """How many elements a window averages."""
    if attrs["count_include_pad"] or not any(lo or hi for lo, hi in attrs["padding"]):
        return index(math.prod(attrs["window"]))
    total = index(1)
    for p, k, s, (lo, _), n in zip(place, attrs["window"], attrs["stride"], attrs["padding"], spatial):
        start = p * s - lo
        total = total * tirx.max(tirx.min(start + k, index(n)) - tirx.max(start, index(0)), index(0))
    return tirx.max(total, index(1))


def _avg_pool(node: Node, target: Any, name: str) -> Any:
    attrs, last = node.attrs, node.attrs["channels_last"]
    source, result = Images.of(node.operands[0].shape, last), Images.of(node.results[0].shape, last)
    dtype, padded = compute_dtype(node.results[0].dtype), [lo > 0 or hi > 0 for lo, hi in attrs["padding"]]
    near_by = (1,) * len(source.spatial)

    def body(operands: list[Row], results: list[Row]) -> None:
        (x,), (y,) = operands, results

        def vector(image: Any, coordinates: Any, count: int) -> None:
            total = local(count, dtype)
            with lane_loop(count) as lane:
                T.buffer_store(total, const(0, dtype), [lane])
            with _window(attrs["window"]) as offset, lane_loop(count) as lane:
                channel, place = coordinates(lane)
                taken = _taken(place, offset, attrs, near_by)
                element = let(x.load(source.at(image, channel, _clamped(taken, source.spatial, padded))))
                inside = _inside(taken, source.spatial, padded)
                if inside is not None:
                    element = tirx.Select(inside, element, const(0, dtype))
                T.buffer_store(total, total[lane] + element, [lane])
            with lane_loop(count) as lane:
                channel, place = coordinates(lane)
                mean = total[lane] / cast(_count(place, attrs, source.spatial), dtype)
                y.store(result.at(image, channel, place), mean)

        _every_vector(result, node, math.prod(attrs["window"]), target, vector)

    return write_kernel(node, name, body)


def _avg_pool_grad(node: Node, target: Any, name: str) -> Any:
    attrs, last = node.attrs, node.attrs["channels_last"]
    given, result = Images.of(node.operands[0].shape, last), Images.of(node.results[0].shape, last)
    dtype, every = compute_dtype(node.results[0].dtype), [True] * len(result.spatial)

    def body(operands: list[Row], results: list[Row]) -> None:
        (dy,), (dx,) = operands, results

        def vector(image: Any, coordinates: Any, count: int) -> None:
            total = local(count, dtype)
            with lane_loop(count) as lane:
                T.buffer_store(total, const(0, dtype), [lane])
            with _window(attrs["window"]) as offset, lane_loop(count) as lane:
                channel, place = coordinates(lane)
                # the windows that hold this place at this offset: one for each axis, if the stride comes out even
                starts = [let(p + lo - k) for p, k, (lo, _) in zip(place, offset, attrs["padding"])]
                windows = [let(s // n) for s, n in zip(starts, attrs["stride"])]
                holds = _inside(windows, given.spatial, every)
                for s, n in zip(starts, attrs["stride"]):
                    holds = tirx.And(holds, tirx.And(s >= 0, s % n == 0)) if n > 1 else holds
                near = _clamped(windows, given.spatial, every)
                part = dy.load(given.at(image, channel, near)) / cast(_count(near, attrs, result.spatial), dtype)
                T.buffer_store(total, total[lane] + tirx.Select(holds, part, const(0, dtype)), [lane])
            with lane_loop(count) as lane:
                dx.store(result.at(image, *coordinates(lane)), total[lane])

        if given.batch * given.channels * math.prod(given.spatial) == 0:
            with loop(math.prod(node.results[0].shape)) as i:
                dx.store(i, const(0, dtype))
        else:
            _every_vector(result, node, math.prod(attrs["window"]), target, vector)

    return write_kernel(node, name, body)


fill("lower", "max_pool", Kernel(_max_pool))
fill("lower", "max_pool_grad", Kernel(_max_pool_grad))
fill("lower", "avg_pool", Kernel(_avg_pool))
fill("lower", "avg_pool_grad", Kernel(_avg_pool_grad))
