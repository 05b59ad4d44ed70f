"""The console script `treadle`: `demo`, `doctor`, `finetune`, `inspect`.

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

app = typer.Typer(name="treadle", no_args_is_help=True, add_completion=False, rich_markup_mode="rich")

demo_app = typer.Typer()
app.add_typer(demo_app, name="demo")
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
    """A deep-learning compiler: trace, differentiate, fuse, schedule, train."""


@demo_app.callback(invoke_without_command=True)
def run_demo(
    context: typer.Context,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the passages.")] = 1,
    passages: Annotated[int, typer.Option(min=32, help="Passages of each kind to learn from.")] = 4500,
    out: Annotated[Path, typer.Option(help="Folder for the export.")] = Path("out"),
    threads: Annotated[int, typer.Option(min=0, help="Threads of a kernel; 0: all cores of this process.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the choice of passages, the head and the order.")] = 0,
) -> None:
    """Fine-tune an encoder that comes as ONNX to tell kinds of plays apart, and show that its export agrees.

    `treadle demo mnist` trains a small CNN from nothing instead.
    """
    if context.invoked_subcommand is None:
        from .demo import shakespeare

        shakespeare.run(Console(), out=out, epochs=epochs, threads=threads or None, seed=seed, passages=passages)


@demo_app.command("mnist")
def run_mnist(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the 4,000 training digits.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, the artifact and the picture.")] = Path("out"),
    threads: Annotated[int, typer.Option(min=0, help="Threads of a kernel; 0: all cores of this process.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the initial weights and the order of the digits.")] = 0,
) -> None:
    """Train a small CNN on real MNIST digits, export it, and run the export in a fresh process."""
    from .demo import mnist

    mnist.run(Console(), out=out, epochs=epochs, threads=threads or None, seed=seed)


@app.command("finetune")
def run_finetune(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The model's file.")],
    data: Annotated[Path, typer.Argument(help="Examples: .npz (an array for each input, and labels), or text and label "
                                              "as .csv, .tsv, .jsonl.")],
    out: Annotated[Path, typer.Option(help="Folder for the model, the checkpoints and the classes.")] = Path("out"),
    held_out: Annotated[Path | None, typer.Option(help="Examples to evaluate on; default: a share.")] = None,
    share: Annotated[float, typer.Option(help="Share of the examples that is held out otherwise.")] = 0.1,
    output: Annotated[str, typer.Option(help="The value of the graph that the new head gets.")] = "",
    pool: Annotated[str, typer.Option(help="What is done to it before: none, mean, max, first, spatial.")] = "none",
    mask: Annotated[str, typer.Option(help="The input that says which positions count when pooling.")] = "",
    train: Annotated[str, typer.Option(help="Patterns of the parameters that train, '*, !*embeddings*'.")] = "*",
    gradual: Annotated[bool, typer.Option("--gradual", help="Unfreeze one layer after the other.")] = False,
    bitfit: Annotated[bool, typer.Option("--bitfit", help="Train the biases and the head alone.")] = False,
    lora: Annotated[str, typer.Option(help="Patterns of the weights that get low-rank adapters, '*query*'.")] = "",
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters.")] = 8,
    dropout: Annotated[float | None, typer.Option(help="Drop where the export dropped dropouts.")] = None,
    batch_norm: Annotated[str, typer.Option(help="frozen: keep the statistics; train: move them.")] = "frozen",
    objective: Annotated[str, typer.Option(help="cross_entropy, mse, l1, bce.")] = "cross_entropy",
    optimizer: Annotated[str, typer.Option(help="adamw, adam, lion, sgd.")] = "adamw",
    lr: Annotated[float, typer.Option(help="Learning rate at its highest.")] = 5e-5,
    head_lr: Annotated[float, typer.Option(help="Factor on it for the head.")] = 10.0,
    layer_decay: Annotated[float | None, typer.Option(help="Factor on it for each layer further down.")] = None,
    schedule: Annotated[str, typer.Option(help="linear, cosine, constant.")] = "linear",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the examples (of each stage).")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Examples of a step.")] = 32,
    accumulate: Annotated[int, typer.Option(min=1, help="Parts that a batch is computed in.")] = 1,
    amp: Annotated[str, typer.Option(help="Mixed precision: bfloat16.")] = "",
    clip_norm: Annotated[float, typer.Option(min=0, help="Largest norm of the gradients; 0: any.")] = 1.0,
    patience: Annotated[int, typer.Option(min=0, help="Stop after so many evaluations without a better one.")] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="For text: vocab.txt or tokenizer.json.")] = None,
    length: Annotated[int, typer.Option(min=2, help="For text: word pieces of an example.")] = 64,
    opset: Annotated[int | None, typer.Option(help="Of the exported model.")] = None,
    seed: Annotated[int, typer.Option(help="Of the head, the split and the order.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the folder.")] = False,
    prune: Annotated[bool, typer.Option("--prune/--no-prune", help="Leave out the backward of what is frozen; compiles "
                                                                   "once for each stage.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
) -> None:
    """Put a head on an ONNX model, train it on examples, and write it as ONNX again."""
    from . import finetune

    task = finetune.Task(model, data, out, held_out, share, output, pool, mask, train, gradual, bitfit, lora, rank,
                         dropout, batch_norm, tokenizer, length, resume, opset, dry_run)
    settings = finetune.ft.Settings(
        objective=objective, optimizer=optimizer, lr=lr, head="head.*", head_lr=head_lr, layer_decay=layer_decay,
        schedule=schedule, epochs=epochs, batch_size=batch, accumulate=accumulate, amp=amp or None,
        clip_norm=clip_norm or None, patience=patience or None, seed=seed, prune_frozen=prune)
    finetune.run(Console(), task, settings)


LAUNCH_EXAMPLES = """Examples:

    treadle launch -n 4 train.py --epochs 3

    treadle launch -n 4 --logs out/logs train.py          rank 0 is shown, the others write to out/logs

    treadle launch -n 4 --max-restarts 3 train.py         with step.resume(folder) in train.py

    treadle launch --hosts a:4,b:4 train.py               8 ranks on two hosts, started by ssh

