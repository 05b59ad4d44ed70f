"""A played pipeline schedule as a picture: a row for each device, forward passes blue, backward green, waits white."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ..ir.errors import ArgumentsError
from .pipeline import FORWARD, Played

SHADES = {FORWARD: ("#4273be", "#2f5590"), "B": ("#5aa569", "#417a4c")}  # by turns, for odd and even micro-batches
MOST_LABELS = 400  # tasks; with more of them numbers cannot be read


def check_drawing() -> None:
    """Raises ArgumentsError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ArgumentsError("a chart needs matplotlib; install it with: pip install 'treadle[plan]'")


def draw(path: Any, played: Played, devices: int, title: str = "") -> None:
    """Writes the schedule as a picture; the file's ending says which kind (.png, .svg, .pdf).

    Raises:
        ArgumentsError: matplotlib is not installed, or does not know the kind.
    """
    check_drawing()
    figure_type = importlib.import_module("matplotlib.figure").Figure
    figure = figure_type(figsize=(12, 1.2 + 0.35 * devices), layout="constrained")
    axes = figure.subplots()
    for task, (start, end) in sorted(played.spans.items()):
        row = task.stage % devices
        axes.barh(row, (end - start) * 1e3, left=start * 1e3, height=0.9, color=SHADES[task.phase][task.micro % 2])
        if len(played.spans) <= MOST_LABELS and end - start > played.makespan / 80:
            axes.text((start + end) * 500, row, str(task.micro), ha="center", va="center", fontsize=7, color="white")
    axes.set(yticks=range(devices), ylabel="device", xlabel="milliseconds", xlim=(0, played.makespan * 1e3),
             title=f"{title}  bubble {played.bubble:.1%}".strip())
    axes.invert_yaxis()
    kinds = sorted(figure.canvas.get_supported_filetypes())
    if Path(path).suffix.lstrip(".") not in kinds:
        raise ArgumentsError(f"a chart cannot be written as {Path(path).name!r}; endings: {', '.join(kinds)}")
    figure.savefig(path, dpi=120)
