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
    def __init__(self, dropout):
        super().__init__()
        self.norm1, self.norm2 = td.nn.LayerNorm(WIDTH), td.nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (td.nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = td.nn.Linear(WIDTH, WIDTH)
        self.up, self.down = td.nn.Linear(WIDTH, 4 * WIDTH), td.nn.Linear(4 * WIDTH, WIDTH)
        self.drop = td.nn.Dropout(dropout)

    def heads(self, x):
        return td.transpose(x.reshape((x.shape[0], SEQ, HEADS, WIDTH // HEADS)), (0, 2, 1, 3))

    def forward(self, x, sequence):
        x = stream(x, sequence)
        y = self.norm1(x)
        y = td.attention(self.heads(self.q(y)), self.heads(self.k(y)), self.heads(self.v(y)), causal=True)
        y = self.out(td.transpose(y, (0, 2, 1, 3)).reshape(x.shape))
        x = stream(x + self.drop(y), sequence)
        return x + self.drop(self.down(td.tanh(self.up(self.norm2(x)))))


def stream(x, sequence):
    return td.distributed.constrain(x, None, "tensor", None) if sequence else x


class Gpt(td.nn.Module):
    def __init__(self, dropout=0.0, sequence=False):
        super().__init__()
        self.sequence = sequence
        self.tokens, self.places = td.nn.Embedding(VOCAB, WIDTH), td.nn.Embedding(SEQ, WIDTH)
        self.blocks = td.nn.ModuleList([Block(dropout) for _ in range(2)])
        self.norm = td.nn.LayerNorm(WIDTH)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places.weight
        for block in self.blocks:
            x = block(x, self.sequence)
        return td.matmul(self.norm(x), self.tokens.weight, transpose_y=True)  # tied weights


class ResNet(td.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = td.nn.Conv2d(3, 4, 3, padding=1)
        self.up, self.norm1 = td.nn.Conv2d(4, 8, 3, padding=1, bias=False), td.nn.BatchNorm2d(8)
        self.down, self.norm2 = td.nn.Conv2d(8, 4, 3, padding=1, bias=False), td.nn.BatchNorm2d(4)
        self.head = td.nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        x = td.nn.functional.relu(x + self.norm2(self.down(td.nn.functional.relu(self.norm1(self.up(x))))))
        return self.head(td.mean(x, axis=(2, 3)))


TENSOR = {
    "*.q.*": ("tensor",), "*.k.*": ("tensor",), "*.v.*": ("tensor",), "*.up.*": ("tensor",),
    "*.out.weight": (None, "tensor"), "*.down.weight": (None, "tensor"),
}
CONV = {"up.weight": ("tensor", None, None, None), "norm1.*": ("tensor",), "down.weight": (None, "tensor", None, None)}


def tensor_plan(model, extra=()):
    """Column and row annotations, spelled out for each parameter's rank."""
    import fnmatch

    table = {**CONV} if isinstance(model, ResNet) else {**TENSOR, **dict(extra)}
    found = {}
    for name, p in model.named_parameters():
        for pattern, dims in table.items():
            if fnmatch.fnmatchcase(name, pattern):
                found[name] = (*dims, *(None,) * (p.ndim - len(dims)))
                break
    return found


CASES = {
    # name: (mesh, options)
    "dp2": ({"data": 2}, {}),
    "zero1": ({"data": 2}, {"zero": 1}),
    "zero3": ({"data": 2}, {"zero": 3}),
    "tp2": ({"tensor": 2}, {}),
    "sequence": ({"tensor": 2}, {"sequence": True}),
    "vocabulary": ({"tensor": 2}, {"vocabulary": True}),
    "dropout": ({"data": 2}, {"dropout": 0.25}),
    "dropout-tp": ({"tensor": 2}, {"dropout": 0.25}),
    "clip": ({"tensor": 2}, {"clip": 0.05, "optimizer": "adamw"}),
    "zero1-adamw": ({"data": 2}, {"zero": 1, "clip": 0.05, "optimizer": "adamw"}),
    "accumulate": ({"data": 2}, {"accumulate": 2}),
    "resnet-dp2": ({"data": 2}, {"model": "resnet"}),
    "resnet-tp2": ({"tensor": 2}, {"model": "resnet"}),
    "gpipe": ({"pipe": 2}, {"accumulate": 4, "schedule": "gpipe"}),
    "1f1b": ({"pipe": 2}, {"accumulate": 4, "clip": 0.05, "optimizer": "adamw"}),
    "interleaved": ({"pipe": 2}, {"accumulate": 4, "schedule": "interleaved", "chunks": 2}),
    "weighted": ({"pipe": 2}, {"accumulate": 4, "weight": True}),
    "dp4": ({"data": 4}, {}),
    "pp4": ({"pipe": 4}, {"accumulate": 4, "clip": 0.05, "optimizer": "adamw"}),
    "tp2xpp2": ({"tensor": 2, "pipe": 2}, {"accumulate": 4, "clip": 0.05, "optimizer": "adamw"}),
    "dp2xpp2": ({"data": 2, "pipe": 2}, {"accumulate": 4, "zero": 1, "clip": 0.05, "optimizer": "adamw"}),
    "zero2-4": ({"data": 4}, {"zero": 2, "optimizer": "adamw"}),
    "zero3-4": ({"data": 4}, {"zero": 3, "optimizer": "adamw"}),
    "tp4": ({"tensor": 4}, {}),
    "dp2xtp2": ({"data": 2, "tensor": 2}, {"zero": 1, "clip": 0.05, "optimizer": "adamw", "dropout": 0.25}),
    "2x2x2": ({"data": 2, "tensor": 2, "pipe": 2},
              {"accumulate": 4, "zero": 1, "clip": 0.05, "optimizer": "adamw"}),
    "resnet-2x2": ({"data": 2, "tensor": 2}, {"model": "resnet"}),
}


def lm_loss(model, tokens, labels):
    return td.nn.functional.cross_entropy(model(tokens), labels)


def batch_of(options):
    rng = np.random.default_rng(1)
    if options.get("model") == "resnet":
        return rng.standard_normal((BATCH, 3, 6, 6)), rng.integers(0, 5, BATCH)
    tokens, labels = rng.integers(0, VOCAB, (2, BATCH, SEQ))
    labels[0, :5] = -100  # tokens that do not count: the mean is over tokens, not over ranks
    return tokens, labels


def run(name, mesh_axes, options):
    """Trains; gives losses, parameters and the step."""
    td.random.seed(0)
    model = ResNet() if options.get("model") == "resnet" else \
        Gpt(options.get("dropout", 0.0), options.get("sequence", False))
    model.to("float64")
    if options.get("optimizer") == "adamw":
        opt, steps = td.optim.AdamW(model.parameters(), lr=1e-2), 5
    else:
        opt, steps = td.optim.SGD(model.parameters(), lr=1.0), 1  # what a parameter loses is its gradient
    inner = td.train_step(model, lm_loss, opt, clip_norm=options.get("clip"),
                          accumulate=options.get("accumulate", 1) if mesh_axes or not options.get("weight") else 1)
    extra = {"tokens.weight": ("tensor",)} if options.get("vocabulary") else {}
    plan = td.distributed.Plan(shard=tensor_plan(model, extra) if "tensor" in mesh_axes else {},
                               zero=options.get("zero", 0) if mesh_axes else 0,
                               schedule=options.get("schedule", "1f1b"), chunks=options.get("chunks", 1),
                               weight=(lambda x, y: (y != -100).sum()) if options.get("weight") else None)
    step = td.distributed.parallelize(inner, td.distributed.Mesh(mesh_axes), plan)
    batch = batch_of(options)
    if "load" in options:
        assert step.load(options["load"]) == {"batch": "2"}
        steps = 3
    losses = [float(step(*batch).numpy()) for _ in range(options.get("stop", steps))]
    if "save" in options:
        step.save(options["save"], {"batch": str(opt.steps)})
    step.gather()
    return losses, {n: t.numpy() for n, t in model.state_dict().items()}, step


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
