"""Every test starts from the same random state, and the kernels it compiles are shared by the whole run."""

from __future__ import annotations

import pytest

import treadle as td


@pytest.fixture(autouse=True)
def same_random_numbers():
    td.random.seed(0)
