"""What a convolution is, and how the CPU schedules cut it up: `ConvProblem`, `ConvConfig`, `propose`.

Forward convolution and its input gradient are one loop nest here.  Along one axis an output element `q` sums
over taps, each reading the input at `q * in_stride + offset`:

* forward: tap `k` reads `x[q * stride + k * dilation - pad]`;
* input gradient: `dx[i]` gets `dy[(i + pad - k * dilation) / stride]` from those `k` for which the division is
  exact.  Outputs with equal `i mod stride` (a *phase*) share their taps, and within a phase the loop is again a
  convolution, of stride 1, with every `stride`-th tap.  No zeros are inserted and none are multiplied.

Both `k` and `offset` run in arithmetic progressions, so that an `AxisTaps` of a few integers describes a phase.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..ir.errors import AttributeValueError, DTypeError, ShapeError
from .sizes import at_least, hint, is_dynamic, smaller

LAYOUTS = ("NCHW", "NHWC")
DTYPES = ("float32", "float64", "bfloat16", "float16")
BAND_PIXELS = 128  # of output that the weight gradient sums in registers: the operands of a band fit the L1 cache
FORWARD, INPUT_GRAD, WEIGHT_GRAD = "conv", "conv_input_grad", "conv_weight_grad"


@dataclass(frozen=True)
class AxisTaps:
    """The taps of one phase along one axis.

    Output elements are `first + step * q` for `q` in `range(count)`; tap `j` in `range(taps)` multiplies weight
    position `k0 + j * k_step` with input element `q * in_stride + offset0 + j * offset_step`, where that lies in
    `range(in_extent)`.
    """

    first: int
    step: int
    count: Any
    in_extent: Any
    in_stride: int
    taps: int
    k0: int
    k_step: int
    offset0: int
    offset_step: int

    def offset(self, j: int) -> int:
        return self.offset0 + j * self.offset_step

    def valid(self, j: int) -> tuple[int, Any]:
        """The range of `q` for which tap `j` reads inside the input; empty ranges come out as (0, 0), those of sizes
        that are not known as ranges that may end before they begin."""
        low = max(0, -(self.offset(j) // self.in_stride))
        high = smaller(self.count, (self.in_extent - 1 - self.offset(j)) // self.in_stride + 1)
        return (low, high) if not isinstance(high, int) or low < high else (0, 0)

    @property
    def expected(self) -> AxisTaps:
        """The same with the sizes that are expected."""
        return replace(self, count=hint(self.count), in_extent=hint(self.in_extent))

    @property
    def reach(self) -> tuple[int, int]:
        """The least and the largest offset of a tap."""
        ends = self.offset(0), self.offset(max(self.taps - 1, 0))
        return min(ends), max(ends)

    @property
    def bounded(self) -> bool:
        """True if no tap ever reads outside the input, so that no check is needed."""
        if is_dynamic(self.count, self.in_extent):
            low, high = self.reach
            return low >= 0 and at_least(self.in_extent - 1, (self.count - 1) * self.in_stride + high)
        return all(self.valid(j) == (0, self.count) for j in range(self.taps))


@dataclass(frozen=True)
class ConvProblem:
    """One convolution `y = conv(x, w)`, whichever of its three products is to be computed.

    x is (batch, in_channels, *spatial), w is (out_channels, in_channels / groups, *kernel), y is (batch,
    out_channels, *out_spatial); 1 to 3 spatial axes.  `padding` holds a (low, high) pair for every axis and may be
    negative (cropping).  `layout` says how x and dx lie in memory, `out_layout` (default: the same) how y and dy
    do: "NCHW" channels first, "NHWC" channels last, for every rank.  Weights are always OI*, row-major.

    Raises ShapeError, AttributeValueError or DTypeError when the sizes do not fit together.
    """

    batch: Any
    in_channels: int
    out_channels: int
    spatial: tuple[Any, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    dtype: str = "float32"
    layout: str = "NCHW"
    out_layout: str = ""

    def __post_init__(self) -> None:
        rank = len(self.spatial)
        defaults = {"stride": (1,) * rank, "dilation": (1,) * rank, "padding": ((0, 0),) * rank}
        for name, value in defaults.items():
            object.__setattr__(self, name, tuple(getattr(self, name)) or value)
        object.__setattr__(self, "out_layout", self.out_layout or self.layout)
        if not 1 <= rank <= 3:
            raise ShapeError(f"conv takes 1, 2 or 3 spatial axes, not {rank} (spatial {self.spatial})")
        for name in ("kernel", "stride", "padding", "dilation"):
            if len(getattr(self, name)) != rank:
                raise ShapeError(f"conv: {name} {getattr(self, name)} needs one entry per spatial axis ({rank})")
        if self.groups < 1 or self.in_channels % self.groups or self.out_channels % self.groups:
            raise ShapeError(f"conv: groups={self.groups} must divide the {self.in_channels} input and the "
                             f"{self.out_channels} output channels")
        sizes = (self.batch, self.in_channels, self.out_channels, *self.spatial, *self.kernel)
        if min(n for n in sizes if isinstance(n, int)) < 1 or min(self.stride + self.dilation) < 1:
            raise AttributeValueError("conv: sizes, kernel, stride and dilation must all be at least 1")
        if min((n for n in self.out_spatial if isinstance(n, int)), default=1) < 1:
            raise ShapeError(f"conv: kernel {self.kernel} with dilation {self.dilation} does not fit into the padded "
                             f"input (spatial {self.spatial}, padding {self.padding}); pad more or shrink the kernel")
        if self.dtype not in DTYPES:
            raise DTypeError(f"conv: no CPU kernel for {self.dtype}; cast to one of {', '.join(DTYPES)}")
        if self.layout not in LAYOUTS or self.out_layout not in LAYOUTS:
            raise AttributeValueError(f"conv: layout must be one of {LAYOUTS}")

    @cached_property
    def out_spatial(self) -> tuple[Any, ...]:
        return tuple((n + low + high - d * (k - 1) - 1) // s + 1 for n, k, s, (low, high), d
                     in zip(self.spatial, self.kernel, self.stride, self.padding, self.dilation))

    @property
    def x_shape(self) -> tuple[Any, ...]:
        return _activation_shape(self.layout, self.batch, self.in_channels, self.spatial)

    @property
    def y_shape(self) -> tuple[Any, ...]:
        return _activation_shape(self.out_layout, self.batch, self.out_channels, self.out_spatial)

    @property
    def w_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def is_dynamic(self) -> bool:
        """Whether a size is known only at run time."""
        return is_dynamic(self.batch, *self.spatial)

    @property
    def acc_dtype(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def is_depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.in_channels == self.out_channels

    @property
    def flops(self) -> Any:
        """Two for each multiply-add, borders counted as if full: the usual figure, for all three products."""
        taps = math.prod(self.kernel) * (self.in_channels // self.groups)
        return 2 * self.batch * self.out_channels * math.prod(self.out_spatial) * taps


def _activation_shape(layout: str, batch: int, channels: int, spatial: tuple[int, ...]) -> tuple[int, ...]:
    return (batch, channels, *spatial) if layout == "NCHW" else (batch, *spatial, channels)


def _axes(problem: ConvProblem) -> list[tuple[int, int, int, int, int, int]]:
    """(in, out, kernel, stride, low padding, dilation) of exactly three axes, missing ones in front as size 1."""
    rows = [(n, o, k, s, p[0], d) for n, o, k, s, p, d in zip(
        problem.spatial, problem.out_spatial, problem.kernel, problem.stride, problem.padding, problem.dilation)]
    return [(1, 1, 1, 1, 0, 1)] * (3 - len(rows)) + rows


def forward_phases(problem: ConvProblem) -> list[list[AxisTaps]]:
    """For each of the three axes its phases: forward has a single one."""
    return [[AxisTaps(0, 1, o, n, s, k, 0, 1, -p, d)] for n, o, k, s, p, d in _axes(problem)]


def input_grad_phases(problem: ConvProblem) -> list[list[AxisTaps]]:
    """For each of the three axes its `stride` phases (fewer when the input is shorter than the stride).

    Weight positions are those of the flipped kernel, as which the weights are packed: taps then go up through dy as
    they do through x forward, and where they are contiguous there, they are so in the weights."""
    result = []
    for n, o, k, s, p, d in _axes(problem):
        phases, jump = [], s // math.gcd(s, d)
        for r in range(s if is_dynamic(n) else min(s, n)):
            ks = [j for j in range(k) if (r + p - j * d) % s == 0]
            last = ks[-1] if ks else 0
            phases.append(AxisTaps(r, s, -(-(n - r) // s), o, 1, len(ks), k - 1 - last, jump, (r + p - last * d) // s,
                                   jump * d // s))
        result.append(phases)
    return result


@dataclass(frozen=True)
class ConvConfig:
    """How a convolution is scheduled on a CPU.

    `algorithm`: "direct" (register tile of pixels x output channels, all taps and input channels reduced in
    registers), "depthwise" (vectors of channels), for the weight gradient "direct" or "depthwise" too.
    `pixels` x `vectors`: the register tile; for the weight gradient `pixels` counts input channels instead.
    `block`: input channels (weight gradient: output rows) that a tile sweeps before the next tap.
    `flatten`: a 1x1 stride-1 convolution runs over one long row of all pixels.
    `channels_outer`: tasks walk all rows of one block of output channels before the next block.
    `fold`: groups of few channels that share a register tile, as blocks on the diagonal of a denser convolution.
    `blocks`: blocks of output channels that a task of the weight gradient takes through a band of rows together.
    `chunks`: partial sums of the weight gradient over the batch (1: none).
    """

    algorithm: str = "direct"
    pixels: int = 14
    vectors: int = 2
    block: int = 64
    flatten: bool = False
    channels_outer: bool = True
    fold: int = 1
    blocks: int = 1
    chunks: int = 1


def lanes(dtype: str, vector_bits: int) -> int:
    """Elements of `dtype` in one vector register."""
    return vector_bits // (64 if dtype == "float64" else 32)


def tile_limit(vectors: int, vector_bits: int) -> int:
    """The most pixels of a register tile of so many vectors of channels.

    About 20 of 32 registers for the accumulators (10 of 16): with more, LLVM's allocator starts to spill them.
    """
    return {1: 16, 2: 8, 3: 6, 4: 5}[vectors] if vector_bits == 512 else {1: 10, 2: 5, 3: 3, 4: 2}[vectors]


def split_row(width: int, limit: int) -> list[tuple[int, int]]:
    """Cut a row of pixels into (start, size) tiles of at most `limit`, as even as can be."""
    count = -(-width // limit)
    size = -(-width // count)
    return [(s, min(size, width - s)) for s in range(0, width, size)]


def tile_cycles(pixels: int, vectors: int, streamed_bytes: int = 0) -> float:
    """Cycles of one reduction step of a register tile.

    Two FMAs and two loads a cycle, FMA latency 4, about 24 bytes a cycle for weights streamed from the L2 cache; loads
    are not quite free even where they are not the bottleneck.
    """
    loads = pixels + vectors
    return max(pixels * vectors / 2, loads / 2, 4.0, streamed_bytes / 24) + 0.08 * loads


def propose(problem: ConvProblem, target, op: str = FORWARD) -> ConvConfig:
    """The configuration for `op` (FORWARD, INPUT_GRAD or WEIGHT_GRAD) from shapes and machine alone.

    Minimises the cycles of one sweep over the output, given what the tiles waste at the ends of rows and channels.
    """
    if op == WEIGHT_GRAD:
        return _propose_weight_grad(problem, target)
    if problem.is_depthwise:
        return ConvConfig("depthwise", pixels=8, vectors=1)
    out = (problem.out_channels if op == FORWARD else problem.in_channels) // problem.groups
    red = (problem.in_channels if op == FORWARD else problem.out_channels) // problem.groups
    wide = lanes(problem.dtype, target.vector_bits)
    fold = max(f for f in range(1, problem.groups + 1) if problem.groups % f == 0 and (f == 1 or f * out <= wide))
    out, red = out * fold, red * fold
    flatten = can_flatten(problem) and not problem.is_dynamic  # else it is a matrix product
    phases = forward_phases(problem)[2] if op == FORWARD else input_grad_phases(problem)[2]
    widths = [problem.batch * math.prod(problem.spatial)] if flatten else [max(hint(p.count), 1) for p in phases]
    best = None
    for vectors in (v for v in (2, 4, 3, 1) if v == 1 or (v - 1) * wide < out):
        limit = tile_limit(vectors, target.vector_bits)
        blocks, register = -(-out // (vectors * wide)), target.vector_bits // 8
        resident = math.prod(problem.kernel) * red * vectors * register <= 0.8 * target.l1_bytes
        streamed = 0 if resident else vectors * register
        cost = blocks * sum(tile_cycles(size, vectors, streamed) for w in widths for _, size in split_row(w, limit))
        if best is None or cost < best[0] * 0.98:
            best = (cost, vectors, limit)
    assert best is not None
    pointwise = math.prod(problem.kernel) == 1
    pixels = min(best[2], 8) if best[1] == 1 and reduces_by_vector(problem, fold, wide, op) else best[2]
    scattered = problem.groups > 1 and out <= wide  # a block of channels is a vector of each pixel
    return ConvConfig("direct", pixels, best[1], min(256 if pointwise else 64, red), flatten,
                      not pointwise and not scattered, fold)


def reduces_by_vector(problem: ConvProblem, fold: int, wide: int, op: str) -> bool:
    """Whether `fold` groups of at most 4 channels are reduced with a shuffle per channel, and not as one dense block.

    Wider groups take more shuffles than the zeros of a dense block cost."""
    channels = problem.in_channels // problem.groups
    layout = problem.layout if op == FORWARD else problem.out_layout
    return (1 < fold and channels <= 4 and fold * channels == wide and problem.in_channels == problem.out_channels
            and layout == "NHWC")


def can_flatten(problem: ConvProblem) -> bool:
    """True where pixels are independent (1x1, stride 1, no padding) and lie channel-last on both sides."""
    return (set(problem.kernel) == {1} and set(problem.stride) == {1} and set(problem.padding) == {(0, 0)}
            and problem.layout == problem.out_layout == "NHWC")


def _propose_weight_grad(problem: ConvProblem, target) -> ConvConfig:
    if problem.is_depthwise:
        return ConvConfig("depthwise", vectors=1, chunks=target.threads)
    wide = lanes(problem.dtype, target.vector_bits)
    red, out = problem.in_channels // problem.groups, problem.out_channels // problem.groups
    best = None
    for vectors in (v for v in (2, 3, 4, 1) if v == 1 or (v - 1) * wide < out):
        limit = tile_limit(vectors, target.vector_bits)
        if red >= 8:  # eight channels of x never straddle a cache line; wider and lower tiles measured slower
            limit = min(limit, 8)
            if vectors > 2:
                continue
        taps = max(1, min(limit // red, problem.kernel[-1]))
        sizes = [size * taps for _, size in split_row(red, min(limit, red))]
        cost = -(-out // (vectors * wide)) * sum(tile_cycles(size, vectors) for size in sizes) / taps
        if best is None or cost < best[0] * 0.98:
            best = (cost, vectors, limit)
    assert best is not None
    _, vectors, limit = best
    tasks = problem.groups * -(-out // (vectors * wide))
    register = target.vector_bits // 8
    pixel = red * math.prod(problem.stride) * register // wide  # bytes of x for each pixel of a band, in the L2 cache
    rows = max(1, min(BAND_PIXELS, max(32, target.l2_bytes // 2 // pixel)) // max(hint(problem.out_spatial[-1]), 1))
    area = math.prod(problem.kernel) * red * vectors * register
    blocks = max(1, min(tasks // target.threads, target.l2_bytes // 4 // area))
    chunks = 1 if tasks % target.threads == 0 or tasks >= 4 * target.threads else target.threads
    return ConvConfig("direct", limit, vectors, rows, blocks=blocks, chunks=chunks)
