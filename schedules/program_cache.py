"""Whole programs on disk: a graph that was compiled before is neither rewritten, lowered nor built again.

The key is a hash of everything that decides a program: the graph as it was traced, the options of its compilation, the
target, and Treadle's own sources, so that a change of one pass makes every program anew. An entry holds the
signature, the constants, and the name of the linked library, which the cache keeps as an entry of its own. What
is missing or damaged is built again.

Nothing here imports TVM: a warm start needs the runtime library only.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from ..ir import config
from ..ir.errors import TreadleError
from ..ir.graph import Graph, Node
from ..ir.hashing import graph_hash
from .artifact import read_tensors, write_tensors
from .cache import cache, digest
from .executable import BuildStats, Executable
from .link import SHARED, Library
from .signature import Signature
from .target import Target, host_model

log = logging.getLogger("treadle.cache")

CONSTANT_BYTES = 64 << 20
"""Programs with more constants than this are built anew: they would crowd kernels out of the cache."""


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
    constants = cache().get(f"{key}.safetensors") if signature.constants else b""
    if code is None or constants is None:
        return None
    executable = Executable(signature, Library({SHARED: code}), read_tensors(constants or None, signature.constants))
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
    if stats is None or stats.library is None or sum(c.nbytes for c in constants.values()) > CONSTANT_BYTES:
        return
    try:
        entry = json.dumps({"signature": executable.signature.to_json(), "library": stats.library,
                            "kernels": stats.kernels})
    except (TypeError, ValueError):  # metadata of the caller's that JSON does not know
        return
    if constants:
        cache().put(f"{key}.safetensors", write_tensors(constants))
    cache().put(f"{key}.json", entry.encode())


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
