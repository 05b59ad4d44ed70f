# %% [markdown]
# # Autodiff
#
# Gradients are made by rewriting the graph: every op has a rule that says how a cotangent passes through it. So they
# can be printed, compiled, and differentiated again.

# %%
import numpy as np

import treadle as td


def f(x):
    return (td.sin(x) * x).sum()


x = td.tensor(np.linspace(-2, 2, 5), dtype="float64")
df = td.grad(f)
np.testing.assert_allclose(df(x).numpy(), np.cos(x.numpy()) * x.numpy() + np.sin(x.numpy()))

# %% [markdown]
# The gradient of a function is a function; tracing it shows forward and backward pass in one graph.

# %%
print(td.trace(df, td.spec((5,), "float64")))

# %% [markdown]
# They nest. The second derivative of a function of one number:

# %%
def g(x):
    return x**3


second = td.grad(td.grad(g))
print(second(td.tensor(2.0)))  # 12
assert abs(second(td.tensor(2.0)).item() - 12) < 1e-4

# %% [markdown]
# `value_and_grad` gives both; `argnums` chooses the arguments, which may be trees of tensors.

# %%
def loss(parameters, x, y):
    prediction = x @ parameters["w"] + parameters["b"]
    return ((prediction - y) ** 2).mean()


rng = np.random.default_rng(0)
parameters = {"w": td.tensor(rng.standard_normal(3)), "b": td.tensor(0.0, dtype="float64")}
data, target = rng.standard_normal((20, 3)), rng.standard_normal(20)
value, gradient = td.compile(td.value_and_grad(loss))(parameters, data, target)
print(value.item(), {name: part.shape for name, part in gradient.items()})

# %% [markdown]
# `vjp` pulls cotangents back through a function of several results, `jvp` pushes tangents forward. Their dot
# products agree: that is how the gradients of every op are tested.

# %%
def two(x):
    return td.exp(x), x.sum()


v = rng.standard_normal(5)
cotangents = (rng.standard_normal(5), np.float64(0.5))
_, pull = td.vjp(two, x)
_, pushed = td.jvp(two, (x,), (td.tensor(v),))
(pulled,) = pull(tuple(td.tensor(c, dtype="float64") for c in cotangents))
left = sum((c * p.numpy()).sum() for c, p in zip(cotangents, pushed, strict=True))
np.testing.assert_allclose(left, (pulled.numpy() * v).sum())

# %% [markdown]
# For debugging there is the dynamic way: operations that run at once are recorded, and `backward()` walks the record
# with the same rules.

# %%
w = td.tensor(np.ones(3), requires_grad=True)
(w * w).sum().backward()
print(w.grad)
np.testing.assert_allclose(w.grad.numpy(), 2)

# %% [markdown]
# What has no gradient says so.

# %%
for bad in (lambda: td.grad(lambda x: x * 2)(td.tensor([1.0, 2.0])), lambda: td.grad(f)(td.tensor([1, 2, 3]))):
    try:
        bad()
    except td.GradientError as error:
        print("as expected:", error)
