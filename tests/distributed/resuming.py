"""What the ranks of the tests of checkpoints run: `resuming.py FOLDER CASE...`, each case a table as JSON.

A case trains the small GPT of `job.py` in f64 with AdamW, clipping, a schedule and a loader on a mesh: from its
beginning or from a checkpoint, for some steps, and may save one. What came out goes to `NAME.npz`: losses, and after
gathering parameters, moments, the generator's state and the position in the data.
"""

import json
import sys
from pathlib import Path

import numpy as np

import treadle as td

sys.path.insert(0, str(Path(__file__).parent))
from job import BATCH, SEQ, VOCAB, Gpt, lm_loss, tensor_plan


def loader():
    tokens, labels = np.random.default_rng(1).integers(0, VOCAB, (2, 3 * BATCH, SEQ))
    return td.finetune.Cursor(td.finetune.Arrays(tokens, labels, batch_size=BATCH, seed=7))


def make(mesh, case):
    """(step, loader); equal cases make equal steps, in any process."""
    td.random.seed(case.get("seed", 0))
    model = Gpt(case.get("dropout", 0.0), fused=case.get("fused", False))
    model.to("float64")
    opt = td.optim.AdamW(model.parameters(), lr=td.optim.LinearWarmup(1e-2, 2, 0.1).then(td.optim.Cosine(1e-2, 4), 2))
    pipe = mesh.get("pipe", 1) > 1
    inner = td.train_step(model, lm_loss, opt, clip_norm=0.05, accumulate=case.get("accumulate", 1))
    plan = td.distributed.Plan(shard=tensor_plan(model) if "tensor" in mesh else {},
                               zero=case.get("zero", 0) if "data" in mesh else 0,
                               **({"schedule": case["schedule"]} if pipe and "schedule" in case else {}))
    return td.distributed.parallelize(inner, td.distributed.Mesh(mesh), plan), loader()


def state_of(step):
    """Everything that a checkpoint restores, whole."""
    step.gather()
    opt = step.inner.opt
    return {**{n: t.numpy() for n, t in step.inner.model.state_dict().items()},
            **{f"optimizer/{k}": v for k, v in opt.state_dict().items()},
            "rng": td.random.default_generator().state.numpy()}


def run(case):
    """(losses, state, position)."""
    step, cursor = make(case["mesh"], case)
    if "load" in case:
        step.load(case["load"], data=cursor)
    batches, losses = iter(cursor), []
    for _ in range(case["steps"]):
        losses.append(float(step(*next(batches)).numpy()))
    if "save" in case:
        step.save(case["save"], {"note": "half way"}, data=cursor)
    return losses, state_of(step), cursor.state_dict()


def main():
    td.set_num_threads(1)
    folder = Path(sys.argv[1])
    for text in sys.argv[2:]:
        case = json.loads(text)
        losses, state, position = run(case)
        if td.distributed.rank() == 0:
            np.savez(folder / f"{case['name']}.npz", losses=losses, position=list(position.values()), **state)


if __name__ == "__main__":
    main()
