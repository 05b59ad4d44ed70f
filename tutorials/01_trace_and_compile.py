# %% [markdown]
# # Trace and compile
#
# A function of tensors runs at once, like NumPy. The same function can be *traced* into a graph that you can read,
# and *compiled* into machine code. Run this file, or step through its cells in an editor that knows `# %%`.

# %%
import numpy as np

import treadle as td


def layer(x, w, b):
    return td.tanh(x @ w + b)


rng = np.random.default_rng(0)
x = rng.standard_normal((8, 784), np.float32)
w = rng.standard_normal((784, 10), np.float32) / 28
b = np.zeros(10, np.float32)

# %% [markdown]
# At once: tensors in, tensors out. NumPy arrays are taken as they are.

# %%
at_once = layer(td.tensor(x), td.tensor(w), td.tensor(b))
print(at_once.shape, at_once.dtype)

# %% [markdown]
# Traced: the function is called once with stand-ins that know a shape and a dtype but have no elements, and what it
# does to them is written down. The text of a graph parses back to an equal graph.

# %%
graph = td.trace(layer, td.spec((8, 784)), td.spec((784, 10)), td.spec((10,)))
print(graph)
assert td.ir.parse(str(graph)) == graph

# %% [markdown]
# Python control flow over sizes and options runs while tracing and leaves no mark. Over *elements* it cannot, since
# there are none yet; the error names the line and what to use instead.

# %%
def clipped(x):
    if x.sum() > 100:
        return x * 0
    return x


try:
    td.trace(clipped, td.spec((8,)))
except td.TraceError as error:
    print("as expected:", error)


def clipped_by_cond(x):
    return td.cond(x.sum() > 100, lambda x: x * 0, lambda x: x, x)


print(td.trace(clipped_by_cond, td.spec((8,))))

# %% [markdown]
# Compiled: the graph is simplified, fused into kernels and lowered to machine code the first time that the function
# is called with some types of arguments. Later calls with the same types go straight to the code.

# %%
compiled = td.compile(layer)
y = compiled(x, w, b)
np.testing.assert_allclose(y.numpy(), at_once.numpy(), rtol=1e-5, atol=1e-5)
y = compiled(x[:4], w, b)  # another batch size: compiled anew
print(y.shape)

# %% [markdown]
# Arguments may be nested in tuples, lists and dicts, and so may results.

# %%
def statistics(data):
    return {name: (column.mean(), column.std()) for name, column in data.items()}


print(td.compile(statistics)({"height": np.array([1.6, 1.8, 1.7]), "age": np.array([20.0, 40.0, 60.0])}))
