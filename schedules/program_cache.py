"""Whole programs on disk: a graph that was compiled before is neither rewritten, lowered nor built again.

The key is a hash of everything that decides a program: the graph as it was traced, the options of its compilation, the
target, and Treadle's own sources, so that a change of one pass makes every program anew. An entry holds the
signature, the constants, and the name of the linked library, which the cache keeps as an entry of its own. So it does
with large constants, under a hash of their elements: programs of one model for several sizes share its weights, on the
disk and when they are written. What is missing or damaged is built again.

Nothing here imports TVM: a warm start needs the runtime library only.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

from ..ir import config
from ..ir.errors import TreadleError
from ..ir.graph import Graph, Node
from ..ir.hashing import content_hash, elements, graph_hash
from .abi import numpy_dtype
from .artifact import read_tensors, write_tensors
from .cache import cache, digest
from .executable import BuildStats, Executable, empty_aligned
from .link import SHARED, Library
from .signature import Signature, TensorInfo
from .target import Target, host_model

log = logging.getLogger("treadle.cache")

APART = 1 << 20
"""Bytes from which on a constant is an entry of its own."""
SHARE = 2
"""A program whose constants take more than the cache's limit divided by this is built anew: it would crowd out all
else."""


def program_key(graph: Graph, target: Target | str, *options: object) -> str | None:
    """The name under which the program of a traced graph is kept.

    `options` are what else decides the program, by their text (mixed precision, a memory budget). None: it is not to be
    kept, because an op's rules come from outside the package, or because the passes were asked to show their work.
    """
    if config.get("TREADLE_DUMP") or config.get("TREADLE_VERIFY") or {"passes", "kernels"} & config.get("TREADLE_LOG"):
        return None
    if any(node.op.has("plugin") for node in _nodes(graph)):
        return None
    target = Target.parse(target)
    machine = (target.name, target.arch, sorted(target.features), target.vector_bits, target.threads, target.l1_bytes,
               target.l2_bytes, target.l3_bytes, host_model())
    names = [v.name for v in graph.inputs]
    return digest("program", graph_hash(graph), graph.name, names, machine, options, _sources(), _versions())


def fetch(key: str) -> Executable | None:
    """The program kept under a key, ready to run; None if there is none, or not all of it."""
    entry = cache().get(f"{key}.json")
    if entry is None:
        return None
    kept = json.loads(entry)
    signature = Signature.from_json(kept["signature"])
    code = cache().get(kept["library"])
    constants = _fetch_constants(key, signature.constants, kept["apart"]) if code is not None else None
    if code is None or constants is None:
        return None
    executable = Executable(signature, Library({SHARED: code}), constants, own_constants=True)
    executable.stats = BuildStats(kept["kernels"], 0, True, kept["library"])
    try:
        executable.prepare()
    except TreadleError as error:
        log.warning("the cached program %s cannot be loaded and is built again: %s", signature.name, error)
        cache().discard(kept["library"])
        return None
    return executable


def keep(key: str, executable: Executable) -> None:
    """Keeps a built program under a key."""
    stats, constants = executable.stats, executable.constants
    if stats is None or stats.library is None:
        return
    nbytes = sum(c.nbytes for c in constants.values())
    if nbytes > cache().limit // SHARE:
        log.info("%s is not kept: its constants take %.0f MB, and TREADLE_CACHE_BYTES is %.0f MB",
                 executable.signature.name, nbytes / 1e6, cache().limit / 1e6)
        return
    apart = {name: content_hash(array) for name, array in constants.items() if array.nbytes >= APART}
    try:
        entry = json.dumps({"signature": executable.signature.to_json(), "library": stats.library,
                            "kernels": stats.kernels, "apart": apart})
    except (TypeError, ValueError):  # metadata of the caller's that JSON does not know
        return
    for name, found in apart.items():
        if not cache().holds(f"{found}.bin", constants[name].nbytes):
            cache().put(f"{found}.bin", elements(constants[name]), bytes.fromhex(found))
    if len(apart) < len(constants):
        cache().put(f"{key}.safetensors", write_tensors({n: a for n, a in constants.items() if n not in apart}))
    cache().put(f"{key}.json", entry.encode())


def _fetch_constants(key: str, infos: Sequence[TensorInfo], apart: dict[str, str]) -> dict[str, np.ndarray] | None:
    """The constants of a kept program; None if one is missing."""
    small = [info for info in infos if info.name not in apart]
    data = cache().get(f"{key}.safetensors") if small else b""
    if data is None:
        return None
    found = read_tensors(data or None, small)
    for info in infos:
        if info.name in apart:
            found[info.name] = array = empty_aligned(info.shape, numpy_dtype(info.dtype))
            if not cache().fill(f"{apart[info.name]}.bin", elements(array)):
                return None
    return found


def _nodes(graph: Graph) -> Iterator[Node]:
    for node in graph.nodes:
        yield node
        for region in node.regions:
            yield from _nodes(region)


@functools.cache
def _sources() -> str:
    """A hash of the package's sources."""
    root = Path(__file__).resolve().parent.parent
    state = hashlib.sha256()
    for folder in ("ir", "autodiff", "schedules", "frontend"):
        for path in sorted((root / folder).glob("*.py")):
            state.update(path.name.encode() + path.read_bytes())
    return state.hexdigest()


@functools.cache
def _versions() -> list[str]:
    return [metadata.version(name) for name in ("apache-tvm", "apache-tvm-ffi", "numpy")]
