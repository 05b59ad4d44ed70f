"""Training steps: equal to the eager loop, compiled once whatever changes, with everything updated in place."""

from __future__ import annotations

import numpy as np
import pytest

import treadle as td
from treadle.frontend.optim.clip import clip_by_global_norm

from .tools import assert_close

rng = np.random.default_rng(0)
X = rng.normal(size=(8, 4)).astype(np.float32)
Y = rng.integers(0, 3, 8)


class Net(td.nn.Module):
    """Everything that makes a step hard: running statistics, dropout, a shared and an unused parameter."""

    def __init__(self, dropout=0.25):
        super().__init__()
        # A bias before a batch norm has no gradient but rounding errors, which Adam would blow up.
        self.first = td.nn.Linear(4, 6, bias=False)
        self.norm = td.nn.BatchNorm1d(6)
        self.drop = td.nn.Dropout(dropout)
        self.last = td.nn.Linear(6, 3)
        self.unused = td.nn.Parameter(np.ones(2, np.float32))

    def forward(self, x):
        return self.last(self.drop(td.relu(self.norm(self.first(x)))))


def loss_fn(model, x, y):
    return td.nn.functional.cross_entropy(model(x), y)


def pair(make=lambda p: td.optim.AdamW(p, lr=1e-2), **options):
    """Two equal models with their optimizers."""
    made = []
    for _ in range(2):
        td.random.seed(0)
        model = Net(**options)
        made.append((model, make(model.parameters())))
    return made


def eager_step(model, opt, x, y, clip=None):
    opt.zero_grad()
    loss = loss_fn(model, td.asarray(x), td.asarray(y))
    loss.backward()
    if clip is not None:
        params = [p for p in opt.params if p.grad is not None]
        for p, g in zip(params, clip_by_global_norm([p.grad for p in params], clip)[0]):
            p.grad = g
    opt.step()
    return loss.item()


def same_state(a, b, tolerance=2e-5):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values()):
        np.testing.assert_allclose(x.numpy(), y.numpy(), tolerance, tolerance, err_msg=name)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: td.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: td.optim.AdamW(p, lr=td.optim.Cosine(1e-2, 10), weight_decay=0.1),
    ],
)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_equal_to_the_eager_loop(make, clip):
    (model, opt), (other, other_opt) = pair(make)
    step = td.train_step(model, loss_fn, opt, clip_norm=clip)
    places = [p._value.array.ctypes.data for p in model.parameters()]
    td.random.seed(5)
    compiled = [step(X, Y).item() for _ in range(4)]
    td.random.seed(5)
    eager = [eager_step(other, other_opt, X, Y, clip) for _ in range(4)]
    np.testing.assert_allclose(compiled, eager, 1e-4)
    same_state(model, other)
    assert [p._value.array.ctypes.data for p in model.parameters()] == places
    assert (step.stats.compiles, step.stats.calls, opt.steps) == (1, 4, 4)


def test_nothing_that_changes_between_steps_compiles_again():
    (model, opt), _ = pair(lambda p: td.optim.SGD(p, lr=td.optim.OneCycle(0.1, 1000)))
    step = td.train_step(model, loss_fn, opt, clip_norm=1.0)
    for i in range(1000):
        step.clip_norm = 1.0 + i % 20
        step(X, Y)
    opt.lr = 0.5
    opt.groups[0].options["weight_decay"] = 0.1
    step(td.tensor(X), td.tensor(Y))
    assert step.stats.compiles == 1
    model.first.weight.requires_grad = False
    before = model.first.weight.numpy()
    step(X, Y)
    assert step.stats.compiles == 2, "the first frozen parameter brings in the flags"
    assert (model.first.weight.numpy() == before).all() and "trainable" in step.stats.reasons[1]
    model.first.weight.requires_grad = True
    model.last.bias.requires_grad = False
    bias = model.last.bias.numpy()
    step(X, Y)
    assert step.stats.compiles == 2
    assert (model.first.weight.numpy() != before).any() and (model.last.bias.numpy() == bias).all()
    step(X[:4], Y[:4])
    assert step.stats.compiles == 3 and "f32[8,4], now f32[4,4]" in step.stats.reasons[2]


def freezing_run(make, compiled, **options):
    """Three stages of two steps each: all train, then the first layer is frozen, then the last instead."""
    (model, opt), _ = pair(make)
    step = td.train_step(model, loss_fn, opt, clip_norm=1.0, **options) if compiled else None
    for stage in range(3):
        model.first.requires_grad_(stage != 1)
        model.last.requires_grad_(stage != 2)
        for _ in range(2):
            td.random.seed(stage)
            step(X, Y) if compiled else eager_step(model, opt, X, Y, 1.0)
    return model, opt, step


