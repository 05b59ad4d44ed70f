# %% [markdown]
# # Writing an op
#
# An op is a record: what it is called, what types it gives, what it means in NumPy. Rules say how it is differentiated
# and compiled. With them an op of your own works everywhere that a built-in one does.
#
# Most functions need no op: a Python function of tensors is traced and fused. An op pays where a derivative or a kernel
# should be written by hand. Here is softplus with a temperature, `log(1 + exp(beta x)) / beta`, which overflows if
# written down naively, and whose derivative is simply `sigmoid(beta x)`.

# %%
import numpy as np

import treadle as td


def infer(x, beta):
    """The result has the operand's type; what is not floating is refused, with a message for the user."""
    if not x.dtype.is_float:
        raise td.DTypeError(f"needs a floating dtype, got {x}")
    return x


def reference(x, beta):
    """The meaning, in NumPy: runs in eager mode and is what tests compare with."""
    return (np.maximum(x, 0) + np.log1p(np.exp(-np.abs(beta * x))) / beta).astype(x.dtype)


def vjp(ct, out, x, beta):
    """The cotangent of x, in tensors; so second derivatives follow by themselves."""
    return ct * td.sigmoid(beta * x)


def decompose(x, beta):
    """The same in simpler ops: how it is compiled."""
    return td.maximum(x, 0) + td.log1p(td.exp(-td.abs(beta * x))) / beta


sharp_softplus = td.plugins.register_op("sharp_softplus", operands="x", attrs={"beta": 1.0}, infer=infer,
                                        reference=reference, vjp=vjp, decompose=decompose,
                                        doc="log(1 + exp(beta x)) / beta")

# %% [markdown]
# It runs at once, stands in graphs under its name, and says what it refuses.

# %%
x = td.tensor(np.linspace(-3, 3, 7), dtype="float32")
print(sharp_softplus(x, beta=10.0))
print(td.trace(lambda x: sharp_softplus(x, beta=2.0), td.spec((7,))))
try:
    sharp_softplus(td.tensor([1, 2]))
except td.DTypeError as error:
    print("as expected:", error)

# %% [markdown]
# Its gradients, first and second, against finite differences.

# %%
def f(x):
    return sharp_softplus(x, beta=2.0).sum()


point, h = td.tensor(0.3, dtype="float64"), 1e-5
for function in (f, td.grad(f)):
    slope = (function(point + h).item() - function(point - h).item()) / (2 * h)
    assert abs(td.grad(function)(point).item() - slope) < 1e-8

# %% [markdown]
# Compiled, it fuses with its neighbours: this is one kernel.

# %%
compiled = td.compile(lambda x: sharp_softplus(x * 2 + 1, beta=2.0) - 1)
np.testing.assert_allclose(compiled(x).numpy(), reference(x.numpy() * 2 + 1, 2.0) - 1, rtol=1e-5, atol=1e-6)
print("kernels:", compiled.stats.kernels)
assert compiled.stats.kernels == 1

# %% [markdown]
# Instead of a decomposition an op may bring its own lowering: `Pointwise` gives one element of the result as a TIR
# expression of the operands' elements. The loops, vectors and threads around it are the compiler's business.

# %%
from tvm import tirx

from treadle.schedules.lower_slots import Pointwise


def squared_relu(node, x):
    positive = tirx.max(x, tirx.const(0, x.ty.dtype))
    return positive * positive


relu2 = td.plugins.register_op(
    "relu2", operands="x", infer=lambda x: x, reference=lambda x: np.maximum(x, 0) ** 2,
    vjp=lambda ct, out, x: ct * 2 * td.maximum(x, 0), lower=Pointwise(squared_relu, elementwise=True),
    traits=("elementwise",))
np.testing.assert_allclose(td.compile(relu2)(x).numpy(), relu2(x).numpy())
gradient = td.compile(td.grad(lambda x: relu2(x).sum()))
np.testing.assert_allclose(gradient(x).numpy(), 2 * np.maximum(x.numpy(), 0), rtol=1e-6)

# %% [markdown]
# On several processes (`07_several_processes.py`) such ops are split like others: `shard="b k, k n -> b n"` would say
# which dimensions of a product's operands and result go together.
#
# A layer, an optimizer or a loss needs no registration. A layer is a class of `td.nn.Module`; a loss is a function; an
# optimizer says how one parameter is updated, and that function becomes part of the compiled step.

# %%
class SignDescent(td.optim.Optimizer):
    """Steps of fixed size against the sign of the gradient (signSGD, Bernstein et al. 2018)."""

    def update_parameter(self, param, grad, state, scalars, options):
        return param - scalars["lr"] * td.sign(grad), state


class Net(td.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = td.nn.Linear(4, 16)
        self.outer = td.nn.Linear(16, 1)

    def forward(self, x):
        return self.outer(relu2(self.inner(x)))


def absolute_error(model, x, y):
    return td.abs(model(x) - y).mean()


td.random.seed(0)
rng = np.random.default_rng(0)
data = rng.standard_normal((256, 4), np.float32)
target = (data**2).sum(1, keepdims=True)
net = Net()
step = td.train_step(net, absolute_error, SignDescent(net.parameters(), lr=5e-3))
losses = [step(data, target).item() for _ in range(200)]
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
assert losses[-1] < 0.3 * losses[0]
