"""Jobs that tests start with `treadle launch`."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def launched(*arguments, timeout=60, before=(), **environment):
    """Runs `treadle launch ARGUMENTS`, in which the name of a script of this folder may stand; the finished process.

    `before`: a command that runs commands. `environment`: None: not set.
    """
    line = [str(HERE / a) if str(a).endswith(".py") and (HERE / str(a)).exists() else str(a) for a in arguments]
    given = {"TREADLE_NUM_THREADS": "1", "TREADLE_VERIFY": "0", "TREADLE_COMM_TIMEOUT": "3", "NO_COLOR": "1"}
    env = {k: v for k, v in {**os.environ, **given, **environment}.items() if v is not None}
    return subprocess.run([*before, sys.executable, "-m", "treadle", "launch", *line], capture_output=True, text=True,
                          timeout=timeout, env=env)
