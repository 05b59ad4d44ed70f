"""What scripts do between steps, on a mesh: `mpiexec -n 2 python usage_job.py '{"data": 2}' ...`.

Rank 0 prints, for each mesh, what every rank found.
"""

import json
import sys

import numpy as np

import treadle as td

d = td.distributed


def loss_of(model, x, y):
    return td.nn.functional.cross_entropy(model(x), y)


def run(axes):
    """What a script finds that assigns to parameters, changes rates, freezes, evaluates and stops early."""
    td.random.seed(0)
    model = td.nn.Sequential(td.nn.Linear(8, 16), td.nn.Tanh(), td.nn.Linear(16, 4)).to("float64")
    opt = td.optim.AdamW(model.parameters(), lr=1e-2)
    plan = d.Plan(zero=3 if "data" in axes else 0,
                  shard={"0.weight": ("tensor", None), "2.weight": (None, "tensor")} if "tensor" in axes else {})
    step = d.parallelize(td.train_step(model, loss_of, opt, clip_norm=1.0, accumulate=2), d.make_mesh(axes), plan)
    if d.is_main():
        model[0].weight.numpy()  # one rank has looked, others have not drawn it
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8, 8)), rng.integers(0, 4, 8)
    found = [step(x, y).item()]
    step.gather()
    average = {name: p.numpy().copy() for name, p in model.named_parameters()}
    found.append(step(x, y).item())
    step.gather()
    last = {name: p.numpy().copy() for name, p in model.named_parameters()}
    model.load_state_dict({name: 0.9 * average[name] + 0.1 * last[name] for name in last})
    found.append(td.compile(loss_of)(model, x, y).item())
    model.load_state_dict(last)
    opt.lr, step.inner.clip_norm = 0.05, 0.1
    found += [step(x, y).item() for _ in range(2)]
    model[0].requires_grad_(False)
    found += [step(x, y).item() for _ in range(2)]
    model[0].requires_grad_(True)
    while not d.broadcast(found[-1] < 0.4):
        found.append(step(x, y).item())
    found.append(step(x[:4], y[:4]).item())
    try:
        said = f"read: {model(td.tensor(x)).sum().item()}"
    except td.ArgumentsError as error:
        said = str(error)
    step.gather()
    found.append(model(td.tensor(x)).sum().item())
    return found, said


def two_steps(axes):
    """Losses of two training steps by turns, each of which reads what the other trains; gathered in between."""
    td.random.seed(0)
    nets = [td.nn.Linear(4, 4).to("float64") for _ in range(2)]
    plan, steps = d.Plan(zero=3 if "data" in axes else 0), []
    for mine, other in (nets, nets[::-1]):
        def loss(model, x, other=other):
            return ((model(other(x)) - x) ** 2).mean()

        opt = td.optim.SGD(mine.parameters(), lr=0.1)
        steps.append(d.parallelize(td.train_step(mine, loss, opt, accumulate=2), d.make_mesh(axes), plan))
    x, found = np.random.default_rng(0).standard_normal((8, 4)), []
    for _ in range(3):
        for step in steps:
            found.append(step(x).item())
            step.gather()
    return found


if __name__ == "__main__":
    everything = [d.all_gather((*run(json.loads(text)), two_steps(json.loads(text)))) for text in sys.argv[1:]]
    if d.is_main():
        print(json.dumps(everything))
