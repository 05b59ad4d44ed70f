"""What the ranks of `test_ranks.py` run: Python values go between them; the first prints what all found as JSON."""

import json

import numpy as np

import treadle as td

d = td.distributed
rank, ranks = d.rank(), d.world_size()


def failing(action):
    """The text of its error."""
    try:
        action()
    except td.TreadleError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


sums = d.all_reduce({"correct": 3 + rank, "loss": 0.5 * rank, "each": np.arange(3, dtype=np.float32) + rank})
found = {
    "main": d.is_main(),
    "gathered": d.all_gather({"rank": rank, "name": "x" * (rank * 1000), "nan": [float("nan")]}),
    "broadcast": d.broadcast({"from": rank, "tensor": td.tensor([1.0, rank])}, root=1)["tensor"].tolist(),
    "sums": [sums["correct"], sums["loss"], sums["each"].tolist(), str(sums["each"].dtype)],
    "of": [d.all_reduce([rank, True], op)[0] for op in ("mean", "max", "min")],
    "stop": d.broadcast(rank == 0),
    "mixed": failing(d.barrier if rank else lambda: d.broadcast(1)),
    "shapes": failing(lambda: d.all_reduce(np.zeros(2 + rank))),
    "root": failing(lambda: d.broadcast(1, root=ranks)),
    "unsendable": failing(lambda: d.all_gather(lambda: 0)),
}
d.barrier()
everything = d.all_gather(found)
if d.is_main():
    print(json.dumps(everything))
