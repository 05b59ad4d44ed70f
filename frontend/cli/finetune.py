"""`treadle finetune`: an ONNX model, a table of examples, and an ONNX model comes out.

Data is an `.npz` with an array for each input of the model, under its name, and `labels`; or, for a text encoder, a
`.csv`, `.tsv` or `.jsonl` with the columns `text` and `label` and a vocabulary of word pieces (or a `tokenizer.json`).
"""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ...ir.errors import ConfigError
from .. import finetune as ft
from .. import onnx as onnx_
from .. import random

LABELS = "labels"


@dataclass(frozen=True)
class Task:
    """What a run of the command is asked for; each field is an option of `treadle finetune`."""

    model: Path
    data: Path
    out: Path = Path("out")
    held_out: Path | None = None
    share: float = 0.1
    output: str = ""
    pool: str = "none"
    mask: str = ""
    train: str = "*"
    gradual: bool = False
    bitfit: bool = False
    lora: str = ""
    rank: int = 8
    dropout: float | None = None
    batch_norm: str = "frozen"
    tokenizer: Path | None = None
    length: int = 64
    resume: bool = False
    opset: int | None = None
    check_only: bool = False


@dataclass(frozen=True)
class Examples:
    """Inputs by name, labels (numbers or class numbers), and the names of the classes ("" where they are numbers)."""

    inputs: dict[str, np.ndarray]
    labels: np.ndarray
    classes: list[str]

    def take(self, rows: np.ndarray) -> Examples:
        """Some of the examples."""
        return Examples({k: v[rows] for k, v in self.inputs.items()}, self.labels[rows], self.classes)

    def columns(self) -> tuple[np.ndarray, ...]:
        """Inputs, then labels."""
        return (*self.inputs.values(), self.labels)


def read(path: Path, task: Task, names: Sequence[str], classes: list[str] | None = None) -> Examples:
    """The examples of a file; see the module's text.

    Args:
        path: of the file.
        task: for the tokenizer.
        names: inputs of the model.
        classes: as found in the training data, for the held-out data.

    Raises:
        ConfigError: the file is missing, of another kind, or does not fit the model.
    """
    try:
        if path.suffix == ".npz":
            inputs, labels = _arrays(path, names)
        else:
            texts, labels = _texts(path)
            inputs = _pieces(texts, task, names)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} cannot be read as examples: {error}") from error
    if np.issubdtype(labels.dtype, np.floating):
        return Examples(inputs, labels.astype(np.float32), [])
    if np.issubdtype(labels.dtype, np.integer):
        return Examples(inputs, labels.astype(np.int64), classes or [""] * (int(labels.max()) + 1))
    known = classes or sorted({str(x) for x in labels})
    if unknown := sorted({str(x) for x in labels} - set(known)):
        raise ConfigError(f"{path}: the label {unknown[0]!r} is not among those learned from: {', '.join(known)}")
    return Examples(inputs, np.array([known.index(str(x)) for x in labels], np.int64), known)


