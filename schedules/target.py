"""Targets: which machine the kernels are made for.

A target string names an instruction set, never a product: `cpu` is what this very process may use,
`cpu:avx2` anything that has AVX2, and so on (`Target.choices()`). The features of the host are read from
the operating system at run time. A hypervisor can hide features that the CPU model is known
for, so LLVM gets the CPU's name for its cost model AND an explicit "off" for every feature that is not there.
"""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..ir.errors import TargetError
from .runtime import get_num_threads

_SSE4 = ("sse3", "ssse3", "sse41", "sse42", "popcnt", "cx16")
_AVX2 = (*_SSE4, "avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe")
_AVX512 = (*_AVX2, "avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl")
_AVX512_VNNI = (*_AVX512, "avx512vnni")
_AVX512_BF16 = (*_AVX512_VNNI, "avx512bf16")
_AMX = (*_AVX512_BF16, "avx512ifma", "avx512vbmi", "avx512vbmi2", "avx512bitalg", "avx512vpopcntdq", "avx512fp16",
        "avxvnni", "gfni", "vaes", "vpclmulqdq", "amxtile", "amxint8", "amxbf16")  # fmt: skip

# Every x86 feature that decides which instructions LLVM may pick. Spelled without separators.
_X86_FEATURES = frozenset((*_AMX, "avx512vp2intersect", "sha", "adx"))
_CPUINFO_NAMES = {"pni": "sse3", "abm": "lzcnt", "bmi1": "bmi", "shani": "sha", "asimd": "neon"}
_LLVM_NAMES = {"sse41": "sse4.1", "sse42": "sse4.2"} | {
    f: f"amx-{f[3:]}" for f in _AMX if f.startswith("amx")
}


@dataclass(frozen=True)
class Isa:
    """A portable instruction set: an LLVM CPU that has these features, and the vector width to schedule for."""

    mcpu: str
    arch: str
    features: tuple[str, ...]
    vector_bits: int


ISAS = {
    "sse4": Isa("x86-64-v2", "x86_64", _SSE4, 128),
    "avx2": Isa("x86-64-v3", "x86_64", _AVX2, 256),
    "avx512": Isa("x86-64-v4", "x86_64", _AVX512, 512),
    "avx512_vnni": Isa("cascadelake", "x86_64", _AVX512_VNNI, 512),
    "avx512_bf16": Isa("cooperlake", "x86_64", _AVX512_BF16, 512),
    "amx": Isa("sapphirerapids", "x86_64", _AMX, 512),
    "neon": Isa("generic", "aarch64", ("neon",), 128),
}


def _plain(feature: str) -> str:
    """avx512_bf16, avx512-bf16 and AVX512BF16 are the same feature."""
    return re.sub(r"[^a-z0-9]", "", feature.lower())


def _size(text: str) -> int:
    text = text.strip()
    scale = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
    return int(text.rstrip("KM")) * scale


@functools.cache
def host_features() -> frozenset[str]:
    """Features that the operating system reports for every CPU of this machine, spelled without separators."""
    try:
        lines = set(Path("/proc/cpuinfo").read_text().splitlines())
    except OSError:
        lines = set()
    found: frozenset[str] | None = None
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            names = frozenset(_CPUINFO_NAMES.get(_plain(f), _plain(f)) for f in value.split())
            found = names if found is None else found & names  # a hybrid machine: what all of its cores have
    return found or frozenset()


@functools.cache
def host_caches() -> dict[int, int]:
    """{level: bytes} of the data caches of one core; the usual sizes where the system does not tell."""
    sizes = {1: 32 << 10, 2: 512 << 10, 3: 8 << 20}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            if (index / "type").read_text().strip() != "Instruction":
                sizes[int((index / "level").read_text())] = _size((index / "size").read_text())
        except (OSError, ValueError):
            continue
    return sizes


@functools.cache
def host_model() -> str:
    """What the operating system calls the processor; "" where it does not say."""
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else ""


@functools.cache
def _host_cpu_name() -> str:
    from tvm.target import codegen

    return str(codegen.llvm_get_system_cpu())


def host_arch() -> str:
    """This processor's architecture, as LLVM calls it."""
    machine = os.uname().machine  # `platform.machine()` looks at much else first
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


