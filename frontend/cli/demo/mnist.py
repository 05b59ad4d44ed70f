"""`treadle demo`: train, save, export, run elsewhere, compare with eager execution.

    1. A small CNN learns 4,000 digits; forward pass, gradients and optimizer are one compiled graph.
    2. The weights go to a safetensors file, the compiled model to one artifact.
    3. A fresh process loads the artifact, which needs no tracing and no compiler, and reads held-out digits.
    4. One step of the same model on the same batch runs eagerly, op by op; the two losses must agree.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .... import compile as compile_
from .... import nn, optim, random, save_checkpoint, set_num_threads, train_step
from ....ir.errors import TreadleError
from .digits import Digits, load
from .picture import side_by_side, write_png

BATCH = 100
SHOWN = 8
AGREEMENT = 1e-4  # relative difference of the eager and the compiled loss that float32 rounding may explain


class DigitNet(nn.Module):
    """Two convolutions with pooling, two linear layers: 206,922 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # (batch, 16, 14, 14)
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # (batch, 32, 7, 7)
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x):
        """(batch, 1, 28, 28) pictures -> (batch, 10) logits."""
        return self.head(self.features(x))


def loss_fn(model, x, y):
    """The mean cross-entropy of a batch."""
    return nn.functional.cross_entropy(model(x), y)


@dataclass
class Outcome:
    """What a run reached."""

    accuracy: float
    seconds: float
    compiled_loss: float
    eager_loss: float
    predictions: list[int]


class Board:
    """Progress: a bar on a terminal, a line for each epoch elsewhere."""

    def __init__(self, console: Console, epochs: int, batches: int):
        self.console, self.epochs, self.batches = console, epochs, batches
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]:>2}/{task.fields[epochs]}"), BarColumn(bar_width=None),
            TextColumn("loss {task.fields[loss]}"), TextColumn("held-out accuracy {task.fields[accuracy]}"),
            TextColumn("{task.fields[speed]} digits/s"), TimeElapsedColumn(),
            console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=epochs * batches, epoch=0, epochs=epochs, loss="-",
                                      accuracy="-", speed="compiling, -")

    def step(self, epoch: int, loss: float, speed: float) -> None:
        self.bar.update(self.task, advance=1, epoch=epoch, loss=f"{loss:.4f}", speed=f"{speed:,.0f}")

    def epoch(self, epoch: int, loss: float, accuracy: float, speed: float) -> None:
        self.bar.update(self.task, accuracy=f"{accuracy:.1%}")
        if self.bar.disable:
            print(f"epoch {epoch:2}/{self.epochs}  loss {loss:.4f}  held-out accuracy {accuracy:.1%}  "
                  f"{speed:,.0f} digits/s", flush=True)


def accuracy_of(predict, digits: Digits) -> float:
    """The share of digits whose largest logit is the label's."""
    right = [predict(x).numpy().argmax(1) == y for x, y in digits.batches(BATCH)]
    return float(np.mean(right))


def train(board: Board, step, predict, learn: Digits, held_out: Digits, epochs: int, seed: int) -> float:
    """Runs the epochs; gives the final accuracy on the held-out digits."""
    rng = np.random.default_rng(seed)
    accuracy = 0.0
    with board.bar:
        for epoch in range(1, epochs + 1):
            started, losses = time.perf_counter(), []
            for x, y in learn.shuffled(rng).batches(BATCH):
                losses.append(step(x, y).item())
                board.step(epoch, float(np.mean(losses)), BATCH * len(losses) / (time.perf_counter() - started))
            speed = BATCH * len(losses) / (time.perf_counter() - started)
            accuracy = accuracy_of(predict, held_out)
            board.epoch(epoch, float(np.mean(losses)), accuracy, speed)
    return accuracy


def read_elsewhere(artifact: Path, images: np.ndarray) -> dict[str, Any]:
    """Runs the artifact in a fresh process (reader.py) on pictures (count, 1, 28, 28)."""
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "pictures.npy"
        np.save(given, images)
        empty = {**os.environ, "TREADLE_CACHE_DIR": str(Path(folder) / "cache")}  # nothing compiled is lying about
        done = subprocess.run([sys.executable, "-m", f"{__package__}.reader", str(artifact), str(given)],
                              capture_output=True, text=True, timeout=120, env=empty)
    if done.returncode:
        raise TreadleError(f"the fresh process that runs {artifact} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)


def compare_with_eager(model, step, batch: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    """The loss of one batch run op by op, then by the compiled step, from the same weights."""
    loss = loss_fn(model, *batch)
    loss.backward()
    model.zero_grad()
    return step(*batch).item(), loss.item()


def run(console: Console, out: Path, epochs: int = 20, threads: int | None = None, seed: int = 0) -> Outcome:
    """The whole demo; see the module's text.

    Raises:
        ConfigError: the digits are not installed.
        TreadleError: the fresh process failed, or the eager loss differs from the compiled one.
    """
    learn, held_out = load()
    out.mkdir(parents=True, exist_ok=True)
    if threads:
        set_num_threads(threads)
    random.seed(seed)
    model = DigitNet()
    total = epochs * (len(learn) // BATCH)
    optimizer = optim.AdamW(model.parameters(), lr=optim.OneCycle(4e-3, total), weight_decay=1e-2)
    step = train_step(model, loss_fn, optimizer)
    predict = compile_(model)

    started = time.perf_counter()
    board = Board(console, epochs, len(learn) // BATCH)
    accuracy = train(board, step, predict, learn, held_out, epochs, seed)
    seconds = time.perf_counter() - started
    console.print(f"{accuracy:.1%} of {len(held_out):,} held-out digits are read right after {seconds:.1f} s, "
                  "compilation included")

    save_checkpoint(out / "mnist.safetensors", model)
    artifact = out / "mnist.treadle"
    predict.save(artifact)
    told = read_elsewhere(artifact, held_out.images[:BATCH])
    if told["compiler"]:
        raise TreadleError("the fresh process loaded the compiler; an artifact should run without it")
    labels = told["labels"]
    console.print(f"saved {out / 'mnist.safetensors'} and {artifact}; a fresh process loaded the artifact in "
                  f"{told['load_s']:.2f} s, without tracing or compiling, and read {BATCH} digits:")
    captions = [f"read {label}, is {truth}" for label, truth in zip(labels, held_out.labels[:SHOWN], strict=False)]
    sheet = side_by_side(held_out.images[:SHOWN, 0], captions, columns=max(1, min(SHOWN, console.width // 30)))
    console.print(sheet, highlight=False, markup=False, no_wrap=True)
    write_png(held_out.images[:SHOWN, 0], captions, out / "mnist.png")
    console.print(f"the same as a picture: {out / 'mnist.png'}")

    compiled, eager = compare_with_eager(model, step, next(held_out.batches(BATCH)))
    console.print(f"loss of one batch: compiled {compiled:.6f}, eager {eager:.6f}")
    if abs(compiled - eager) > AGREEMENT * max(abs(eager), 1e-3):
        raise TreadleError(f"the compiled loss {compiled} differs from the eager loss {eager}")
    return Outcome(accuracy, seconds, compiled, eager, labels)
