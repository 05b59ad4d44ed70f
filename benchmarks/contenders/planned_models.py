"""Models for `treadle plan`: each a class whose `forward` gives the loss of a batch, as FILE.py:NAME takes it."""

from __future__ import annotations

from typing import Any

import treadle as td
from treadle import nn

F = nn.functional


class Block(nn.Module):
    """A pre-norm block of a transformer; query, key and value apart."""

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


class Gpt(nn.Module):
    """Radford et al. (2019): learned positions, tied embedding."""

    layers, width, heads, length, vocabulary = 12, 768, 12, 1024, 50257  # GPT-2 small

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(self.vocabulary, self.width), nn.Embedding(self.length, self.width)
        self.blocks = nn.ModuleList(Block(self.width, self.heads) for _ in range(self.layers))
        self.ln = nn.LayerNorm(self.width)

    def forward(self, tokens: Any, labels: Any) -> Any:
        x = self.wte(tokens) + self.wpe(td.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(F.linear(self.ln(x), self.wte.weight), labels)


class GptXl(Gpt):
    """GPT-2 XL."""

    layers, width, heads = 48, 1600, 25


class Gpt3(Gpt):
    """Brown et al. (2020), 175 billion parameters."""

    layers, width, heads, length = 96, 12288, 96, 2048


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1, and a projection where the shape changes."""

    def __init__(self, inner: int, width: int, stride: int):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(inner, width, 1, bias=False),
                                    nn.Conv2d(width, width, 3, stride, 1, bias=False),
                                    nn.Conv2d(width, 4 * width, 1, bias=False)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width), nn.BatchNorm2d(4 * width)])
        self.down = nn.Identity() if inner == 4 * width else nn.Sequential(
            nn.Conv2d(inner, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x: Any) -> Any:
        y = x
        for k, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            y = norm(conv(y))
            y = F.relu(y) if k < 2 else y
        return F.relu(y + self.down(x))


class ResNet50(nn.Module):
    """He et al. (2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        blocks, inner = [], 64
        for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for k in range(count):
                blocks.append(Bottleneck(inner, width, stride if k == 0 else 1))
                inner = 4 * width
        self.pool, self.blocks, self.head = nn.MaxPool2d(3, 2, 1), nn.Sequential(*blocks), nn.Linear(2048, 1000)

    def forward(self, images: Any, labels: Any) -> Any:
        x = self.pool(F.relu(self.norm(self.stem(images))))
        return F.cross_entropy(self.head(self.blocks(x).mean((2, 3))), labels)


class Lstm(nn.Module):
    """A language model of four recurrent layers (Zaremba et al. 2014, and wider)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32000, 2048)
        self.layers = nn.ModuleList(nn.LSTM(2048, 2048, batch_first=True) for _ in range(4))
        self.head = nn.Linear(2048, 32000)

    def forward(self, tokens: Any, labels: Any) -> Any:
        x = self.table(tokens)
        for layer in self.layers:
            x = layer(x)[0]
        return F.cross_entropy(self.head(x), labels)
