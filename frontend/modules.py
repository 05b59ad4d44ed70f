"""Public modules under their public names: `import treadle.nn.functional`, `from treadle.onnx import load`.

`td.nn` lies in `frontend/nn`, since the layers are the folders. So that it can be imported by the name that users know,
a finder answers for `treadle.nn` and what is below it with the module of `treadle.frontend.nn`: the same object, as
`os.path` is `posixpath`, so nothing is loaded twice and classes are identical whichever way they were imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import ModuleType


class _Aliases(MetaPathFinder, Loader):
    """Finds each module of `names` (public name -> where it lies), and those inside of it."""

    def __init__(self, names: dict[str, str]):
        self.names = names

    def place(self, name: str) -> str | None:
        """Where the module with a public name lies; None if it is none of ours."""
        parts = name.split(".")
        real = self.names.get(".".join(parts[:2]))
        return real and ".".join([real, *parts[2:]])

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        real = self.place(name)
        return spec_from_loader(name, self) if real is not None and find_spec(real) is not None else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        real = self.place(spec.name)
        assert real is not None
        module = import_module(real)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run; the import system has put the alias's spec into it, where its own belongs."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def offer(package: str, names: Sequence[str]) -> None:
    """Makes `frontend.<name>` importable as `<package>.<name>`, for each name."""
    here = __name__.rpartition(".")[0]
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Aliases)]
    sys.meta_path.insert(0, _Aliases({f"{package}.{name}": f"{here}.{name}" for name in names}))
