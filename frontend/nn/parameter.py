"""Tensors that are trained."""

from __future__ import annotations

from typing import Any

from ..pending import Source
from ..tensor import Tensor


class Parameter(Tensor):
    """A tensor with the role "parameter": a module registers it, an optimizer updates it in place.

    Args:
        data: what `Tensor` takes; it is copied.
        requires_grad: False freezes it.
        name: shown in messages and in the text of graphs.
    """

    __slots__ = ()

    def __init__(self, data: Any, requires_grad: bool = True, name: str = ""):
        super().__init__(data, requires_grad=requires_grad, role="parameter", name=name)

    @classmethod
    def later(cls, source: Source, requires_grad: bool = True, name: str = "") -> Parameter:
        """A parameter whose elements are made when they are first asked for."""
        made: Parameter = cls._later(source, requires_grad=requires_grad, role="parameter", name=name)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Parameter:
        fresh = Parameter(self.numpy(), self.requires_grad, self.name)
        memo[id(self)] = fresh
        return fresh

    def __reduce__(self) -> Any:
        return (Parameter, (self.numpy(), self.requires_grad, self.name))
