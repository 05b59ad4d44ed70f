"""What the ranks of test_progress.py run: a long message arrives while neither side calls MPI.

Both look at memory only: the receiver at the last byte of its array, the sender at a file that the receiver writes.
"""

import sys
import time
from pathlib import Path

import numpy as np

from treadle.distributed.comm import Job
from treadle.distributed.mesh import Mesh
from treadle.distributed.messages import Messages
from treadle.ir.dtypes import as_dtype
from treadle.ir.types import TensorType

SIZE = 8 << 20  # bytes: more than travels unasked


def until(done):
    end = time.monotonic() + 20
    while not done() and time.monotonic() < end:
        time.sleep(0.001)
    return done()


def main():
    arrived = Path(sys.argv[1])
    job = Job(Mesh({"pipe": 2}))
    messages = Messages(job.groups["pipe"], job.watch, apart="pipe" in job.apart)
    kind = TensorType((SIZE,), as_dtype("uint8"))
    job.barrier()
    if job.rank == 0:
        messages.send([np.full(SIZE, 7, np.uint8)], 1, 0)
        print("sent" if until(arrived.exists) else "waited", flush=True)
    else:
        messages.post((0,), [kind], 0, 0)
        ((_, array),) = messages.posted[0,]
        array[-1] = 0
        if until(lambda: array[-1] == 7):
            arrived.touch()
        assert (messages.take((0,), "recv")[0] == 7).all()
    messages.finish()
    job.barrier()


if __name__ == "__main__":
    main()
