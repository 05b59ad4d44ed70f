"""Models for `treadle plan`: each a class whose `forward` gives the loss of a batch, as FILE.py:NAME takes it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from treadle import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from contenders.gpt2 import GPT2, Size

F = nn.functional


class Gpt(GPT2):
    """GPT-2 small."""

    size = Size(12, 768, 12, 50257, 50304, 1024, 512)

    def __init__(self) -> None:
        super().__init__(self.size, padded=False)

    def forward(self, tokens: Any, labels: Any) -> Any:
        return F.cross_entropy(super().forward(tokens), labels)


class GptXl(Gpt):
    """GPT-2 XL."""

    size = Size(48, 1600, 25, 50257, 50304, 1024, 512)


class Gpt3(Gpt):
    """Brown et al. (2020), 175 billion parameters."""

    size = Size(96, 12288, 96, 50257, 50304, 2048, 512)


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
