"""The backend suite of the `onnx` package, compiled: everything passes but what `known_failures` lists with a reason.

The cases of one test are compiled together (see `conformance.attempt_all`).
"""

import conformance
import pytest
from known_failures import KNOWN

BATCH = 16
PARTS = 12
LEAST = 0.97
"""Of the cases of floats, integers and bools, at least this many have to pass."""


@pytest.fixture(scope="module")
def suite():
    return {kind: conformance.cases([kind]) for kind in conformance.KINDS}


def failing(cases):
    """Names of the cases that fail, with why."""
    found = {}
    for start in range(0, len(cases), BATCH):
        batch = cases[start:start + BATCH]
        problems = conformance.attempt_all(batch)
        found.update({c.name: p for c, p in zip(batch, problems) if p})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_nodes(suite, part):
    cases = [c for c in suite["node"] if c.numbers]
    size = -(-len(cases) // PARTS)
    cases = [c for c in cases[part * size:(part + 1) * size] if c.name not in KNOWN]
    assert failing(cases) == {}


def test_few_are_known_to_fail(suite):
    names = {c.name for c in suite["node"] if c.numbers}
    assert set(KNOWN) <= names and len(KNOWN) <= (1 - LEAST) * len(names)


def test_simple_models(suite):
    """Sequences, strings, gradients, shapes."""
    assert failing(suite["simple"]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pytorch-operator", "pytorch-converted"])
def test_models_that_pytorch_exported(suite, kind):
    assert failing(suite[kind]) == {}


def test_optimizers_and_gradients(suite):
    names = ("adagrad", "adam", "momentum", "gradient")
    cases = [c for kind in ("node", "simple") for c in suite[kind] if any(n in c.name for n in names)]
    assert len(cases) >= 9
    assert failing(cases) == {}
