"""`treadle inspect` prints what a function is traced to, what each pass makes of it, and what every node costs."""

import textwrap

import pytest
from typer.testing import CliRunner

import treadle as td
from treadle.frontend.cli import app

run = CliRunner().invoke

SOURCE = """
import treadle as td
from treadle import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 16)

    def forward(self, x):
        return td.softmax(self.inner(x) * 1.0, axis=-1)

def twice(x, w):
    return (td.tanh(x @ w) * td.tanh(x @ w)).sum()

net = Net()
step = td.train_step(net, lambda net, x, y: nn.functional.cross_entropy(net(x), y), td.optim.SGD(net.parameters(), 0.1))
number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(textwrap.dedent(SOURCE))
    return path


def inspect(*arguments):
    result = run(app, ["inspect", *map(str, arguments)], terminal_width=200)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_a_function_before_and_after_each_pass(file):
    output = inspect(f"{file}:twice", "f32[4,8]", "f32[8,3]")
    before, after = output.split("after cse", 1)
    assert before.split("after simplify")[0].count("matmul(%x, %w)") == 2
    assert after.count("matmul(%x, %w)") == 1  # the two are one now
    line = SOURCE.splitlines().index("def twice(x, w):") + 2
    assert f"nets.py:{line}" in output  # the user's line
    assert "192" in output  # 2 * 4 * 8 * 3 operations


def test_the_printed_graph_parses_back(file):
    output = inspect(f"{file}:twice", "f32[4,8]", "f32[8,3]", "--no-passes")
    text = output[output.index("graph twice("):]
    text = text[: text.index("\n}") + 2]
    assert str(td.ir.parse(text)) == text


def test_a_module_class_is_instantiated_and_symbolic_sizes_stay(file):
    output = inspect(f"{file}:Net", "f32[batch,8]")
    assert "f32[batch,16]" in output and "256*batch" in output


def test_the_gradient(file):
    assert "transpose_y=true" in inspect(f"{file}:twice", "f32[4,8]", "f32[8,3]", "--grad")


def test_a_whole_training_step(file):
    output = inspect(f"{file}:step", "f32[4,8]", "i64[4]", "--no-passes")
    assert "scalar" in output and "-> %inner.weight" in output  # the parameter is updated in place


def test_the_decisions_of_mixed_precision(file):
    output = inspect(f"{file}:twice", "f32[4,8]", "f32[8,3]", "--amp", "bfloat16")
    assert "matmul: bf16" in output and "reduce_sum: f32 (wide" in output and "cast(%x)" in output


@pytest.mark.parametrize(("what", "types", "says"), [
    ("nothing.py:f", ["f32[2]"], "nothing.py"),
    ("{file}", ["f32[2]"], "FILE.py:NAME"),
    ("{file}:absent", ["f32[2]"], "twice"),
    ("{file}:number", ["f32[2]"], "cannot be traced"),
    ("{file}:twice", ["f32[4,8]"], "'w'"),
    ("{file}:twice", ["f32[4,8]", "f31[8,3]"], "f31"),
    ("{file}:twice", ["f32[4,8]", "f32[7,3]"], "matmul"),
])
def test_what_cannot_be_inspected_says_why(file, what, types, says):
    with pytest.raises(td.TreadleError, match=says):
        inspect(what.format(file=file), *types)
