"""What the ranks of the MPI tests run: `mpiexec -n N python job.py FOLDER CASE...`.

Each case trains for some steps in f64 and rank 0 writes what came out: losses, parameters, what was sent. With the
mesh of one rank the same code is the expectation.
"""

import json
import sys
from pathlib import Path

import numpy as np

import treadle as td

WIDTH, HEADS, VOCAB, SEQ, BATCH = 8, 4, 16, 8, 8


class Block(td.nn.Module):
    def __init__(self, dropout, fused):
        super().__init__()
        self.norm1, self.norm2 = td.nn.LayerNorm(WIDTH), td.nn.LayerNorm(WIDTH)
        if fused:
            self.qkv = td.nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.q, self.k, self.v = (td.nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = td.nn.Linear(WIDTH, WIDTH)
        self.up, self.down = td.nn.Linear(WIDTH, 4 * WIDTH), td.nn.Linear(4 * WIDTH, WIDTH)
        self.drop = td.nn.Dropout(dropout)

    def heads(self, x):
        return td.transpose(x.reshape((x.shape[0], SEQ, HEADS, WIDTH // HEADS)), (0, 2, 1, 3))

    def forward(self, x, sequence):
        x = stream(x, sequence)
        y = self.norm1(x)
        q, k, v = td.split(self.qkv(y), 3, axis=-1) if hasattr(self, "qkv") else (self.q(y), self.k(y), self.v(y))
        y = td.attention(self.heads(q), self.heads(k), self.heads(v), causal=True)
        y = self.out(td.transpose(y, (0, 2, 1, 3)).reshape(x.shape))
        x = stream(x + self.drop(y), sequence)
        return x + self.drop(self.down(td.tanh(self.up(self.norm2(x)))))


def stream(x, sequence):
    return td.distributed.constrain(x, None, "tensor", None) if sequence else x


class Gpt(td.nn.Module):
    def __init__(self, dropout=0.0, sequence=False, fused=False, vocab=VOCAB):
        super().__init__()
        self.sequence = sequence
        self.tokens, self.places = td.nn.Embedding(vocab, WIDTH), td.nn.Embedding(SEQ, WIDTH)
        self.blocks = td.nn.ModuleList([Block(dropout, fused) for _ in range(2)])
        self.norm = td.nn.LayerNorm(WIDTH)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places.weight
        for block in self.blocks:
            x = block(x, self.sequence)
        return td.matmul(self.norm(x), self.tokens.weight, transpose_y=True)  # tied weights


class Residual(td.nn.Module):
    """Two convolutions beside a shortcut; one that halves the picture has a convolution in the shortcut, too."""

    def __init__(self, channels, inner, out, stride):
        super().__init__()
        self.up = td.nn.Conv2d(channels, inner, 3, stride=stride, padding=1, bias=False)
        self.down = td.nn.Conv2d(inner, out, 3, padding=1, bias=False)
        self.norm1, self.norm2 = td.nn.BatchNorm2d(inner), td.nn.BatchNorm2d(out)
        self.shortcut = None
        if stride > 1:
            self.shortcut = td.nn.Conv2d(channels, out, 1, stride=stride, bias=False)
            self.norm3 = td.nn.BatchNorm2d(out)

    def forward(self, x):
        y = self.norm2(self.down(td.nn.functional.relu(self.norm1(self.up(x)))))
        return td.nn.functional.relu(y + (x if self.shortcut is None else self.norm3(self.shortcut(x))))


class ResNet(td.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = td.nn.Conv2d(3, 4, 3, padding=1), td.nn.BatchNorm2d(4)
        self.blocks = td.nn.ModuleList([Residual(4, 8, 4, 1), Residual(4, 4, 8, 2)])
        self.head = td.nn.Linear(8, 5)

    def forward(self, x):
        x = td.nn.functional.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(td.mean(x, axis=(2, 3)))


class Recurrent(td.nn.Module):
    """An LSTM over more steps than are written out one by one."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = td.nn.LSTM(3, 4, batch_first=True), td.nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


TENSOR = {
    "*.q.*": ("tensor",), "*.k.*": ("tensor",), "*.v.*": ("tensor",), "*.up.*": ("tensor",),
    "*.qkv.*": ("tensor:3",), "*.out.weight": (None, "tensor"), "*.down.weight": (None, "tensor"),
}
GATES = {"lstm.weight*": ("tensor:4",), "lstm.bias*": ("tensor:4",)}  # four gates, one after the other
CONV = {"*.up.weight": ("tensor",), "*.norm1.*": ("tensor",), "*.down.weight": (None, "tensor")}


def tensor_plan(model, extra=()):
    """Column and row annotations, spelled out for each parameter's rank."""
    import fnmatch

    table = CONV if isinstance(model, ResNet) else GATES if isinstance(model, Recurrent) else {**TENSOR, **dict(extra)}
    found = {}
    for name, p in model.named_parameters():
        for pattern, dims in table.items():
            if fnmatch.fnmatchcase(name, pattern):
                found[name] = (*dims, *(None,) * (p.ndim - len(dims)))
                break
    return found


PIPE = {"accumulate": 4}
MATRIX = {
    # configuration: (mesh, options); each for the GPT and for the ResNet
    "dp2": ({"data": 2}, {}),
    "zero1": ({"data": 2}, {"zero": 1}),
    "zero2": ({"data": 4}, {"zero": 2}),
    "zero3": ({"data": 4}, {"zero": 3}),
    "tp2": ({"tensor": 2}, {}),
    "tp4": ({"tensor": 4}, {}),
    "dp2xtp2": ({"data": 2, "tensor": 2}, {"zero": 1}),
    **{f"pp{n}-{kind}": ({"pipe": n}, {**PIPE, "schedule": kind, "chunks": 1 + (kind == "interleaved")})
       for n in (2, 4) for kind in ("gpipe", "1f1b", "interleaved")},
    "pp2-zb-h1": ({"pipe": 2}, {**PIPE, "schedule": "zb-h1"}),
    "dp2xpp2": ({"data": 2, "pipe": 2}, {**PIPE, "zero": 1}),
    "tp2xpp2": ({"tensor": 2, "pipe": 2}, PIPE),
    "zero2xpp2": ({"data": 2, "pipe": 2}, {**PIPE, "zero": 2}),
    "zero3xpp2": ({"data": 2, "pipe": 2}, {**PIPE, "zero": 3}),
    "2x2x2": ({"data": 2, "tensor": 2, "pipe": 2}, {**PIPE, "zero": 1}),
}


def case(model, mesh, options):
    """Five steps of AdamW, clipped from the second on, with dropout where it can be."""
    return mesh, {"model": model, "optimizer": "adamw", "clip": 0.05, "moments": True, "stop": 5,
                  "dropout": 0.25 * (model == "gpt"), **options}


CASES = {f"{model}-{name}": case(model, *row) for model in ("gpt", "resnet") for name, row in MATRIX.items()}
CASES.update({
    "sequence": case("gpt", {"tensor": 2}, {"sequence": True}),
    "vocabulary": case("gpt", {"tensor": 2}, {"vocabulary": True}),
    "accumulate": case("gpt", {"data": 2}, {"accumulate": 2}),
    "padded": case("gpt", {"tensor": 2}, {"vocabulary": True, "vocab": 17}),
    "zero3xpadded": case("gpt", {"data": 2, "tensor": 2}, {"vocabulary": True, "vocab": 17, "zero": 3}),
    "short": case("resnet", {"data": 2}, {"examples": 7, "zero": 1}),
    "short-zero3xtp2": case("gpt", {"data": 2, "tensor": 2}, {"examples": 5, "zero": 3}),
    "fused": case("gpt", {"tensor": 2}, {"fused": True}),
    "zero3xtp2": case("gpt", {"data": 2, "tensor": 2}, {"zero": 3, "fused": True}),
    "lstm-dp2": case("lstm", {"data": 2}, {"zero": 1}),
    "lstm-tp2": case("lstm", {"tensor": 2}, {}),
    "weighted-dp2": case("gpt", {"data": 2}, {"accumulate": 4, "weight": True, "dropout": 0.0}),
    "uneven-zero2": case("gpt", {"data": 2}, {"accumulate": 3, "weight": True, "dropout": 0.0, "zero": 2}),
    "uneven-zero3xtp2": case("gpt", {"data": 2, "tensor": 2}, {"accumulate": 3, "weight": True, "dropout": 0.0,
                                                               "zero": 3}),
    "turns-gpt": case("gpt", {"pipe": 2}, {**PIPE, "turns": True, "schedule": "interleaved", "chunks": 2}),
    "turns-resnet": case("resnet", {"pipe": 2}, {**PIPE, "turns": True}),
    "weighted": case("gpt", {"pipe": 2}, {"accumulate": 4, "weight": True, "dropout": 0.0}),
    "uneven": case("gpt", {"pipe": 2}, {"accumulate": 3, "weight": True, "dropout": 0.0}),
})


def lm_loss(model, tokens, labels):
    return td.nn.functional.cross_entropy(model(tokens), labels)


def batch_of(options):
    rng = np.random.default_rng(1)
    if options.get("model") == "resnet":
        return rng.standard_normal((BATCH, 3, 6, 6)), rng.integers(0, 5, BATCH)
    if options.get("model") == "lstm":
        return rng.standard_normal((BATCH, 40, 3)), rng.integers(0, 5, BATCH)
    tokens, labels = rng.integers(0, VOCAB, (2, BATCH, SEQ))
    labels[0, :5] = -100  # tokens that do not count: the mean is over tokens, not over ranks
    return tokens, labels


def run(name, mesh_axes, options):
    """Trains; gives losses, parameters (and, after the first step, gradients as `name.grad`) and the step."""
    td.random.seed(0)
    model = ResNet() if options.get("model") == "resnet" else Recurrent() if options.get("model") == "lstm" else \
        Gpt(options.get("dropout", 0.0), options.get("sequence", False), options.get("fused", False),
            options.get("vocab", VOCAB))
    model.to("float64")
    if options.get("optimizer") == "adamw":
        opt, steps = td.optim.AdamW(model.parameters(), lr=1e-2), 5
    else:
        opt, steps = td.optim.SGD(model.parameters(), lr=1.0), 1  # what a parameter loses is its gradient
    inner = td.train_step(model, lm_loss, opt, clip_norm=options.get("clip"),
                          accumulate=options.get("accumulate", 1) if mesh_axes or not options.get("weight") else 1)
    step = td.distributed.parallelize(inner, td.distributed.Mesh(mesh_axes), plan_of(model, mesh_axes, options))
    batch = tuple(array[:options.get("examples")] for array in batch_of(options))
    if "load" in options:
        assert step.load(options["load"]) == {"batch": "2"}
        steps = 3
    first, losses = {}, []
    for number in range(options.get("stop", steps)):
        if options.get("turns"):  # another mode: no dropout, or running statistics
            model.train(number % 3 != 1)
        if options.get("moments"):
            inner.clip_norm = options["clip"] if number else 1e9
        losses.append(float(step(*batch).numpy()))
        if options.get("moments") and number == 0:  # the first moment is a tenth of the gradient
            step.gather()
            names = {id(p): name for name, p in model.named_parameters()}
            first = {f"{names[id(p)]}.grad": slots["mean"].numpy() * 10 for p, slots in zip(opt.params, opt.state)}
    if "save" in options:
        step.save(options["save"], {"batch": str(opt.steps)})
    step.gather()
    return losses, {**{n: t.numpy() for n, t in model.state_dict().items()}, **first}, step


def plan_of(model, mesh_axes, options):
    extra = {"tokens.weight": ("tensor",)} if options.get("vocabulary") else {}
    return td.distributed.Plan(shard=tensor_plan(model, extra) if "tensor" in mesh_axes else {},
                               zero=options.get("zero", 0) if mesh_axes else 0,
                               schedule=options.get("schedule", "1f1b"), chunks=options.get("chunks", 1),
                               weight=(lambda x, y: (y != -100).sum()) if options.get("weight") else None)


def main():
    td.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        mesh, options = CASES[name] if name in CASES else json.loads(name)
        name = options.get("name", name)
        losses, state, step = run(name, mesh, options)
        if td.distributed.rank() == 0:
            np.savez(folder / f"{name}.npz", losses=losses, **state)
            facts = {"collectives": step.partitioned.collectives(), "bytes": step.local_bytes,
                     "calls": step.job.calls, "traffic": step.partitioned.traffic()}
            (folder / f"{name}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
