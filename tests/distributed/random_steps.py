"""Random training steps: models of few layers, batches of odd sizes, plans that nobody would write.

`case(seed)` draws a mesh, a plan, a model and a batch; `run(case)` partitions two steps of it, interprets all ranks in
one process, and compares with the graph of one process in f64. Everything agrees, or is refused by a `TreadleError`
that a person can act on.
"""

import random
from dataclasses import dataclass

import numpy as np

import treadle as td
from treadle.distributed import Mesh, lockstep
from treadle.ir import interp
from treadle.ir.verify import verify

F = td.nn.functional
MESHES = [{"data": 2}, {"data": 3}, {"data": 4}, {"tensor": 2}, {"tensor": 3}, {"tensor": 4}, {"data": 2, "tensor": 2},
          {"tensor": 2, "data": 2}, {"data": 2, "tensor": 3}, {"data": 3, "tensor": 2}, {"data": 2, "tensor": 4},
          {"data": 4, "tensor": 2}, {"data": 2, "tensor": 2, "other": 2}, {"other": 2, "tensor": 2, "data": 2}]


class Part(td.nn.Module):
    """A layer with the function that applies it."""

    def __init__(self, apply, **layers):
        super().__init__()
        self.apply = apply
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.apply(self, x)


class Net(td.nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.parts = td.nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


def free(n):
    """A parameter of the shape n."""
    values = np.random.default_rng(sum(n) + len(n)).standard_normal(n)
    return td.nn.Parameter(td.tensor(values))


# Parts: functions of (random.Random, shape), None if they do not take the shape --------------------------------------


def on_axis(f):
    """A part that works along a random axis."""
    def make(r, s):
        axis = r.randrange(len(s))
        return f(r, s, axis)
    return make


def plain(f):
    return lambda r, s: Part(lambda self, x: f(x))


def linear(r, s):
    n = r.choice([2, 3, 4, 5, 6, 8, 12])
    return Part(lambda self, x: self.layer(x), layer=td.nn.Linear(s[-1], n, bias=r.random() < 0.7))


def norm(r, s):
    layer = r.choice([td.nn.LayerNorm, td.nn.RMSNorm])(s[-1])
    return Part(lambda self, x: self.layer(x), layer=layer)


def wide_norm(r, s):
    return Part(lambda self, x: self.layer(x), layer=td.nn.LayerNorm(s[-2:])) if len(s) > 2 else None


def batch_norm(r, s):
    kinds = {2: td.nn.BatchNorm1d, 3: td.nn.BatchNorm1d, 4: td.nn.BatchNorm2d, 5: td.nn.BatchNorm3d}
    return Part(lambda self, x: self.layer(x), layer=kinds[len(s)](s[1])) if s[0] > 1 else None


def group_norm(r, s):
    if len(s) < 3:
        return None
    groups = r.choice([g for g in (1, 2, 3, 4, s[1]) if s[1] % g == 0])
    layer = td.nn.GroupNorm(groups, s[1]) if r.random() < 0.7 else td.nn.InstanceNorm(s[1], affine=True)
    return Part(lambda self, x: self.layer(x), layer=layer)


def conv(r, s):
    if len(s) < 3:
        return None
    dims = len(s) - 2
    groups = r.choice([g for g in (1, 1, 2, 3, 4, s[1]) if s[1] % g == 0])
    out = groups * r.choice([1, 2, 3])
    if r.random() < 0.3:
        layer = getattr(td.nn, f"ConvTranspose{dims}d")(s[1], out, 2, stride=r.choice([1, 2]), groups=groups)
    else:
        layer = getattr(td.nn, f"Conv{dims}d")(s[1], out, r.choice([1, 3]), stride=r.choice([1, 1, 2]), padding=1,
                                               groups=groups)
    return Part(lambda self, x: self.layer(x), layer=layer)


def pool(r, s):
    if len(s) < 3 or min(s[2:]) < 2:
        return None
    kind = r.choice(["MaxPool", "AvgPool"])
    layer = getattr(td.nn, f"{kind}{len(s) - 2}d")(2, stride=r.choice([1, 2]))
    return Part(lambda self, x: self.layer(x), layer=layer)


def recurrent(r, s):
    if len(s) != 3:
        return None
    layer = r.choice([td.nn.LSTM, td.nn.GRU, td.nn.RNN])(s[-1], r.choice([2, 3, 4]), batch_first=True,
                                                        bidirectional=r.random() < 0.3)
    return Part(lambda self, x: self.layer(x)[0], layer=layer)


def attention(r, s):
    if len(s) != 3:
        return None
    heads = r.choice([h for h in (1, 2, 3, 4) if s[-1] % h == 0])
    causal, masked = r.random() < 0.5, r.random() < 0.4
    mask = np.tril(np.ones((s[1], s[1]), bool), 1)
    drop = r.choice([0.0, 0.0, 0.25])
    if r.random() < 0.3:
        return Part(lambda self, x: self.layer(x, causal=causal),
                    layer=td.nn.TransformerEncoderLayer(s[-1], heads, 8, dropout=drop, norm_first=r.random() < 0.5))
    return Part(lambda self, x: first(self.layer(x, x, x, causal=causal, mask=td.tensor(mask) if masked else None)),
                layer=td.nn.MultiHeadAttention(s[-1], heads, dropout=drop))


def first(x):
    return x[0] if isinstance(x, tuple) else x


def bilinear(r, s):
    return Part(lambda self, x: self.layer(x, x), layer=td.nn.Bilinear(s[-1], s[-1], r.choice([2, 4])))


def embed(r, s):
    n = r.choice([5, 6, 8])
    return Part(lambda self, x: self.layer(td.clip(td.abs(td.round(x * 2)), 0, n - 1).astype("int64")) * td.mean(x),
                layer=td.nn.Embedding(n, r.choice([2, 3, 4]))) if len(s) < 4 else None


def dropout(r, s):
    return Part(lambda self, x: self.layer(x), layer=td.nn.Dropout(0.3))


def factors(s):
    return [(d, k) for d, n in enumerate(s) for k in (2, 3, 4) if n % k == 0]


def divide(r, s):
    """A dimension becomes two."""
    if len(s) > 4 or not (ways := factors(s)):
        return None
    d, k = r.choice(ways)
    flip = r.random() < 0.5
    two = lambda n: (k, n // k) if flip else (n // k, k)  # noqa: E731
    return Part(lambda self, x: x.reshape((*x.shape[:d], *two(x.shape[d]), *x.shape[d + 1:])))


def unite(r, s):
    """Two dimensions become one."""
    if len(s) < 3:
        return None
    d = r.randrange(len(s) - 1)
    return Part(lambda self, x: x.reshape((*x.shape[:d], x.shape[d] * x.shape[d + 1], *x.shape[d + 2:])))


def permute(r, s):
    perm = list(range(len(s)))
    r.shuffle(perm)
    return Part(lambda self, x: td.transpose(x, tuple(perm)))


def halves(r, s, axis):
    if s[axis] % 2:
        return None
    way = r.choice([lambda a, b: a * td.tanh(b), lambda a, b: td.concatenate([b, a, b], axis=axis),
                    lambda a, b: td.maximum(a, b), lambda a, b: td.stack([a, b], axis=axis)])
    if len(s) > 3:
        way = lambda a, b: a * td.tanh(b)  # noqa: E731
    return Part(lambda self, x: way(*td.split(x, 2, axis=axis)))


def padded(r, s, axis):
    low, high = r.choice([(1, 0), (0, 1), (1, 1), (2, 2), (0, 3)])
    value = r.choice([0.0, 0.0, 1.5])
    widths = [(low, high) if i == axis else (0, 0) for i in range(len(s))]
    return Part(lambda self, x: td.pad(x, widths, constant_values=value))


def sliced(r, s, axis):
    start, step = r.choice([0, 1]), r.choice([1, 1, 2])
    stop = s[axis] - r.choice([0, 1])
    if stop <= start:
        return None
    at = tuple(slice(start, stop, step) if i == axis else slice(None) for i in range(len(s)))
    return Part(lambda self, x: x[at])


def picked(r, s, axis):
    rows = np.asarray([r.randrange(s[axis]) for _ in range(r.choice([1, 2, 4]))])
    return Part(lambda self, x: td.take(x, td.tensor(rows), axis=axis))


def along(r, s, axis):
    return Part(lambda self, x: td.take_along_axis(x, td.argsort(td.sin(x), axis=axis), axis=axis))


def scattered(r, s, axis):
    if len(s) > 3:
        return None
    rows = np.asarray([r.randrange(4) for _ in range(s[axis])])
    def apply(self, x):
        x = td.moveaxis(x, axis, 0)
        return td.scatter_add(td.zeros((4, *x.shape[1:]), x.dtype), td.tensor(rows), x)
    return Part(apply)


def reduced(r, s, axis):
    f = r.choice([td.mean, td.sum, td.max, td.min, td.logsumexp, td.std, td.prod])
    keep = r.random() < 0.5 or len(s) < 3
    way = r.choice([lambda x, y: x - y, lambda x, y: x * td.tanh(y)]) if keep else lambda x, y: y
    return Part(lambda self, x: way(x, f(x, axis=axis, keepdims=keep)))


def runs(r, s, axis):
    f = r.choice([lambda x: td.cumsum(x, axis=axis), lambda x: td.sort(x, axis=axis), lambda x: td.flip(x, axis=axis),
                  lambda x: td.roll(x, 1, axis=axis), lambda x: td.softmax(x, axis=axis),
                  lambda x: td.log_softmax(x, axis=axis), lambda x: td.top_k(x, 2, axis=axis)[0] if s[axis] > 2 else x,
                  lambda x: x * td.one_hot(td.argmax(x, axis=-1), x.shape[-1]).astype(x.dtype)])
    return Part(lambda self, x: f(x))


def product(r, s):
    """x @ x.T of the last two dimensions, or an einsum with a parameter over random dimensions."""
    if r.random() < 0.3 and len(s) > 1:
        return Part(lambda self, x: td.matmul(td.tanh(x), x, transpose_y=True))
    letters = "abcde"[:len(s)]
    lost = r.choice(letters)
    kept = letters.replace(lost, "z")
    w = free((s[letters.index(lost)], r.choice([2, 3, 4])))
    return Part(lambda self, x: td.einsum(f"{letters},{lost}z->{kept}", x, self.w), w=w)


def scale(r, s):
    """A parameter that is broadcast."""
    shape = tuple(n if r.random() < 0.6 else 1 for n in s[1:])[r.randrange(len(s)):]
    op = r.choice([lambda x, w: x * w, lambda x, w: x + w, lambda x, w: td.where(x > w, x, w * 0.5)])
    return Part(lambda self, x: op(x, self.w), w=free(shape))


def tables(r, s):
    """A constant as large as the value: of all dimensions."""
    table = np.random.default_rng(len(s)).standard_normal(s)
    return Part(lambda self, x: x * td.tensor(table))


def chosen(r, s):
    f = r.choice([lambda x: td.where(x > td.mean(x), x, td.tanh(x)), lambda x: td.where((x > 0) & (x < 1), x, x * 0.1),
                  lambda x: x * ((x > 0).astype("int64") % 2).astype(x.dtype), lambda x: td.clip(x, -0.7, 0.8),
                  lambda x: x * td.norm(x), lambda x: x / (1 + td.sum(td.abs(x))),
                  lambda x: x * td.arange(x.shape[-1]).astype(x.dtype), lambda x: td.any(x > 0, axis=0) * x,
                  lambda x: x + td.count_nonzero(x > 0.2) * 0.01, lambda x: x * td.eye(x.shape[-1]).astype(x.dtype)[0]])
    return Part(lambda self, x: f(x))


def activation(r, s):
    f = r.choice([F.relu, td.tanh, F.gelu, F.silu, td.sigmoid, td.sin, F.softplus, td.square, lambda x: td.exp(-x * x)])
    return Part(lambda self, x: f(x))


def scanned(r, s):
    """A scan over a random axis, of as many steps as there are."""
    axis = r.randrange(len(s))
    def apply(self, x):
        rows = td.moveaxis(x, axis, 0)
        def body(h, row):
            h = td.tanh(h * self.w + row)
            return h, h * row
        last, found = td.scan(body, rows[0] * 0.0, rows)
        return found + last
    return Part(apply, w=free(tuple(n for i, n in enumerate(s) if i != axis)[-1:]))


def looped(r, s):
    def apply(self, x):
        x, _ = td.while_loop(lambda state: state[1] < 3, lambda state: (td.sin(state[0]) * 1.1, state[1] + 1),
                             (x, td.tensor(np.asarray(0))))
        return x
    return Part(lambda self, x: x + td.stop_gradient(apply(self, x)))


def branched(r, s):
    return Part(lambda self, x: td.cond(td.mean(td.square(x)) > 0.3, lambda x: x * self.w,
                                        lambda x: td.sin(x) - self.w, x), w=free(s[-1:]))


def checkpointed(r, s):
    layer = td.nn.Linear(s[-1], s[-1])
    return Part(lambda self, x: td.checkpoint(lambda x: td.tanh(self.layer(x)))(x), layer=layer)


def constrained(r, s, mesh):
    """An activation that is to lie in some way."""
    dims = [None] * len(s)
    for axis in mesh:
        if r.random() < 0.7:
            d = r.randrange(len(s))
            name = axis if r.random() < 0.8 else f"{axis}:2"
            dims[d] = name if dims[d] is None else (*((dims[d],) if isinstance(dims[d], str) else dims[d]), name)
    return Part(lambda self, x: td.distributed.constrain(x, *dims))


PARTS = [linear, linear, linear, norm, wide_norm, batch_norm, group_norm, conv, conv, pool, recurrent, attention,
         attention, bilinear, embed, dropout, divide, divide, unite, unite, permute, permute, on_axis(halves),
         on_axis(padded), on_axis(sliced), on_axis(picked), on_axis(along), on_axis(scattered), on_axis(reduced),
         on_axis(reduced), on_axis(runs), on_axis(runs), product, product, scale, tables, chosen, activation,
         activation, scanned, looped, branched, checkpointed]


@dataclass
class Case:
    seed: int
    axes: dict
    plan: td.distributed.Plan
    step: td.TrainStep
    batch: tuple
    text: list


def losses(r, x, y):
    """A loss function for outputs of any shape, and its targets."""
    kind = r.choice(["square", "square", "classes", "rows", "abs", "max"])
    if kind == "classes" and len(y.shape) > 1:
        labels = np.random.default_rng(1).integers(0, y.shape[-1], y.shape[:-1])
        labels.reshape(-1)[::3] = -100
        return kind, labels
    if kind == "rows" and len(y.shape) > 1:
        return kind, None
    return ("square" if kind in ("classes", "rows") else kind), np.random.default_rng(1).standard_normal(y.shape)


def loss_of(kind, target):
    def loss(model, x, *labels):
        y = model(x)
        t = labels[0] if labels else target
        if kind == "classes":
            return F.cross_entropy(y.reshape((-1, y.shape[-1])), td.tensor(t).reshape((-1,)), ignore_index=-100)
        if kind == "rows":
            return -td.mean(td.log_softmax(y, axis=-1)[..., 0])
        if kind == "max":
            return td.max(y * t) + td.mean(y)
        return td.mean(td.square(y - t)) if kind == "square" else td.mean(td.abs(y - t))
    return loss


def net(r, x, count, mesh):
    """A random net for a batch, what it gives, and its parts' names."""
    parts, text, y = [], [], td.tensor(x)
    while len(parts) < count:
        make = constrained if r.random() < 0.12 else r.choice(PARTS)
        try:
            part = make(r, y.shape, mesh) if make is constrained else make(r, y.shape)
            if part is None:
                continue
            made = part.to("float64")(y)
        except td.TreadleError:
            continue
        if made.ndim < 2 or made.ndim > 5 or made.size > 4000 or 0 in made.shape or not np.isfinite(made.numpy()).all():
            continue
        parts.append(part)
        text.append(f"{getattr(make, '__name__', make)} {part.apply.__qualname__}@{part.apply.__code__.co_firstlineno} "
                    f"-> {made.shape}")
        y = made
    return Net(parts), y, text


def some_shards(r, model, mesh):
    found = {}
    for name, p in model.named_parameters():
        if r.random() < 0.6 and p.ndim:
            dims = [()] * p.ndim
            for axis in mesh:
                if r.random() < (0.75 if axis != "data" else 0.1):
                    d = r.randrange(p.ndim)
                    ranks = mesh[axis]
                    blocks = r.choice([b for b in (1, 1, 1, 2, 3, 4) if b == 1 or p.shape[d] % (b * ranks) == 0])
                    if blocks == 1 and p.shape[d] % ranks and dims[d]:
                        continue
                    dims[d] += (axis if blocks == 1 else f"{axis}:{blocks}",)
            found[name] = tuple(d[0] if len(d) == 1 else d or None for d in dims)
    return found


def by_examples(model, x, y):
    """Whether the net can be given fewer examples."""
    try:
        return model(td.tensor(x[:1])).shape == (1, *y.shape[1:])
    except td.TreadleError:
        return False


def case(seed, parts=(1, 6)):
    r = random.Random(seed)
    td.random.seed(seed % 1000)
    axes = r.choice(MESHES)
    shape = [r.choice([4, 6, 8, 12, 5, 7, 9, 2, 3])]
    shape += [r.choice([2, 3, 4, 5, 6, 8]) for _ in range(r.choice([1, 1, 2, 2, 3, 4]))]
    if len(shape) > 3:
        shape = [shape[0], *(min(n, 4) for n in shape[1:])]
    if r.random() < 0.7 and "data" in axes:
        shape[0] = axes["data"] * r.choice([1, 2, 3])
    x = np.random.default_rng(seed).standard_normal(shape)
    model, y, text = net(r, x, r.randint(*parts), axes)
    if not list(model.parameters()):
        model.parts.append(Part(lambda self, x: x * self.w, w=free((y.shape[-1],))).to("float64"))
    kind, target = losses(r, x, y)
    carried = target is not None and len(target) == len(x) and r.random() < 0.8
    opt = r.choice([lambda p: td.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: td.optim.AdamW(p, lr=1e-2, eps=1e-2)])
    options = {}
    if r.random() < 0.3:
        options["clip_norm"] = 0.05
    fits = carried or target is None
    if fits and r.random() < 0.3 and by_examples(model, x, y):
        options["accumulate"] = 2
    if r.random() < 0.1:
        options["amp"] = "bfloat16"
        model = model.to("float32")
        x = x.astype(np.float32)
    step = td.train_step(model, loss_of(kind, target), opt(list(model.parameters())), **options)
    data = "data" if "data" in axes and r.random() < 0.85 else None
    zero, over = r.choice([0, 1, 2, 3]) if data else 0, None
    if data and len(axes) > 1 and r.random() < 0.3:
        data = ("data", r.choice([axis for axis in axes if axis != "data"]))
        over = r.choice([None, *data])
    plan = td.distributed.Plan(data=data, shard=some_shards(r, model, axes), zero=zero, zero_over=over,
                               recompute=r.random() < 0.15, bucket_bytes=r.choice([25 << 20, 200]))
    batch = (x, target) if carried else (x,)
    text += [f"loss {kind}", str(options), str(axes), str(plan), f"batch {[np.shape(b) for b in batch]}"]
    return Case(seed, axes, plan, step, batch, text)


def inputs_of(graph, batch, numbers):
    captures, leaves, found = graph.meta["captures"], list(batch), []
    for i, (v, role) in enumerate(zip(graph.inputs, graph.roles)):
        if i in captures:
            found.append(np.array(captures[i].numpy()))
        elif role == "scalar":
            found.append(np.asarray(numbers[v.name], v.dtype.np))
        else:
            found.append(np.asarray(leaves.pop(0)).reshape(v.shape))
    return found


def stepped(graph, arrays, run):
    """What two steps give: results, and by the tensors what they are then."""
    found, captures = [], graph.meta["captures"]
    for _ in range(2):
        outputs = run(arrays)
        found.append({id(captures[graph.aliases[i]]) if i in graph.aliases else i: a for i, a in enumerate(outputs)})
        for i, j in graph.aliases.items():
            arrays[j] = outputs[i]
    return found


def run(made_case):
    """Two steps on the mesh against two of one process; raises AssertionError where they differ."""
    step, batch = made_case.step, made_case.batch
    numbers = {k.replace(".", "_"): float(v) for k, v in step._scalars().items()}
    alone = step.trace(*batch)
    parallel = td.distributed.parallelize(step, Mesh({}), made_case.plan)
    parallel.mesh, parallel.plan = Mesh(made_case.axes), made_case.plan
    parallel.plan.check(parallel.mesh, list(parallel.names.values()))
    made = parallel.trace(*batch)
    verify(made.graph)
    if step.accumulate > 1 and len(batch[0]) % (step.accumulate * parallel.mesh.size):
        alone = made.whole  # parts of other examples
    with np.errstate(all="ignore"):
        want = stepped(alone, inputs_of(alone, batch, numbers), lambda a: interp.run(alone, a))
        got = stepped(made.whole, inputs_of(made.whole, batch, numbers), lambda a: lockstep.run_whole(made, a))
    rough = 0.2 if step._compiled.amp is not None else 1e-9
    for number, (a, b) in enumerate(zip(got, want)):
        assert a.keys() == b.keys()
        for key, one in a.items():
            most = max(1, float(np.max(np.abs(b[key].astype(float)), initial=0)))
            np.testing.assert_allclose(one, b[key], rtol=rough, atol=rough * most, err_msg=f"step {number}")
    return made
