"""The planner against trying everything, in code of its own; and what it says when nothing fits.

`brute_force` below is written from the descriptions in `layouts.py`, one cut and one number at a time: it shares the
alpha-beta cost of a collective with the planner, and nothing else.
"""

import itertools
import math

import numpy as np
import pytest

from treadle.distributed import planner
from treadle.distributed.cost import Cluster, Link
from treadle.distributed.layouts import Candidate, Chain, Costs, Machine, Unit
from treadle.distributed.mesh import Mesh
from treadle.distributed.pipeline import ideal_bubble, schedule, simulate
from treadle.distributed.planner import (
    Choices,
    balance,
    best_cut,
    candidates,
    divisors,
    every_cut,
    meshes,
    plan,
)
from treadle.distributed.timetable import held_of, timetable
from treadle.ir.errors import AttributeValueError


class Table:
    """Prices made up from the figures of whole layers: (forward, backward, parameters, activations, output)."""

    def __init__(self, rows, tied=0.0):
        self.rows, self.tied = rows, tied

    def units(self, tensor, examples, recompute):
        return [self.unit(i, row, tensor, examples, recompute) for i, row in enumerate(self.rows)]

    def unit(self, i, row, tensor, examples, recompute):
        forward, backward, parameters, activations, output = row
        talk = 0.1 * forward * examples * (tensor - 1)
        f = forward * examples / tensor + talk
        b = backward * examples / tensor + talk + (f if recompute else 0.0)
        kept = (0.2 if recompute else 1.0) * activations * examples / tensor
        shared = self.tied / tensor if i in (0, len(self.rows) - 1) else 0.0
        own = parameters / tensor + shared
        return Unit(f, b, own, own, 2 * own, kept, 0.3 * activations * examples / tensor, output * examples,
                    2 * output * examples * (tensor > 1), f"layer{i}",
                    (("table", shared, shared, 2 * shared),) if shared else ())


def rows_of(rng, count):
    draws = rng.uniform(1, 4, (count, 5))
    return [(f * 1e-3, f * b * 1e-3, p * 1e6, a * 1e5, o * 1e4) for f, b, p, a, o in draws.tolist()]


# Trying everything, simply -------------------------------------------------------------------------------------------


