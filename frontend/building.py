"""From a traced graph to an executable: passes, lowering, machine code; in phases where shapes depend on data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..autodiff.amp import amp_pass
from ..autodiff.budget import budget_pass
from ..autodiff.save_less import SAVE_LESS
from ..ir.errors import CompileError
from ..ir.freeze import FREEZE
from ..ir.graph import Graph
from ..ir.passes import FINISH, TIDY
from ..ir.phases import is_split, split, to_json
from ..ir.pipeline import Pass, Pipeline
from .progress import Progress

BUDGET_ROUNDS = 6
"""How often recomputation is planned anew while the memory plan exceeds its budget."""


def passes(amp: Any = None, memory_budget: int | None = None, freeze: bool = False,
           sizes: Mapping[str, int] | None = None) -> list[Pass]:
    """What a traced graph goes through before it is lowered.

    Args:
        amp: "bfloat16" (or "float16"): mixed precision; None: none.
        memory_budget: bytes; values are recomputed until the estimated peak of what waits between kernels is below it.
        freeze: fold what depends on constants only, and scales into weights.
        sizes: at which the budget is kept, of a graph with symbolic ones.
    """
    frozen_steps = [FREEZE, *TIDY] if freeze else []
    steps = [*TIDY, *frozen_steps]
    if amp is not None:
        steps += [amp_pass(amp), *TIDY, *frozen_steps]
    steps.append(SAVE_LESS)
    if memory_budget is not None:
        steps.append(budget_pass(memory_budget, sizes))
    return [*steps, *FINISH]


def build_executable(graph: Graph, target: str, amp: Any = None, meta: dict[str, Any] | None = None,
                     memory_budget: int | None = None, sizes: Mapping[str, int] | None = None,
                     freeze: bool = False) -> Any:
    """Passes, lowering, machine code: a graph as an executable. `sizes`: what its symbolic sizes are expected to be.

    A graph whose shapes depend on data becomes a sequence of programs (`ir.phases`).

    Raises:
        CompileError: the memory budget is out of reach, or a kernel cannot be compiled.
    """
    from ..schedules.cache import cache
    from ..schedules.program_cache import fetch, keep, program_key

    if is_split(graph):
        return _phased(graph, target, amp, meta, memory_budget, sizes, freeze)
    options = (amp, memory_budget, freeze, *([sorted(sizes.items())] if sizes else []))

    def made() -> Any:
        return _build(graph, target, amp, memory_budget, sizes, freeze)

    key = program_key(graph, target, *options)
    executable: Any = fetch(key) if key is not None else made()
    if executable is None and key is not None:
        with cache().alone(key):
            executable = fetch(key)  # another rank of the job may just have kept it
            if executable is None:
                executable = made()
                keep(key, executable)
    if executable.profile_builder is None:
        executable.profile_builder = lambda: made().profile_builder()
    executable.signature.meta.update(meta or {})
    return executable


def arena_bytes(graph: Graph, target: str) -> int:
    """Bytes of temporaries that the program of a graph takes, before it is compiled."""
    from ..schedules.plan import plan_memory

    return plan_memory(_lowered(graph, target, None)).arena_bytes


def _phased(graph: Graph, target: str, amp: Any, meta: dict[str, Any] | None, *options: Any) -> Any:
    from ..schedules.phased import phased

    parts = split(Pipeline(TIDY).run(graph))
    made = phased(graph, [build_executable(p.graph, target, amp, None, *options) for p in parts.phases],
                  to_json(parts))
    made.signature.meta.update(meta or {})
    return made


def _build(graph: Graph, target: str, amp: Any, memory_budget: int | None, sizes: Mapping[str, int] | None,
           freeze: bool) -> Any:
    from ..schedules.build import build  # importing TVM takes a second: only who compiles pays

    program = _within(graph, memory_budget, target, amp, freeze, sizes) if memory_budget is not None else \
        _lowered(graph, target, amp, sizes=sizes, freeze=freeze)
    with Progress() as progress:
        return build(program, target, progress.update)


def _lowered(graph: Graph, target: str, amp: Any, memory_budget: int | None = None,
             sizes: Mapping[str, int] | None = None, freeze: bool = False) -> Any:
    from ..schedules.lower import lower

    return lower(Pipeline(passes(amp, memory_budget, freeze, sizes)).run(graph), target, sizes)


def _within(graph: Graph, budget: int, target: str, amp: Any, freeze: bool, sizes: Mapping[str, int] | None) -> Any:
    """The program whose memory plan keeps to the budget.

    The pass that recomputes estimates what fusion and the plan will do; where they need more, it is asked for less.
    """
    from ..schedules.plan import plan_memory

    asked, best = budget, -1
    for _ in range(BUDGET_ROUNDS):
        program = _lowered(graph, target, amp, asked, sizes, freeze)
        used = plan_memory(program, sizes).arena_bytes
        if used <= budget:
            return program
        if 0 <= best <= used:
            break
        best, asked = used, max(int(asked * 0.97 * budget / used), 1)
    at = f" (at {', '.join(f'{name} = {size}' for name, size in sizes.items())})" if sizes else ""
    raise CompileError(f"{graph.name}: values take {best:,} bytes between its kernels even with everything recomputed "
                       f"that helps{at}; the budget is {budget:,}. Use smaller batches, or accumulate")
