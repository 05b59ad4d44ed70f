"""What is said when the compiler itself fails: an exception of TVM's, of LLVM's, or of a rule of ours.

Such an error names things that a user has never seen. So it is told as what it is, a fault of the compiler, with the
kernel in which it came up, the ops that the kernel is made of, the line of the user's that made them, and what helps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..ir.dims import Dim
from ..ir.errors import CompileError, TreadleError
from ..ir.graph import Node

_REASON = 400  # characters of TVM's own message: what follows are its stack and its IR


class Origin(NamedTuple):
    """What a kernel was made from. `where`: the user's line. `sized`: whether it has sizes that are not known."""

    ops: tuple[str, ...]
    where: Any
    sized: bool

    @staticmethod
    def of(nodes: Sequence[Node]) -> Origin:
        """The origin of a kernel that computes these nodes."""
        sizes = (n for node in nodes for v in (*node.operands, *node.results) for n in v.shape)
        where = next((node.loc for node in reversed(nodes) if node.loc is not None), None)
        return Origin(tuple(dict.fromkeys(node.op.name for node in nodes)), where,
                      any(isinstance(n, Dim) for n in sizes))


def fault(name: str, origin: Origin | None, error: BaseException) -> CompileError:
    """The error to raise in place of `error`, which came up while the kernel (or the program) `name` was made."""
    reason = (str(error).strip().splitlines() or ["no reason given"])[0][:_REASON]
    ops = f" (ops: {', '.join(origin.ops)})" if origin is not None else ""
    helps = "compile with specialize=True, which knows all sizes" if origin is not None and origin.sized else \
        "compile for a smaller instruction set, target='cpu:avx2'"
    return CompileError(
        f"{name}{ops} cannot be compiled: {type(error).__name__}: {reason}. This is a fault of the compiler, not of "
        f"the program: report it, with what TREADLE_DUMP=<folder> writes. Until it is mended this may help: {helps}",
        origin.where if origin is not None else None)


@contextmanager
def explained(name: str, nodes: Sequence[Node]) -> Iterator[None]:
    """Makes a fault of whatever is raised inside but errors of ours, and out of memory.

    Raises:
        CompileError: naming the kernel, its ops and the user's line.
    """
    try:
        yield
    except (TreadleError, MemoryError):
        raise
    except Exception as error:  # TVM's errors have no base class of their own
        raise fault(f"the kernel {name}", Origin.of(nodes), error) from error
