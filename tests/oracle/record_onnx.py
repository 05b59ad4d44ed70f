"""Records torch's gradients of imported models into onnx.npz: `python tests/oracle/record_onnx.py`.

Needs the extra `oracle`. onnx2torch translates the files; what it lacks is added here with torch's own layers.
"""

import pathlib
import sys
import types

import numpy as np
import onnx
import torch
from onnx_cases import MODELS, cotangent, moved, projections, read

import treadle as td

# onnx2torch asks torchvision for two ops of detection models, of which there are none here.
vision = types.ModuleType("torchvision")
vision.ops = types.ModuleType("torchvision.ops")
vision.ops.roi_align = vision.ops.nms = None
sys.modules.update({"torchvision": vision, "torchvision.ops": vision.ops})

import onnx2torch  # noqa: E402
from onnx2torch.node_converters.registry import add_converter  # noqa: E402
from onnx2torch.utils.common import OperationConverterResult, onnx_mapping_from_node  # noqa: E402


class Lstm(torch.nn.Module):
    """ONNX's LSTM of one direction by torch's: gates i, o, f, c there, i, f, g, o here."""

    def __init__(self, w, r, b):
        super().__init__()
        self.w, self.r, self.b = (torch.nn.Parameter(torch.from_numpy(x)) for x in (w, r, b))

    def forward(self, x, h, c):
        size = self.r.shape[2]
        turn = [0, 2, 3, 1]
        rows = torch.cat([torch.arange(size) + size * k for k in turn])
        bias = self.b[0].reshape(2, -1)[:, rows]
        y, hn, cn = torch._VF.lstm(x, (h, c), [self.w[0][rows], self.r[0][rows], bias[0], bias[1]], True, 1, 0.0,
                                   False, False, False)
        return y.unsqueeze(1), hn, cn


@add_converter(operation_type="LSTM", version=14)
def _(node, graph):
    assert node.attributes.get("direction", "forward") == "forward" and len(node.input_values) in (6, 7)
    arrays = [graph.initializers[n].to_torch().numpy() for n in node.input_values[1:4]]
    mapping = onnx_mapping_from_node(node)
    mapping = type(mapping)(inputs=(node.input_values[0], *node.input_values[5:7]), outputs=mapping.outputs)
    return OperationConverterResult(torch_module=Lstm(*arrays), onnx_mapping=mapping)


def _padding(pads, mode):
    """torch reflects rows of a matrix too: only the padding of leading axes must be none."""
    pads = list(pads)
    while mode != "constant" and len(pads) > 2 and pads[-2:] == [0, 0]:
        pads = pads[:-2]
    return pads


onnx2torch.node_converters.pad._torch_padding_to_mode_format = _padding


def translated(model, inputs):
    """The model as a torch module in f64; the converter wants to know ranks, so shapes are inferred from the inputs."""
    for node in model.graph.node:
        while node.input and not node.input[-1]:
            del node.input[-1]
    for value, array in zip(model.graph.input, inputs):
        for dim, size in zip(value.type.tensor_type.shape.dim, array.shape):
            dim.dim_value = size
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in inferred.graph.value_info}
    for node in inferred.graph.node:
        if node.op_type == "BatchNormalization" and not ranks.get(node.input[0]):  # behind a computed shape: an image
            for known in [v for v in inferred.graph.value_info if v.name == node.input[0]]:
                inferred.graph.value_info.remove(known)
            inferred.graph.value_info.append(onnx.helper.make_tensor_value_info(node.input[0], 1, "NCHW"))
    return onnx2torch.convert(inferred).eval().double()


def record(key, out):
    """The loss, and for every parameter of our import the projections of its gradient."""
    model = read(key)
    names = [n for n, _ in td.onnx.load(model).named_parameters()]
    stored = {t.name: t for t in model.graph.initializer}
    weights = {}
    for name in names:
        array = moved(name, onnx.numpy_helper.to_array(stored[name]))
        weights[name] = array
        stored[name].CopyFrom(onnx.numpy_helper.from_array(array, name))
    torch_model = translated(model, MODELS[key][2]().values())
    inputs = [torch.from_numpy(a.astype(np.float64) if a.dtype == np.float32 else a)
              for a in MODELS[key][2]().values()]
    tensors = {}
    for kind in (torch_model.named_parameters(), torch_model.named_buffers()):
        for place, tensor in kind:
            if tensor.is_floating_point() and "running_" not in place:
                tensors[place] = tensor.requires_grad_()
    outputs = torch_model(*inputs)
    # Of a node with several results, only those after the first are outputs here.
    listed = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    outputs = [y for result in listed for y in (result[1:] if isinstance(result, tuple) else [result])]
    loss = sum((y * torch.from_numpy(cotangent(y.shape))).sum() for y in outputs if y.is_floating_point())
    loss.backward()
    out[f"{key}/loss"] = np.array(loss.item())
    for name, array in weights.items():
        found = [g for t in tensors.values() if (g := _fitting(t, array)) is not None]
        assert found, f"{key}: torch has no tensor with the values of {name}"
        out[f"{key}/{name}"] = projections(name, sum(found))
    print(f"{key}: {len(weights)} parameters, loss {loss.item():.6f}")


def _fitting(tensor, array):
    """The gradient of a tensor that holds the array, perhaps transposed, in the array's layout."""
    for turned in (False, True):
        values = tensor.detach().numpy()
        values = values.T if turned and values.ndim == 2 else values
        if values.size == array.size and np.array_equal(values.reshape(-1), array.reshape(-1).astype(np.float64)):
            if tensor.grad is None:
                return np.zeros(array.shape)
            gradient = tensor.grad.numpy()
            return (gradient.T if turned and values.ndim == 2 else gradient).reshape(array.shape)
    return None


if __name__ == "__main__":
    torch.set_num_threads(2)
    answers = {}
    for key in sys.argv[1:] or MODELS:
        record(key, answers)
    if not sys.argv[1:]:
        np.savez_compressed(pathlib.Path(__file__).parent / "onnx.npz", **answers)
