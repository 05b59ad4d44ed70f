"""A bar on a terminal while kernels compile, shown only if that takes a while; nothing elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

PATIENCE = 1.0
"""Seconds before the bar appears."""


class Progress:
    """`with Progress() as p: build(program, target, p.update)`."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, done: int, total: int, label: str) -> None:
        """Shows that `done` of `total` kernels are compiled."""
        if self.bar is None and time.perf_counter() - self.started > PATIENCE and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Bar

            self.bar = Bar(console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task("compiling kernels", total=total)
            self.bar.start()
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total, description=f"compiling {label}")
