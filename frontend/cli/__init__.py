"""The console script `treadle`: `demo`, `doctor`, `inspect`.

Each command is a module of this folder, imported when it is asked for, so that `treadle --help` answers at once.
A `TreadleError` ends a command with its message and exit code 1; a traceback would be a bug of ours.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ... import __version__
from ...ir.errors import TreadleError

app = typer.Typer(name="treadle", no_args_is_help=True, add_completion=False, rich_markup_mode="rich",
                  help="A deep-learning compiler: trace, differentiate, fuse, schedule, train.")

onnx_app = typer.Typer(no_args_is_help=True, help="ONNX models: look before you load.")
app.add_typer(onnx_app, name="onnx")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"treadle {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True,
                                          help="Print the version and exit.")] = False,
) -> None:
    pass


@app.command("demo")
def run_demo(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the 4,000 training digits.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, the artifact and the picture.")] = Path("out"),
    threads: Annotated[int, typer.Option(min=0, help="Threads of a kernel; 0: all cores of this process.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the initial weights and the order of the digits.")] = 0,
) -> None:
    """Train a small CNN on real MNIST digits, export it, and run the export in a fresh process."""
    from .demo import mnist

    mnist.run(Console(), out=out, epochs=epochs, threads=threads or None, seed=seed)


@app.command("doctor")
def run_doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what works on this machine and what does not: versions, CPU, threads, cache, MPI, CUDA compiler."""
    from .doctor import report

    if not report(Console(), as_json=as_json):
        raise typer.Exit(1)


@app.command("inspect")
def run_inspect(
    what: Annotated[str, typer.Argument(metavar="FILE.py:NAME", help="A function, or an nn.Module (class or object).")],
    inputs: Annotated[list[str], typer.Argument(metavar="TYPE...", help="Input types, such as f32[8,784] i64[8].")],
    grad: Annotated[bool, typer.Option(help="Inspect the gradient with respect to the first argument.")] = False,
    amp: Annotated[str, typer.Option(help="Show the decisions of mixed precision: bfloat16.")] = "",
    every_pass: Annotated[bool, typer.Option("--passes/--no-passes", help="Print the graph after every pass.")] = True,
) -> None:
    """Print a traced graph before and after each pass, with the cost of every node."""
    from .inspect import show

    show(Console(), what, inputs, grad=grad, amp=amp or None, every_pass=every_pass)


@onnx_app.command("check")
def run_onnx_check(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The model's file.")],
    train: Annotated[bool, typer.Option("--train", help="List what blocks a gradient too.")] = False,
) -> None:
    """List every node of a model that is not supported, before anything is compiled."""
    from .onnx import check

    if not check(Console(), model, train):
        raise typer.Exit(1)


@onnx_app.callback()
def _onnx_options() -> None:
    """ONNX models: look before you load."""


def main() -> None:
    """The entry point: runs a command and turns our own errors into a message."""
    try:
        app()
    except TreadleError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}:[/] {escape(str(error))}", highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        sys.exit(130)
