"""`treadle onnx check`: what of a model stands in the way."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from .. import onnx as _onnx


def check(console: Console, path: Path, train: bool) -> bool:
    """Prints the report on a model; returns whether nothing is in the way."""
    report = _onnx.check(str(path), train=train)
    verdict = "[green]all supported[/]" if report.ok else f"[red]{len(report.problems)} problems[/]"
    console.print(f"{escape(str(path))}: {report.nodes} nodes, {verdict}", highlight=False, soft_wrap=True)
    for problem in report.problems:
        console.print(f"  [red]{problem.kind}[/]  {escape(str(problem))}", highlight=False, soft_wrap=True)
    for note in report.notes:
        console.print(f"  [yellow]note[/]  {escape(str(note))}", highlight=False, soft_wrap=True)
    if report.frozen:
        console.print(f"  parameters without a gradient: {escape(', '.join(report.frozen))}", highlight=False,
                      soft_wrap=True)
    elif train and report.ok:
        console.print("  every parameter has a gradient", highlight=False)
    return report.ok
