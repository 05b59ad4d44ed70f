"""JAX as its users run it: the whole training step under one jit, parameters and optimizer state donated."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
started = time.perf_counter()
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax import lax  # noqa: E402

imported = time.perf_counter() - started

import contender  # noqa: E402
import problems  # noqa: E402


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def mlp(p, x, sizes):
    for i in range(sizes["layers"] - 1):
        x = jax.nn.relu(linear(p, f"layers.{i}", x))
    return linear(p, f"layers.{sizes['layers'] - 1}", x)


def conv(p, name, x, stride):
    w = p[f"{name}.weight"]
    padding = [(w.shape[-1] // 2,) * 2] * 2
    return lax.conv_general_dilated(x, w, (stride, stride), padding, dimension_numbers=("NCHW", "OIHW", "NCHW"))


def batch_norm(p, name, x):
    mean = x.mean((0, 2, 3), keepdims=True)
    variance = jnp.square(x - mean).mean((0, 2, 3), keepdims=True)
    scale, bias = (p[f"{name}.{part}"][None, :, None, None] for part in ("weight", "bias"))
    return (x - mean) * lax.rsqrt(variance + 1e-5) * scale + bias


def block(p, name, x, stride):
    y = jax.nn.relu(batch_norm(p, f"{name}.norm1", conv(p, f"{name}.conv1", x, stride)))
    y = batch_norm(p, f"{name}.norm2", conv(p, f"{name}.conv2", y, 1))
    if f"{name}.down.conv.weight" in p:
        x = batch_norm(p, f"{name}.down.norm", conv(p, f"{name}.down.conv", x, stride))
    return jax.nn.relu(y + x)


def resnet18(p, x, sizes):
    x = jax.nn.relu(batch_norm(p, "stem.norm", conv(p, "stem.conv", x, 2)))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 3, 3), (1, 1, 2, 2), [(0, 0), (0, 0), (1, 1), (1, 1)])
    for stage, (_, stride) in enumerate(problems.RESNET_STAGES):
        x = block(p, f"stages.{stage}.0", x, stride)
        x = block(p, f"stages.{stage}.1", x, 1)
    return linear(p, "head", x.mean((2, 3)))


def layer_norm(p, name, x):
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def gpt2(p, tokens, sizes):
    b, t = tokens.shape
    heads, width = sizes["heads"], sizes["width"]
    x = p["wte.weight"][tokens] + p["wpe.weight"][:t]
    for i in range(sizes["layers"]):
        name = f"blocks.{i}"
        qkv = linear(p, f"{name}.qkv", layer_norm(p, f"{name}.ln1", x)).reshape(b, t, 3, heads, width // heads)
        y = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], is_causal=True)
        x = x + linear(p, f"{name}.proj", y.reshape(b, t, width))
        x = x + linear(p, f"{name}.down", jax.nn.gelu(linear(p, f"{name}.up", layer_norm(p, f"{name}.ln2", x))))
    return layer_norm(p, "ln", x) @ p["wte.weight"].T


MODELS = {"mlp": mlp, "resnet18": resnet18, "gpt2": gpt2}


def adamw(p, g, state):
    m, v, count = state
    count = count + 1
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, g)

    def update(p, m, v):
        change = (m / (1 - 0.9**count)) / (jnp.sqrt(v / (1 - 0.999**count)) + 1e-8)
        return p * (1 - 1e-3 * 0.01) - 1e-3 * change

    return jax.tree.map(update, p, m, v), (m, v, count)


def sgd(p, g, state):
    state = jax.tree.map(lambda s, g: 0.9 * s + g, state, g)
    return jax.tree.map(lambda p, s: p - 0.01 * s, p, state), state


def training_step(problem):
    # the drawn weights must not live on in a closure: they would count as this framework's memory
    model, sizes, adam = MODELS[problem.name], problem.sizes, problem.optimizer == "adamw"

    def loss_of(p, x, y):
        logits = model(p, x, sizes)
        chosen = jax.nn.log_softmax(logits.reshape(-1, logits.shape[-1]))
        return -jnp.take_along_axis(chosen, y.reshape(-1, 1), axis=1).mean()

    def whole(p, state, x, y):
        loss, g = jax.value_and_grad(loss_of)(p, x, y)
        return loss, *(adamw if adam else sgd)(p, g, state)

    step = jax.jit(whole, donate_argnums=(0, 1))
    p = jax.tree.map(jnp.asarray, problem.weights)
    zeros = jax.tree.map(jnp.zeros_like, p)
    state = (zeros, jax.tree.map(jnp.zeros_like, p), jnp.zeros((), jnp.float32)) if adam else zeros
    x, y = (jnp.asarray(array) for array in problem.batch)

    def run():
        nonlocal p, state
        loss, p, state = step(p, state, x, y)
        # the step is over when its results are, not when the loss is
        jax.block_until_ready((p, state))
        return float(loss)

    return run


def call():
    f = jax.jit(lambda x: x + 1)
    x = jnp.zeros(16)

    def step():
        f(x).block_until_ready()

    return step


def prepare(case, threads):
    if cache := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    return call() if case == "call" else training_step(problems.PROBLEMS[case]())


if __name__ == "__main__":
    contender.main(prepare, imported)
