"""A small GPT for the tests of planning; as a script, what the ranks of a planned job run:
`mpiexec -n N python planned.py PLAN.json OUT.npz`."""

import json
import sys

import numpy as np

import treadle as td

WIDTH, HEADS, VOCAB, SEQ, BATCH, STEPS = 16, 4, 32, 8, 8, 3


class Block(td.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = td.nn.LayerNorm(WIDTH), td.nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (td.nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = td.nn.Linear(WIDTH, 4 * WIDTH), td.nn.Linear(4 * WIDTH, WIDTH)

    def heads(self, x):
        return td.transpose(x.reshape((x.shape[0], SEQ, HEADS, WIDTH // HEADS)), (0, 2, 1, 3))

    def forward(self, x):
        y = self.norm1(x)
        y = td.attention(self.heads(self.q(y)), self.heads(self.k(y)), self.heads(self.v(y)), causal=True)
        x = x + self.out(td.transpose(y, (0, 2, 1, 3)).reshape(x.shape))
        return x + self.down(td.nn.functional.gelu(self.up(self.norm2(x))))


class Gpt(td.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.tokens, self.places = td.nn.Embedding(VOCAB, WIDTH), td.nn.Embedding(SEQ, WIDTH)
        self.blocks = td.nn.ModuleList([Block() for _ in range(layers)])
        self.norm = td.nn.LayerNorm(WIDTH)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places.weight
        for block in self.blocks:
            x = block(x)
        return td.matmul(self.norm(x), self.tokens.weight, transpose_y=True)  # tied weights


def step_of(accumulate=1, dtype="float32", layers=3):
    """A training step of a GPT of some blocks."""
    td.random.seed(0)
    model = Gpt(layers).to(dtype)
    return td.train_step(model, lambda m, x, y: td.nn.functional.cross_entropy(m(x), y),
                         td.optim.AdamW(model.parameters(), lr=1e-2), clip_norm=1.0, accumulate=accumulate)


def batch():
    tokens, labels = np.random.default_rng(2).integers(0, VOCAB, (2, BATCH, SEQ))
    return tokens, labels


def losses(step):
    return [float(step(*batch()).numpy()) for _ in range(STEPS)]


def main():
    td.set_num_threads(1)
    plan = td.distributed.Plan.load(sys.argv[1])
    step = td.distributed.parallelize(step_of(plan.accumulate, "float64"), plan=plan)
    found = losses(step)
    if plan.cut:
        facts = {"kept": {str(s): n for s, n in step.stages.kept_bytes.items()}}
    else:
        inputs = sum(int(v.type.nbytes) for v in step.partitioned.graph.inputs)
        facts = {"memory": inputs + step.executable.signature.arena_bytes}
    gathered = step.job.gather_all(facts)
    step.gather()
    if td.distributed.rank() == 0:
        np.savez(sys.argv[2], losses=found, facts=json.dumps(gathered),
                 **{n: t.numpy() for n, t in step.inner.model.state_dict().items()})


if __name__ == "__main__":
    main()
