"""The public names as a user writes them: in a fresh interpreter, outside of the checkout."""

import re
import subprocess
import sys

import pytest

IMPORTS = """
import treadle.onnx.backend
import treadle.nn.functional as F
import treadle.finetune, treadle.optim, treadle.random, treadle.plugins, treadle.distributed
from treadle.onnx import load, save, check
from treadle.nn import Linear
from treadle.nn.functional import relu
from treadle.optim import AdamW
from treadle.finetune import Tuner
from treadle.random import normal
from treadle.distributed import Mesh, Plan, make_mesh, parallelize
from treadle.plugins import register_op
import treadle as td
assert load is td.onnx.load and Linear is td.nn.Linear and relu is td.nn.functional.relu and F is td.nn.functional
assert AdamW is td.optim.AdamW and Tuner is td.finetune.Tuner and make_mesh is td.distributed.make_mesh
assert treadle.distributed is td.distributed and Plan is td.distributed.Plan
assert register_op is td.plugins.register_op
"""
ONCE = """
import sys
import treadle as td
assert "treadle.frontend.onnx" not in sys.modules
import treadle.onnx, treadle.nn.layers
assert treadle.onnx is sys.modules["treadle.frontend.onnx"] is td.onnx
assert treadle.nn.layers is sys.modules["treadle.frontend.nn.layers"]
assert td.nn.__spec__.name == "treadle.frontend.nn" and td.onnx.__spec__.name == "treadle.frontend.onnx"
import importlib, pickle
assert importlib.reload(td.nn.functional).__spec__.name == "treadle.frontend.nn.functional"
assert pickle.loads(pickle.dumps(td.nn.Linear)) is td.nn.Linear
"""
CONFORMANCE = """
import unittest
import onnx.backend.test
import treadle.onnx.backend

tests = onnx.backend.test.BackendTest(treadle.onnx.backend, __name__)
tests.include("test_abs_cpu")
tests.include("test_gemm_default_vector_bias_cpu")
globals().update(tests.test_cases)
if __name__ == "__main__":
    unittest.main()
"""


def run(code: str, folder) -> subprocess.CompletedProcess:
    (folder / "used.py").write_text(code)
    return subprocess.run([sys.executable, "-W", "error", "used.py"], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("code", [IMPORTS, ONCE], ids=["imports", "once"])
def test_what_is_public_is_imported_by_its_public_name(code, tmp_path):
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["treadle.nothing", "treadle.nn.nothing", "treadle.random.nothing"])
def test_what_is_not_there_is_said_to_be_missing(name, tmp_path):
    done = run(f"import {name}", tmp_path)
    assert f"ModuleNotFoundError: No module named '{name}'" in done.stderr


@pytest.mark.slow  # it makes the cases of all ops
def test_the_tools_of_onnx_take_the_backend_as_a_module(tmp_path):
    (tmp_path / "used.py").write_text(CONFORMANCE)
    done = subprocess.run([sys.executable, "used.py"], cwd=tmp_path, capture_output=True, text=True)
    counts = re.search(r"Ran (\d+) tests.*OK \(skipped=(\d+)\)", done.stderr, re.DOTALL)
    assert counts and int(counts[1]) - int(counts[2]) == 2, done.stderr[-2000:]
