"""What the ranks of the memory tests run: `mpiexec -n N python parts_job.py FOLDER '{"zero": 3, ...}'...`.

Each case makes a GPT of eight equal layers, trains for three steps, and every rank writes how much memory its process
came to hold, step by step, in bytes; rank 0 also the losses and, if asked, the parameters.
"""

import json
import sys
import threading
from pathlib import Path

import gpt
import numpy as np

import treadle as td
from treadle.ir.errors import ArgumentsError


def resident():
    """Bytes of memory that this process has filled: pages of its own, and its share of what the ranks share."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    own, shared = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
    return own + shared // td.distributed.world_size()


def most(during):
    """What a function gives, and the most memory that the process held meanwhile, in bytes."""
    found, done = [resident()], threading.Event()

    def watch():
        while not done.wait(0.001):
            found.append(resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = during()
    finally:
        done.set()
        thread.join()
    return result, max(found)


def run(case, folder):
    """One case; gives this rank's figures."""
    ranks = td.distributed.world_size()
    start = resident()
    plan = td.distributed.Plan(zero=case.get("zero", 0))
    size = {**gpt.EIGHT, "width": case["width"]}
    mesh = td.distributed.Mesh({"data": ranks} if ranks > 1 else {})
    step = td.distributed.parallelize(gpt.step_of(size, clip_norm=case.get("clip")), mesh, plan)
    made = resident() - start
    batch = gpt.batch(size, case.get("batch", ranks))
    losses, peaks, after = [], [], []
    for _ in range(3):
        loss, peak = most(lambda: step(*batch))
        losses.append(float(loss.numpy()))
        peaks.append(peak - start)
        after.append(resident() - start)
    model, layer = gpt.nbytes(step.inner.model)
    figures = {"model": model, "layer": layer, "made": made, "peaks": peaks, "after": after, "losses": losses,
               "memory": step.memory}
    weight = step.inner.model.blocks[0].up.weight
    try:
        figures["read"] = str(weight.numpy().shape)
    except ArgumentsError as error:
        figures["read"] = str(error)
    if case.get("keep"):
        step.gather()
        figures["gathered"] = weight.numpy().tolist() == weight.numpy().tolist()
        if td.distributed.rank() == 0:
            np.savez(folder / f"{case['name']}.npz", **{n: t.numpy() for n, t in step.inner.model.state_dict().items()})
    return figures


def main():
    td.set_num_threads(1)
    folder = Path(sys.argv[1])
    for text in sys.argv[2:]:
        case = json.loads(text)
        figures = run(case, folder)
        (folder / f"{case['name']}-{td.distributed.rank()}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
