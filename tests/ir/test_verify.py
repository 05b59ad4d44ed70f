"""The verifier finds each way of breaking a graph; the pipeline names and bisects the pass that did it."""

import pytest

from treadle.ir import ops as _ops  # noqa: F401
from treadle.ir.builder import GraphBuilder, emit, make_node
from treadle.ir.errors import ArgumentsError, AttributeValueError, ConfigError, ShapeError, VerifyError
from treadle.ir.graph import Graph, Value
from treadle.ir.interp import run
from treadle.ir.opdef import op
from treadle.ir.pipeline import Pass, PassResult, Pipeline
from treadle.ir.types import TensorType
from treadle.ir.verify import verify

F32 = TensorType((3,), "float32")


def axpy():
    with GraphBuilder("axpy") as b:
        x, y = b.input(F32, "x"), b.input(F32, "y")
        b.output(x * 2.0 + y, x - y)
    return b.graph


def reorder(g):
    g.nodes.reverse()


def foreign_operand(g):
    g.nodes.append(make_node(op("neg"), [Value(F32, "stranger")], {}))


def foreign_output(g):
    g.outputs.append(Value(F32, "stranger"))


def wrong_type(g):
    g.nodes[-1].results[0].type = TensorType((4,), "float32")


def missing_attribute(g):
    del g.nodes[0].attrs["value"]


def duplicate_node(g):
    g.nodes.append(g.nodes[-1])


def alias_twice(g):
    g.aliases.update({0: 0, 1: 0})


def alias_out_of_range(g):
    g.aliases[0] = 9


def unknown_role(g):
    g.roles[0] = "weights"


@pytest.mark.parametrize("damage", [reorder, foreign_operand, foreign_output, wrong_type, missing_attribute,
                                    duplicate_node, alias_twice, alias_out_of_range, unknown_role])
def test_damage_is_found(damage):
    graph = axpy()
    verify(graph)
    damage(graph)
    with pytest.raises(VerifyError):
        verify(graph)


def test_errors_name_the_op_the_types_and_the_users_line():
    with GraphBuilder() as b:
        x, y = b.input(F32, "x"), b.input(TensorType((4,), "float32"), "y")
        with pytest.raises(ShapeError) as error:
            emit("add", x, y)
        text = str(error.value)
        assert "add" in text and "[3]" in text and "[4]" in text and "test_verify.py" in text
        with pytest.raises(AttributeValueError, match="has no attribute axis"):
            emit("reduce_sum", x, axis=0)
        with pytest.raises(ArgumentsError, match="takes the operands"):
            emit("add", x)


def replace_node(name):
    """A pass that turns every node of an op into `sub`: wrong on purpose."""
    def function(graph):
        with GraphBuilder(graph.name) as b:
            env = {v: b.input(v.type, v.name) for v in graph.inputs}
            for node in graph.nodes:
                op_name = "sub" if node.op.name == name else node.op.name
                new = b.emit(op_name, [env[v] for v in node.operands], node.attrs)
                env.update(zip(node.results, new))
            b.output(*(env[v] for v in graph.outputs))
        return PassResult(b.graph, True, {"replaced": name})
    return Pass(f"replace_{name}", function)


def unchanged(graph):
    return PassResult(graph, False)


def test_bisect_finds_the_wrong_pass():
    import numpy as np
    arrays = [np.array([1, 2, 3], np.float32), np.array([4, 5, 6], np.float32)]
    pipeline = Pipeline([Pass("nothing", unchanged), replace_node("pow"), replace_node("add"), replace_node("mul")])
    assert pipeline.bisect(axpy(), arrays).name == "replace_add"
    assert Pipeline([Pass("nothing", unchanged)]).bisect(axpy(), arrays) is None


def test_pipeline_verifies_and_dumps(monkeypatch, tmp_path):
    monkeypatch.setenv("TREADLE_VERIFY", "1")
    monkeypatch.setenv("TREADLE_DUMP", str(tmp_path / "dump"))

    def broken(graph):
        return PassResult(Graph("broken", outputs=graph.outputs), True)

    seen = []
    Pipeline([replace_node("add")], observe=seen.append).run(axpy())
    names = sorted(f.name for f in (tmp_path / "dump").iterdir())
    assert names == ["000_axpy_input.txt", "001_axpy_replace_add.txt"]
    assert [s.name for s in seen] == ["replace_add"] and seen[0].seconds > 0
    with pytest.raises(VerifyError):
        Pipeline([Pass("broken", broken)]).run(axpy())
    monkeypatch.setenv("TREADLE_VERIFY", "maybe")
    with pytest.raises(ConfigError, match="TREADLE_VERIFY='maybe'"):
        Pipeline([]).run(axpy())


def test_the_interpreter_refuses_what_does_not_fit():
    import numpy as np
    graph = axpy()
    with pytest.raises(ArgumentsError, match="takes 2 inputs, got 1"):
        run(graph, [np.zeros(3, np.float32)])
    with pytest.raises(ArgumentsError, match=r"float64"):
        run(graph, [np.zeros(3), np.zeros(3, np.float32)])
    with pytest.raises(ArgumentsError, match=r"\(4,\)"):
        run(graph, [np.zeros(4, np.float32), np.zeros(3, np.float32)])
