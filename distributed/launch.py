"""Starts a script on several ranks: `treadle launch -n 4 script.py`.

Wraps mpiexec: the one of the running Python's environment (the wheel `mpich`), else the one on the path. Every rank
gets its share of the cores as threads, and writes to a log of its own; what rank 0 prints is shown.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import LaunchError


def find_mpiexec() -> str | None:
    """The launcher, or None."""
    beside = Path(sys.executable).parent / "mpiexec"
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def threads_per_rank(ranks: int, cores: int) -> int:
    """The cores shared out, at least one each."""
    return max(1, cores // ranks)


def command(ranks: int, script: Sequence[str], hosts: str | None = None) -> list[str]:
    """The command line of mpiexec.

    Raises:
        LaunchError: there is no mpiexec, or fewer than one rank.
    """
    if ranks < 1:
        raise LaunchError(f"a job needs at least one rank, not {ranks}")
    mpiexec = find_mpiexec()
    if mpiexec is None:
        raise LaunchError("mpiexec was not found; install it with: pip install 'treadle[mpi]' (or your system's MPI)")
    found = [mpiexec, "-n", str(ranks)]
    if _is_hydra(mpiexec):
        found.insert(1, "-disable-auto-cleanup")  # ranks that remain say what they missed, and end by themselves
    if hosts:
        found += ["-hosts", hosts]
    return [*found, sys.executable, "-u", *script]


def _is_hydra(mpiexec: str) -> bool:
    try:
        shown = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "HYDRA" in shown.upper()


def environment(ranks: int, threads: int | None, cores: int,
                base: Mapping[str, str] | None = None) -> dict[str, str]:
    """What the ranks find in their environment."""
    found = dict(os.environ if base is None else base)
    found["TREADLE_NUM_THREADS"] = str(threads or threads_per_rank(ranks, cores))
    found.setdefault("OMP_NUM_THREADS", found["TREADLE_NUM_THREADS"])
    return found


def launch(ranks: int, script: Sequence[str], threads: int | None = None, logs: Path | None = None,
           hosts: str | None = None) -> int:
    """Runs the job; gives its exit code.

    Raises:
        LaunchError: the script does not exist, or mpiexec is missing.
    """
    if not script or not Path(script[0]).is_file():
        raise LaunchError(f"there is no script {script[0] if script else ''!r}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
    runner = [str(Path(__file__).with_name("_rank.py")), str(logs), *script] if logs is not None else list(script)
    return subprocess.run(command(ranks, runner, hosts), env=environment(ranks, threads, cores)).returncode
