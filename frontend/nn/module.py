"""Modules: trees of parameters, buffers and other modules, with a `forward`.

The conventions are torch's, so that code and checkpoints carry over: assigning a `Parameter` or a
`Module` to an attribute registers it, names join with dots, `state_dict` holds parameters and
persistent buffers.

A parameter may be read *through* a function (`parametrize`): low-rank adaptation, weight normalisation or quantised
weights then need no layer of their own. The stored parameter keeps its name, the function's own stand beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ...ir.dtypes import DType, as_dtype
from ...ir.errors import ArgumentsError, CheckpointError
from .. import recording
from ..dispatch import as_tensor
from ..grad_mode import no_grad
from ..pending import Cast, waiting
from ..tensor import Tensor
from .parameter import Parameter


class Module:
    """Base class of layers and models. A subclass assigns its parts in `__init__` and defines `forward`."""

    def __init__(self) -> None:
        object.__setattr__(self, "_parameters", {})
        object.__setattr__(self, "_buffers", {})
        object.__setattr__(self, "_modules", {})
        object.__setattr__(self, "_transient", set())  # buffers that state_dict leaves out
        object.__setattr__(self, "_readers", {})  # parameter -> names of the modules that it is read through
        object.__setattr__(self, "_hooks", {"pre": [], "post": []})
        object.__setattr__(self, "_training", True)
        object.__setattr__(self, "_edits", 0)  # parts replaced: what was compiled with the old ones is stale

    @property
    def training(self) -> bool:
        """Whether layers behave as in training; change it with train() and eval().

        A trace that reads it is made anew when it changes.
        """
        recording.guard(lambda: self._training)
        return bool(self._training)

    def _edited(self) -> None:
        object.__setattr__(self, "_edits", self._edits + 1)
        recording.changed()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The computation; defined by the subclass."""
        raise ArgumentsError(f"{type(self).__name__} must define forward(self, ...)")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recording.guard(lambda: self._edits)
        args = tuple(as_tensor(a) if isinstance(a, np.ndarray) else a for a in args)
        for hook in self._hooks["pre"]:
            changed = hook(self, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
        result = self.forward(*args, **kwargs)
        for hook in self._hooks["post"]:
            changed = hook(self, args, result)
            result = result if changed is None else changed
        return result

    # -- registration

    def __setattr__(self, name: str, value: Any) -> None:
        if "_parameters" not in self.__dict__:
            raise ArgumentsError(f"call super().__init__() first in {type(self).__name__}.__init__")
        held_in_table = any(table.get(name) is not None for table in self._tables())
        for table in self._tables():
            table.pop(name, None)
        if isinstance(value, Parameter):
            self.register_parameter(name, value)
        elif isinstance(value, Module):
            self.add_module(name, value)
        elif held_in_table and isinstance(value, Tensor):
            self.register_buffer(name, value)
        else:
            object.__setattr__(self, name, value)

    def _tables(self) -> tuple[dict[str, Any], ...]:
        return self._parameters, self._buffers, self._modules

    def __getattr__(self, name: str) -> Any:
        for table in ("_parameters", "_buffers", "_modules"):
            held = self.__dict__.get(table, {})
            if name in held:
                return self.read(name) if name in self.__dict__.get("_readers", ()) else held[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __delattr__(self, name: str) -> None:
        for table in self._tables():
            if name in table:
                del table[name]
                for part in self._readers.pop(name, ()):
                    del self._modules[part]
                self._edited()
                return
        object.__delattr__(self, name)

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *self._parameters, *self._buffers, *self._modules]

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Adds a tensor that is part of the state but not trained (running statistics, masks...)."""
        if tensor is not None:
            tensor.role = "state"  # a compiled function updates it in place
        self.__dict__.pop(name, None)
        self._buffers[name] = tensor
        self._edited()
        (self._transient.discard if persistent else self._transient.add)(name)

    def register_parameter(self, name: str, parameter: Parameter | None) -> None:
        """Adds a parameter, or None for one that this layer does without (a bias)."""
        self.__dict__.pop(name, None)
        self._parameters[name] = parameter
        self._edited()

    def add_module(self, name: str, module: Module | None) -> None:
        """Adds a child under a name that need not be an identifier."""
        self.__dict__.pop(name, None)
        self._modules[name] = module
        self._edited()

    def read(self, name: str) -> Any:
        """The parameter (None if the layer does without) as `forward` sees it: through its parametrizations.

        What an attribute gives, for names that are no identifiers.
        """
        value: Any = self._parameters[name]
        for part in self._readers.get(name, ()):
            value = self._modules[part](value)
        return value

    def parametrize(self, name: str, kind: str, function: Module) -> None:
        """From now on the parameter `name` is read as `function(parameter)`, after what was added before.

        The parameters of `function` are those of this module under `name.kind`.

        Raises:
            ArgumentsError: there is no such parameter, or it has a parametrization of this kind.
        """
        part = f"{name}.{kind}"
        if self._parameters.get(name) is None:
            raise ArgumentsError(f"{type(self).__name__} has no parameter {name!r} to parametrize")
        if part in self._modules:
            raise ArgumentsError(f"the parameter {name!r} has a parametrization {kind!r} already; remove it first")
        self.add_module(part, function)
        self._readers.setdefault(name, []).append(part)

    def parametrized(self) -> Iterator[tuple[str, str, Module]]:
        """(parameter, kind, function) for each parametrization of this module's own parameters."""
        for name, parts in self._readers.items():
            for part in parts:
                yield name, part[len(name) + 1:], self._modules[part]

    def remove_parametrization(self, name: str, kind: str, merge: bool = True) -> None:
        """Ends `parametrize`; with `merge` the parameter takes over the value it was read as.

        Raises:
            ArgumentsError: there is no such parametrization, or another one was added on top of it.
        """
        parts = self._readers.get(name, [])
        if f"{name}.{kind}" not in parts or (merge and parts[0] != f"{name}.{kind}"):
            raise ArgumentsError(f"{name!r} is not read through {kind!r}"
                                 + (f" first but through {parts[0][len(name) + 1:]!r}" if parts else ""))
        if merge:
            with no_grad():
                self._parameters[name].assign(self._modules[parts[0]](self._parameters[name].detach()))
        parts.remove(f"{name}.{kind}")
        if not parts:
            del self._readers[name]
        del self._modules[f"{name}.{kind}"]
        self._edited()

    def register_forward_hook(self, hook: Callable[[Module, tuple[Any, ...], Any], Any]) -> Callable[[], None]:
        """Calls `hook(module, args, result)` after forward; a result it returns replaces the module's.

        Returns a function that removes the hook.
        """
        return self._add_hook("post", hook)

    def register_forward_pre_hook(self, hook: Callable[[Module, tuple[Any, ...]], Any]) -> Callable[[], None]:
        """Calls `hook(module, args)` before forward; arguments it returns replace the given ones."""
        return self._add_hook("pre", hook)

    def _add_hook(self, when: str, hook: Callable[..., Any]) -> Callable[[], None]:
        self._hooks[when].append(hook)
        return lambda: self._hooks[when].remove(hook)

    # -- walking the tree

    def named_modules(self, prefix: str = "", _seen: set[int] | None = None) -> Iterator[tuple[str, Module]]:
        """This module and all below it with their dotted names, each once."""
        seen = set() if _seen is None else _seen
        if id(self) in seen:
            return
        seen.add(id(self))
        yield prefix, self
        for name, child in self._modules.items():
            if child is not None:
                yield from child.named_modules(f"{prefix}.{name}" if prefix else name, seen)

    def modules(self) -> Iterator[Module]:
        """This module and all below it."""
        return (m for _, m in self.named_modules())

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """The modules directly below this one."""
        return ((n, m) for n, m in self._modules.items() if m is not None)

    def children(self) -> Iterator[Module]:
        """The modules directly below this one, without names."""
        return (m for _, m in self.named_children())

    def _named(self, table: str, prefix: str, unique: bool) -> Iterator[tuple[str, Any]]:
        seen: set[int] = set()
        for path, module in self.named_modules(prefix):
            for name, tensor in getattr(module, table).items():
                if tensor is None or (unique and id(tensor) in seen):
                    continue
                seen.add(id(tensor))
                yield (f"{path}.{name}" if path else name), tensor

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """Parameters with their dotted names; a shared one once, under its first name."""
        return self._named("_parameters", prefix, unique=True)

    def parameters(self) -> Iterator[Parameter]:
        """Parameters, each once."""
        return (p for _, p in self.named_parameters())

    def named_buffers(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Buffers with their dotted names."""
        return self._named("_buffers", prefix, unique=True)

    def buffers(self) -> Iterator[Tensor]:
        """Buffers, each once."""
        return (b for _, b in self.named_buffers())

    def parameter_aliases(self) -> Mapping[str, Sequence[str]]:
        """Further names that patterns may call this module's own parameters by (`td.finetune`)."""
        return {}

    def product_weights(self) -> Mapping[str, bool]:
        """Own parameters that inputs are multiplied by (matrix products, convolutions): name -> whether the inputs'
        axis comes first, as in `x @ w`, and not the outputs'."""
        return {}

    # -- modes and state

    def train(self, mode: bool = True) -> Module:
        """Switches the whole tree to training (or, with False, evaluation) behaviour; returns self."""
        for module in self.modules():
            object.__setattr__(module, "_training", mode)
        recording.changed()
        return self

    def eval(self) -> Module:
        """Switches the whole tree to evaluation behaviour; returns self."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Module:
        """Says whether the parameters of this tree are trained; returns self."""
        for parameter in self.parameters():
            parameter.requires_grad = requires_grad
        return self

    def zero_grad(self) -> None:
        """Forgets the gradients of all parameters."""
        for parameter in self.parameters():
            parameter.grad = None

    def apply(self, fn: Callable[[Module], None]) -> Module:
        """Calls `fn` on every module, children first; returns self."""
        for child in self.children():
            child.apply(fn)
        fn(self)
        return self

    def to(self, dtype: Any) -> Module:
        """Casts floating-point parameters and buffers in place; returns self."""
        wanted = as_dtype(dtype)
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dtype.is_float:
                    module._parameters[name] = _as(parameter, wanted)
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.dtype.is_float:
                    module._buffers[name] = Tensor(buffer.numpy(), wanted, role="state")
            module._edited()
        return self

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint holds: all parameters and persistent buffers, shared ones under each of their names."""
        transient = {f"{path}.{name}" if path else name
                     for path, m in self.named_modules() for name in m._transient}
        for kind in ("_parameters", "_buffers"):
            yield from ((n, t) for n, t in self._named(kind, "", unique=False) if n not in transient)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all parameters and persistent buffers by dotted name."""
        return {name: Tensor(t.numpy().copy()) for name, t in self.named_state()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Copies values (tensors or arrays) into parameters and buffers, in place.

        Args:
            state: by dotted name; values are cast to the dtype of the parameter.
            strict: complain about names that are missing on either side.

        Raises:
            CheckpointError: names or shapes do not fit; all of them are listed.
        """
        own = dict([*self._named("_parameters", "", unique=False), *self._named("_buffers", "", unique=False)])
        expected = self.state_dict().keys()
        problems = [f"{n}: checkpoint has shape {tuple(np.shape(state[n]))}, model {tuple(own[n].shape)}"
                    for n in own.keys() & state.keys() if tuple(np.shape(state[n])) != tuple(own[n].shape)]
        if strict:
            problems += [f"{n}: missing from the checkpoint" for n in expected - state.keys()]
            problems += [f"{n}: not in the model" for n in state.keys() - own.keys()]
        if problems:
            raise CheckpointError(f"the state does not fit {type(self).__name__}:\n  " + "\n  ".join(sorted(problems)))
        for name in own.keys() & state.keys():
            own[name].assign(Tensor(np.asarray(state[name]).astype(own[name].dtype.np)))

    # -- display

    def extra_repr(self) -> str:
        """What `repr` shows between the brackets."""
        return ""

    def __repr__(self) -> str:
        head = f"{type(self).__name__}({self.extra_repr()}"
        lines = [f"  ({n}): " + repr(m).replace("\n", "\n  ") for n, m in self._modules.items()]
        return head + ("\n" + "\n".join(lines) + "\n)" if lines else ")")


def _as(parameter: Parameter, dtype: DType) -> Parameter:
    """A parameter in another dtype; one that was not drawn yet still is not."""
    value = parameter._value
    if waiting(value):
        return Parameter.later(Cast(value.source, value.type.with_dtype(dtype)), parameter.requires_grad)
    return Parameter(parameter.numpy().astype(dtype.np), parameter.requires_grad)


class Sequential(Module):
    """Modules one after the other: `Sequential(a, b)` or `Sequential({"first": a, "second": b})`."""

    def __init__(self, *modules: Any):
        super().__init__()
        named = modules[0].items() if len(modules) == 1 and isinstance(modules[0], Mapping) else enumerate(modules)
        for name, module in named:
            self.add_module(str(name), module if isinstance(module, Module) else Lambda(module))

    def forward(self, x: Any) -> Any:
        for module in self.children():
            x = module(x)
        return x

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Module]:
        return self.children()

    def __getitem__(self, index: Any) -> Any:
        listed = list(self.children())
        return Sequential(*listed[index]) if isinstance(index, slice) else listed[index]


class ModuleList(Module):
    """A list of modules, registered under their positions."""

    def __init__(self, modules: Iterable[Module] = ()):
        super().__init__()
        for module in modules:
            self.append(module)

    def append(self, module: Module) -> ModuleList:
        """Adds a module at the end; returns self."""
        self.add_module(str(len(self._modules)), module)
        return self

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Module]:
        return self.children()

    def __getitem__(self, index: Any) -> Any:
        listed = list(self.children())
        return ModuleList(listed[index]) if isinstance(index, slice) else listed[index]


class Lambda(Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        if not callable(function):
            raise ArgumentsError(f"a layer must be a Module or a function, got {function!r}")
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))
