"""Predicted against measured seconds of a step: `mpiexec -n 2 python benchmarks/planned.py`, one thread a rank.

The layers of a small GPT are timed by both ranks at once; the planner predicts a step of each layout from that and
from the link between the ranks; then the layout runs.
"""

import statistics
import time

import numpy as np
from contenders.gpt2 import GPT2, Size, loss_of

import treadle as td
from treadle.distributed.comm import load_mpi
from treadle.distributed.cost import Cluster
from treadle.distributed.layouts import Candidate, Chain, Costs, Machine
from treadle.distributed.planner import best_cut
from treadle.distributed.probe import links
from treadle.frontend.measured import measure
from treadle.frontend.planning import ModelPrices, Planned, plan_of

SIZE = Size(layers=4, width=256, heads=4, vocabulary=2048, padded=2048, length=128, batch=8)
LAYOUTS = [({"data": 2}, 1), ({"tensor": 2}, 1), ({"pipe": 2}, 4), ({"pipe": 2}, 8)]


def step_of(accumulate):
    td.random.seed(0)
    model = GPT2(SIZE, padded=False)
    return td.train_step(model, loss_of, td.optim.AdamW(model.parameters(), lr=1e-3), accumulate=accumulate)


def main():
    td.set_num_threads(1)
    (_, _, link), = links()
    x, y = np.random.default_rng(0).integers(0, SIZE.vocabulary, (2, SIZE.batch, SIZE.length))
    cluster = Cluster(link, flops=5e10, memory=1e10)
    model = Planned.of(step_of(1), [td.spec(a.shape, a.dtype).type for a in (x, y)])
    factors = load_mpi().COMM_WORLD.bcast(measure(model, cluster), 0)
    prices = ModelPrices(model, cluster, factors=factors)
    for axes, micro in LAYOUTS:
        sizes = {"pipe": 1, "data": 1, "tensor": 1, **axes}
        c = Candidate(tuple(sizes.items()), micro, SIZE.batch // sizes["data"] // micro)
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
