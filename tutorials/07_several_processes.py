# %% [markdown]
# # From one process to 2 x 2
#
# Run this file as it is, and then on four processes:
#
#     python tutorials/07_several_processes.py
#     treadle launch -n 4 tutorials/07_several_processes.py
#
# It prints the same losses both times; on 2 or 8 processes, too. (`pip install 'treadle[mpi]'` brings MPI as a wheel.)

# %%
import numpy as np

import treadle as td

td.set_num_threads(1)
td.random.seed(0)


class Net(td.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = td.nn.Linear(16, 64), td.nn.Linear(64, 4)

    def forward(self, x):
        return self.down(td.tanh(self.up(x)))


net = Net()
opt = td.optim.AdamW(net.parameters(), lr=1e-2)
step = td.train_step(net, lambda model, x, y: td.nn.functional.cross_entropy(model(x), y), opt, clip_norm=1.0)

# %% [markdown]
# A *mesh* names the axes along which processes lie. With four of them: two replicas of the model, each on two
# processes (-1: what the others leave). Every process makes the same model, so all are seeded alike. The *plan* says
# how parameters are split: the first weight by its outputs, the second by its inputs (weights of `Linear` are (outputs,
# inputs)). Nobody writes where to communicate.

# %%
axes = {"data": -1, "tensor": 2} if td.distributed.world_size() > 1 else {}
plan = td.distributed.Plan(shard={"up.weight": ("tensor", None), "up.bias": ("tensor",),
                                  "down.weight": (None, "tensor")}, zero=1)
parallel = td.distributed.parallelize(step, td.distributed.make_mesh(axes), plan)

# %% [markdown]
# Every process passes the whole batch and takes its part of it.

# %%
rng = np.random.default_rng(0)
x = rng.standard_normal((64, 16)).astype(np.float32)
y = (x[:, :4] + x[:, 4:8]).argmax(1)
losses = [float(parallel(x, y).numpy()) for _ in range(20)]
if td.distributed.is_main():
    print("losses:", [round(loss, 4) for loss in losses[::5]])
    print("a step calls:", dict(parallel.partitioned.collectives()) or "nobody")
    print("bytes kept here:", parallel.local_bytes)
assert losses[-1] < losses[0] / 2

# %% [markdown]
# Between steps a parameter that is split has no elements on any one process. `gather` brings the model everywhere
# whole, until the next step: to look at it, evaluate it, or save it as one process would. Here each process evaluates
# its own share of other examples, and what they counted is added up.

# %%
parallel.gather()
others = rng.standard_normal((64, 16)).astype(np.float32)
mine = others[td.distributed.rank()::td.distributed.world_size()]
right = td.compile(net)(mine).numpy().argmax(1) == (mine[:, :4] + mine[:, 4:8]).argmax(1)
found = td.distributed.all_reduce({"right": int(right.sum()), "of": len(mine)})
if td.distributed.is_main():
    print("right:", found["right"], "of", found["of"])
assert found["of"] == 64 and found["right"] > 32

# %% [markdown]
# The plan need not be written by hand. `find_plan` searches meshes, splits, ZeRO stages, pipelines and micro-batches
# for a described cluster; `treadle plan` does the same from the command line, prints the alternatives and writes the
# plan to a file. Here: four devices that compute 1 GFLOPS, talk at 10 GB/s, and have 40 KB of memory each.

# %%
from treadle.distributed.cost import Cluster, Link

cluster = Cluster(Link(latency=1e-6, bandwidth=1e10), flops=1e9, memory=1e10)
planned = td.distributed.find_plan(step, x, y, devices=4, memory=40e3, cluster=cluster)
if td.distributed.is_main():
    print("planned for four devices:", dict(planned.mesh), "ZeRO", planned.zero, dict(planned.shard))

# %% [markdown]
# It is used like any other, and the losses go on from where they were: the planned step trains the same model. (A plan
# may ask for micro-batches, which are the training step's.)

# %%
again = td.train_step(net, lambda model, x, y: td.nn.functional.cross_entropy(model(x), y), opt, clip_norm=1.0,
                      accumulate=planned.accumulate)
here = planned.mesh if td.distributed.world_size() == 4 else axes
parallel = td.distributed.parallelize(again, td.distributed.make_mesh(here), planned)
more = [float(parallel(x, y).numpy()) for _ in range(5)]
if td.distributed.is_main():
    print("losses under the plan:", [round(loss, 4) for loss in more])
assert more[0] < losses[-1] < losses[0] / 2

# %% [markdown]
# The program of a rank can be looked at, and interpreted for all ranks together, without any processes. That is how
# Treadle tests it: here the forward pass on a 2 x 2 mesh.

# %%
from treadle.distributed import Mesh, Sharding, lockstep
from treadle.distributed.partition import partition
from treadle.ir import interp


def forward(x, up, down):
    return td.matmul(td.tanh(td.matmul(x, up)), down)


graph = td.trace(forward, td.spec((8, 16)), td.spec((16, 64)), td.spec((64, 4)))
made = partition(graph, Mesh({"data": 2, "tensor": 2}), {
    0: Sharding(("data", None)), 1: Sharding((None, "tensor")), 2: Sharding(("tensor", None))})
arrays = [rng.standard_normal(v.shape).astype(np.float32) for v in graph.inputs]
np.testing.assert_allclose(lockstep.run_whole(made, arrays)[0], interp.run(graph, arrays)[0], rtol=1e-4, atol=1e-4)
if td.distributed.is_main():
    print(made.graph)
