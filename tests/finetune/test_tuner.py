"""Runs of fine-tuning: stages on one program, exact resume, early stopping, evaluation."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest

import treadle as td

ft = td.finetune
rng = np.random.default_rng(0)
W = rng.normal(size=(6, 3))
X = rng.normal(size=(96, 6)).astype(np.float32)
Y = (X @ W).argmax(1)


class Net(td.nn.Module):
    def __init__(self, dropout=0.1):
        super().__init__()
        self.blocks = td.nn.Sequential(*[td.nn.Sequential(td.nn.Linear(6, 6), td.nn.ReLU()) for _ in range(3)])
        self.drop = td.nn.Dropout(dropout)
        self.head = td.nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.drop(self.blocks(x)))


def tuner(seed=0, **options):
    td.random.seed(seed)
    options = {"batch_size": 16, "lr": 1e-2, "epochs": 2, "show": False, **options}
    return ft.Tuner(Net(), (X[:64], Y[:64]), evaluation=(X[64:], Y[64:]), **options)


def state(run):
    return {n: t.numpy() for n, t in run.model.state_dict().items()}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_it_learns_and_says_so():
    run = tuner(epochs=30, metrics=("accuracy", "macro_f1"), lr=3e-2)
    before = run.evaluate((X[64:], Y[64:]))
    history = run.fit()
    assert history.steps == run.total == 120 and len(history.losses) == 120 and len(history.evaluations) == 30
    assert history.best["accuracy"] > max(0.7, before["accuracy"]) and set(before) == {"loss", "accuracy", "macro_f1"}
    assert run.evaluate((X[64:], Y[64:]))["accuracy"] == history.best["accuracy"], "the best weights are restored"
    assert run.step.stats.compiles == 1 and history.first_examples == 16 and history.examples == 16 * 120
    assert 0 < history.first_seconds < history.seconds
    assert history.speed == 16 * 119 / (history.seconds - history.first_seconds), "the first step compiles"
    assert run.predict(X[:5]).shape == (5, 3)


@pytest.mark.parametrize("prune, compiles", [(False, 1), (True, 4)])
def test_gradual_unfreezing_compiles_once_or_once_for_each_stage(prune, compiles):
    net = Net()
    stages = ft.gradual(net)
    assert [len(s.train) for s in stages] == [2, 4, 6, 8]
    run = tuner(stages=[*stages, stages[0]], prune_frozen=prune, weight_decay=0.1)
    moved = []
    for _ in run._steps(ft.board.Board(0, 1, False)):
        pass
    assert run.step.stats.compiles == compiles, "going back to the first stage finds its program"
    for i, slots in enumerate(run.optimizer.state):
        moved.append((run.optimizer.skipped[i], max(float(np.abs(t.numpy()).max()) for t in slots.values())))
    assert sorted({s for s, _ in moved}) == [0, 8, 12, 16], "each parameter counts its own updates"


def test_what_is_frozen_stays_to_the_last_bit():
    run = tuner(stages=[ft.Stage("head.*", epochs=1)], weight_decay=0.5)
    before = state(run)
    run.fit()
    after = state(run)
    changed = {n for n in after if (after[n] != before[n]).any()}
    assert changed == {"head.weight", "head.bias"}
    frozen = [s for p, s in zip(run.optimizer.params, run.optimizer.state) if id(p) not in (
        id(run.model.head.weight), id(run.model.head.bias))]
    assert len(frozen) == 6 and all((t.numpy() == 0).all() for s in frozen for t in s.values())


@pytest.mark.parametrize("options", [
    {}, {"prune_frozen": True}, {"accumulate": 2, "amp": "bfloat16", "schedule": "cosine", "optimizer": "sgd"}])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, options):
    stages = [ft.Stage("head.*"), ft.Stage("*", epochs=2, lr=0.5)]
    whole = tuner(stages=stages, keep_best=False, **options)
    expected = whole.fit()
    first = tuner(stages=stages, keep_best=False, folder=tmp_path, save_every=1, **options)
    td.random.seed(0)
    for _ in itertools.islice(first._steps(ft.board.Board(0, 1, False)), 7):  # in the middle of the second epoch
        pass
    second = tuner(seed=5, stages=stages, keep_best=False, folder=tmp_path, **options)
    td.random.seed(99)
    history = second.fit(resume=True)
    same(state(whole), state(second))
    assert history.losses == expected.losses and history.evaluations == expected.evaluations
    for mine, theirs in zip(second.optimizer.state, whole.optimizer.state):
        same({k: t.numpy() for k, t in mine.items()}, {k: t.numpy() for k, t in theirs.items()})
    with pytest.raises(td.CheckpointError, match="lr: 0.01 there, 0.5 here"):
        tuner(stages=stages, folder=tmp_path, **{**options, "lr": 0.5, "keep_best": False}).fit(resume=True)


def test_interrupting_saves(tmp_path, monkeypatch):
    run = tuner(folder=tmp_path, epochs=3)
    calls = itertools.count()

    def interrupted(*batch):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return real(*batch)

    real = run.step
    interrupted.stats = real.stats
    monkeypatch.setattr(run, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    again = tuner(folder=tmp_path, epochs=3)
    assert again.fit(resume=True).steps == 12 and len(again.history.losses) == 12
    assert again.history.losses == tuner(epochs=3).fit().losses
    assert (tmp_path / "best.safetensors").exists()


def test_early_stopping_waits_for_a_better_one():
    numbers = iter([0.1, 0.5, 0.4, 0.3, 0.9])
    run = tuner(epochs=5, metrics={"given": lambda outputs, targets: next(numbers)}, patience=2)
    history = run.fit()
    assert history.steps == 16 and "given has not improved in 2" in history.stopped
    assert history.best["given"] == 0.5 and history.best["epoch"] == 1


def test_rates_by_layer_head_and_stage():
    run = tuner(stages=[ft.Stage("*"), ft.Stage("*", lr=0.1)], layer_decay=0.5, head="head.*", head_lr=3.0,
                schedule="constant", warmup=2, weight_decay=0.1)
    rates = {}
    for group in run.optimizer.groups:
        for p in group.params:
            name = next(n for n, q in run.model.named_parameters() if q is p)
            rates[name] = [round(group.options["lr"](s), 8) for s in (0, 1, 2, 7)]
            assert group.options["weight_decay"] == (0.1 if p.ndim > 1 else 0.0)
    assert rates["head.weight"] == [0.0, 0.015, 0.03, 0.003]
    assert [rates[f"blocks.{i}.0.bias"][2] for i in (2, 1, 0)] == [0.005, 0.0025, 0.00125]


def test_bad_settings_say_what_is_wrong():
    for options, message in (
        ({"objective": "hinge"}, "no objective 'hinge'"), ({"metrics": ["auc"]}, "no metric 'auc'"),
        ({"optimizer": "adamax"}, "optimizer is adamw"), ({"schedule": "step"}, "schedule is linear"),
        ({"lr": 0}, "lr must be above 0"), ({"batch_size": 15, "accumulate": 2}, "does not divide"),
        ({"batch_size": 65}, "64 examples do not make a batch of 65"), ({"monitor": "f1"}, "monitored metric 'f1'"),
        ({"stages": [ft.Stage("haed.*")]}, "'haed.*' fits no parameter; there are for example head"),
        ({"stage": 3}, "no setting 'stage'"), ({"layer_decay": 2.0}, "decay lies in"), ({"patience": 0}, "patience"),
    ):
        with pytest.raises(td.TreadleError, match=message.replace("*", r"\*")):
            tuner(**options)
    net = Net()
    ft.freeze(net)
    with pytest.raises(td.ArgumentsError, match="every parameter is frozen"):
        ft.Tuner(net, (X, Y), show=False)
    with pytest.raises(td.ArgumentsError, match="columns of one length"):
        ft.Tuner(Net(), (X, Y[:5]), show=False)


def test_lines_where_there_is_no_terminal(capsys):
    tuner(show=True).fit()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("epoch  1/2  loss ") and "held out: loss" in lines[1]


def test_a_loss_that_is_no_number_ends_the_run():
    run = ft.Tuner(td.nn.Linear(6, 3), (X * np.float32(np.inf), Y), show=False)
    with pytest.raises(td.GradientError, match="the loss of step 1 is nan.*clip_norm"):
        run.fit()


def test_data_of_the_users_own():
    class Noise:
        def __len__(self):
            return 3

        def batch(self, epoch, index):
            assert 0 <= epoch < 2 and 0 <= index < 3
            made = np.random.default_rng([epoch, index])
            return made.standard_normal((4, 6)).astype(np.float32), made.integers(0, 3, 4)

    seen = []

    def half(outputs, targets):
        seen.append(outputs.shape)
        return 0.5

    td.random.seed(0)
    run = ft.Tuner(td.nn.Linear(6, 3), Noise(), evaluation=Noise(), epochs=2, metrics=[half], show=False)
    assert run.fit().steps == 6 and seen == [(12, 3)] * 2 and run.history.best["half"] == 0.5
    augmented = ft.Arrays(X, Y, batch_size=8, augment=lambda rng, x, y: (x + rng.normal(), y))
    first = augmented.batch(1, 2)[0]
    np.testing.assert_array_equal(first, augmented.batch(1, 2)[0])
    assert len({float(a[0, 0]) for a in (first, augmented.batch(0, 2)[0], augmented.batch(1, 3)[0])}) == 3
    assert sorted(np.concatenate([ft.Arrays(X, Y, batch_size=10, drop_last=False).batch(0, i)[1]
                                  for i in range(10)]).tolist()) == sorted(Y.tolist())


def test_the_package_is_imported_when_it_is_used():
    code = "import sys, treadle; assert 'treadle.frontend.finetune' not in sys.modules; treadle.finetune.Tuner; " \
           "assert 'onnx' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
