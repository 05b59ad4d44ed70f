"""ONNX models in and out.

    m = td.onnx.load("model.onnx")        # a module: run it, compile it, train it
    y = td.compile(m)(x)
    td.onnx.save(m, "out.onnx")           # also any other module, function or graph: see `save`

Only this folder imports the package `onnx`, and it is imported when `td.onnx` is first used.
"""

from . import backend
from .check import CheckReport, Problem, check
from .export import save, to_model
from .module import OnnxModule, load
