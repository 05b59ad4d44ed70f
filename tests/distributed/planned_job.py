"""What the ranks of a planned job run: `mpiexec -n N python planned_job.py PLAN.json OUT.npz`."""

import json
import sys

import gpt
import numpy as np

import treadle as td


def main():
    td.set_num_threads(1)
    plan = td.distributed.Plan.load(sys.argv[1])
    inner = gpt.step_of(gpt.SMALL, "float64", clip_norm=1.0, accumulate=plan.accumulate)
    step = td.distributed.parallelize(inner, plan=plan)
    found = gpt.losses(step)
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
