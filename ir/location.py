"""Where in the user's code a node was made."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# tests/, tutorials/ and benchmarks/ lie under the same root but are users of the package
_OURS = tuple(os.path.join(_ROOT, folder) + os.sep
              for folder in ("ir", "autodiff", "schedules", "distributed", "frontend"))


@dataclass(frozen=True)
class Loc:
    """A line of source code."""

    file: str
    line: int
    function: str = ""

    def __str__(self) -> str:
        name = f", in {self.function}" if self.function not in ("", "<module>") else ""
        return f"{self.file}:{self.line}{name}"


def user_location() -> Loc | None:
    """The innermost line on the stack that is not Treadle's own."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith(_OURS) and not code.co_filename.startswith("<frozen"):
            return Loc(code.co_filename, frame.f_lineno, code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    return None
