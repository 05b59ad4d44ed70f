"""What the ranks of the tests of faults run: `faults.py MESH FAULT PLACE FOLDER`.

Trains five steps, saves after each, and writes the final state. In the job's first start the last rank has an
accident in its third step: it is killed, is stopped, hangs, spins or raises, in its own code, in a collective, before
one, in a pipeline's receive or while it writes the checkpoint. In the second it goes on from what was saved. Some
further FAULTs are mistakes of the script: ranks that differ in what they run or are given. PLACE `slow` is no accident:
that rank takes its time between steps, and in the first.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import treadle as td
from treadle.distributed.watch import Watch

WIDTH, BATCH, STEPS = 8, 8, 5


class Net(td.nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.layers = td.nn.ModuleList([td.nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        self.drop = td.nn.Dropout(dropout)

    def forward(self, x):
        for layer in self.layers:
            x = self.drop(td.tanh(layer(x)))
        return x


def loss_fn(model, x, y):
    return td.mean((model(x) - y) ** 2)


def batches(seed):
    x, y = np.random.default_rng(seed).standard_normal((2, STEPS * BATCH, WIDTH))
    return td.finetune.Cursor(td.finetune.Arrays(x, y, batch_size=BATCH), epochs=1)


def have_accident(kind):
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "hang":
        time.sleep(600)
    while kind == "spin":
        pass
    if kind == "unplug":
        subprocess.run(["ip", "link", "set", os.environ["TEST_WIRE"], "down"], check=True)
        return
    raise ValueError("on purpose")


def arrange(kind, place, step):
    """Lets the accident happen at its place in the third step, or in the saving after it."""
    reduces = ("all_reduce", "reduce_scatter", "all_gather")
    wanted = {"collective": reduces, "kernel": reduces, "receive": ("recv", "receive"),
              "save": ("save",)}.get(place, ())
    enter, sync = Watch.enter, os.fsync

    def entering(self, label):
        if self.step == 2 and place == "kernel" and label.startswith(wanted):
            have_accident(kind)
        enter(self, label)
        if self.step == 2 and place not in ("kernel", "save") and label.startswith(wanted):
            have_accident(kind)
        if self.step == 0 and place == "slow" and label.startswith(reduces):
            time.sleep(1)

    def syncing(handle):
        if step.inner.opt.steps == 3:
            have_accident(kind)  # with part of a file on the disk
        sync(handle)

    if place == "save":
        os.fsync = syncing
    elif wanted or place == "slow":
        Watch.enter = entering
        step.job.watch.timeline = []  # this rank's programs leave short collectives to Python, too


def mistake(kind, last):
    """Makes the last rank differ before anything is built."""
    if not last:
        return
    if kind == "version":
        np.__version__ = "0.1"
    if kind == "early":
        raise ValueError("cannot read the data")  # before it has joined the others


def trained(mesh, kind, place, folder):
    """The step and the batches, with the mistake or the accident in place."""
    size, number = td.distributed.world_size(), td.distributed.rank()
    last, again = number == size - 1, bool(int(os.environ.get("TREADLE_RESTART", "0")))
    mistake(kind, last)
    if kind == "mesh" and last:
        mesh = {"other": size}
    td.random.seed(int(kind == "seed" and last))
    model = Net(0.0 if "pipe" in mesh else 0.25)
    if kind == "model" and last:
        model.layers.append(td.nn.Linear(WIDTH, WIDTH))
    model.to("float32" if kind == "dtype" and last else "float64")
    opt = td.optim.AdamW(model.parameters(), lr=0.02 if kind == "rate" and last else 0.01)
    inner = td.train_step(model, loss_fn, opt, clip_norm=0.5, accumulate=4 if "pipe" in mesh else 1)
    plan = td.distributed.Plan(zero=int("data" in mesh and not (kind == "plan" and last)))
    step = td.distributed.parallelize(inner, td.distributed.make_mesh(mesh), plan)
    cursor = batches(seed=int(kind == "data" and last))
    if again and number == 0:
        known = set(json.loads((folder / "index.json").read_text())["files"]) | {"index.json"}
        print("half-written:", sorted({p.name for p in folder.iterdir()} - known))
    if last and not again:
        arrange(kind, place, step)
    return step, cursor, last and not again


def main():
    mesh, kind, place, folder = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])
    step, cursor, unlucky = trained(mesh, kind, place, folder)
    for number in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        name = os.readlink(f"/proc/self/fd/{number}") if os.path.lexists(f"/proc/self/fd/{number}") else ""
        if "mpich_shm" in name:
            print("memory:", name)
    step.resume(folder, data=cursor)
    for x, y in cursor:
        if kind == "shape" and unlucky and step.inner.opt.steps == 2:
            x, y = x[:4], y[:4]
        if place == "slow" and unlucky:
            time.sleep(2)
        if place == "compute" and unlucky and step.inner.opt.steps == 2:
            have_accident(kind)
        if kind == "fewer" and unlucky and step.inner.opt.steps == 3:
            break
        if kind == "draw" and unlucky and step.inner.opt.steps == 2:
            td.random.uniform((3,))
        if kind == "eval" and unlucky and step.inner.opt.steps == 2:
            step.inner.model.eval()
        if kind == "alone" and unlucky and step.inner.opt.steps == 2:
            step.save(folder)
        step(x, y)
        if kind != "fewer":
            step.save(folder, data=cursor)
    if kind == "fewer":
        sys.exit(0)
    step.gather()
    if td.distributed.rank() == 0:
        opt = {f"optimizer/{k}": v for k, v in step.inner.opt.state_dict().items()}
        np.savez(folder.with_suffix(".npz"), rng=td.random.default_generator().state.numpy(),
                 **{n: t.numpy() for n, t in step.inner.model.state_dict().items()}, **opt)
    print("done")


if __name__ == "__main__":
    td.set_num_threads(1)
    main()
