"""The interface of the `onnx` package for who runs models: `prepare`, `run_model`, `run_node`.

    import treadle as td
    rep = td.onnx.backend.prepare(model)      # a ModelProto
    outputs = rep.run([x, y])                 # a list of arrays

Everything runs compiled. The conformance suite of the `onnx` package drives this interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx.backend.base import Backend, BackendRep, Device, DeviceType

from ...ir.errors import OnnxError, TreadleError
from ..compile import compile
from ..tensor import Tensor
from .module import OnnxModule, load


class TreadleRep(BackendRep):
    """A model that is ready to run.

    Attributes:
        module: the model.
        compiled: what `run` calls.
    """

    def __init__(self, module: OnnxModule, target: str):
        super().__init__()
        self.module = module
        self.compiled = compile(module, target=target)

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The outputs, as arrays (lists of arrays for sequences, None for empty optionals).

        Args:
            inputs: arrays in the order of the model's inputs, one array, or a dict by name.

        Raises:
            TreadleError: the inputs do not fit, or a node cannot be run.
        """
        if isinstance(inputs, dict):
            results = self.compiled(**inputs)
        else:
            given = inputs if isinstance(inputs, (list, tuple)) else [inputs]
            results = self.compiled(*given)
        outputs = results if len(self.module.output_names) > 1 else (results,)
        return tuple(to_array(x) for x in outputs)


def to_array(value: Any) -> Any:
    """A result of a compiled model as the `onnx` package has it: arrays, lists of arrays, None."""
    if isinstance(value, Tensor):
        return value.numpy()
    if isinstance(value, list):
        return [to_array(v) for v in value]
    return value


class TreadleBackend(Backend):
    """`onnx.backend.base.Backend` over compiled programs."""

    @classmethod
    def is_compatible(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> bool:
        """Whether every node of the model has a rule or a body."""
        from .check import problems_of

        try:
            return not problems_of(load(model))
        except TreadleError:
            return False

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> TreadleRep:
        """A model that is ready to run; `target` as in `td.compile`.

        Raises:
            OnnxError: the model is not valid, or the device is not one of ours.
        """
        if not cls.supports_device(device):
            raise OnnxError(f"the device {device!r} is not supported; CPU is")
        return TreadleRep(load(model), kwargs.get("target", "cpu"))

    @classmethod
    def run_model(cls, model: onnx.ModelProto, inputs: Any, device: str = "CPU", **kwargs: Any) -> tuple[Any, ...]:
        """Prepares and runs."""
        return cls.prepare(model, device, **kwargs).run(inputs)

    @classmethod
    def run_node(cls, node: onnx.NodeProto, inputs: Any, device: str = "CPU",
                 outputs_info: Sequence[tuple[Any, tuple[int, ...]]] | None = None, **kwargs: Any,
                 ) -> tuple[Any, ...]:
        """Runs one node on arrays; `opset` is a keyword, the newest by default."""
        arrays = [np.asarray(x) for x in (inputs if isinstance(inputs, (list, tuple)) else [inputs])]
        values = [onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
                  for name, x in zip([n for n in node.input if n], arrays)]
        results = [onnx.ValueInfoProto(name=name) for name in node.output if name]
        graph = onnx.helper.make_graph([node], "node", values, results)
        opset = onnx.helper.make_opsetid(node.domain, kwargs.pop("opset", onnx.defs.onnx_opset_version()))
        return cls.run_model(onnx.helper.make_model(graph, opset_imports=[opset]), arrays, device, **kwargs)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """CPU only, so far."""
        return bool(Device(device).type == DeviceType.CPU)


prepare = TreadleBackend.prepare
run_model = TreadleBackend.run_model
run_node = TreadleBackend.run_node
supports_device = TreadleBackend.supports_device
is_compatible = TreadleBackend.is_compatible
