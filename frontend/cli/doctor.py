"""`treadle doctor`: what works on this machine and what does not, each with its remedy.

A finding is `works`, `absent` (optional, and how to get it) or `broken` (needed, and how to mend it). The last finding
is the proof: a small function is compiled and its answer compared with NumPy's.
"""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ... import __version__
from ...ir import config
from ...ir.errors import TreadleError
from ...schedules.cache import default_directory
from ...schedules.link import linker
from ...schedules.runtime import available_cpus
from ...schedules.target import ISAS, Target

WORKS, ABSENT, BROKEN = "works", "absent", "broken"
STYLE = {WORKS: "green", ABSENT: "yellow", BROKEN: "bold red"}
EXTRAS = {"demo": "mlxtend", "mpi": "mpi4py", "tune": "xgboost", "test": "pytest", "oracle": "torch", "bench": "jax"}
# Instruction sets in rising order; the last one that the host has names the portable target nearest to it.
SHOWN_FEATURES = ("avx2", "fma", "avx512f", "avx512vnni", "avx512bf16", "amxbf16", "neon", "sve")


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    topic: str
    state: str
    detail: str
    remedy: str = ""


def versions() -> Iterator[Finding]:
    """Python, Treadle and what it needs, against the exact pins of its own metadata."""
    yield Finding("Python", WORKS, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("Treadle", WORKS, __version__)
    try:
        required = importlib.metadata.requires("treadle") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("packages", BROKEN, "treadle is imported from a folder and not installed",
                      "pip install -e . in the checkout")
        return
    for requirement in required:
        if "extra ==" in requirement:
            continue
        name, pin = re.match(r"([\w.-]+)\s*(?:==([\w.]+))?", requirement).groups()  # type: ignore[union-attr]
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, BROKEN, "not installed", f"pip install '{requirement}'")
            continue
        if pin and found != pin:
            yield Finding(name, BROKEN, f"{found}, where the compiler's ABI needs {pin}",
                          f"pip install '{name}=={pin}'")
        else:
            yield Finding(name, WORKS, found)


def processor() -> Iterator[Finding]:
    """The CPU, its instruction sets, memory and threads."""
    target = Target.parse("cpu")
    features = " ".join(f for f in SHOWN_FEATURES if target.has(f)) or "none of those that matter"
    named = [name for name in ISAS if Target.parse(f"cpu:{name}").runnable_here()]
    yield Finding("CPU", WORKS, _model_name())
    yield Finding("instruction sets", WORKS if named else BROKEN, f"{features}; {target.vector_bits}-bit vectors",
                  "" if named else "Treadle needs at least SSE4.2 or NEON")
    if named:
        yield Finding("targets that run here", WORKS, ", ".join(["cpu", *(f"cpu:{name}" for name in named)]))
    yield Finding("threads", WORKS, f"{target.threads} used of {available_cpus()} available ({os.cpu_count()} in the "
                                    "machine); set_num_threads or TREADLE_NUM_THREADS changes it")
    memory = psutil.virtual_memory()
    yield Finding("memory", WORKS, f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free")


def _model_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or "unknown"


def cache() -> Iterator[Finding]:
    """The folder of compiled kernels."""
    folder = default_directory()
    limit = config.get("TREADLE_CACHE_BYTES")
    sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()] if folder.is_dir() else []
    detail = f"{folder}: {len(sizes)} files, {sum(sizes) / 2**20:.1f} of at most {limit / 2**20:.0f} MiB"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield Finding("kernel cache", BROKEN, f"{folder}: {error.strerror}; every process compiles anew",
                      "set TREADLE_CACHE_DIR to a folder that can be written")
        return
    if free < 64 << 20:
        yield Finding("kernel cache", BROKEN, f"{detail}; {free / 2**20:.0f} MiB free on the disk",
                      "free some space, or set TREADLE_CACHE_DIR to another disk")
    else:
        yield Finding("kernel cache", WORKS, detail)


