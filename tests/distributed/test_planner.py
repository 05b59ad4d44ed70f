"""The planner against brute force, and what it says when nothing fits."""

import itertools

import numpy as np
import pytest

from treadle.distributed.chain import Cut, Layer, stage_bytes
from treadle.distributed.cost import Cluster, Link
from treadle.distributed.gantt import pixels, write_png
from treadle.distributed.pipeline import one_f_one_b, simulate
from treadle.distributed.planner import Machine, divisors, evaluate, merged, meshes, plan, scaled
from treadle.ir.errors import ArgumentsError, AttributeValueError

FAST = Cluster(Link(1e-6, 1e10))


def chain(count=6, seed=0):
    rng = np.random.default_rng(seed)
    draws = rng.uniform(1, 4, (count, 3))
    return [Layer(f, 2 * f, p * 1e6, a * 1e6, 1e5, f"layer{i}") for i, (f, p, a) in enumerate(draws.tolist())]


def brute_force(layers, machine, batch):
    """The least seconds over all meshes, micro-batches, recomputation and all cuts."""
    best = float("inf")
    for data, tensor, pipe in itertools.product(range(1, machine.devices + 1), repeat=3):
        if data * tensor * pipe != machine.devices or batch % data or pipe > len(layers):
            continue
        for micro, again in itertools.product(range(1, batch // data + 1), (False, True)):
            if batch // data % micro or pipe > 1 and micro < pipe:
                continue
            own = [scaled(x, 1 / data / micro, tensor, again, machine.cluster) for x in layers]
            factor = 0.5 + 0.5 / data if data > 1 else 1.0
            for inner in itertools.combinations(range(1, len(own)), pipe - 1):
                stages = Cut((0, *inner), 0.0).stages(own)
                kept = [min(pipe - s, micro) for s in range(pipe)]
                held = [stage_bytes(run, k) - (1 - factor) * sum(x.parameters for x in run)
                        for run, k in zip(stages, kept)]
                if max(held) > machine.memory:
                    continue
                link = machine.cluster.along("pipe")
                hop = link.latency + max((run[-1].output for run in stages[:-1]), default=0) / link.bandwidth
                played = simulate(one_f_one_b(pipe, micro), [sum(x.forward for x in run) for run in stages],
                                  [sum(x.backward for x in run) for run in stages], hop)
                reduce = max(2 * machine.cluster.all_gather("data", data, sum(x.parameters for x in run) / 4)
                             for run in stages)
                best = min(best, played.makespan + reduce)
    return best


@pytest.mark.parametrize("devices", [1, 2, 4, 6])
@pytest.mark.parametrize("memory", [4e7, 1.2e7])
def test_as_brute_force(devices, memory):
    machine, layers = Machine(devices, memory, FAST), chain()
    best = brute_force(layers, machine, 12)
    if best == float("inf"):
        with pytest.raises(AttributeValueError, match="the least that does is"):
            plan(layers, machine, 12)
    else:
        assert plan(layers, machine, 12)[0].seconds == pytest.approx(best, rel=0.02)  # the slowest stage is not all


def test_the_least_memory_does():
    layers = chain()
    with pytest.raises(AttributeValueError, match="no layout on 2 devices fits in 10 bytes each") as caught:
        plan(layers, Machine(2, 10, FAST), 8)
    least = float(str(caught.value).rsplit(" ", 1)[1].replace(",", "")) + 1
    assert plan(layers, Machine(2, least, FAST), 8)


def test_a_slow_network_is_avoided():
    slow = Machine(8, 1e9, Cluster(Link(1e-6, 1e10), (("tensor", Link(1.0, 1e5)),)))
    assert plan(chain(), slow, 64)[0].tensor == 1
    assert all(d * t * p == 8 for d, t, p in meshes(8)) and len(list(meshes(64))) == 28
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


def test_merging_keeps_the_sums():
    layers = chain(20)
    few = merged(layers, 7)
    assert len(few) == 7
    for name in ("forward", "backward", "parameters", "activations"):
        assert sum(getattr(x, name) for x in few) == pytest.approx(sum(getattr(x, name) for x in layers))


def test_a_picture(tmp_path):
    layout = evaluate(chain(), Machine(4, 1e9, FAST), 1, 1, 4, 8, False)
    image = pixels(layout.played, 4, 300)
    assert image.shape == (4 * 28 + 4, 300, 3)
    blank = np.mean([(image[4 + 28 * d + 12] == 255).all(-1).mean() for d in range(4)])
    assert blank == pytest.approx(layout.bubble, abs=0.05)
    write_png(tmp_path / "plan.png", image)
    pillow = pytest.importorskip("PIL.Image")
    with pillow.open(tmp_path / "plan.png") as read:
        np.testing.assert_array_equal(np.asarray(read), image)


MODEL = """
import treadle as td
layers = [td.nn.Linear(32, 32) for _ in range(4)]
def loss(x, y):
    for layer in layers:
        x = td.tanh(layer(x))
    return td.mean((x - y) ** 2)
"""


def test_the_command(tmp_path, capsys):
    from rich.console import Console

    from treadle.frontend.cli.plan import show

    (tmp_path / "model.py").write_text(MODEL)

    def run(devices, memory, **more):
        show(Console(width=120), f"{tmp_path}/model.py:loss", ["f32[32,32]"] * 2, devices, memory, "1GB/s", "1us",
             "1GFLOPS", "1TB/s", 3, more.get("picture"))
        return capsys.readouterr().out

    assert "4 devices" in run(4, "1MB") and "stage 0: layers 0-" in run(4, "1MB")
    assert "|" in run(4, "30kB", picture=tmp_path / "plan.png") and (tmp_path / "plan.png").stat().st_size > 100
    with pytest.raises(AttributeValueError, match="no layout on 4 devices fits in 1,000 bytes each; the least"):
        run(4, "1kB")
    with pytest.raises(ArgumentsError, match="--memory is 'lots'; expected a number with a unit"):
        run(4, "lots")
