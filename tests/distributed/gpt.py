"""A small GPT for the tests of memory and planning. Jobs import it by name, tests from the package."""

import numpy as np

import treadle as td

SMALL = {"layers": 3, "width": 16, "length": 8, "vocabulary": 32}
EIGHT = {"layers": 8, "width": 64, "length": 4, "vocabulary": 16}  # what a rank holds are parameters and the like


class Block(td.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = td.nn.LayerNorm(width), td.nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (td.nn.Linear(width, width) for _ in range(4))
        self.up, self.down = td.nn.Linear(width, 4 * width), td.nn.Linear(4 * width, width)

    def split(self, x):
        return td.transpose(x.reshape((*x.shape[:2], self.heads, x.shape[2] // self.heads)), (0, 2, 1, 3))

    def forward(self, x):
        y = self.norm1(x)
        y = td.attention(self.split(self.q(y)), self.split(self.k(y)), self.split(self.v(y)), causal=True)
        x = x + self.out(td.transpose(y, (0, 2, 1, 3)).reshape(x.shape))
        return x + self.down(td.nn.functional.gelu(self.up(self.norm2(x))))


class Gpt(td.nn.Module):
    def __init__(self, layers, width, length, vocabulary):
        super().__init__()
        self.tokens, self.places = td.nn.Embedding(vocabulary, width), td.nn.Embedding(length, width)
        self.blocks = td.nn.ModuleList([Block(width, 4) for _ in range(layers)])
        self.norm = td.nn.LayerNorm(width)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places.weight
        for block in self.blocks:
            x = block(x)
        return td.matmul(self.norm(x), self.tokens.weight, transpose_y=True)  # tied weights


def loss(model, tokens, labels):
    return td.nn.functional.cross_entropy(model(tokens), labels)


def step_of(size, dtype="float32", **options):
    """A training step with AdamW."""
    td.random.seed(0)
    model = Gpt(**size).to(dtype)
    return td.train_step(model, loss, td.optim.AdamW(model.parameters(), lr=1e-2), **options)


def batch(size, examples):
    tokens, labels = np.random.default_rng(2).integers(0, size["vocabulary"], (2, examples, size["length"]))
    return tokens, labels


def nbytes(model):
    """Of all parameters, and of those of a layer."""
    return tuple(sum(p.type.nbytes for p in m.parameters()) for m in (model, model.blocks[0]))


def losses(step):
    """Of three steps of the small one, on eight examples."""
    return [float(step(*batch(SMALL, 8)).numpy()) for _ in range(3)]
