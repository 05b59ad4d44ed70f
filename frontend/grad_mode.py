"""Whether what runs now is recorded for a gradient: `no_grad`, `enable_grad`, per thread."""

from __future__ import annotations

import threading
from contextlib import ContextDecorator
from typing import Any


class _Mode(threading.local):
    enabled = True


_mode = _Mode()


def is_grad_enabled() -> bool:
    """Whether operations on tensors that require a gradient are recorded."""
    return _mode.enabled


class set_grad_enabled(ContextDecorator):
    """A context (or decorator) in which recording is on or off: `with td.set_grad_enabled(False): ...`."""

    def __init__(self, enabled: bool):
        self.wanted = enabled
        self.before: list[bool] = []

    def __enter__(self) -> None:
        self.before.append(_mode.enabled)
        _mode.enabled = self.wanted

    def __exit__(self, *exc: Any) -> None:
        _mode.enabled = self.before.pop()


class no_grad(set_grad_enabled):
    """A context (or decorator) in which nothing is recorded: results do not require a gradient.

    In a trace, what is computed inside is a constant to the gradients taken of it.
    """

    def __init__(self) -> None:
        super().__init__(False)


class enable_grad(set_grad_enabled):
    """A context (or decorator) in which recording is on, inside a `no_grad`."""

    def __init__(self) -> None:
        super().__init__(True)
