"""The runner of a pipeline with programs of NumPy and devices that are threads: what is handed over, and when."""

import threading

import numpy as np
import pytest

from treadle.distributed.messages import Messages
from treadle.distributed.pipeline import schedule, simulate, stash_bound
from treadle.distributed.stage_run import Program, Runner, StageProgram
from treadle.ir.dtypes import as_dtype
from treadle.ir.types import TensorType

VECTOR, SCALAR = (TensorType(shape, as_dtype("float64")) for shape in ((3,), ()))


class Post:
    """Mailboxes in place of MPI. `log`: what each device did, in order."""

    def __init__(self):
        self.boxes, self.log, self.lock = {}, {}, threading.Lock()

    def group(self, here):
        return Group(self, here)


class Group:
    def __init__(self, post, here):
        self.post, self.here = post, here

    def Isend(self, data, other, tag):
        with self.post.lock:
            self.post.boxes.setdefault((self.here, other, tag), []).append(data.copy())
        return Request(lambda: True)

    def Irecv(self, into, other, tag):
        self.post.log.setdefault(self.here, []).append(f"post {tag}")

        def arrived():
            with self.post.lock:
                waiting = self.post.boxes.get((other, self.here, tag))
                if not waiting:
                    return False
                into[...] = waiting.pop(0)
                return True

        return Request(arrived)


class Request:
    def __init__(self, test):
        self.test, self.done = test, False

    def Test(self):
        self.done = self.done or self.test()
        return self.done


class Watch:
    def enter(self, label):
        pass

    def leave(self):
        return 0.0

    def wait(self, request):
        for _ in range(10_000_000):
            if request.Test():
                return
        raise TimeoutError


def stage(number, count, scale, sums, log, apart=False):
    """y = scale * x, the last sums y up; `sums` collects d(scale), `apart` from what is handed back."""
    last = number + 1 == count

    def forward(inputs):
        log.append(f"F{number}")
        y = inputs[0] * scale
        return [np.asarray(y.sum()) if last else y]

    def cotangents(inputs):
        log.append(f"B{number}")
        return [] if number == 0 else [np.broadcast_to(inputs[1], (3,)) * scale]

    def weights(inputs):
        x, ct = inputs
        sums[number] += float((x * ct).sum())
        return []

    def backward(inputs):
        weights(inputs)
        return cotangents(inputs)

    source = {"batch": [(0, 0)]} if number == 0 else {"handed": [(0, 0)]}
    back, first = (Program(run, [None, None], cotangents=[(1, 0)], **source)
                   for run in (weights if apart else backward, cotangents))
    return StageProgram(Program(forward, [None], **source), back, back, first if apart else None, list,
                        [VECTOR] * (number > 0), [SCALAR if last else VECTOR], [0] * (number > 0), [0], [], {})


