"""The documents are true: the worked examples of CONTRIBUTING.md and the example of README.md run, named files exist.

A block of CONTRIBUTING.md is run as if it stood at the end of the module that its first line names.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n# (?P<file>\S+\.py)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)

# Runs in a process of its own, since the examples add to the package's tables.
RUNNER = '''
import importlib, sys, types
sys.path.insert(0, {tests!r})
import treadle as td

def run(file, code):
    """As if the code stood at the end of the file; a file that is not there is made of it."""
    parts = file[:-3].split("/")
    name = ".".join(["treadle", *parts] if parts[0] != "tests" else parts[1:])
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        module = sys.modules[name] = types.ModuleType(name)
        module.__package__ = name.rpartition(".")[0]
    exec(compile(code, file, "exec"), vars(module))

for file, code in {blocks!r}:
    run(file, code)

# The op is whole: it runs eagerly and compiled, has gradients, and a row that its tests are made from.
import numpy as np
from treadle.frontend.functions_elementwise import log_sigmoid
from treadle.ir.opdef import op
from optable.table import TABLE

x = np.linspace(-3, 3, 13).astype("float32")
expected = -np.log1p(np.exp(-x))
np.testing.assert_allclose(log_sigmoid(td.tensor(x)).numpy(), expected, rtol=1e-6)
np.testing.assert_allclose(td.compile(log_sigmoid)(x).numpy(), expected, rtol=1e-6)
slope = td.compile(td.grad(lambda x: log_sigmoid(x).sum()))(x).numpy()
np.testing.assert_allclose(slope, 1 / (1 + np.exp(x)), rtol=1e-6)
(row,) = [row for row in TABLE if row.op == "log_sigmoid"]
for sample in row.samples(td.float32):
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(row.answer()(*sample.args), op("log_sigmoid").reference(*sample.args), rtol=1e-5)
'''


def blocks():
    return [(match["file"], match["code"]) for match in BLOCK.finditer((ROOT / "CONTRIBUTING.md").read_text())]


def test_each_example_touches_the_files_it_should():
    files = [file for file, _ in blocks()]
    assert {"ir/ops_elementwise.py", "autodiff/vjp_elementwise.py", "schedules/lower_elementwise.py",
            "schedules/rules.py", "tests/optable/table.py"} <= set(files)


@pytest.mark.slow
def test_the_worked_examples_work(tmp_path):
    script = tmp_path / "examples.py"
    script.write_text(RUNNER.format(tests=str(ROOT / "tests"), blocks=blocks()))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr[-4000:]


def test_every_file_that_the_documents_name_exists():
    for document in ("README.md", "CONTRIBUTING.md", "docs/architecture.md"):
        text = re.sub(r"^```python\n.*?^```$", "", (ROOT / document).read_text(), flags=re.MULTILINE | re.DOTALL)
        for name in re.findall(r"`((?:[\w.]+/)*[\w]+\.(?:py|md))`", text):
            places = [ROOT / name, *ROOT.glob(f"*/{name}"), *ROOT.glob(f"*/*/{name}")]
            assert any(place.exists() for place in places), f"{document} names {name}"


@pytest.mark.slow
def test_the_readme_example_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((64, 784), np.float32), rng.integers(0, 10, 64)
    names = {"batches": [(x, y)] * 5}
    exec(compile(code, "README.md", "exec"), names)
    assert names["step"].stats.compiles == 1
    assert names["loss"].item() < 2.3
    assert names["predict"](x).shape == (64, 10)
