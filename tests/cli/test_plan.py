"""`treadle plan`: its forms of a model, what it prints and writes, and what it says of a wrong command line."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from treadle.distributed.errors import LaunchError
from treadle.distributed.plans import Plan
from treadle.distributed.probe import links
from treadle.frontend.cli.plan import Request, choices_of, cluster_of, quantity, show
from treadle.ir.errors import ArgumentsError, AttributeValueError

MODEL = """
import treadle as td

class Net(td.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = td.nn.ModuleList([td.nn.Linear(32, 32) for _ in range(6)])
    def forward(self, x, y):
        for layer in self.layers:
            x = td.tanh(layer(x))
        return td.mean((x - y) ** 2)

net = Net()
def loss(x, y):
    return net(x, y)
step = td.train_step(net, lambda model, x, y: model(x, y), td.optim.SGD(net.parameters(), lr=0.1))
nameless = [td.nn.Linear(32, 32) for _ in range(2)]
def anonymous(x, y):
    for layer in nameless:
        x = layer(x)
    return td.mean((x - y) ** 2)
def nothing(x, y):
    return td.mean((x - y) ** 2)
"""
TYPES = ["f32[32,32]"] * 2
SMALL = {"bandwidth": "1GB/s", "latency": "1us", "flops": "1GFLOPS", "memory_bandwidth": "1TB/s"}


@pytest.fixture
def run(tmp_path, capsys):
    (tmp_path / "planned_net.py").write_text(MODEL)

    def call(name, devices=4, **request):
        layouts = show(Console(width=120), f"{tmp_path}/planned_net.py:{name}", TYPES,
                       Request(devices=devices, **{**SMALL, **request}))
        return capsys.readouterr().out, layouts

    return call


def test_tables(run):
    text, layouts = run("loss", pipe="2", micro="4", schedule="1f1b")
    assert "24.6kB of parameters" in text or "25.3kB of parameters" in text
    assert "p2 d" in text and "1f1b" in text and "layers.3" in text and "bubble" in text and "memory" in text
    assert "\n  0 |" in text and "\n  1 |" in text  # the pipeline, a line for each device
    assert all(x.candidate.size("pipe") == 2 and x.candidate.micro == 4 for x in layouts)
    assert [x.seconds for x in layouts] == sorted(x.seconds for x in layouts)


def test_a_training_step_has_its_optimizer(run):
    """SGD keeps no state: less memory than AdamW's two moments."""
    _, with_step = run("step", 1)
    _, with_adam = run("loss", 1)
    _, without = run("loss", 1, optimizer="sgd")
    assert with_step[0].nbytes == without[0].nbytes < with_adam[0].nbytes


def test_out_and_chart(run, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `plan`")
    text, (best, *_) = run("step", pipe="2", tensor="1", gantt=tmp_path / "p.png", out=tmp_path / "p.json")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert f"accumulate={best.candidate.micro})" in text and "Plan.load(" in text
    plan = Plan.load(tmp_path / "p.json")
    assert plan.mesh["pipe"] == 2 and plan.accumulate == best.candidate.micro
    assert len(plan.cut) + 1 == len(best.bounds) and plan.schedule == best.candidate.schedule
    assert json.loads((tmp_path / "p.json").read_text())["treadle"] == "plan 1"
    with pytest.raises(ArgumentsError, match=r"a chart cannot be written as 'p.txt'; endings: .*png"):
        run("step", pipe="2", gantt=tmp_path / "p.txt")


def test_an_onnx_model(tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    weights = [np.zeros((32, 32), np.float32)] * 3
    nodes = [onnx.helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(3)]
    graph = onnx.helper.make_graph(
        nodes, "g", [onnx.helper.make_tensor_value_info("x0", 1, ["batch", 32])],
        [onnx.helper.make_tensor_value_info("x3", 1, ["batch", 32])],
        [onnx.numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), tmp_path / "m.onnx")
    found = show(Console(width=100), str(tmp_path / "m.onnx"), ["f32[16,32]"], Request(devices=2, **SMALL))
    assert "3 layers, 12.3kB of parameters; batch 16 on 2 devices" in capsys.readouterr().out
    assert found[0].candidate.mesh.size == 2


@pytest.mark.slow
def test_measured_times(run):
    text, layouts = run("loss", 2, measure=True, most=1)
    assert "2 devices" in text and layouts[0].seconds > 0


def test_nothing_fits(run):
    with pytest.raises(AttributeValueError, match="no layout on 4 devices fits in 1,000 bytes each") as caught:
        run("loss", memory="1kB")
    least = int(str(caught.value).split("the least that does is ")[1].split(" ")[0].replace(",", ""))
    assert run("loss", memory=f"{least * 1.05:.0f}B")[1]
    with pytest.raises(AttributeValueError, match="no mesh of 7 devices suits a batch of 32"):
        run("loss", 7)
    with pytest.raises(ArgumentsError, match="no parameters to train"):
        run("nothing")


def test_parameters_without_names_cannot_be_written(run, tmp_path):
    assert run("anonymous")[1]
    with pytest.raises(ArgumentsError, match="parameters that the plan splits have no names"):
        run("anonymous", tensor="2", pipe="1", out=tmp_path / "p.json")


@pytest.mark.parametrize(("field", "value", "message"), [
    ("memory", "lots", "--memory is 'lots'; expected a number with a unit, such as 24GB"),
    ("memory", "24GB/s", "--memory is '24GB/s'; expected a number with a unit, such as 24GB"),
    ("bandwidth", "12furlongs", "--bandwidth is '12furlongs'; expected .* 12GB/s"),
    ("latency", "-1us", "--latency is '-1us'"), ("flops", "0FLOPS", "--flops is '0FLOPS'"),
    ("bandwidth", "600GB/s,25GB/s", "give --devices-per-host and two bandwidths"),
    ("per_host", 8, "give --devices-per-host and two bandwidths"),
    ("zero", "4", "--zero is 4; expected some of 0, 1, 2, 3"), ("schedule", "zb", "--schedule is zb; expected some of"),
    ("recompute", "maybe", "--recompute is maybe; expected some of yes, no"), ("micro", "two", "--micro is 'two'"),
    ("shard", ["*.up.weight"], "--shard is .*; expected PATTERN=DIMENSIONS"),
    ("shard", ["*.up.weight=rows,-"], "--shard is .*; expected PATTERN=DIMENSIONS"),
    ("optimizer", "adamx", "there is no optimizer 'adamx'"),
    ("out", Path("nowhere/p.json"), "--out is 'nowhere/p.json', but there is no folder 'nowhere'"),
    ("gantt", Path("nowhere/p.png"), "--gantt is 'nowhere/p.png', but there is no folder 'nowhere'"),
])
def test_wrong_command_lines(run, field, value, message):
    with pytest.raises(ArgumentsError, match=message):
        run("loss", **{field: value})


def test_quantities():
    for text, kind, number in (("24GB", "B", 24e9), ("12.5GB/s", "B/s", 12.5e9), ("10us", "s", 1e-5), ("3", "s", 3.0),
                               ("1TFLOPS", "FLOPS", 1e12), ("2 GFLOP/s", "FLOPS", 2e9), ("1e-6s", "s", 1e-6)):
        assert quantity(text, "it", kind) == pytest.approx(number)
    near = cluster_of(Request(bandwidth="600GB/s,25GB/s", latency="2us,10us", per_host=8))
    assert near.near.bandwidth == 600e9 and near.link.bandwidth == 25e9 and near.link.latency == pytest.approx(1e-5)
    some = choices_of(Request(tensor="1,2", zero="1", recompute="no"))
    assert some.tensor == [1, 2] and some.zero == [1] and some.recompute == (False,) and some.pipe is None


def test_the_batch_is_needed(tmp_path):
    (tmp_path / "other_net.py").write_text(MODEL)
    with pytest.raises(ArgumentsError, match="give the type of a whole batch"):
        show(Console(), f"{tmp_path}/other_net.py:loss", [], Request())


def test_links_are_measured_between_processes(tmp_path):
    pytest.importorskip("mpi4py", reason="needs the extra `mpi`")
    from treadle.distributed.launch import command

    line = command(2, ["-m", "treadle", "links"])
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    said = re.fullmatch(r"rank 0 to rank 1 on \S+: --bandwidth (\S+) --latency (\S+)\n", done.stdout)
    bandwidth, latency = said.groups()
    found = cluster_of(Request(bandwidth=bandwidth, latency=latency)).link
    assert 1e6 < found.bandwidth < 1e12 and 0 < found.latency < 1
    with pytest.raises(LaunchError, match="a job of one process has no links to measure"):
        list(links())


def test_wrong_models(run, tmp_path):
    for what, types, message in (("nofile.py:step", ["f32[8,4]"], "there is no file 'nofile.py'; write FILE.py:NAME"),
                                 ("nofile:step", ["f32[8,4]"], "does not name a function in a file")):
        with pytest.raises(ArgumentsError, match=message):
            show(Console(), what, types, Request(devices=2))
    (tmp_path / "two.py").write_text("def loss(x, y):\n    return (x * y).mean()\n")
    with pytest.raises(ArgumentsError, match="but there are types of 1 tensors of a batch: .*'y'. Give one"):
        show(Console(), f"{tmp_path / 'two.py'}:loss", ["f32[8,4]"], Request(devices=2))
    with pytest.raises(AttributeValueError, match="the plan cannot be written to .*No such file or directory"):
        Plan().save(tmp_path / "nowhere" / "p.json")
