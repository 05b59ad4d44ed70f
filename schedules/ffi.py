"""Import `tvm_ffi` and `tvm` without torch.

Both import torch wherever it is installed: tvm_ffi against a symbol clash that was seen on Windows with torch 2.9.0,
tvm for a class of its own that is not used here. That costs a second and 150 MB in every process. So on Linux they are
shown no torch while they are imported, unless the program has imported it already. Importing torch later works as ever
(tvm_ffi then takes its tensors by DLPack's plain protocol).
"""

from __future__ import annotations

import importlib
import sys


def import_ffi() -> None:
    """Import tvm_ffi, and not torch with it. Called before anything here imports TVM."""
    _import("tvm_ffi")


def import_tvm() -> None:
    """Import tvm, and not torch with it."""
    import_ffi()
    _import("tvm")


def _import(name: str) -> None:
    if name in sys.modules or "torch" in sys.modules or not sys.platform.startswith("linux"):
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` an ImportError
    try:
        importlib.import_module(name)
    finally:
        del sys.modules["torch"]