@pytest.mark.parametrize("make", [
    lambda p: td.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    lambda p: td.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1),
    lambda p: td.optim.AdaGrad(p, lr=0.1, lr_decay=0.5),
])
def test_what_is_frozen_does_not_move_and_its_steps_do_not_count(make):
    expected, expected_opt, _ = freezing_run(make, compiled=False)
    for options, compiles in (({"freezable": True}, 1), ({"prune_frozen": True}, 3)):
        model, opt, step = freezing_run(make, compiled=True, **options)
        same_state(model, expected)
        assert step.stats.compiles == compiles
        assert opt.skipped[1:] == expected_opt.skipped[1:] and set(opt.skipped) == {0, 2}  # the first is the unused one
        for slots, others in zip(opt.state, expected_opt.state):
            for name, tensor in slots.items():
                np.testing.assert_allclose(tensor.numpy(), others[name].numpy(), 2e-4, 2e-5)


def test_pruning_leaves_the_frozen_backward_out():
    sizes = {}
    for prune in (False, True):
        (model, opt), _ = pair()
        model.first.requires_grad_(False)
        graph = td.train_step(model, loss_fn, opt, prune_frozen=prune).trace(X, Y)
        sizes[prune] = len(graph.nodes)
        names = {v.name for i, v in enumerate(graph.inputs) if i in set(graph.aliases.values())}
        assert ("first.weight" in names) is not prune and "last.weight" in names
    assert sizes[True] < sizes[False]


def test_equal_updates_stay_one_kernel_when_frozen():
    layers = td.nn.Sequential(*[td.nn.Linear(8, 8) for _ in range(6)])
    step = td.train_step(layers, lambda m, x: (m(x) ** 2).mean(), td.optim.AdamW(layers.parameters()))
    step(np.ones((4, 8), np.float32))
    kernels = step.stats.kernels
    layers[1].requires_grad_(False)
    step(np.ones((4, 8), np.float32))
    assert step.stats.kernels <= kernels + 1


def test_accumulation_equals_the_whole_batch():
    def loss(model, x, y):
        return ((model(x) - y[:, None]) ** 2).mean(), {"kept": x.sum()}

    models = []
    for accumulate in (1, 4):
        td.random.seed(1)
        model = td.nn.Linear(4, 3)
        step = td.train_step(model, loss, td.optim.SGD(model.parameters(), lr=0.1), accumulate=accumulate)
        value, aux = step(X, Y.astype(np.float32))
        models.append((model, value, aux))
    same_state(models[0][0], models[1][0])
    assert_close(models[0][1], models[1][1], 1e-5)
    assert models[0][2]["kept"].shape == () and models[1][2]["kept"].shape == (4,)
    (model, opt), _ = pair()
    td.train_step(model, loss_fn, opt, accumulate=2)(X, Y)
    assert model.norm.running_mean.numpy().any()
    with pytest.raises(td.TreadleError, match=f"does not divide into {len(X) + 1} parts"):
        td.train_step(model, loss_fn, opt, accumulate=len(X) + 1)(X, Y)


def test_the_graph_of_a_step():
    (model, opt), _ = pair()
    graph = td.train_step(model, loss_fn, opt, clip_norm=1.0).trace(X, Y)
    roles = dict(zip([v.name for v in graph.inputs], graph.roles))
    assert roles["clip_norm"] == roles["0_step_size"] == "scalar" and roles["first.weight"] == "parameter"
    assert (
        roles["norm.running_mean"] == roles["rng"] == roles["first.weight.m"] == "state"
        if "first.weight.m" in roles
        else True
    )
    assert len(graph.aliases) == 5 + 2 * 5 + 2 + 1, (
        "parameters, moments, statistics, random state; not the unused"
    )
    assert td.ir.parse(str(graph)) == graph


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes_of_parameters(dtype):
    model = td.nn.Linear(4, 3).to(dtype)
    opt = td.optim.Adam(model.parameters(), lr=1e-2)
    step = td.train_step(model, lambda m, x: (m(x.astype(dtype)) ** 2).mean(), opt)
    losses = [step(X).item() for _ in range(10)]
    assert losses[-1] < losses[0] and model.weight.dtype == dtype


def test_mixed_precision_keeps_masters():
    (model, opt), _ = pair(dropout=0.0)
    step = td.train_step(model, loss_fn, opt, amp="bfloat16")
    losses = [step(X, Y).item() for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0] and model.first.weight.dtype == "float32"


def test_a_memory_budget_recomputes_blocks():
    def make():
        td.random.seed(0)
        return td.nn.Sequential(*[td.nn.Sequential(td.nn.Linear(64, 64), td.nn.GELU()) for _ in range(4)])

    x = np.random.default_rng(0).normal(size=(256, 64)).astype(np.float32)
    results, bytes_used = [], []
    for budget in (None, 400_000):
        model = make()
        step = td.train_step(
            model,
            lambda m, x: (m(x) ** 2).mean(),
            td.optim.SGD(model.parameters(), lr=0.1),
            memory_budget=budget,
        )
        results.append([step(x).item() for _ in range(2)])
        bytes_used.append(step.executable.signature.arena_bytes)
    np.testing.assert_allclose(results[0], results[1], 1e-5)
    assert bytes_used[1] <= 400_000 < bytes_used[0]
    with pytest.raises(td.TreadleError, match="the budget is 1,000"):
        td.train_step(
            model, lambda m, x: (m(x) ** 2).mean(), td.optim.SGD(model.parameters()), memory_budget=1000
        )(x)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accumulate": 0}, "accumulate"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"memory_budget": 0.5}, "memory_budget"),
        ({"target": "x"}, "target|x"),
    ],
)
def test_wrong_options(options, words):
    model = td.nn.Linear(4, 3)
    with pytest.raises(td.TreadleError, match=words):
        td.train_step(model, lambda m, x: m(x).sum(), td.optim.SGD(model.parameters()), **options)(X)


