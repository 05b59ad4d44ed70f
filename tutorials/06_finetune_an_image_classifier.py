# %% [markdown]
# # Fine-tune an image classifier from its ONNX file, and ship it
#
# An exported model is no dead end: Treadle imports it as a module with its weights as parameters, trains it, and writes
# it out again. Here the PP-OCR classifier of text lines, which tells upright from upside-down, learns a third
# class, mirrored. (`pip install "treadle[test,demo]"` brings the model and Pillow.)

# %%
import site
import string
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageFont, ImageOps

import treadle as td
from treadle import finetune

MODEL = "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx"
path = next(Path(folder) / MODEL for folder in site.getsitepackages() if (Path(folder) / MODEL).exists())

# %% [markdown]
# What is in the file, and does anything stand in the way of training it? `check` looks at every node at once
# (`treadle onnx check --train model.onnx` is the same).

# %%
print(td.onnx.check(path, train=True))

# %% [markdown]
# The data: lines of random letters, rendered. An image is f32[3, 48, 192] between -1 and 1.

# %%
CLASSES = ("upright", "upside down", "mirrored")
rng = np.random.default_rng(0)
fonts = [ImageFont.load_default(size) for size in (22, 26, 30, 34)]


def rendered(label):
    text = "".join(rng.choice(list(string.ascii_letters + string.digits + "  "), rng.integers(6, 14)))
    image = Image.new("L", (192, 48), int(rng.integers(170, 256)))
    ink = int(rng.integers(0, 110))
    ImageDraw.Draw(image).text((rng.integers(1, 10), rng.integers(-2, 10)), text, ink, fonts[rng.integers(len(fonts))])
    image = {0: lambda i: i, 1: lambda i: i.rotate(180), 2: ImageOps.mirror}[label](image)
    return np.repeat(np.asarray(image, np.float32)[None] / 127.5 - 1, 3, axis=0)


labels = rng.integers(0, 3, 448)
images = np.stack([rendered(label) for label in labels])
train, held_out = (images[:320], labels[:320]), (images[320:], labels[320:])

# %% [markdown]
# An inference graph has lost what only training needs. `recognise` says what was found and how it is treated: here the
# batch norms keep the statistics of the file, and their scales and shifts train.

# %%
td.random.seed(0)
body = td.onnx.load(path)
print(finetune.recognise(body))

# %% [markdown]
# The old head goes and a new one of three classes comes: the graph is cut before the last product. First the head
# alone is trained, then everything. Which parameters are frozen is an input of the compiled step, so
# both stages run the same program.

# %%
net = finetune.replace_head(body, len(CLASSES))
stages = [finetune.Stage("head.*", epochs=3), finetune.Stage("*", epochs=7)]
tuner = finetune.Tuner(net, train, evaluation=held_out, stages=stages, lr=3e-3, batch_size=16, warmup=0.1, show=False)
before = tuner.evaluate(held_out)
history = tuner.fit()
after = tuner.evaluate(held_out)
head_alone = [e["accuracy"] for e in history.evaluations if e["stage"] == 0][-1]
print(f"accuracy: new head {before['accuracy']:.1%}, trained head {head_alone:.1%}, all trained "
      f"{after['accuracy']:.1%}; {history.speed:.0f} images/s, {tuner.step.stats.compiles} compilation")
assert after["accuracy"] > 0.85 and after["accuracy"] > head_alone and tuner.step.stats.compiles == 1

# %% [markdown]
# Ship it. As ONNX, for whatever runs ONNX: the answers are the same there.

# %%
with tempfile.TemporaryDirectory() as folder:
    exported = Path(folder) / "lines.onnx"
    td.onnx.save(net, exported)
    session = onnxruntime.InferenceSession(exported)
    (theirs,) = session.run(None, {session.get_inputs()[0].name: held_out[0]})
    ours = tuner.predict(held_out[0])
    print(f"onnxruntime differs by {np.abs(theirs - ours).max():.1e} at most")
    assert (theirs.argmax(1) == ours.argmax(1)).all()

    # Or as a compiled program in one file, for machines without a compiler.
    program = Path(folder) / "lines.treadle"
    predict = td.compile(net)
    predict(held_out[0][:8])
    predict.save(program)
    started = time.perf_counter()
    answer = td.load(program)(held_out[0][:8]).numpy()
    print(f"loaded and run in {time.perf_counter() - started:.3f} s:", ", ".join(CLASSES[k] for k in answer.argmax(1)))
    np.testing.assert_array_equal(answer.argmax(1), ours[:8].argmax(1))
