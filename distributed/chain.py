"""Where to cut a chain of layers into stages: optimally.

The slowest stage sets the pace of a pipeline, so the cut minimises the largest stage time among those that fit in
memory. `cut` finds it by dynamic programming over (layers done, stages used) in O(layers^2 stages); a test compares
it with brute force.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..ir.errors import AttributeValueError


@dataclass(frozen=True)
class Layer:
    """One link of the chain. Times in seconds for a micro-batch, sizes in bytes.

    Attributes:
        parameters: bytes that stay (parameters, gradients, states).
        activations: bytes kept for the backward pass of one micro-batch.
        output: bytes handed to the next layer, in so many `tensors`.
    """

    forward: float
    backward: float
    parameters: float = 0.0
    activations: float = 0.0
    output: float = 0.0
    name: str = ""
    tensors: int = 1


@dataclass(frozen=True)
class Cut:
    """`bounds[s]`: the first layer of stage s; `seconds`: the slowest stage's time. As text a table of the stages."""

    bounds: tuple[int, ...]
    seconds: float
    layers: tuple[Layer, ...] = field(default=(), compare=False, repr=False)

    def __str__(self) -> str:
        rows = [("stage", "layers", "ops", "forward ms", "backward ms", "MB that stay", "MB kept", "hands on")]
        for s, own in enumerate(self.stages(self.layers)):
            handed = f"{own[-1].tensors} x {own[-1].output / own[-1].tensors / 1e6:.2f} MB"
            rows.append((str(s), f"{self.bounds[s]}-{self.bounds[s] + len(own) - 1}", f"{own[0].name}..{own[-1].name}",
                         f"{sum(x.forward for x in own) * 1e3:.2f}", f"{sum(x.backward for x in own) * 1e3:.2f}",
                         f"{sum(x.parameters for x in own) / 1e6:.1f}", f"{sum(x.activations for x in own) / 1e6:.1f}",
                         "the loss" if s + 1 == len(self.bounds) else handed))
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)

    def stages(self, layers: Sequence[Layer]) -> list[Sequence[Layer]]:
        """The layers of each stage."""
        ends = (*self.bounds[1:], len(layers))
        return [layers[a:b] for a, b in zip(self.bounds, ends)]

    def show(self, layers: Sequence[Layer]) -> str:
        """One line a stage."""
        lines = []
        for s, own in enumerate(self.stages(layers)):
            seconds = sum(x.forward + x.backward for x in own)
            nbytes = sum(x.parameters for x in own)
            lines.append(f"stage {s}: layers {self.bounds[s]}-{self.bounds[s] + len(own) - 1} "
                         f"({own[0].name}..{own[-1].name}) {seconds * 1e3:.2f} ms, {nbytes / 1e6:.1f} MB")
        return "\n".join(lines)


def cut(layers: Sequence[Layer], stages: int, memory: float = float("inf"), kept: Sequence[int] | None = None,
        bandwidth: float = float("inf")) -> Cut:
    """The best cut into `stages` runs of at least one layer.

    Args:
        memory: bytes of a device.
        kept: micro-batches whose activations each stage keeps; 1F1B: stages - s.
        bandwidth: bytes a second between stages: what a stage hands on counts to its time.

    Raises:
        AttributeValueError: more stages than layers, or no cut fits in memory; the message gives the least that does.
    """
    count, kept = len(layers), list(kept or range(stages, 0, -1))
    if not 1 <= stages <= count:
        raise AttributeValueError(f"{count} layers cannot be cut into {stages} stages of at least one layer")
    best = _best(layers, stages, memory, kept, bandwidth)
    if best is None:
        raise AttributeValueError(f"no cut into {stages} stages fits in {memory:,.0f} bytes a device; the least "
                                  f"that does is {least_memory(layers, stages, kept):,.0f}")
    return best


def _best(layers: Sequence[Layer], stages: int, memory: float, kept: Sequence[int], bandwidth: float) -> Cut | None:
    count, infinite = len(layers), float("inf")
    table: list[list[tuple[float, int]]] = [[(infinite, -1)] * (count + 1) for _ in range(stages + 1)]
    table[0][0] = (0.0, -1)
    for s in range(1, stages + 1):
        for end in range(s, count + 1):
            seconds = layers[end - 1].output / bandwidth if end < count else 0.0
            nbytes, found = 0.0, (infinite, -1)
            for start in range(end - 1, s - 2, -1):
                layer = layers[start]
                seconds += layer.forward + layer.backward
                nbytes += layer.parameters + kept[s - 1] * layer.activations
                if nbytes > memory:
                    break
                slowest = max(table[s - 1][start][0], seconds)
                if slowest < found[0]:
                    found = (slowest, start)
            table[s][end] = found
    if table[stages][count][0] == infinite:
        return None
    bounds, end = [], count
    for s in range(stages, 0, -1):
        end = table[s][end][1]
        bounds.append(end)
    return Cut(tuple(reversed(bounds)), table[stages][count][0], tuple(layers))


def least_memory(layers: Sequence[Layer], stages: int, kept: Sequence[int]) -> float:
    """The smallest memory of a device with which some cut fits."""
    as_time = [[x.parameters + k * x.activations for x in layers] for k in kept]
    count, infinite = len(layers), float("inf")
    row = [0.0] + [infinite] * count
    for s in range(stages):
        sums = [0.0]
        for nbytes in as_time[s]:
            sums.append(sums[-1] + nbytes)
        row = [min((max(row[a], sums[b] - sums[a]) for a in range(b)), default=infinite) for b in range(count + 1)]
    return row[count]
