"""torch's recorded answers, by case."""

import functools
import importlib.util
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parents[1] / "oracle"


@functools.cache
def cases():
    """The module of cases that the recorder used."""
    spec = importlib.util.spec_from_file_location("nn_cases", FOLDER / "nn_cases.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def answers():
    """Every recorded array by its path."""
    with np.load(FOLDER / "nn.npz") as data:
        return dict(data)


def part(case, kind):
    """{name: array} of one kind (state, input, output...) of a case, in the order recorded."""
    prefix = f"{case}/{kind}/"
    return {k[len(prefix):]: v for k, v in answers().items() if k.startswith(prefix)}