def optional() -> Iterator[Finding]:
    """Linker, MPI, CUDA, extras."""
    yield Finding("linker", WORKS if linker() else ABSENT, linker() or "none on the path: kernels are linked in memory")
    launcher = shutil.which("mpiexec") or shutil.which("mpirun")
    if importlib.util.find_spec("mpi4py") and launcher:
        yield Finding("MPI", WORKS, f"mpi4py {importlib.metadata.version('mpi4py')}, {launcher}")
    else:
        parts = {"mpi4py": importlib.util.find_spec("mpi4py"), "mpiexec": launcher}
        lacking = [name for name, there in parts.items() if not there]
        yield Finding("MPI", ABSENT, f"{' and '.join(lacking)} not found", "pip install 'treadle[mpi]'")
    nvcc = shutil.which("nvcc")
    nvrtc = importlib.util.find_spec("nvidia") is not None and ctypes.util.find_library("nvrtc") is not None
    compiler = nvcc or ("NVRTC" if nvrtc else None)
    yield Finding("CUDA compiler", WORKS if compiler else ABSENT, compiler or "neither nvcc nor NVRTC found",
                  "" if compiler else "only needed for CUDA targets, which this version does not compile for yet")
    driver = ctypes.util.find_library("cuda")
    yield Finding("CUDA driver", WORKS if driver else ABSENT, driver or "libcuda not found: no GPU can be used")
    for extra, module in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        yield Finding(f"extra {extra}", WORKS if there else ABSENT, f"{module} {'found' if there else 'not found'}",
                      "" if there else f"pip install 'treadle[{extra}]'")


def proof() -> Iterator[Finding]:
    """Compiles y = tanh(x @ w + b) and compares it with NumPy."""
    from ... import compile, tanh

    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(shape, np.float32) for shape in ((33, 47), (47, 29), (29,)))
    started = time.perf_counter()
    y = compile(lambda x, w, b: tanh(x @ w + b))(x, w, b).numpy()
    seconds = time.perf_counter() - started
    error = float(np.abs(y - np.tanh(x @ w + b)).max())
    state = WORKS if error < 1e-5 else BROKEN
    yield Finding("compile and run", state, f"tanh(x @ w + b) in {seconds:.2f} s, {error:.1e} from NumPy's answer",
                  "" if state == WORKS else "please report this with the output of `treadle doctor --json`")


GROUPS: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
    ("versions", versions), ("machine", processor), ("cache", cache), ("optional", optional), ("proof", proof),
)

GROUPS_BY_NAME = dict(GROUPS)


def examine() -> dict[str, list[Finding]]:
    """Every finding, by group. A group that cannot be examined is itself a finding."""
    found: dict[str, list[Finding]] = {}
    for group, look in GROUPS:
        try:
            found[group] = list(look())
        except (TreadleError, ImportError, OSError) as error:
            found[group] = [Finding(group, BROKEN, f"{type(error).__name__}: {error}")]
    return found


def report(console: Console, as_json: bool = False) -> bool:
    """Prints the findings; False if something that is needed is broken."""
    found = examine()
    if as_json:
        print(json.dumps({group: [asdict(f) for f in findings] for group, findings in found.items()}, indent=2))
    else:
        table = Table(show_header=False, box=None, pad_edge=False)
        for group, findings in found.items():
            table.add_row(f"[bold]{group}[/]", "", "")
            for f in findings:
                remedy = f"  [dim]-> {escape(f.remedy)}[/]" if f.remedy else ""
                table.add_row(f"  {f.topic}", f"[{STYLE[f.state]}]{f.state}[/]", escape(f.detail) + remedy)
        console.print(table)
    broken = [f.topic for findings in found.values() for f in findings if f.state == BROKEN]
    if not as_json:
        console.print(f"[bold red]needs mending: {', '.join(broken)}[/]" if broken
                      else "[green]all that is needed works[/]")
    return not broken
