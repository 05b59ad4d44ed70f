"""Passes and pipelines.

A pass is a named function from graph to graph that reports whether it changed anything. A `Pipeline`
runs a list of them and can verify, time and dump every step, and bisect: find the first pass after
which the reference interpreter gives another answer.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import config
from .errors import TreadleError
from .graph import Graph
from .interp import run
from .verify import verify

logger = logging.getLogger("treadle.passes")


@dataclass(frozen=True)
class PassResult:
    """What a pass gives: the graph (the same object if nothing changed) and counts of what it did."""

    graph: Graph
    changed: bool
    stats: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """A named graph transform. `function(graph) -> PassResult` must not modify the graph it is given."""

    name: str
    function: Callable[[Graph], PassResult]

    def run(self, graph: Graph) -> PassResult:
        return self.function(graph)


@dataclass(frozen=True)
class Step:
    """A pass that a pipeline ran: its result and the seconds it took."""

    name: str
    result: PassResult
    seconds: float


class Pipeline:
    """A linear list of passes.

    Args:
        passes: run in order, each once.
        observe: called with every `Step`, e.g. to print the graph after each pass.
    """

    def __init__(self, passes: Sequence[Pass], observe: Callable[[Step], None] | None = None):
        self.passes = list(passes)
        self.observe = observe

    def run(self, graph: Graph) -> Graph:
        """Runs every pass; under TREADLE_VERIFY=1 the graph is checked after each, under TREADLE_DUMP=dir
        each step is written to a numbered file there.

        Raises:
            TreadleError: from a pass; the message is extended by the name of the pass.
        """
        checking, folder = config.get("TREADLE_VERIFY"), config.get("TREADLE_DUMP")
        if folder:
            _dump(folder, graph, "input")
        for p in self.passes:
            started = time.perf_counter()
            try:
                result = p.run(graph)
                if checking:
                    verify(result.graph)
            except TreadleError as error:
                error.add_note(f"in the pass {p.name!r}") if hasattr(error, "add_note") else None
                raise
            step = Step(p.name, result, time.perf_counter() - started)
            logger.debug("%s: %s in %.1f ms %s", p.name, "changed" if result.changed else "no change",
                         1e3 * step.seconds, dict(result.stats))
            graph = result.graph
            if folder and result.changed:
                _dump(folder, graph, p.name)
            if self.observe:
                self.observe(step)
        return graph

    def bisect(self, graph: Graph, arrays: Sequence[Any], rtol: float = 1e-5, atol: float = 1e-6) -> Step | None:
        """The first step after which the reference interpreter gives another answer than before, or None."""
        expected = run(graph, arrays)
        for p in self.passes:
            started = time.perf_counter()
            result = p.run(graph)
            verify(result.graph)
            actual = run(result.graph, arrays)
            same = len(actual) == len(expected) and all(
                a.shape == e.shape
                and np.allclose(a.astype(np.float64), e.astype(np.float64), rtol, atol, equal_nan=True)
                for a, e in zip(actual, expected, strict=True))
            if not same:
                return Step(p.name, result, time.perf_counter() - started)
            graph = result.graph
        return None


def _dump(folder: str, graph: Graph, name: str) -> None:
    os.makedirs(folder, exist_ok=True)
    number = sum(1 for f in os.listdir(folder) if f.endswith(".txt"))
    with open(os.path.join(folder, f"{number:03d}_{graph.name}_{name}.txt"), "w", encoding="utf-8") as file:
        file.write(str(graph) + "\n")
