"""GPT-2 with weights that a mesh can split by heads: the model of distributed.py, planned.py and planner.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import treadle as td
from treadle import nn

F = nn.functional


@dataclass(frozen=True)
class Size:
    """Of a GPT and its batch. The tables for tensor parallelism have `padded` rows (50257 is odd)."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    padded: int
    length: int
    batch: int


class Block(nn.Module):
    """A pre-norm block; query, key and value apart, so that each can be split by heads."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def split(self, x: Any) -> Any:
        """(batch, length, width) -> (batch, heads, length, width of a head)"""
        return x.reshape((*x.shape[:2], self.heads, x.shape[2] // self.heads)).transpose((0, 2, 1, 3))

    def forward(self, x: Any) -> Any:
        y = self.ln1(x)
        y = F.scaled_dot_product_attention(*(self.split(f(y)) for f in (self.q, self.k, self.v)), causal=True)
        x = x + self.proj(y.transpose((0, 2, 1, 3)).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """Radford et al. (2019): learned positions, tied embedding."""

    def __init__(self, size: Size, padded: bool):
        super().__init__()
        self.wte = nn.Embedding(size.padded if padded else size.vocabulary, size.width)
        self.wpe = nn.Embedding(size.length, size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.layers))
        self.ln = nn.LayerNorm(size.width)

    def forward(self, tokens: Any) -> Any:
        x = self.wte(tokens) + self.wpe(td.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.ln(x), self.wte.weight)


def loss_of(model: Any, x: Any, y: Any) -> Any:
    return F.cross_entropy(model(x), y)
