"""Treadle: a deep-learning compiler stack in Python on Apache TVM.

A model is traced into Treadle's IR, differentiated and rewritten there, and lowered to kernels that Treadle
schedules itself. This file holds the public names and nothing else.

Functions of tensors are in one flat namespace under NumPy's (the array API standard's) names, `td.sum`, `td.where`,
because a second one, `td.numpy`, would hold the same names once more.
"""

import typing as _typing

from . import ir
from .frontend import methods as _methods
from .frontend import modules as _modules
from .frontend import nn, optim, plugins, random
from .frontend import parallel as _parallel
from .frontend.checkpoint import load_checkpoint, save_checkpoint
from .frontend.compile import Compiled, compile, load
from .frontend.control import cond, scan, while_loop
from .frontend.functions import *  # noqa: F403
from .frontend.grad_mode import enable_grad, is_grad_enabled, no_grad, set_grad_enabled
from .frontend.nn import Parameter
from .frontend.tensor import Tensor
from .frontend.trace import Spec, spec, trace
from .frontend.train import TrainStep, train_step
from .frontend.transforms import checkpoint, grad, jvp, value_and_grad, vjp
from .ir.dims import Dim
from .ir.dtypes import (
    DType,
    bfloat16,
    bool_,
    float8_e4m3fn,
    float8_e5m2,
    float16,
    float32,
    float64,
    int4,
    int8,
    int16,
    int32,
    int64,
    uint4,
    uint8,
    uint16,
    uint32,
    uint64,
)
from .ir.errors import (
    ArgumentsError,
    ArtifactError,
    AttributeValueError,
    CheckpointError,
    CompileError,
    ConfigError,
    DTypeError,
    GradientError,
    MissingRuleError,
    OnnxError,
    ParseError,
    RegistryError,
    ShapeError,
    TargetError,
    TraceError,
    TreadleError,
    VerifyError,
)
from .schedules.runtime import get_num_threads, set_num_threads

__version__ = "0.1.0"

_modules.offer(__name__, ("finetune", "nn", "onnx", "optim", "plugins", "random"))
if _typing.TYPE_CHECKING:
    from .frontend import parallel as distributed
else:  # `treadle.distributed` is a layer below the frontend, so what it offers to users is put into it from here
    from . import distributed

    vars(distributed).update({name: getattr(_parallel, name) for name in (*_parallel.__all__, "__doc__")})


def __getattr__(name: str) -> _typing.Any:
    """`td.onnx` and `td.finetune` are imported when they are first used: most programs do without."""
    if name == "onnx":
        from .frontend import onnx

        return onnx
    if name == "finetune":
        from .frontend import finetune

        return finetune
    raise AttributeError(f"module 'treadle' has no attribute {name!r}")