@dataclass(frozen=True)
class Target:
    """What kernels are scheduled and compiled for. Made by `Target.parse`; `str(target)` parses back.

    `vector_bits` is the register width to schedule for, `threads` the number of threads a parallel kernel is split for,
    `l1_bytes`, `l2_bytes`, `l3_bytes` the data caches.
    """

    name: str
    kind: str  # "cpu" or "cuda"
    arch: str  # "x86_64", "aarch64", or "sm_80"
    features: frozenset[str] = field(repr=False)
    vector_bits: int
    threads: int
    l1_bytes: int = field(repr=False)
    l2_bytes: int = field(repr=False)
    l3_bytes: int = field(repr=False)

    @staticmethod
    def choices() -> list[str]:
        """Every target string that `parse` takes (CUDA: an example)."""
        return ["cpu", *(f"cpu:{isa}" for isa in ISAS), "cuda:sm_80"]

    @staticmethod
    def parse(spec: str | Target = "cpu") -> Target:
        """The target called `spec`: "cpu" (this host), "cpu:<isa>" or "cuda:sm_<nn>".

        Raises:
            TargetError: the name is unknown; the message lists the choices.
        """
        if isinstance(spec, Target):
            return spec
        kind, _, isa = str(spec).partition(":")
        caches = host_caches()
        rest = (get_num_threads(), caches[1], caches[2], caches[3])
        if kind == "cuda" and re.fullmatch(r"sm_\d{2,3}a?", isa):
            return Target(f"cuda:{isa}", "cuda", isa, frozenset(), 128, *rest)
        if kind == "cpu" and isa in ISAS:
            known = ISAS[isa]
            features = frozenset(known.features)
            return Target(f"cpu:{isa}", "cpu", known.arch, features, known.vector_bits, *rest)
        if spec == "cpu":
            wanted = _X86_FEATURES if host_arch() == "x86_64" else frozenset(("neon", "sve", "bf16", "i8mm"))
            features = host_features() & wanted
            bits = 512 if {"avx512f", "avx512vl"} <= features else 256 if "avx2" in features else 128
            return Target("cpu", "cpu", host_arch(), features, bits, *rest)
        raise TargetError(
            f"unknown target {spec!r}: choose one of {', '.join(Target.choices())} (or another sm_<nn>)"
        )

    def has(self, feature: str) -> bool:
        """Whether kernels may use a feature; separators and case do not matter ("avx512_bf16", "AVX512BF16")."""
        return _plain(feature) in self.features

    @property
    def missing_here(self) -> list[str]:
        """What this machine lacks to run the target's code; empty if it runs here."""
        if self.kind == "cuda":
            return ["a CUDA device"]
        if self.arch != host_arch():
            return [f"an {self.arch} processor"]
        return sorted(self.features - host_features())

    def runnable_here(self) -> bool:
        """Whether this machine can execute code made for the target."""
        return not self.missing_here

    @functools.cached_property
    def llvm(self) -> dict[str, Any]:
        """The LLVM target as TVM takes it: CPU name and explicit features."""
        if self.kind != "cpu":
            raise TargetError(
                f"target {self.name!r} is understood but this version compiles for CPUs only; "
                "use target='cpu' or one of its named instruction sets"
            )
        triple = f"{self.arch}-unknown-linux-gnu"
        if self.name != "cpu":
            return {"kind": "llvm", "mcpu": ISAS[self.name.partition(":")[2]].mcpu, "mtriple": triple}
        spec: dict[str, Any] = {"kind": "llvm", "mcpu": _host_cpu_name(), "mtriple": triple}
        if self.arch == "x86_64":
            spec["mattr"] = [
                ("+" if f in self.features else "-") + _LLVM_NAMES.get(f, f) for f in sorted(_X86_FEATURES)
            ]
        return spec

    @functools.cached_property
    def tvm_target(self) -> Any:
        """The `tvm.target.Target` (imports TVM). TargetError for CUDA, which parses but does not compile yet."""
        import tvm

        return tvm.target.Target(self.llvm)

    @property
    def fingerprint(self) -> str:
        """What decides the machine code: part of every cache key."""
        return "|".join(f"{key}={value}" for key, value in sorted(self.llvm.items()))

    def __str__(self) -> str:
        return self.name
