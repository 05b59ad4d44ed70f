"""What every test shares: a compile cache of its own, passes verified after each step, tests that repeat exactly."""

import atexit
import importlib.util
import os
import shutil
import tempfile

import hypothesis
import pytest

# Read when treadle is first imported, so they are set before any test imports it.
os.environ.setdefault("TREADLE_VERIFY", "1")
# The oracles' products are small, and the threads of OpenBLAS spin for a while after each, on a core that others need.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if "TREADLE_CACHE_DIR" not in os.environ:
    os.environ["TREADLE_CACHE_DIR"] = tempfile.mkdtemp(prefix="treadle-test-cache-")
    atexit.register(shutil.rmtree, os.environ["TREADLE_CACHE_DIR"], ignore_errors=True)

# Compilation makes single examples slow and the first one slower: the time is bounded by the number of examples.
hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, max_examples=25, print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `oracle` need torch, which `make test` does not install."""
    if importlib.util.find_spec("torch") is not None:
        return
    skip = pytest.mark.skip(reason="needs the extra `oracle` (torch)")
    for item in items:
        if item.get_closest_marker("oracle"):
            item.add_marker(skip)
