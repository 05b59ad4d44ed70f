"""Treadle as its users run it: the whole training step compiled by td.train_step."""

from __future__ import annotations

import collections
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
started = time.perf_counter()
import treadle as td  # noqa: E402
from treadle import nn  # noqa: E402

imported = time.perf_counter() - started

import contender  # noqa: E402
import models  # noqa: E402
import problems  # noqa: E402

F = nn.functional


class MLP(nn.Module):
    def __init__(self, weights, layers):
        super().__init__()
        shapes = [weights[f"layers.{i}.weight"].shape for i in range(layers)]
        self.layers = nn.ModuleList(nn.Linear(inner, out) for out, inner in shapes)

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[len(self.layers) - 1](x)


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
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.head = nn.Linear(512, 1000)

    def forward(self, x):
        x = self.pool(F.relu(self.stem(x)))
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
        qkv = self.qkv(self.ln1(x)).reshape((b, t, 3, self.heads, c // self.heads)).transpose((2, 0, 3, 1, 4))
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], causal=True)
        x = x + self.proj(y.transpose((0, 2, 1, 3)).reshape((b, t, c)))
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))


class GPT2(nn.Module):
    def __init__(self, weights, layers, width, heads, length):
        super().__init__()
        self.wte = nn.Embedding(*weights["wte.weight"].shape)
        self.wpe = nn.Embedding(*weights["wpe.weight"].shape)
        self.blocks = nn.ModuleList(GPTBlock(width, heads) for _ in range(layers))
        self.ln = nn.LayerNorm(width)

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(td.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.ln(x), self.wte.weight)


def loss_of(model, x, y):
    logits = model(x)
    return F.cross_entropy(logits.reshape((-1, logits.shape[-1])), y.reshape((-1,)))


def training_step(problem):
    build = {"mlp": lambda: MLP(problem.weights, **problem.sizes), "resnet18": ResNet18,
             "gpt2": lambda: GPT2(problem.weights, **problem.sizes)}
    model = build[problem.name]()
    model.load_state_dict({**model.state_dict(), **problem.weights})
    assert {name for name, _ in model.named_parameters()} == set(problem.weights)
    if problem.optimizer == "adamw":
        optimizer = td.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    else:
        optimizer = td.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    train = td.train_step(model, loss_of, optimizer)
    x, y = (td.tensor(array) for array in problem.batch)

    def step():
        return train(x, y).item()

    step.program = lambda: (train._compiled._last, step)
    return step


def call():
    x = td.tensor([0.0] * 16)
    f = td.compile(lambda x: x + 1)

    def step():
        f(x)

    return step


def onnx_model(case):
    """An imported model. The first process compiles it and saves the program, the next ones start from that file."""
    model, _ = models.CASES[case]
    inputs = list(models.inputs_of(case).values())
    saved = Path(os.environ["TREADLE_CACHE_DIR"]) / f"{case}.treadle"
    f = None

    def step():
        nonlocal f
        if f is None and saved.exists():
            f = td.load(saved)
        elif f is None:
            f = td.compile(td.onnx.load(model.file), specialize=True, freeze=True)  # as ONNX Runtime serves it
            f(*inputs)
            f.save(saved)
        first = f(*inputs)
        return float(abs((first[0] if isinstance(first, tuple) else first).numpy(copy=False)).mean())

    def program():
        compiled = td.compile(td.onnx.load(model.file), specialize=True, freeze=True)
        compiled(*inputs)
        return compiled._last, lambda: compiled(*inputs)

    step.program = program
    return step


def prepare(case, threads):
    td.set_num_threads(threads)
    if case in models.CASES:
        return onnx_model(case)
    return call() if case == "call" else training_step(problems.PROBLEMS[case]())


def kernels(step):
    """[name, seconds of a step, GFLOP/s] of each kernel, call sites with the same name together, the slowest first."""
    if not hasattr(step, "program"):
        return None
    (program, run), seen = step.program(), []
    program.run = lambda arrays: (seen.append(list(arrays)), program.executable.run(arrays))[1]
    run()
    program.run = program.executable.run
    together = collections.defaultdict(lambda: [0.0, 0.0])
    for time_of in program.executable.kernel_times(seen[0], repeat=5):
        together[time_of.label][0] += time_of.seconds
        together[time_of.label][1] += time_of.flops * time_of.calls
    rows = [[label, seconds, flops / seconds / 1e9 if seconds else 0.0] for label, (seconds, flops) in together.items()]
    return sorted(rows, key=lambda row: -row[1])


if __name__ == "__main__":
    contender.main(prepare, imported, kernels)
