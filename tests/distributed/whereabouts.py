"""Prints, as JSON, where a rank is and whom it is linked to."""

import json
import os
import socket

import numpy as np

import treadle as td
from treadle.distributed.comm import Job

job = Job(td.distributed.make_mesh({"data": -1}))
total = np.zeros(1)
job.watch.wait(job.world.Iallreduce(np.array([float(job.rank)]), total))
print(json.dumps({"rank": job.rank, "host": socket.gethostname(), "near": job.watch.near_ranks,
                  "linked": sorted(job.watch.links.sockets), "sum": total[0],
                  "threads": os.environ["TREADLE_NUM_THREADS"]}))
