"""Progress of a run: a bar on a terminal, a line for each epoch elsewhere."""

from __future__ import annotations

from typing import Any


class Board:
    """`with Board(...) as board: board.step(...)`.

    Args:
        total: steps of the run.
        epoch_steps: steps of an epoch.
        show: whether anything is shown.
    """

    def __init__(self, total: int, epoch_steps: int, show: bool):
        self.total, self.epochs, self.show = total, total // max(epoch_steps, 1), show
        self.bar: Any = None
        self.task: Any = None
        self.last = ""

    def __enter__(self) -> Board:
        if not self.show:
            return self
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        console = Console()
        if console.is_terminal:
            self.bar = Progress(TextColumn("stage {task.fields[stage]} epoch {task.fields[epoch]}"),
                                BarColumn(bar_width=None), TextColumn("loss {task.fields[loss]}"),
                                TextColumn("{task.fields[held_out]}"), TextColumn("{task.fields[speed]} samples/s"),
                                TimeElapsedColumn(), TimeRemainingColumn(), console=console)
            self.task = self.bar.add_task("", total=self.total, stage="1", epoch=f"1/{self.epochs}", loss="-",
                                          held_out="", speed="compiling, -")
            self.bar.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(self, stage: int, epoch: int, loss: float, speed: float) -> None:
        """A step was done."""
        if self.bar is not None:
            self.bar.update(self.task, advance=1, stage=str(stage + 1), epoch=f"{epoch + 1}/{self.epochs}",
                            loss=f"{loss:.4f}", speed=_speed(speed))

    def evaluation(self, found: dict[str, Any]) -> None:
        """An evaluation was done."""
        if self.bar is not None:
            self.bar.update(self.task, held_out=_numbers(found))

    def epoch(self, epoch: int, loss: float, found: dict[str, Any], speed: float) -> None:
        """An epoch was done."""
        if self.show and self.bar is None:
            told = f"  held out: {_numbers(found)}" if found else ""
            print(f"epoch {epoch + 1:2}/{self.epochs}  loss {loss:.4f}{told}  {_speed(speed)} samples/s", flush=True)


def _speed(speed: float) -> str:
    """A run of nothing but first steps, which compile, has no speed yet."""
    return f"{speed:,.0f}" if speed else "-"


def _numbers(found: dict[str, Any]) -> str:
    shown = {k: v for k, v in found.items() if k not in ("step", "stage", "epoch")}
    return ", ".join(f"{k} {v:.1%}" if k in ("accuracy", "top5", "macro_f1") else f"{k} {v:.4f}"
                     for k, v in shown.items())
