"""This process in its job: how it joins, and how it ends.

A process that fails tells the others before it goes and does not wait for them in MPI_Finalize; one that ends normally
says so, too, since the others may still wait for it. mpi4py is imported when a job is joined, not before.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib.metadata
import os
import platform
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..ir import config
from .errors import LaunchError
from .watch import Watch

SIZES = (("PMI_SIZE", "MPI_LOCALNRANKS"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"))  # all, on this host


def started_by_mpi() -> bool:
    """Whether an MPI launcher started this process."""
    return any(name in os.environ for names in SIZES for name in names)


class _State:
    """What the process knows about its end."""

    watch: Watch | None = None
    failed = False
    registered = False


def load_mpi() -> Any:
    """`mpi4py.MPI`, initialised.

    Raises:
        LaunchError: it is not installed.
    """
    try:
        import mpi4py

        mpi4py.rc.finalize = False  # a job that failed must not wait for the others in MPI_Finalize
        mpi4py.rc.thread_level = "multiple" if _messages() else "serialized"  # see progress.py
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(f"mpi4py cannot be loaded ({error}); install it with: pip install 'treadle[mpi]'") from error
    _at_exit(MPI)
    return MPI


def _messages() -> bool:
    """Whether ranks may have to send each other messages: they are not all on this host, as far as is known."""
    sizes = [(os.environ.get(world), os.environ.get(here)) for world, here in SIZES]
    together = [world == here for world, here in sizes if world is not None and here is not None]
    return not (together and all(together) and config.get("TREADLE_SHARED_MEMORY"))


def join(timeout: float) -> Watch:
    """The watch over this process's job, made at the first call, which every rank has to make."""
    mpi = load_mpi()
    if _State.watch is None:
        mpi.COMM_WORLD.Set_errhandler(mpi.ERRORS_RETURN)
        _State.watch = Watch(mpi, mpi.COMM_WORLD, timeout)
        remove_names()  # by now every rank of this host has the memory
    _State.watch.timeout = timeout
    return _State.watch


def versions() -> str:
    """What has to be the same on every rank for the same program to come out, a line for each."""
    sources = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for folder in ("ir", "autodiff", "schedules", "distributed", "frontend"):
        for file in sorted((root / folder).rglob("*.py")):
            sources.update(file.read_bytes())
    found = {"Python": platform.python_version(), "NumPy": np.__version__, "the machine": platform.machine(),
             "Treadle's sources": sources.hexdigest()[:12]}
    for package in ("treadle", "apache-tvm", "mpi4py"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return "".join(f"{name}: {version}\n" for name, version in found.items())


def fail(error: BaseException) -> None:
    """Tells the other ranks that this one gives up; called for any exception that ends the process."""
    if not _State.failed:
        _State.failed = True
        if _State.watch is not None:
            _State.watch.tell(error)


def ignore_notices() -> None:
    """MPICH's launcher tells the ranks of another one's death by SIGUSR1, of which a process dies by default."""
    with contextlib.suppress(ValueError):  # not the main thread
        if signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def remove_names() -> None:
    """The memory that MPICH's ranks of a host share is a file until MPI_Finalize, which a killed job does not come to.

    Without its name it lasts as long as the ranks that have opened it.
    """
    with contextlib.suppress(OSError):
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                path = os.readlink(f"/proc/self/fd/{number}")
                if path.startswith("/dev/shm/mpich_shm_"):
                    os.unlink(path)


def _at_exit(mpi: Any) -> None:
    if _State.registered:
        return
    _State.registered = True
    atexit.register(_leave, mpi)
    ignore_notices()
    previous = sys.excepthook

    def hook(kind: Any, error: Any, trace: Any) -> None:
        fail(error)
        previous(kind, error, trace)

    sys.excepthook = hook


def _leave(mpi: Any) -> None:
    if not mpi.Is_initialized() or mpi.Is_finalized():
        return
    if not _State.failed:
        if _State.watch is not None:
            _State.watch.end()
        mpi.Finalize()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    remove_names()
    if config.get("TREADLE_RESTART") is None:  # not under `treadle launch`, which gives the others time and ends them
        time.sleep(1.5)
        if _State.watch is not None:
            _State.watch.end_others()
    os._exit(1)
