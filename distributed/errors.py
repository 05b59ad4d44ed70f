"""Errors of a job of several processes."""

from __future__ import annotations

from ..ir.errors import TreadleError


class DistributedError(TreadleError, RuntimeError):
    """Another rank failed, does not come, or runs another program. The message names rank, op and step."""


class LaunchError(TreadleError, RuntimeError):
    """A job cannot be started: mpiexec or mpi4py is missing, or the script does not exist."""
