"""`treadle finetune` on small models: arrays and text in, an ONNX model out."""

import json

import numpy as np
import onnx
import pytest
from finetune import models
from typer.testing import CliRunner

import treadle as td
from treadle.frontend.cli import app

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"good bad fine poor play act a an the is was very".split()]


def invoke(*arguments):
    result = CliRunner().invoke(app, ["finetune", *map(str, arguments)], terminal_width=200)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def pictures(tmp_path):
    """A classifier's file, and pictures whose class is their brightness."""
    onnx.save(models.classifier(dropout=True), tmp_path / "model.onnx")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 64)
    images = (0.3 * rng.standard_normal((64, 1, 6, 6)) + labels[:, None, None, None]).astype(np.float32)
    np.savez(tmp_path / "data.npz", image=images, labels=labels)
    return tmp_path


def pictured(folder):
    """The images and labels of `pictures`."""
    with np.load(folder / "data.npz") as found:
        return found["image"], found["labels"]


def run_exported(path, *inputs):
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: x for i, x in zip(session.get_inputs(), inputs)})[0]


def test_arrays_in_a_model_out(pictures):
    out = pictures / "out"
    text = invoke(pictures / "model.onnx", pictures / "data.npz", "--out", out, "--epochs", 8, "--batch", 8,
                  "--lr", 0.02, "--head-lr", 2)
    assert "dropout that passes on" in text and "batch norm with fixed statistics" in text
    assert "stage 1: 8 epochs" in text and "held out: loss" in text and (out / "best.safetensors").exists()
    images, labels = pictured(pictures)
    logits = run_exported(out / "model.onnx", images)
    assert logits.shape == (64, 2) and np.mean(logits.argmax(1) == labels) > 0.8
    again = td.onnx.load(out / "model.onnx")
    np.testing.assert_allclose(again(images).numpy(), logits, rtol=1e-4, atol=1e-4)
    assert str(again.inputs[0].type) == "f32[batch,1,height,width]"


@pytest.mark.parametrize("how, message", [
    (["--gradual"], "stage 2"), (["--bitfit"], "numbers"), (["--lora", "conv*", "--rank", "1"], "lora.safetensors"),
    (["--batch-norm", "train", "--dropout", "0.1"], "those of the batch"),
])
def test_ways_to_train(pictures, how, message):
    out = pictures / "out"
    text = invoke(pictures / "model.onnx", pictures / "data.npz", "--out", out, "--epochs", 1, "--batch", 8,
                  "--held-out", pictures / "data.npz", *how)
    assert message in text and (out / "model.onnx").exists()


def test_a_dry_run_trains_nothing_and_resuming_goes_on(pictures):
    out = pictures / "out"
    arguments = [pictures / "model.onnx", pictures / "data.npz", "--out", out, "--epochs", 2, "--batch", 8]
    text = invoke(*arguments, "--dry-run", "--train", "conv*, head.*")
    assert "4 of 8 parameters train" in text and not out.exists()
    invoke(*arguments)
    assert "epoch  2/2" not in invoke(*arguments, "--resume"), "all epochs were done"


def test_text_in_a_model_out(tmp_path):
    pytest.importorskip("tokenizers")
    onnx.save(models.encoder(), tmp_path / "encoder.onnx")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    rows = [("a very good play", "yes"), ("the play is bad", "no"), ("fine act", "yes"), ("a poor act", "no")] * 8
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(f"{t},{label}" for t, label in rows))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": t, "label": label}) for t, label in rows))
    out = tmp_path / "out"
    text = invoke(tmp_path / "encoder.onnx", tmp_path / "rows.csv", "--held-out", tmp_path / "rows.jsonl",
                  "--tokenizer", tmp_path / "vocab.txt", "--length", 8, "--pool", "mean", "--mask", "mask",
                  "--out", out, "--epochs", 10, "--batch", 8, "--lr", 0.01, "--layer-decay", 0.8)
    assert "accuracy 1.0000" in text
    assert json.loads((out / "classes.json").read_text()) == ["no", "yes"]


def test_numbers_as_targets(pictures):
    images, _ = pictured(pictures)
    np.savez(pictures / "values.npz", image=images, labels=images.mean((1, 2, 3)))
    text = invoke(pictures / "model.onnx", pictures / "values.npz", "--out", pictures / "out", "--objective", "mse",
                  "--batch", 8, "--epochs", 2)
    assert "mse" in text


def test_what_is_wrong_is_said(pictures, tmp_path):
    model, data = pictures / "model.onnx", pictures / "data.npz"
    np.savez(tmp_path / "other.npz", picture=np.zeros(3), labels=np.zeros(3))
    (tmp_path / "rows.csv").write_text("words,label\nx,y\n")
    (tmp_path / "good.csv").write_text("text,label\nx,y\n")
    for arguments, message in (
        ((model, tmp_path / "other.npz"), "has no array image"), ((model, tmp_path / "none.npz"), "cannot be read"),
        ((model, tmp_path / "rows.csv"), "columns text and label; it has words, label"),
        ((model, tmp_path / "rows.txt"), "not .txt"), ((model, tmp_path / "good.csv"), "text needs --tokenizer"),
        ((model, data, "--share", "2"), "between 0 and 1"), ((model, data, "--train", "nothing"), "fits no parameter"),
        ((model, data, "--lr", "0"), "lr must be above 0"), ((data, data), "data.npz"),
    ):
        with pytest.raises(td.TreadleError, match=message):
            invoke(*arguments)
