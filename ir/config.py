"""Every environment variable that Treadle reads, in one validated table.

Values are read when asked for, never at import, so that a test or a notebook can change them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError


def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "on", "yes"):
        return True
    if text.lower() in ("0", "false", "off", "no", ""):
        return False
    raise ValueError("give 1 or 0")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError("give a whole number >= 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError("give a number of seconds >= 0")
    return value


def _topics(text: str) -> frozenset[str]:
    known = {"recompiles", "cache", "passes", "kernels"}
    topics = frozenset(t.strip() for t in text.split(",") if t.strip())
    if topics - known:
        raise ValueError(f"known topics: {', '.join(sorted(known))}")
    return topics


@dataclass(frozen=True)
class Variable:
    """One environment variable: how it is read, its default, what it does."""

    name: str
    read: Callable[[str], Any]
    default: Any
    help: str


VARIABLES = {
    v.name: v
    for v in (
        Variable("TREADLE_CACHE_DIR", str, None, "folder of compiled kernels; default: the user's cache folder"),
        Variable("TREADLE_CACHE_BYTES", _count, 2 << 30, "size that the kernel cache is pruned to"),
        Variable("TREADLE_COMM_TIMEOUT", _count, 300, "seconds after which a rank that does not come is given up"),
        Variable("TREADLE_STEP_TIMEOUT", _seconds, None, "seconds after which a rank that hangs in the middle of a "
                 "step is given up; default: 10 times the longest step so far, at least 10 s; 0: never"),
        Variable("TREADLE_SHARED_MEMORY", _flag, True, "0: ranks of one host send each other messages like any others"),
        Variable("TREADLE_NUM_THREADS", _count, None, "threads of a kernel; default: the cores of this process"),
        Variable("TREADLE_RESTART", int, None, "set by treadle launch: how often the job was started again"),
        Variable("TREADLE_VERIFY", _flag, False, "1: check the graph after every pass"),
        Variable("TREADLE_DUMP", str, None, "folder that receives the graph after every pass, numbered"),
        Variable("TREADLE_LOG", _topics, frozenset(), "comma-separated: recompiles, cache, passes, kernels"),
    )
}


def get(name: str) -> Any:
    """The validated value of an environment variable of the table, or its default.

    Raises:
        ConfigError: the variable holds a value outside its domain.
    """
    variable = VARIABLES[name]
    text = os.environ.get(name)
    if text is None:
        return variable.default
    try:
        return variable.read(text)
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} is not valid: {error}. It is: {variable.help}.") from None
