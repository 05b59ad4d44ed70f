"""ONNX models in and out.

    m = td.onnx.load("model.onnx")        # a module: run it, compile it, train it
    y = td.compile(m)(x)

Only this folder imports the package `onnx`, and it is imported when `td.onnx` is first used.
"""

from . import backend
from .check import CheckReport, Problem, check
from .module import OnnxModule, load
