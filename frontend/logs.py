"""TREADLE_LOG: topics whose log lines go to stderr.

Every part logs through Python's `logging` under `treadle.*`, silent by default. Naming a topic in TREADLE_LOG
("recompiles", "cache", "passes", "kernels") shows it without any set-up of the program's own.
"""

from __future__ import annotations

import logging
import sys

from ..ir import config

LOGGERS = {
    "recompiles": ("treadle.recompiles", logging.INFO),
    "cache": ("treadle.cache", logging.DEBUG),
    "passes": ("treadle.passes", logging.DEBUG),
    "kernels": ("treadle.build", logging.DEBUG),
}


class _Stderr(logging.Handler):
    """Writes to whatever stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"treadle: {record.getMessage()}", file=sys.stderr)


_handler = _Stderr()


def follow_environment() -> None:
    """Shows the topics that TREADLE_LOG names now, and no others.

    Raises:
        ConfigError: it names an unknown topic.
    """
    wanted = config.get("TREADLE_LOG")
    for topic, (name, level) in LOGGERS.items():
        logger = logging.getLogger(name)
        if topic in wanted:
            logger.addHandler(_handler)  # twice is once
            if not logger.level or logger.level > level:
                logger.setLevel(level)
        else:
            logger.removeHandler(_handler)
