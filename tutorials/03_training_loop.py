# %% [markdown]
# # A training loop
#
# A model is a class, a loss is a function, and `td.train_step` compiles forward pass, backward pass, clipping and
# optimizer into one graph that updates the parameters in place.

# %%
import tempfile
from pathlib import Path

import numpy as np

import treadle as td
from treadle import nn

# %% [markdown]
# The task: two interleaved spirals.

# %%
rng = np.random.default_rng(0)
angle = rng.uniform(0.5, 3 * np.pi, 1024)
arm = rng.integers(0, 2, 1024)
points = np.stack([angle * np.cos(angle + np.pi * arm), angle * np.sin(angle + np.pi * arm)], axis=1) / 10
points = (points + 0.01 * rng.standard_normal(points.shape)).astype(np.float32)


class Net(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.hidden = nn.ModuleList([nn.Linear(2, width), nn.Linear(width, width)])
        self.out = nn.Linear(width, 2)

    def forward(self, x):
        for layer in self.hidden:
            x = td.tanh(layer(x))
        return self.out(x)


def loss_fn(model, x, y):
    return nn.functional.cross_entropy(model(x), y)


td.random.seed(0)
model = Net()
print(model)

# %% [markdown]
# The learning rate may be a schedule. It is an input of the compiled graph: no step is compiled twice because of it.

# %%
steps = 400
optimizer = td.optim.AdamW(model.parameters(), lr=td.optim.OneCycle(2e-2, steps))
step = td.train_step(model, loss_fn, optimizer, clip_norm=1.0)
for i in range(steps):
    batch = rng.integers(0, len(points), 128)
    loss = step(points[batch], arm[batch])
    if i % 100 == 0:
        print(f"step {i:3}: loss {loss.item():.4f}")

# %% [markdown]
# For predictions, compile the model itself. It reads the parameters where they are, so it sees what training did.

# %%
predict = td.compile(model)
accuracy = (predict(points).numpy().argmax(1) == arm).mean()
print(f"accuracy {accuracy:.1%}")
assert accuracy > 0.97

# %% [markdown]
# A checkpoint holds model and optimizer in one safetensors file; a new model takes up where this one stands.

# %%
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "spirals.safetensors"
    td.save_checkpoint(file, model, optimizer)
    again = Net()
    td.load_checkpoint(file, again)
    np.testing.assert_array_equal(td.compile(again)(points).numpy(), predict(points).numpy())

    # A compiled function can be saved too, and loaded where no compiler is.
    artifact = Path(folder) / "spirals.treadle"
    predict.save(artifact)
    np.testing.assert_array_equal(td.load(artifact)(points).numpy(), predict(points).numpy())

# %% [markdown]
# Mixed precision is a rewrite of the graph: matrix products in bfloat16, parameters and sums in float32.

# %%
model = Net()
step = td.train_step(model, loss_fn, td.optim.AdamW(model.parameters(), lr=1e-2), amp="bfloat16")
losses = [step(points[:256], arm[:256]).item() for _ in range(50)]
print(f"bfloat16: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0]
