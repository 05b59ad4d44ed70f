"""Predicted against measured seconds of a step: `mpiexec -n 2 python benchmarks/planned.py`, one thread a rank.

The layers of a small GPT are timed by both ranks at once; the planner predicts a step of each layout from that and
from the link between the ranks; then the layout runs.
"""

import statistics
import time

import numpy as np

import treadle as td
from treadle.distributed.comm import load_mpi
from treadle.distributed.cost import Cluster
from treadle.distributed.layouts import Candidate, Chain, Costs, Machine
from treadle.distributed.planner import best_cut
from treadle.distributed.probe import links
from treadle.frontend.measured import measure
from treadle.frontend.planning import ModelPrices, Planned, plan_of

WIDTH, HEADS, LAYERS, VOCAB, SEQ, BATCH = 256, 4, 4, 2048, 128, 8
LAYOUTS = [({"data": 2}, 1), ({"tensor": 2}, 1), ({"pipe": 2}, 4), ({"pipe": 2}, 8)]


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
    def __init__(self):
        super().__init__()
        self.tokens, self.places = td.nn.Embedding(VOCAB, WIDTH), td.nn.Embedding(SEQ, WIDTH)
        self.blocks = td.nn.ModuleList([Block() for _ in range(LAYERS)])

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places.weight
        for block in self.blocks:
            x = block(x)
        return td.matmul(x, self.tokens.weight, transpose_y=True)


def step_of(accumulate):
    td.random.seed(0)
    model = Gpt()
    return td.train_step(model, lambda m, x, y: td.nn.functional.cross_entropy(m(x), y),
                         td.optim.AdamW(model.parameters(), lr=1e-3), accumulate=accumulate)


def main():
    td.set_num_threads(1)
    (_, _, link), = links()
    x, y = np.random.default_rng(0).integers(0, VOCAB, (2, BATCH, SEQ))
    cluster = Cluster(link, flops=5e10, memory=1e10)
    model = Planned.of(step_of(1), [td.spec(a.shape, a.dtype).type for a in (x, y)])
    factors = load_mpi().COMM_WORLD.bcast(measure(model, cluster), 0)
    prices = ModelPrices(model, cluster, factors=factors)
    for axes, micro in LAYOUTS:
        sizes = {"pipe": 1, "data": 1, "tensor": 1, **axes}
        c = Candidate(tuple(sizes.items()), micro, BATCH // sizes["data"] // micro)
        costs = Costs(c, Chain(prices.exact(c.size("tensor"), c.examples, False)), Machine(2, 1e12, cluster))
        layout = costs.layout(best_cut(costs, 1e12))
        plan = plan_of(model, prices, layout)
        step = td.distributed.parallelize(step_of(micro), td.distributed.make_mesh(axes), plan)
        taken = []
        for _ in range(8):
            started = time.perf_counter()
            step(x, y)
            taken.append(time.perf_counter() - started)
        if td.distributed.rank() == 0:
            real = statistics.median(taken[2:])
            print(f"{c}: predicted {layout.seconds * 1e3:.1f} ms, measured {real * 1e3:.1f} ms, "
                  f"{layout.seconds / real:.2f}", flush=True)


if __name__ == "__main__":
    main()
