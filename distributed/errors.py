"""Errors of a job of several processes."""

from __future__ import annotations

from ..ir.errors import TreadleError


class DistributedError(TreadleError, RuntimeError):
    """Another rank failed, does not come, or runs another program. The message names rank, op and step.

    Attributes:
        gone: the rank whose process is known to have ended; None if none is.
    """

    def __init__(self, message: str, where: object = None, gone: int | None = None):
        super().__init__(message, where)
        self.gone = gone


class LaunchError(TreadleError, RuntimeError):
    """A job cannot be started: mpiexec or mpi4py is missing, or the script does not exist."""
