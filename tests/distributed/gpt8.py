"""A GPT of eight equal layers, for what is said of memory: `mpiexec -n N python gpt8.py FOLDER OPTIONS`.

Its batch is small, so that what a rank holds is parameters, gradients and states.
"""


import numpy as np

import treadle as td

HEADS, SEQ, VOCAB, LAYERS = 4, 4, 16, 8


class Block(td.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = td.nn.LayerNorm(width), td.nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (td.nn.Linear(width, width) for _ in range(4))
        self.up, self.down = td.nn.Linear(width, 4 * width), td.nn.Linear(4 * width, width)

    def heads(self, x):
        return td.transpose(x.reshape((x.shape[0], SEQ, HEADS, x.shape[2] // HEADS)), (0, 2, 1, 3))

    def forward(self, x):
        y = self.norm1(x)
        y = td.attention(self.heads(self.q(y)), self.heads(self.k(y)), self.heads(self.v(y)), causal=True)
        x = x + self.out(td.transpose(y, (0, 2, 1, 3)).reshape(x.shape))
        return x + self.down(td.nn.functional.gelu(self.up(self.norm2(x))))


class Gpt(td.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.tokens = td.nn.Embedding(VOCAB, width)
        self.blocks = td.nn.ModuleList([Block(width) for _ in range(LAYERS)])
        self.norm = td.nn.LayerNorm(width)

    def forward(self, tokens):
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return td.matmul(self.norm(x), self.tokens.weight, transpose_y=True)


def loss(model, tokens, labels):
    return td.nn.functional.cross_entropy(model(tokens), labels)


def step_of(axes, plan, width=64, clip=None, **options):
    """A training step with AdamW on a mesh."""
    td.random.seed(0)
    model = Gpt(width)
    opt = td.optim.AdamW(model.parameters(), lr=1e-3)
    inner = td.train_step(model, loss, opt, clip_norm=clip, **options)
    return td.distributed.parallelize(inner, Mesh(axes), plan)


def batch(examples):
    tokens = np.arange(examples * SEQ).reshape(examples, SEQ) % VOCAB
    return tokens, (tokens + 1) % VOCAB


def sizes(step):
    """Bytes of all parameters, and of those of a layer."""
    model = step.inner.model
    return tuple(sum(p.type.nbytes for p in m.parameters()) for m in (model, model.blocks[0]))


Mesh = td.distributed.Mesh