def _arrays(path: Path, names: Sequence[str]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    with np.load(path, allow_pickle=False) as found:
        if missing := [n for n in (*names, LABELS) if n not in found]:
            raise ConfigError(f"{path} has no array {', '.join(missing)}; it needs one for each input of the model "
                              f"({', '.join(names)}) and {LABELS!r}, and has {', '.join(found.files)}")
        return {n: found[n] for n in names}, found[LABELS]


def _texts(path: Path) -> tuple[list[str], np.ndarray]:
    rows: list[Mapping[str, Any]]
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    elif path.suffix in (".csv", ".tsv"):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    else:
        raise ConfigError(f"{path}: examples are .npz, .csv, .tsv or .jsonl, not {path.suffix or 'without a suffix'}")
    if not rows or "text" not in rows[0] or "label" not in rows[0]:
        raise ConfigError(f"{path} needs the columns text and label"
                          + (f"; it has {', '.join(map(str, rows[0]))}" if rows else " and at least one row"))
    return [str(r["text"]) for r in rows], np.array([r["label"] for r in rows])


def _pieces(texts: Sequence[str], task: Task, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Texts as the inputs of an encoder, which are told apart by their names."""
    if importlib.util.find_spec("tokenizers") is None:
        raise ConfigError("text is cut into pieces by the package tokenizers, which is not installed: pip install "
                          "tokenizers")
    import tokenizers

    if task.tokenizer is None:
        raise ConfigError("text needs --tokenizer: a vocab.txt of word pieces, or a tokenizer.json")
    made: Any
    if task.tokenizer.suffix == ".json":
        made = tokenizers.Tokenizer.from_file(str(task.tokenizer))
    else:
        made = tokenizers.BertWordPieceTokenizer(str(task.tokenizer), lowercase=True)
    made.enable_truncation(task.length)
    made.enable_padding(length=task.length)
    found = made.encode_batch(list(texts))
    inputs = {}
    for name in names:
        part = "attention_mask" if "mask" in name else "type_ids" if "type" in name else "ids"
        inputs[name] = np.array([getattr(e, part) for e in found], np.int64)
    return inputs


def split(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """(to learn from, held out), the same for every run."""
    if not 0.0 < share < 1.0:
        raise ConfigError(f"--share lies between 0 and 1, got {share}")
    order = np.random.default_rng(seed).permutation(len(examples.labels))
    held = max(1, round(share * len(order)))
    return examples.take(order[held:]), examples.take(order[:held])


def run(console: Console, task: Task, settings: ft.Settings) -> ft.History | None:
    """The whole command: import, report, head, training, export.

    Returns:
        What the run did; None if it was only asked what it would do.
    """
    random.seed(settings.seed)  # of the head and of the adapters
    body = onnx_.load(task.model)
    report = ft.prepare(body, batch_norm=task.batch_norm, dropout=task.dropout)
    wide = report.findings and console.width >= 100
    console.print(report.table() if wide else str(report), soft_wrap=not wide, markup=False, highlight=False)
    learn = read(task.data, task, body.input_names)
    held_out = None if task.held_out is None else read(task.held_out, task, body.input_names, learn.classes)
    if held_out is None:
        learn, held_out = split(learn, task.share, settings.seed)
    net = _headed(body, task, len(learn.classes) or (1 if learn.labels.ndim == 1 else learn.labels.shape[1]))
    stages = _what_trains(net, task, settings)
    _say(console, net, stages)
    if task.check_only:
        return None
    labelled = _labels(learn, settings), _labels(held_out, settings)
    tuner = ft.Tuner(net, labelled[0], evaluation=labelled[1], folder=task.out, settings=settings, stages=stages)
    history = tuner.fit(resume=task.resume)
    found = tuner.evaluate(labelled[1])
    console.print(f"held out: {', '.join(f'{k} {v:.4f}' for k, v in found.items())}; {history.speed:,.0f} samples/s"
                  + (f"; stopped: {history.stopped}" if history.stopped else ""))
    _export(console, net, body, task, learn.classes)
    return history


def _labels(examples: Examples, settings: ft.Settings) -> tuple[np.ndarray, ...]:
    """Columns whose labels have the shape that the objective compares outputs with."""
    labels = examples.labels
    if labels.dtype != np.int64 and labels.ndim == 1 or settings.objective in ("mse", "l1", "bce"):
        labels = labels.astype(np.float32).reshape(len(labels), -1)
    return (*examples.inputs.values(), labels)


def _headed(body: Any, task: Task, classes: int) -> Any:
    if task.output or task.pool != "none":
        return ft.add_head(body, classes, output=task.output or 0, pool=task.pool, mask=task.mask or None)
    return ft.replace_head(body, classes)


def _what_trains(net: Any, task: Task, settings: ft.Settings) -> list[ft.Stage]:
    if task.bitfit:
        return [ft.Stage(tuple(ft.names.literal(n) for n in ft.bitfit(net, also="head.*")), settings.epochs)]
    if task.lora:
        ft.add_lora(net, task.lora, rank=task.rank)
        return [ft.Stage("*.lora.*, head.*", settings.epochs)]
    if task.gradual:
        return ft.gradual(net, epochs=settings.epochs)
    return [ft.Stage(task.train, settings.epochs)]


def _say(console: Console, net: Any, stages: Sequence[ft.Stage]) -> None:
    sizes = {n: int(p.size) for n, p in ft.parameters(net).items()}
    for i, stage in enumerate(stages, 1):
        names = ft.select(net, stage.train)
        console.print(f"stage {i}: {stage.epochs} epochs, {len(names)} of {len(sizes)} parameters train, "
                      f"{sum(sizes[n] for n in names):,} of {sum(sizes.values()):,} numbers", highlight=False)


def _export(console: Console, net: Any, body: Any, task: Task, classes: Sequence[str]) -> None:
    path = task.out / "model.onnx"
    if task.lora:
        ft.save_lora(net, task.out / "lora.safetensors", also="head.*")
        ft.merge_lora(net)
        console.print(f"wrote {task.out / 'lora.safetensors'}: the adapters alone; the model has them merged",
                      soft_wrap=True)
    options: dict[str, Any] = {"opset": task.opset} if task.opset is not None else {}
    onnx_.save(net, path, *body.inputs, input_names=body.input_names, output_names=["output"], **options)
    if any(classes):
        (task.out / "classes.json").write_text(json.dumps(list(classes)) + "\n", encoding="utf-8")
    console.print(f"wrote {path}", soft_wrap=True)