A mesh of as many ranks as the job has: td.distributed.make_mesh({"data": -1, "tensor": 2}).
"""


@app.command("launch", epilog=LAUNCH_EXAMPLES, context_settings={
    "allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False})
def run_launch(
    script: Annotated[list[str], typer.Argument(metavar="SCRIPT [ARGUMENT]...", help="A script, or -m MODULE, and its "
                                                                                "arguments.")],
    ranks: Annotated[int | None, typer.Option("-n", "--ranks", min=1, help="Processes to start; default: one for each "
                                                                           "slot of the hosts, or 2.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads of each; 0: its host's cores, shared out.")] = 0,
    logs: Annotated[Path | None, typer.Option(help="Folder, on each host, for a log of each rank; only rank 0 and "
                                                   "errors are shown.")] = None,
    hosts: Annotated[str, typer.Option(help="Hosts and how many ranks each takes, a:4,b:4; default: this one.")] = "",
    hostfile: Annotated[Path | None, typer.Option(help="The same as a file, a host in a line.")] = None,
    restarts: Annotated[int, typer.Option("--max-restarts", "--restarts", min=0, help="Start the job again so often "
                                                                                     "if it fails.")] = 0,
    prefix: Annotated[bool, typer.Option("--prefix/--no-prefix", help="Begin shown lines with the rank.")] = True,
    mpiexec: Annotated[str, typer.Option(help="Further arguments of mpiexec, '-iface eth1'.")] = "",
) -> None:
    r"""Run a script on several ranks under MPI (pip install 'treadle\[mpi]').

    If a rank fails, the others have five seconds to say what they missed; then all are ended, on all hosts. The exit
    code is that of the rank that failed first: its own, or 128 and the number of the signal that killed it.
    """
    from ...distributed.launch import Request, launch

    raise typer.Exit(launch(Request(script, ranks, threads or None, logs, hosts or None, hostfile, restarts, prefix,
                                    mpiexec)))


@app.command("plan")
def run_plan(
    what: Annotated[str, typer.Argument(metavar="MODEL", help="FILE.py:NAME, a training step, a module or a loss "
                                                              "function; or MODEL.onnx.")],
    inputs: Annotated[list[str], typer.Argument(metavar="TYPE...", help="Types of a whole batch: i64[64,1024].")],
    devices: Annotated[int, typer.Option(min=1, help="Devices of the cluster.")] = 8,
    memory: Annotated[str, typer.Option(help="Of a device.")] = "24GB",
    bandwidth: Annotated[str, typer.Option(help="Between two devices; or inside a host, between hosts: "
                                                "600GB/s,25GB/s.")] = "12GB/s",
    latency: Annotated[str, typer.Option(help="Of a message; one, or inside a host, between hosts.")] = "10us",
    devices_per_host: Annotated[int, typer.Option(min=0, help="With two bandwidths.")] = 0,
    flops: Annotated[str, typer.Option(help="That a device reaches, not its peak.")] = "1TFLOPS",
    memory_bandwidth: Annotated[str, typer.Option(help="Of a device's memory.")] = "100GB/s",
    measure: Annotated[bool, typer.Option("--measure", help="Time the layers on this machine instead.")] = False,
    optimizer: Annotated[str, typer.Option(help="adamw, sgd, momentum...; a training step has its own.")] = "adamw",
    amp: Annotated[str, typer.Option(help="Mixed precision: bfloat16.")] = "",
    shard: Annotated[list[str] | None, typer.Option(help="How parameters are split, '*.up.weight=tensor,-'; default: "
                                                         "found.")] = None,
    tensor: Annotated[str, typer.Option(help="Sizes of the tensor axis to search: 1,2,4.")] = "",
    pipe: Annotated[str, typer.Option(help="Sizes of the pipeline axis to search.")] = "",
    micro: Annotated[str, typer.Option(help="Numbers of micro-batches to search.")] = "",
    zero: Annotated[str, typer.Option(help="ZeRO stages to search: 0,1,2,3.")] = "",
    schedule: Annotated[str, typer.Option(help="Schedules to search: gpipe,1f1b,interleaved (all "
                                                "by default), zb-h1.")] = "",
    recompute: Annotated[str, typer.Option(help="yes or no; default: both are searched.")] = "",
    most: Annotated[int, typer.Option(min=1, help="Layouts to list.")] = 5,
    gantt: Annotated[Path | None, typer.Option(help="Draw the best pipeline into this PNG file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the best layout as JSON, for Plan.load.")] = None,
) -> None:
    """Search data x tensor x pipeline x micro-batches x recomputation x ZeRO for a described cluster, offline."""
    from .plan import Request, show

    show(Console(), what, inputs, Request(
        devices, memory, bandwidth, latency, devices_per_host, flops, memory_bandwidth, optimizer, amp, shard or [],
        tensor, pipe, micro, zero, schedule, recompute, measure, most, gantt, out))


@app.command("links")
def run_links() -> None:
    """Measure latency and bandwidth between the processes of an MPI job (mpiexec -n 2 treadle links)."""
    from ...distributed.probe import links
    from ..parallel import rank

    found = list(links())
    if rank() == 0:
        for other, host, link in found:
            print(f"rank 0 to rank {other} on {host}: --bandwidth {link.bandwidth / 1e9:.3g}GB/s --latency "
                  f"{link.latency * 1e6:.3g}us")


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