def test_wrong_losses():
    model = td.nn.Linear(4, 3)
    opt = td.optim.SGD(model.parameters())
    with pytest.raises(td.TreadleError, match="floating scalar"):
        td.train_step(model, lambda m, x: m(x), opt)(X)
    with pytest.raises(td.TreadleError, match="scalar"):
        td.train_step(model, lambda m, x: 1.0, opt)(X)
    with pytest.raises(td.TreadleError, match="must be a function"):
        td.train_step(model, None, opt)
    with pytest.raises(td.TreadleError, match="cannot be traced"):
        td.trace(td.train_step(model, lambda m, x: m(x).sum(), opt), X)


# Checkpoints -----------------------------------------------------------------------------------------------------


def test_a_run_resumed_from_a_checkpoint_is_the_same_run(tmp_path):
    path = tmp_path / "run.safetensors"
    (model, opt), (other, other_opt) = pair()
    step = td.train_step(model, loss_fn, opt)
    for _ in range(3):
        step(X, Y)
    td.save_checkpoint(path, model, opt, step=3, metadata={"note": "half way"})
    rest = [step(X, Y).item() for _ in range(3)]
    td.random.seed(99)
    resumed = td.train_step(other, loss_fn, other_opt)
    resumed(X, Y)
    found = td.load_checkpoint(path, other, other_opt)
    assert (found.step, found.metadata, other_opt.steps) == (3, {"note": "half way"}, 3)
    assert [resumed(X, Y).item() for _ in range(3)] == rest
    same_state(model, other, 0)


def test_the_file_is_plain_safetensors(tmp_path):
    import ml_dtypes
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "m.safetensors"
    model = td.nn.Linear(4, 3)
    td.save_checkpoint(path, model)
    foreign = load_file(path)
    assert (foreign["weight"] == model.weight.numpy()).all()
    save_file({"weight": np.ones((3, 4), np.float32), "bias": np.zeros(3, np.float32)}, path)
    assert td.load_checkpoint(path, model).step is None and model.weight.numpy().min() == 1
    narrow = {
        "a": np.ones((2, 0, 3), ml_dtypes.bfloat16),
        "b": np.array(True),
        "c": np.arange(3, dtype=np.uint16),
    }
    td.frontend.safetensors.write_safetensors(path, narrow, {"k": "v"})
    arrays, notes = td.frontend.safetensors.read_safetensors(path)
    assert notes["k"] == "v" and all(
        (arrays[k] == v).all() and arrays[k].dtype == v.dtype for k, v in narrow.items()
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-3],
        lambda b: b + b"x",
        lambda b: b[:4],
        lambda b: b[:-5] + bytes([b[-5] ^ 1]) + b[-4:],
        lambda b: b"\xff" * 8 + b[8:],
        lambda b: b.replace(b'"F32"', b'"F99"'),
        lambda b: b.replace(b"data_offsets", b"data_offsetz"),
        lambda b: b.replace(b"[3, 4]", b"[4, 4]"),
        lambda b: b"",
    ],
)
def test_damage_is_found(tmp_path, damage):
    path = tmp_path / "broken.safetensors"
    model = td.nn.Linear(4, 3)
    td.save_checkpoint(path, model)
    path.write_bytes(damage(path.read_bytes()))
    before = model.weight.numpy()
    with pytest.raises(td.TreadleError, match=r"broken\.safetensors") as caught:
        td.load_checkpoint(path, model)
    assert type(caught.value).__name__ == "CheckpointError" and (model.weight.numpy() == before).all()


def test_checkpoints_that_do_not_fit(tmp_path):
    path = tmp_path / "m.safetensors"
    model = td.nn.Linear(4, 3)
    td.save_checkpoint(path, model)
    with pytest.raises(td.TreadleError, match=r"m\.safetensors.*(?s:.*)\(3, 4\).*\(3, 5\)"):
        td.load_checkpoint(path, td.nn.Linear(5, 3))
    with pytest.raises(td.TreadleError, match="without one"):
        td.load_checkpoint(path, model, td.optim.Adam(model.parameters()))
    for wrong in (
        lambda: td.load_checkpoint(tmp_path / "none", model),
        lambda: td.save_checkpoint(tmp_path / "no" / "x", model),
    ):
        with pytest.raises(td.TreadleError):
            wrong()
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"], "no half-written file stays"
