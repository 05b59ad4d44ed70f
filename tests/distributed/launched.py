"""Starting jobs of the scripts of this folder, by mpiexec or by `treadle launch`."""

import os
import subprocess
import sys
from pathlib import Path

from treadle.distributed.launch import command

HERE = Path(__file__).parent
# Programs are kept only where passes are not verified: the ranks compile each once.
OWN = {"TREADLE_NUM_THREADS": "1", "TREADLE_VERIFY": "0"}


class Place:
    """Where jobs run: here. Environment variables that are None are not set."""

    several = False      # hosts
    before: tuple = ()   # a command that runs commands
    environment: dict = {}

    def hosts_of(self, ranks):
        """For so many ranks, as `NAME:RANKS`; none: this one."""
        return []

    def start(self, ranks, script, *arguments, timeout=900, **environment):
        """Runs a script on ranks under mpiexec; the finished process."""
        line = command(ranks, [str(HERE / script), *map(str, arguments)], self.hosts_of(ranks))
        return self._run(line, timeout, {"PYTHONWARNINGS": "default", **environment})

    def launched(self, ranks, *arguments, timeout=120, **environment):
        """Runs `treadle launch` for so many ranks; the name of a script of this folder may stand in it."""
        hosts = self.hosts_of(ranks)
        where = ["--hosts", ",".join(hosts)] if hosts else ["-n", str(ranks)]
        line = [str(HERE / a) if str(a).endswith(".py") and (HERE / str(a)).exists() else str(a) for a in arguments]
        given = {"TREADLE_COMM_TIMEOUT": "3", "NO_COLOR": "1", **environment}
        return self._run([sys.executable, "-m", "treadle", "launch", *where, *line], timeout, given)

    def _run(self, line, timeout, environment):
        given = {**os.environ, **OWN, **self.environment, **environment}
        return subprocess.run([*self.before, *line], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=timeout, env={k: v for k, v in given.items() if v is not None})