def tasks_of(kind, pipe, micro, chunks, device):
    """What a device does, in order: ("F" or "B", stage, micro-batch)."""
    if kind == "gpipe":
        return [("F", device, m) for m in range(micro)] + [("B", device, m) for m in range(micro)]
    if chunks == 1:
        ahead = [("F", device, m) for m in range(micro)]
        back = [("B", device, m) for m in range(micro)]
        warm = min(pipe - 1 - device, micro)
    else:
        ahead, back = [], []
        for group in range(micro // pipe):
            for c in range(chunks):
                for i in range(pipe):
                    ahead.append(("F", c * pipe + device, group * pipe + i))
                    back.append(("B", (chunks - 1 - c) * pipe + device, group * pipe + i))
        warm = min(2 * (pipe - 1 - device) + (chunks - 1) * pipe, micro * chunks)
    order = ahead[:warm]
    for k in range(len(ahead) - warm):
        order += [ahead[warm + k], back[k]]
    return order + back[len(ahead) - warm:]


def when_done(orders, forward, backward, hops):
    """When each device has done its last task: tasks start when the device is free and what they read is there."""
    ends, clock, stages = {}, [0.0] * len(orders), len(forward)
    queues = [list(o) for o in orders]
    while any(queues):
        for d, queue in enumerate(queues):
            if not queue:
                continue
            phase, s, m = queue[0]
            if phase == "F":
                wanted = [(("F", s - 1, m), hops[s - 1])] if s else []
            else:
                wanted = [(("F", s, m), 0.0)] + ([(("B", s + 1, m), hops[s])] if s + 1 < stages else [])
            if all(t in ends for t, _ in wanted):
                start = max([clock[d], *(ends[t] + hop for t, hop in wanted)])
                clock[d] = ends[queue.pop(0)] = start + (forward if phase == "F" else backward)[s]
    return clock


def most_held(order, kept):
    """The most bytes of activations that a device holds."""
    held = most = 0.0
    for phase, s, _ in order:
        held += kept[s] if phase == "F" else -kept[s]
        most = max(most, held)
    return most


def total(units, name):
    return sum(getattr(u, name) for u in units)


def once(units, name):
    """A total that counts a parameter which two units read once."""
    twice = [u.tied[0][1 + ("parameters", "gradients", "states").index(name)] for u in units if u.tied]
    return total(units, name) - sum(twice[1:])


def cost(runs, cluster, data, pipe, micro, kind, chunks, zero, again):
    """(seconds, bytes of the fullest device, bytes sent by the busiest) of one layout and one cut."""
    accumulating, part = micro > 1 or pipe > 1, (data - 1) / data
    forward, backward = [], []
    for run in runs:
        gather = cluster.all_gather("data", data, once(run, "parameters")) if zero == 3 else 0.0
        forward.append(total(run, "forward") + gather)
        g = once(run, "gradients")
        sums = 3 * g / (data if zero > 1 else 1) / cluster.memory if accumulating else 0.0
        if accumulating and zero > 1:
            sums += cluster.reduce_scatter("data", data, g)
        backward.append(total(run, "backward") + (2 if again else 1) * gather + sums)
    link = cluster.along("pipe")
    hops = [link.latency + run[-1].output / link.bandwidth for run in runs[:-1]]
    orders = [tasks_of(kind, pipe, micro, chunks, d) for d in range(pipe)]
    clock = when_done(orders, forward, backward, hops)
    tied = [(s % pipe, u.tied[0][2]) for s, run in enumerate(runs) for u in run if u.tied]
    tied_bytes = tied[0][1] if len({device for device, _ in tied}) > 1 else 0.0
    seconds, fullest, busiest = [], [], []
    for d in range(pipe):
        own = [run for s, run in enumerate(runs) if s % pipe == d]
        p, g, o = (sum(once(run, n) for run in own) for n in ("parameters", "gradients", "states"))
        whole = 0.0
        if zero == 0:
            whole += cluster.all_reduce("data", data, g)
        if zero == 1:
            whole += cluster.reduce_scatter("data", data, g)
        if zero in (1, 2):
            whole += cluster.all_gather("data", data, p)
        if not accumulating:
            whole = hidden(runs[0], cluster, data, zero, again)
        seconds.append(clock[d] + whole + (2 * p + g + 2 * o) / (data if zero else 1) / cluster.memory)
        work = max(beyond(run, zero) for run in own)
        fullest.append((p / data if zero == 3 else p) + (g / data if zero > 1 or zero and not accumulating else g)
                       + (o / data if zero else o) + most_held(orders[d], [total(run, "activations") for run in runs])
                       + work + (2 * max(run[-1].output for run in own) if pipe > 1 else 0.0))
        handed = sum(run[-1].output for s, run in enumerate(runs[:-1]) if s % pipe == d) + sum(
            run[-1].output for s, run in enumerate(runs[:-1]) if (s + 1) % pipe == d)
        over = [2 * g, g + p, micro * g + p, micro * g + micro * (3 if again else 2) * p][zero] * part
        along = sum(total(run, "sent") for run in own) + (handed if pipe > 1 else 0.0)
        busiest.append(over + tied_bytes * 2 * (pipe - 1) / pipe + micro * along)
    adding = cluster.all_reduce("pipe", pipe, tied_bytes) if tied_bytes else 0.0
    return max(seconds) + adding, max(fullest), max(busiest)


def beyond(run, zero):
    """What a stage needs at most, going back from its last unit, beyond what it keeps."""
    kept = most = 0.0
    for u in run:
        kept += u.activations
        most = max(most, kept + u.work + (u.parameters if zero == 3 else 0.0))
    return most - kept


def hidden(units, cluster, data, zero, again):
    """What is left of the reduction of gradients when the backward pass is over."""
    clock = free = 0.0
    for i, u in reversed(list(enumerate(units))):
        gather = cluster.all_gather("data", data, u.parameters) if zero == 3 else 0.0
        clock += u.backward + (2 if again else 1) * gather
        reduce = cluster.all_gather if zero else cluster.all_reduce
        summed = u.gradients - (u.tied[0][2] if u.tied and i else 0.0)  # a shared one is reduced when it is complete
        free = max(free, clock) + reduce("data", data, summed)
    return max(0.0, free - clock) + (
        cluster.all_gather("data", data, once(units, "parameters")) if zero in (1, 2) else 0.0)


def brute_force(prices, machine, batch):
    """Seconds, bytes and bytes sent of everything there is, with a description."""
    for data, tensor, pipe in itertools.product(range(1, machine.devices + 1), repeat=3):
        if data * tensor * pipe != machine.devices or batch % data:
            continue
        cluster = machine.cluster.on(Mesh({"pipe": pipe, "data": data, "tensor": tensor}))
        for micro, again in itertools.product(range(1, batch // data + 1), (False, True)):
            if batch // data % micro or 1 < pipe > micro:
                continue
            units = prices.units(tensor, batch // data // micro, again)
            kinds = [("1f1b", 1)] if pipe == 1 else [("gpipe", 1), ("1f1b", 1)] + [
                ("interleaved", c) for c in (2, 3, 4) if micro % pipe == 0]
            for (kind, chunks), zero in itertools.product(kinds, range(4)):
                if pipe * chunks > len(units) or (zero and data == 1):
                    continue
                for inner in itertools.combinations(range(1, len(units)), pipe * chunks - 1):
                    edges = [0, *inner, len(units)]
                    runs = [units[a:b] for a, b in zip(edges, edges[1:])]
                    found = cost(runs, cluster, data, pipe, micro, kind, chunks, zero, again)
                    yield (*found, (data, tensor, pipe, micro, again, zero, kind, chunks, tuple(edges[:-1])))


@pytest.mark.parametrize("seed", [*range(40), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(40, 200))])
def test_as_trying_everything(seed):
    """Without a limit, and with limits that many, few and hardly any layouts meet."""
    rng = np.random.default_rng(seed)
    prices = Table(rows_of(rng, int(rng.integers(4, 8))), 4e6 * (seed % 2))
    devices, batch = int(rng.choice([2, 3, 4, 6])), int(rng.choice([4, 6, 12]))
    link = Link(float(rng.choice([1e-6, 1e-4])), float(rng.choice([1e8, 1e10])))
    cluster = Cluster(link, memory=float(rng.choice([1e10, 1e12])))
    everything = list(brute_force(prices, Machine(devices, math.inf, cluster), batch))
    sizes = sorted(nbytes for _, nbytes, *_ in everything)
    for memory in (math.inf, sizes[len(sizes) // 3], sizes[len(sizes) // 20], sizes[0]):
        fitting = [x for x in everything if x[1] <= memory]
        best = plan(prices, Machine(devices, memory * (1 + 1e-9), cluster), batch).layouts[0]
        assert best.seconds == pytest.approx(min(x[0] for x in fitting), rel=1e-9)
        c = best.candidate
        same = (c.size("data"), c.size("tensor"), c.size("pipe"), c.micro, c.recompute, c.zero, c.schedule, c.chunks,
                best.bounds)
        (nbytes, sent), = [x[1:3] for x in fitting if x[3] == same]
        assert best.nbytes == pytest.approx(nbytes, rel=1e-9) and best.sent == pytest.approx(sent, rel=1e-9)
    with pytest.raises(AttributeValueError, match="no layout on . devices fits") as caught:
        plan(prices, Machine(devices, sizes[0] * 0.999, cluster), batch)
    least = float(str(caught.value).split("the least that does is ")[1].split(" ")[0].replace(",", ""))
    assert least == pytest.approx(sizes[0], abs=1)


# What the search relies on -------------------------------------------------------------------------------------------


def costs_of(rng, units, candidate, machine):
    made = Table(rows_of(rng, units)).units(1, candidate.examples, candidate.recompute)
    return Costs(candidate, Chain(made), machine)


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
def test_the_bubble_of_uniform_stages(kind):
    unit = Unit(1.0, 2.0)
    for pipe, micro in ((2, 4), (4, 8), (4, 4), (8, 32)):
        candidate = Candidate((("pipe", pipe), ("data", 1), ("tensor", 1)), micro, 1, schedule=kind)
        fast = Machine(pipe, math.inf, Cluster(Link(0.0, math.inf)))
        layout = Costs(candidate, Chain([unit] * pipe), fast).layout(range(pipe))
        assert layout.bubble == pytest.approx((pipe - 1) / (micro + pipe - 1)) == ideal_bubble(pipe, micro)
        assert layout.pipeline == pytest.approx(3 * (micro + pipe - 1))


@pytest.mark.parametrize(("kind", "chunks"), [("gpipe", 1), ("1f1b", 1), ("zb-h1", 1), ("interleaved", 3)])
def test_played_together_as_one_by_one(kind, chunks):
    """Many cuts at once against `simulate`, task by task; and what devices hold."""
    rng = np.random.default_rng(0)
    for devices, micro in ((2, 4), (4, 8), (4, 4), (3, 9)):
        plan, stages, cuts = schedule(kind, devices, micro, chunks), devices * chunks, 5
        forward, backward = rng.uniform(1, 3, (2, stages, cuts))
        hops = rng.uniform(0, 1, (stages - 1, cuts))
        ends = timetable(kind, devices, micro, chunks).play(forward, backward, hops)
        for k in range(cuts):
            played = simulate(plan, forward[:, k].tolist(), backward[:, k].tolist(), hops[:, k].tolist())
            own = [max(end for task, (_, end) in played.spans.items() if task.stage % devices == d)
                   for d in range(devices)]
            np.testing.assert_allclose(ends[:, k], own, rtol=1e-12)
            assert [rows.sum(1).max() for rows in held_of(kind, devices, micro, chunks)] == list(played.stash)


def test_gradients_of_weights_fill_the_bubble():
    prices = Table([(1e-3, 2e-3, 1e6, 1e5, 1e2)] * 8)
    machine = Machine(4, math.inf, Cluster(Link(1e-9, 1e12)))
    one, two = (plan(prices, machine, 8, choices=Choices(schedules=(kind,), pipe=(4,), recompute=(False,))).layouts[0]
                for kind in ("1f1b", "zb-h1"))
    assert two.bubble < one.bubble and two.seconds < one.seconds and two.candidate.schedule == "zb-h1"


def test_sizes_of_the_tensor_axis_that_cannot_pay_are_not_priced():
    class Counted(Table):
        asked = set()

        def units(self, tensor, examples, recompute):
            self.asked.add(tensor)
            return super().units(tensor, examples, recompute)

    prices = Counted([(1e-3, 2e-3, 1e4, 1e5, 1e2)] * 8)
    best = plan(prices, Machine(64, math.inf, Cluster(Link(1e-6, 1e10))), 64).layouts[0]
    assert best.candidate.size("tensor") == 1 and max(prices.asked) <= 4


def test_moved_bounds_find_the_best_cut_of_a_long_chain(monkeypatch):
    """Too many cuts to try them all: what dynamic programming and moving bounds find, against trying them all."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        candidate = Candidate((("pipe", 4), ("data", 1), ("tensor", 1)), 8, 1)
        machine = Machine(4, math.inf, Cluster(Link(1e-6, 1e9)))
        costs = costs_of(rng, 14, candidate, machine)
        cuts = every_cut(14, 4)
        memory = float(np.quantile(costs.memory(costs.stages(cuts)).max(0), rng.choice([0.2, 1.0])))
        everything = best_cut(costs, memory)
        monkeypatch.setattr(planner, "MOST_CUTS", 1)
        found = best_cut(costs, memory)
        monkeypatch.undo()
        assert costs.layout(found).seconds <= 1.02 * costs.layout(everything).seconds
        assert costs.layout(found).nbytes <= memory


def test_the_slowest_stage_of_the_starting_cut_is_the_fastest_possible():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        candidate = Candidate((("pipe", 3), ("data", 1), ("tensor", 1)), 6, 1)
        costs = costs_of(rng, 9, candidate, Machine(3, math.inf, Cluster(Link(0.0, math.inf), memory=math.inf)))
        stages = costs.stages(every_cut(9, 3))
        slowest = (stages["forward"] + stages["backward"]).max(0).min()
        seconds, bounds = balance(costs, math.inf)
        made = costs.stages(np.array([bounds]))
        assert (made["forward"] + made["backward"]).max() == pytest.approx(slowest) == seconds


def test_a_slow_network_between_hosts_keeps_tensors_inside():
    near, far = Link(1e-6, 1e11), Link(1e-5, 1e8)
    cluster = Cluster(far, near=near, per_host=4)
    on = cluster.on(Mesh({"pipe": 2, "data": 2, "tensor": 4}))
    assert on.along("tensor") == near and on.along("data") == far and on.along("pipe") == far
    assert cluster.on(Mesh({"data": 4, "tensor": 3})).along("tensor") == far  # groups of 3 straddle hosts of 4
    prices = Table(rows_of(np.random.default_rng(0), 8))
    best = plan(prices, Machine(16, math.inf, cluster), 16).layouts[0].candidate
    assert best.size("tensor") <= 4
    orders = {c.axes[0][0] for c in candidates(Machine(16, math.inf, cluster), 16)}
    assert orders == {"pipe", "data"}


def test_candidates():
    assert all(d * t * p == 8 for d, t, p in meshes(8)) and len(list(meshes(64))) == 28
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    everything = list(candidates(Machine(4, 1e9), 8))
    assert len(set(everything)) == len(everything)
    for c in everything:
        assert c.micro * c.examples * c.size("data") == 8 and (c.size("pipe") == 1 or c.micro >= c.size("pipe"))
    few = list(candidates(Machine(4, 1e9), 8, Choices(zero=(1,), schedules=("gpipe",), recompute=(True,), pipe=(2,))))
    assert {c.schedule for c in few} == {"gpipe"} and {c.zero for c in few} == {0, 1} and all(c.recompute for c in few)


def test_nothing_to_choose_from():
    one = Table(rows_of(np.random.default_rng(0), 1))
    with pytest.raises(AttributeValueError, match="no mesh of 7 devices suits a batch of 8"):
        plan(one, Machine(7, 1e9), 8, choices=Choices(tensor=(1,)))
    with pytest.raises(AttributeValueError, match="at least one device and one example"):
        plan(one, Machine(0, 1e9), 8)
