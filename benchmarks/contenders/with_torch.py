"""PyTorch as its users run it: eager, or with the forward and backward passes under torch.compile
(TREADLE_BENCH_COMPILE=1). The optimizers are the fused ones, the fastest that PyTorch has on CPUs."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
started = time.perf_counter()
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

imported = time.perf_counter() - started

import contender  # noqa: E402
import problems  # noqa: E402

COMPILE = os.environ.get("TREADLE_BENCH_COMPILE") == "1"


class MLP(nn.Module):
    def __init__(self, weights, layers):
        super().__init__()
        shapes = [weights[f"layers.{i}.weight"].shape for i in range(layers)]
        self.layers = nn.ModuleList(nn.Linear(inner, out) for out, inner in shapes)

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class ConvNorm(nn.Module):
    def __init__(self, inner, out, kernel, stride):
        super().__init__()
        self.conv = nn.Conv2d(inner, out, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x):
        return self.norm(self.conv(x))


class Block(nn.Module):
    def __init__(self, inner, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inner, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.down = ConvNorm(inner, width, 1, stride) if inner != width else nn.Identity()

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.down(x))


class ResNet18(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = ConvNorm(3, 64, 7, 2)
        inner, stages = 64, []
        for width, stride in problems.RESNET_STAGES:
            stages.append(nn.Sequential(Block(inner, width, stride), Block(width, width, 1)))
            inner = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(512, 1000)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        return self.head(self.stages(x).mean((2, 3)))


class GPTBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))


class GPT2(nn.Module):
    def __init__(self, weights, layers, width, heads, length):
        super().__init__()
        self.wte = nn.Embedding(*weights["wte.weight"].shape)
        self.wpe = nn.Embedding(*weights["wpe.weight"].shape)
        self.blocks = nn.ModuleList(GPTBlock(width, heads) for _ in range(layers))
        self.ln = nn.LayerNorm(width)

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.ln(x), self.wte.weight)


def loss_of(model, x, y):
    logits = model(x)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))


def training_step(problem):
    build = {"mlp": lambda: MLP(problem.weights, **problem.sizes), "resnet18": ResNet18,
             "gpt2": lambda: GPT2(problem.weights, **problem.sizes)}
    model = build[problem.name]()
    given = {name: torch.from_numpy(array) for name, array in problem.weights.items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(given.pop(name))
    assert not given, f"weights without a place: {list(given)}"
    x, y = (torch.from_numpy(array) for array in problem.batch)
    if problem.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    forward = torch.compile(loss_of) if COMPILE else loss_of

    def step():
        loss = forward(model, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def call():
    x = torch.zeros(16)
    f = torch.compile(lambda x: x + 1) if COMPILE else (lambda x: x + 1)

    def step():
        with torch.no_grad():
            f(x)

    return step


def prepare(case, threads):
    torch.set_num_threads(threads)
    return call() if case == "call" else training_step(problems.PROBLEMS[case]())


if __name__ == "__main__":
    contender.main(prepare, imported)
