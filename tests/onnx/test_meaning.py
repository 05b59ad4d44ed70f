"""Imported models do what they are for: one reads rendered text, one tells what is in a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_real_models import MODELS, find

import treadle as td

pytestmark = pytest.mark.slow

HEIGHT, WIDTH = 48, 320


def rendered(text: str) -> np.ndarray:
    """A line of text as the model takes it: f32[3, 48, 320] in -1 to 1, dark on white, padded with zeros."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(30)
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("RGB", (right - left + 16, HEIGHT), "white")
    ImageDraw.Draw(image).text((8 - left, (HEIGHT - bottom + top) // 2 - top), text, "black", font)
    assert image.width <= WIDTH, f"{text!r} is too long for one line"
    pixels = np.zeros((3, HEIGHT, WIDTH), np.float32)
    pixels[:, :, :image.width] = np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1
    return pixels


def read_out(probabilities: np.ndarray, alphabet: list[str]) -> str:
    """The best path of connectionist temporal classification: repeats merged, blanks (class 0) dropped."""
    best = probabilities.argmax(-1)
    return "".join(alphabet[k] for i, k in enumerate(best) if k and (i == 0 or k != best[i - 1]))


def test_recognition_reads_rendered_text():
    import onnx

    pytest.importorskip("PIL")
    path = find(MODELS["recognition"][0])
    listed = next(p.value for p in onnx.load(path).metadata_props if p.key == "character").split("\n")
    alphabet = ["", *listed, " "]
    lines = ["Treadle 2026", "weft and warp", "loss = 0.125", "matmul + bias"]
    read = td.compile(td.onnx.load(path))
    found = read(np.stack([rendered(line) for line in lines])).numpy()
    assert [read_out(p, alphabet).replace(" ", "") for p in found] == [line.replace(" ", "") for line in lines]


def features(content: bytes) -> np.ndarray:
    """i32[2048]: the first and the last 1,024 bytes without outer blanks, filled up with 256."""
    head, tail = content[:4096].strip()[:1024], content[-4096:].strip()[-1024:]
    return np.array([*head, *[256] * (1024 - len(head)), *[256] * (1024 - len(tail)), *tail], np.int32)


def test_magika_labels_files(tmp_path):
    path = find(MODELS["magika"][0])
    labels = json.loads(Path(path).with_name("config.min.json").read_text())["target_labels_space"]
    np.save(tmp_path / "array.npy", np.arange(5000.0))
    root = Path(__file__).resolve().parents[2]
    files = {"python": root / "frontend" / "compile.py", "markdown": root / "README.md",
             "toml": root / "pyproject.toml", "npy": tmp_path / "array.npy", "onnx": path}
    label = td.compile(td.onnx.load(path))
    found = label(np.stack([features(Path(file).read_bytes()) for file in files.values()])).numpy()
    assert [labels[k] for k in found.argmax(1)] == list(files)
