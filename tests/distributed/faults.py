"""What the ranks of the tests of faults run: `faults.py KIND`."""

import os
import signal
import sys
import time

import numpy as np

import treadle as td


def main():
    kind = sys.argv[1]
    td.set_num_threads(1)
    mesh = td.distributed.make_mesh({"data": -1})
    td.random.seed(0)
    model = td.nn.Linear(4, 2)
    opt = td.optim.SGD(model.parameters(), lr=0.1)
    step = td.distributed.parallelize(td.train_step(model, lambda m, x: td.mean(m(x) ** 2), opt), mesh)
    last = td.distributed.rank() == mesh.size - 1
    x = np.ones((8, 4), np.float32)
    if kind == "mismatch" and last:
        x = np.ones((12, 4), np.float32)
    for i in range(4):
        if i == 2 and last:
            if kind == "raise":
                raise ValueError("out of data")
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "hang":
                time.sleep(60)
        step(x)
    print("done")


if __name__ == "__main__":
    main()
