"""The training steps that are compared: sizes, weights and data, the same numbers for every contender.

Weights go by name and are drawn once, here, so that each framework starts from the same point; the harness compares
the losses of the first steps and refuses to compare times of unequal maths. Linear weights are (out, in),
convolutions (out, in, height, width), everything float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Problem:
    """One training step: `weights` by name, a batch `(x, y)`, and the optimizer all contenders use."""

    name: str
    describe: str
    weights: Arrays
    batch: tuple[np.ndarray, np.ndarray]
    optimizer: str  # "adamw" (lr 1e-3, betas 0.9 0.999, weight decay 0.01) or "sgd" (lr 0.01, momentum 0.9)
    sizes: dict[str, int] = field(default_factory=dict)
    steps: int = 10  # of one round


class _Draw:
    """Weights by name from one generator."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        self.weights: Arrays = {}

    def normal(self, name: str, shape: tuple[int, ...], std: float) -> None:
        self.weights[name] = (self.rng.standard_normal(shape, np.float32) * np.float32(std)).astype(np.float32)

    def fill(self, name: str, shape: tuple[int, ...], value: float) -> None:
        self.weights[name] = np.full(shape, value, np.float32)

    def linear(self, name: str, out: int, inner: int, std: float | None = None) -> None:
        self.normal(f"{name}.weight", (out, inner), std if std is not None else (2 / inner) ** 0.5)
        self.fill(f"{name}.bias", (out,), 0.0)

    def norm(self, name: str, width: int) -> None:
        self.fill(f"{name}.weight", (width,), 1.0)
        self.fill(f"{name}.bias", (width,), 0.0)


def mlp() -> Problem:
    """784-1024-1024-10, ReLU, batch 256, AdamW."""
    draw = _Draw()
    widths = [784, 1024, 1024, 10]
    for i, (inner, out) in enumerate(zip(widths, widths[1:])):
        draw.linear(f"layers.{i}", out, inner)
    x = draw.rng.standard_normal((256, 784), np.float32)
    y = draw.rng.integers(0, 10, 256)
    return Problem("mlp", "MLP 784-1024-1024-10, batch 256, AdamW", draw.weights, (x, y), "adamw", {"layers": 3}, 20)


RESNET_STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))


def resnet18(size: int = 224) -> Problem:
    """He et al., "Deep Residual Learning" (2015), table 1, 18 layers; batch statistics in the norms; SGD."""
    draw = _Draw()

    def conv(name: str, out: int, inner: int, kernel: int) -> None:
        draw.normal(f"{name}.weight", (out, inner, kernel, kernel), (2 / (inner * kernel * kernel)) ** 0.5)

    conv("stem.conv", 64, 3, 7)
    draw.norm("stem.norm", 64)
    inner = 64
    for stage, (width, _) in enumerate(RESNET_STAGES):
        for block in range(2):
            name = f"stages.{stage}.{block}"
            conv(f"{name}.conv1", width, inner, 3)
            draw.norm(f"{name}.norm1", width)
            conv(f"{name}.conv2", width, width, 3)
            draw.norm(f"{name}.norm2", width)
            if inner != width:
                conv(f"{name}.down.conv", width, inner, 1)
                draw.norm(f"{name}.down.norm", width)
            inner = width
    draw.linear("head", 1000, 512)
    x = draw.rng.standard_normal((8, 3, size, size), np.float32)
    y = draw.rng.integers(0, 1000, 8)
    return Problem("resnet18", f"ResNet-18, 8 x 3 x {size} x {size}, SGD with momentum", draw.weights, (x, y),
                   "sgd", {}, 2)


def gpt2(layers: int = 12, width: int = 768, heads: int = 12, vocabulary: int = 50257, length: int = 256) -> Problem:
    """Radford et al. (2019), the small model: pre-norm blocks, GELU (tanh form), tied embedding; AdamW."""
    draw = _Draw()
    draw.normal("wte.weight", (vocabulary, width), 0.02)
    draw.normal("wpe.weight", (1024, width), 0.02)
    for i in range(layers):
        draw.norm(f"blocks.{i}.ln1", width)
        draw.linear(f"blocks.{i}.qkv", 3 * width, width, 0.02)
        draw.linear(f"blocks.{i}.proj", width, width, 0.02)
        draw.norm(f"blocks.{i}.ln2", width)
        draw.linear(f"blocks.{i}.up", 4 * width, width, 0.02)
        draw.linear(f"blocks.{i}.down", width, 4 * width, 0.02)
    draw.norm("ln", width)
    tokens = draw.rng.integers(0, vocabulary, (1, length + 1))
    return Problem("gpt2", f"GPT-2 small, 1 x {length} tokens, AdamW", draw.weights,
                   (np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])), "adamw",
                   {"layers": layers, "width": width, "heads": heads, "length": length}, 2)


PROBLEMS = {"mlp": mlp, "resnet18": resnet18, "gpt2": gpt2}