@pytest.mark.parametrize(("kind", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1)])
def test_devices_hand_over_and_use_memory_again(kind, chunks):
    devices, micro, steps = 2, 4, 3
    count, post = devices * chunks, Post()
    scales, sums, made, losses, failures = [2.0, 3.0, 5.0, 7.0][:count], np.zeros(count), {}, [], []
    batch = [[np.arange(3.0) + m] for m in range(micro)]
    shares = [0.1, 0.2, 0.3, 0.4]

    def device(here):
        log = post.log.setdefault(here, [])
        order = schedule(kind, devices, micro, chunks)[here]
        runner = Runner(order, here, devices, count, micro, Messages(post.group(here), Watch()))
        own = {s: stage(s, count, scales[s], sums, log, kind == "zb-h1" and s > 0)
               for s in range(here, count, devices)}
        try:
            for _ in range(steps):
                loss = runner.step([own] * micro, batch, shares)
                made.setdefault(here, []).append(runner.messages.buffers.made)
                assert runner.most_kept <= stash_bound(kind, devices, micro, here, chunks)
                if here == (count - 1) % devices:
                    losses.append(loss)
        except BaseException as error:  # it belongs to the test, not to the thread
            failures.append(error)
            raise

    threads = [threading.Thread(target=device, args=(d,)) for d in range(devices)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    total = sum(share * x.sum() for share, (x,) in zip(shares, batch)) * np.prod(scales)
    np.testing.assert_allclose(losses, total)
    np.testing.assert_allclose(sums, [steps * total / s for s in scales])
    assert all(counts == counts[:1] * steps for counts in made.values())  # nothing is allocated after the first step
    for log in post.log.values():  # before the last task but one ran, the receive of the last was posted
        tasks = [i for i, line in enumerate(log) if line[0] in "FB"]
        posts = [i for i, line in enumerate(log) if line.startswith("post")]
        assert max(posts) < tasks[-2]


# Time ----------------------------------------------------------------------------------------------------------------


class Wire:
    """Devices with clocks in place of MPI: a message sets out when it was sent and its receive was posted, and takes
    `hop`; whoever waits for it has its clock set on."""

    def __init__(self, devices, hop):
        self.hop, self.clocks = hop, [0.0] * devices
        self.ends, self.changed = {}, threading.Condition()

    def meet(self, message, side, clock, array):
        with self.changed:
            self.ends.setdefault(message, {})[side] = clock, array
            self.changed.notify_all()

    def group(self, here):
        return Clocked(self, here)


class Clocked:
    """One device's communicator, and its watch."""

    def __init__(self, wire, here):
        self.wire, self.here, self.moving = wire, here, 0

    def Isend(self, data, other, tag):
        self.wire.meet((self.here, other, tag), "sent", self.wire.clocks[self.here], data.copy())
        return Request(lambda: True)

    def Irecv(self, into, other, tag):
        self.wire.meet((other, self.here, tag), "posted", self.wire.clocks[self.here], into)
        return other, self.here, tag

    def enter(self, *label):
        pass

    leave = enter

    def wait(self, request):
        if isinstance(request, Request):
            return
        with self.wire.changed:
            assert self.wire.changed.wait_for(lambda: len(self.wire.ends.get(request, ())) == 2, 5)
            ends = self.wire.ends.pop(request)
        (sent, data), (posted, into) = ends["sent"], ends["posted"]
        into[...] = data
        clocks = self.wire.clocks
        clocks[self.here] = max(clocks[self.here], max(sent, posted) + self.wire.hop)


@pytest.mark.parametrize(("kind", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1)])
@pytest.mark.parametrize("hop", [0.0, 0.5, 1.0])
def test_messages_travel_while_stages_compute(kind, chunks, hop):
    """Only what the schedule's order makes a task wait for is waited for: a step takes what `simulate` says, though no
    message sets out before its receive was posted. Waiting for each would take as long as computing and sending."""
    devices, micro = 2, 8
    count = devices * chunks
    wire, sums = Wire(devices, hop), np.zeros(count)
    order = schedule(kind, devices, micro, chunks)

    def device(here):
        def timed(program, seconds):
            def run(inputs):
                wire.clocks[here] += seconds
                return original(inputs)

            original = program.run
            program.run = run

        own = {}
        for s in range(here, count, devices):
            apart = kind == "zb-h1" and s > 0
            made = own[s] = stage(s, count, 2.0, sums, [], apart)
            timed(made.forward, 1.0)
            timed(made.backward, 2.0 - apart)
            if apart:
                timed(made.cotangents, 1.0)
        group = wire.group(here)
        Runner(order[here], here, devices, count, micro, Messages(group, group)).step(
            [own] * micro, [[np.arange(3.0)]] * micro, [1 / micro] * micro)

    threads = [threading.Thread(target=device, args=(d,)) for d in range(devices)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    played = simulate(order, [1.0] * count, [2.0] * count, hop)
    assert max(wire.clocks) == pytest.approx(played.makespan)
    if kind == "gpipe":  # of all that crosses, one message each way is waited for
        assert played.makespan == pytest.approx(3 * (micro + 1) + 2 * hop)
