"""Pipeline schedules and cuts: pure data, checked without processes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.distributed.chain import Layer, cut, least_memory
from treadle.distributed.pipeline import (
    BACKWARD,
    FORWARD,
    WEIGHTS,
    Task,
    chart,
    gpipe,
    ideal_bubble,
    interleaved,
    one_f_one_b,
    schedule,
    simulate,
    stash_bound,
)
from treadle.ir.errors import AttributeValueError

SIZES = [(1, 1), (1, 4), (2, 2), (2, 3), (4, 4), (4, 8), (4, 13), (8, 64), (64, 128)]


def every_task(stages, micro):
    return {Task(phase, s, m) for phase in (FORWARD, BACKWARD) for s in range(stages) for m in range(micro)}


@pytest.mark.parametrize(("devices", "micro"), SIZES)
@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
def test_bubble_and_stash(kind, devices, micro):
    plan = schedule(kind, devices, micro)
    assert {t for tasks in plan for t in tasks} == every_task(devices, micro)
    played = simulate(plan, [1.0] * devices, [2.0] * devices)
    assert played.bubble == pytest.approx(ideal_bubble(devices, micro))
    for stage, held in enumerate(played.stash):
        assert held == stash_bound(kind, devices, micro, stage)


@pytest.mark.parametrize(("devices", "micro", "chunks"), [(2, 4, 2), (4, 8, 2), (4, 8, 4), (8, 16, 3)])
def test_interleaving_divides_the_bubble(devices, micro, chunks):
    plan = interleaved(devices, micro, chunks)
    assert {t for tasks in plan for t in tasks} == every_task(devices * chunks, micro)
    assert all(t.stage % devices == d for d, tasks in enumerate(plan) for t in tasks)
    stages = devices * chunks
    played = simulate(plan, [1 / chunks] * stages, [2 / chunks] * stages)
    assert played.bubble == pytest.approx(ideal_bubble(devices, micro, chunks))
    for stage, held in enumerate(played.stash):
        assert held <= stash_bound("interleaved", devices, micro, stage, chunks)


@pytest.mark.parametrize(("devices", "micro"), SIZES)
def test_gradients_of_weights_fill_the_bubble(devices, micro):
    plan = schedule("zb-h1", devices, micro)
    later = {Task(WEIGHTS, d, m) for d in range(1, devices) for m in range(micro)}
    assert {t for tasks in plan for t in tasks} == every_task(devices, micro) | later
    played = simulate(plan, [1.0] * devices, [2.0] * devices)
    before = simulate(schedule("1f1b", devices, micro), [1.0] * devices, [2.0] * devices)
    assert played.makespan <= before.makespan
    if devices == 2 and micro > 2:
        assert (before.makespan, played.makespan) == (3 * micro + 3, 3 * micro + 1)
    for stage, held in enumerate(played.stash):
        assert held <= stash_bound("zb-h1", devices, micro, stage)


def test_tables():
    def text(plan):
        return [" ".join(map(str, tasks)) for tasks in plan]

    assert text(gpipe(2, 2)) == ["F0.0 F0.1 B0.0 B0.1", "F1.0 F1.1 B1.0 B1.1"]
    assert text(one_f_one_b(2, 3)) == ["F0.0 F0.1 B0.0 F0.2 B0.1 B0.2", "F1.0 B1.0 F1.1 B1.1 F1.2 B1.2"]


def test_chart():
    played = simulate(one_f_one_b(2, 2), [1.0] * 2, [1.0] * 2)
    assert chart(played, 2, 12) == "  0 |0011  aa  bb|\n  1 |  00aa11bb  |"


def test_a_deadlock_is_found():
    plan = ((Task(BACKWARD, 0, 0), Task(FORWARD, 0, 0)),)
    with pytest.raises(AttributeValueError, match="deadlocks: B0.0"):
        simulate(plan, [1.0], [1.0])


def test_what_cannot_be_scheduled():
    with pytest.raises(AttributeValueError, match="multiples of the 4 devices, got 6"):
        interleaved(4, 6, 2)
    with pytest.raises(AttributeValueError, match="no pipeline schedule 'zigzag'"):
        schedule("zigzag", 2, 2)
    with pytest.raises(AttributeValueError, match="'gpipe' has one stage on each device, not 2 chunks"):
        schedule("gpipe", 2, 2, 2)


# Cuts --------------------------------------------------------------------------------------------------------------

layers = st.builds(Layer, forward=st.integers(1, 9).map(float), backward=st.integers(1, 9).map(float),
                   parameters=st.integers(0, 5).map(float), activations=st.integers(0, 3).map(float),
                   output=st.integers(0, 3).map(float))


def brute_force(chain, stages, memory, kept, bandwidth):
    best = float("inf")
    for inner in itertools.combinations(range(1, len(chain)), stages - 1):
        bounds = (0, *inner, len(chain))
        runs = [chain[a:b] for a, b in zip(bounds, bounds[1:])]
        if all(sum(x.parameters + k * x.activations for x in run) <= memory for run, k in zip(runs, kept)):
            last = len(runs) - 1
            best = min(best, max(sum(x.forward + x.backward for x in run) + run[-1].output / bandwidth * (s < last)
                                 for s, run in enumerate(runs)))
    return best


@given(st.lists(layers, min_size=1, max_size=8), st.integers(1, 4), st.sampled_from([8.0, 15.0, float("inf")]))
def test_the_cut_is_optimal(chain, stages, memory):
    stages = min(stages, len(chain))
    kept = list(range(stages, 0, -1))
    best = brute_force(chain, stages, memory, kept, 2.0)
    if best == float("inf"):
        least = least_memory(chain, stages, kept)
        assert least > memory
        with pytest.raises(AttributeValueError, match="the least that does is"):
            cut(chain, stages, memory, kept, 2.0)
        cut(chain, stages, least, kept, 2.0)
    else:
        found = cut(chain, stages, memory, kept, 2.0)
        assert found.seconds == pytest.approx(best)
        assert found.show(chain).count("stage") == stages
