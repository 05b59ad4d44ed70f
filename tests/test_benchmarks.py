"""The benchmark's own machinery, with contenders made of nothing: turns, failures, unequal maths."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import harness
import models
import problems

from treadle.distributed.comm import mpi_available

FAKE = """
import sys
sys.path.insert(0, {benchmarks!r})
import contender

def prepare(case, threads):
    losses = iter({losses} + [0.0] * 1000)
    print("frameworks chatter")
    return lambda: next(losses)

contender.main(prepare, 0.5, kernels=lambda step: [["add", 0.25, 1.0]])
"""


def fake(tmp_path, name, losses, text=FAKE):
    script = tmp_path / f"{name}.py"
    script.write_text(textwrap.dedent(text).format(benchmarks=str(harness.HERE), losses=losses))
    return harness.Contender(name, str(script), "sys")


def test_contenders_take_turns(tmp_path):
    turns = []
    a, b = (fake(tmp_path, name, [3.0, 2.0, 1.0]) for name in "ab")
    results = harness.compare("mlp", [a, b], threads=1, rounds=2, steps=3, progress=turns.append)
    assert turns == ["a", "b", "a", "b", "a", "b"]  # the two starts, then the rounds
    for result in results:
        assert not result.failure
        assert len(result.seconds) == 2 * 3 and result.median < 1
        assert result.losses == [3.0, 2.0, 1.0]
        assert result.kernels == [["add", 0.25, 1.0]]
        assert result.memory >= 0


def test_unequal_maths_is_no_contest(tmp_path):
    contenders = [fake(tmp_path, "a", [3.0, 2.0, 1.0]), fake(tmp_path, "b", [3.0, 2.0, 1.0]),
                  fake(tmp_path, "c", [3.0, 2.1, 1.0])]
    results = harness.compare("mlp", contenders, threads=1, rounds=1, steps=1)
    assert [bool(r.failure) for r in results] == [False, False, True]


def test_a_contender_that_dies_is_reported_and_the_rest_go_on(tmp_path):
    good = fake(tmp_path, "good", [1.0, 1.0, 1.0])
    bad = fake(tmp_path, "bad", [], "raise SystemExit('no such library')")
    results = {r.name: r for r in harness.compare("mlp", [bad, good], threads=1, rounds=1, steps=1)}
    assert "no such library" in results["bad"].failure and not results["bad"].seconds
    assert not results["good"].failure


def test_a_contender_that_dies_in_a_round_is_out(tmp_path):
    dying = FAKE.replace("[0.0] * 1000", "[0.0] * 2")  # its steps run out in the first round
    contenders = [fake(tmp_path, "dying", [1.0, 1.0, 1.0], dying), fake(tmp_path, "good", [1.0, 1.0, 1.0])]
    results = {r.name: r for r in harness.compare("mlp", contenders, threads=1, rounds=2, steps=3)}
    assert "stopped at `round 3`" in results["dying"].failure
    assert len(results["good"].seconds) == 6 and not results["good"].failure


def test_problems_are_the_same_for_everyone():
    first, second = problems.mlp(), problems.mlp()
    assert all(np.array_equal(first.weights[name], second.weights[name]) for name in first.weights)
    assert first.weights["layers.0.weight"].shape == (1024, 784)
    count = sum(w.size for w in problems.resnet18(32).weights.values())
    assert count == 11_689_512  # torchvision's resnet18


@pytest.mark.parametrize("case", models.CASES)
def test_models_get_the_inputs_that_their_files_declare(case):
    model, batch = models.CASES[case]
    if model.file is None:
        pytest.skip("the model's package is not installed")
    onnxruntime = pytest.importorskip("onnxruntime")
    session, inputs = onnxruntime.InferenceSession(str(model.file)), models.inputs_of(case)
    assert list(inputs) == [i.name for i in session.get_inputs()] and models.describe(case).endswith(str(batch))
    assert all(np.isfinite(result).all() for result in session.run(None, inputs))


@pytest.mark.slow
def test_gpt2_small_has_its_published_size():
    assert sum(w.size for w in problems.gpt2().weights.values()) == 124_439_808


@pytest.mark.slow
@pytest.mark.skipif(mpi_available() is not None, reason=f"no MPI: {mpi_available()}")
def test_ranks_stand_beside_one_process(tmp_path):
    figures = tmp_path / "figures.json"
    done = subprocess.run([sys.executable, str(harness.HERE / "distributed.py"), "gpt2", "allreduce", "--size", "tiny",
                           "--rounds", "1", "--json", str(figures)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    for case in ("zero1", "tp", "pp"):
        one, ranks = found[case]["losses"]
        np.testing.assert_allclose(ranks, one, rtol=1e-4)
        spread = found[case]["ranks"]
        assert len(spread) == 2 and len(found[case]["memory"][1]) == 2
        for rank in spread:
            assert rank["flops"] < 0.7 * found[case]["one"]["flops"]
            parts = rank["kernels"] + rank["outside"] + sum(v[1] + v[2] for v in rank["moved"].values())
            assert parts == pytest.approx(rank["steps"])
    assert {"reduce_scatter:data", "all_gather:data"} <= found["zero1"]["ranks"][0]["moved"].keys()
    assert [row[0] for row in found["allreduce"]["rows"]] == [4, 1024, 1 << 20]
