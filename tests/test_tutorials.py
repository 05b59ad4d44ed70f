"""The tutorials are scripts; here each is run as a user would run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from treadle.distributed.comm import mpi_available
from treadle.distributed.launch import command

TUTORIALS = sorted((Path(__file__).resolve().parent.parent / "tutorials").glob("*.py"))


def test_there_are_tutorials():
    assert len(TUTORIALS) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("script", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(script, tmp_path):
    done = subprocess.run([sys.executable, "-W", "error", str(script)], cwd=tmp_path, capture_output=True, text=True,
                          timeout=300, env=os.environ)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert not list(tmp_path.iterdir()), "a tutorial cleans up after itself"


@pytest.mark.slow
@pytest.mark.skipif(mpi_available() is not None, reason="needs MPI")
def test_the_tutorial_on_four_processes(tmp_path):
    """The same losses, before and under the plan, as on one."""
    script = next(path for path in TUTORIALS if path.stem == "07_several_processes")
    shown = []
    for line in ([sys.executable, "-W", "error", str(script)], command(4, ["-W", "error", str(script)])):
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=os.environ)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        shown.append([text for text in done.stdout.splitlines() if text.startswith("losses")])
    assert shown[0] == shown[1] and len(shown[0]) == 2
