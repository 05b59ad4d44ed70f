"""`treadle inspect FILE.py:NAME TYPE...`: a traced graph as text, before and after each pass, with every node's cost.

NAME is a function of tensors, an nn.Module (an object, or a class that needs no arguments), a compiled function or a
training step. The types are those of the text form: `f32[8,784]`, `i64[8]`, `bf16[4,seq,64]`.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...ir.errors import ArgumentsError
from ...ir.graph import Graph, Node
from ...ir.parse import parse_type
from ...ir.pipeline import Pipeline, Step
from ...ir.types import TensorType
from .. import transforms
from ..compile import Compiled, passes
from ..trace import Spec, trace
from ..train import TrainStep


def resolve(what: str) -> Any:
    """The object that `FILE.py:NAME` names; a class of modules is instantiated.

    Raises:
        ArgumentsError: no such file, name, or it cannot be called.
    """
    path_text, _, name = what.rpartition(":")
    path = Path(path_text)
    if name and path.suffix == ".py" and not path.is_file():
        raise ArgumentsError(f"there is no file {path_text!r}; write FILE.py:NAME")
    if not name or path.suffix != ".py":
        raise ArgumentsError(f"{what!r} does not name a function in a file; write FILE.py:NAME")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent.resolve()))
    spec.loader.exec_module(module)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            offered = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
            raise ArgumentsError(f"{path} has no {name!r}; it has {offered or 'nothing that can be called'}")
        found = getattr(found, part)
    if not callable(found):
        raise ArgumentsError(f"{what} is a {type(found).__name__} and cannot be traced; name a function or a module")
    return found() if isinstance(found, type) else found


def check_arguments(what: str, fn: Any, specs: list[Spec]) -> None:
    """Raises ArgumentsError if the function does not take so many tensors."""
    signature = inspect.signature(getattr(fn, "forward", fn))
    try:
        signature.bind(*specs)
    except TypeError as error:
        raise ArgumentsError(f"{what}{signature}: {error}; give a type such as f32[8,784] for each tensor") from None


def graph_of(what: str, fn: Any, types: list[TensorType], grad: bool) -> Graph:
    """The traced graph; a training step is traced on a batch of zeros, since it takes arrays only."""
    if isinstance(fn, TrainStep):
        return fn.trace(*(np.zeros(t.shape, t.dtype.np) for t in types))
    fn = fn.fn if isinstance(fn, Compiled) else fn
    specs = [Spec(t) for t in types]
    check_arguments(what, fn, specs)
    return trace(transforms.grad(fn) if grad else fn, *specs)


def rounded(number: Any) -> str:
    """12.3M for 12,345,678; symbolic sizes as they are."""
    if not isinstance(number, (int, float)):
        return str(number)
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def costs(graph: Graph) -> Table:
    """Operations and bytes of every node, with the user's line; nested regions are counted in their node."""
    table = Table(title=f"cost of {graph.name}", title_justify="left")
    for column in ("node", "result", "FLOPs", "bytes", "FLOPs per byte", "line"):
        table.add_column(column, justify="right" if "FLOPs" in column or column == "bytes" else "left", overflow="fold")
    flops, nbytes = 0, 0
    for node in graph.nodes:
        f, b = node.flops, node.nbytes
        intensity = f"{f / b:.2f}" if isinstance(f, int) and isinstance(b, int) and b else ""
        results = Text(", ".join(str(v.type) for v in node.results))
        table.add_row(node.op.name, results, rounded(f), rounded(b), intensity, line_of(node))
        flops, nbytes = flops + f, nbytes + b
    table.add_section()
    table.add_row(f"{len(graph.nodes)} nodes", "", rounded(flops), rounded(nbytes), "", "")
    return table


def line_of(node: Node) -> str:
    """The user's line; nothing for a node made on behalf of no line of theirs, while this command calls their code."""
    if node.loc is None or node.loc.file.startswith(sys.prefix):
        return ""
    return f"{Path(node.loc.file).name}:{node.loc.line}"


def heading(console: Console, text: str) -> None:
    """A rule with a title."""
    console.rule(Text(text, style="bold"), align="left")


def printer(console: Console) -> Callable[[Step], None]:
    """Prints a pass's result: the graph where it changed, one line where not."""

    def show_step(step: Step) -> None:
        graph, stats = step.result.graph, dict(step.result.stats)
        listed = {name: str(value) for name, value in stats.items() if "\n" in str(value)}
        said = ", ".join(f"{name} {value}" for name, value in stats.items() if value and name not in listed)
        if not step.result.changed:
            console.print(Text(f"{step.name}: nothing to do ({1e3 * step.seconds:.1f} ms)", style="dim"))
            return
        heading(console, f"after {step.name} ({1e3 * step.seconds:.1f} ms): {len(graph.nodes)} nodes")
        for line in filter(None, [said, *(f"{name}:{text}" for name, text in listed.items())]):
            console.print(Text(line, style="dim"), soft_wrap=True)
        console.print(str(graph), markup=False, highlight=False, soft_wrap=True)

    return show_step


def show(console: Console, what: str, types: list[str], grad: bool = False, amp: str | None = None,
         every_pass: bool = True) -> Graph:
    """Prints the traced graph, its costs, the graph after each pass, and the costs of what is lowered.

    Raises:
        ArgumentsError: there is no such function; ParseError: a type is not well formed.
        TreadleError: from tracing it, or from a pass.
    """
    fn = resolve(what)
    traced = graph_of(what, fn, [parse_type(text) for text in types], grad)
    heading(console, f"traced: {len(traced.nodes)} nodes")
    console.print(str(traced), markup=False, highlight=False, soft_wrap=True)
    console.print(costs(traced))
    final = Pipeline(passes(amp), observe=printer(console) if every_pass else None).run(traced)
    if not every_pass:
        heading(console, f"after all passes: {len(final.nodes)} nodes")
        console.print(str(final), markup=False, highlight=False, soft_wrap=True)
    console.print(costs(final))
    return final
