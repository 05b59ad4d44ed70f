"""Low-rank adaptation (Hu et al. 2022): W + scale * B A is trained in place of W, with A and B thin.

An adapter is a parametrization of the weight (`Module.parametrize`), so it works alike for layers of `td.nn` and for
the matrices of an imported graph, is traced, compiled and exported like anything else, and merging it is writing one
array. A is drawn at random and B starts at zero, so a fresh adapter changes nothing.

What the products cost: the sum W + scale * B A is formed once for each step, which is little beside multiplying a batch
by W. With the base frozen and pruned (`train_step(prune_frozen=True)`) neither W's update nor its moments exist.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ...ir.errors import ArgumentsError, AttributeValueError, CheckpointError
from ..nn import Module, Parameter, init
from ..safetensors import read_safetensors, write_safetensors
from ..tensor import Tensor
from .names import Patterns, parameters, select

KIND = "lora"
FORMAT = "treadle-lora/1"


class LowRank(Module):
    """What a weight is read through: (rows, columns...) -> the same, plus `scale * b @ a`.

    Args:
        shape: of the weight; axes after the first count as one.
        rank: columns of `b`, (rows, rank), and rows of `a`, (rank, columns).
        alpha: `scale` is alpha / rank.
        inputs_first: the weight is (inputs, outputs), as in `x @ w`: then `b`, on the side of the outputs, and `a`
            swap places in the product.
        dtype: of `a` and `b`.
    """

    def __init__(self, shape: Sequence[int], rank: int, alpha: float, inputs_first: bool, dtype: Any = "float32"):
        super().__init__()
        rows, columns = int(shape[0]), int(np.prod(shape[1:]))
        self.shape, self.rank, self.alpha, self.inputs_first = tuple(shape), rank, alpha, inputs_first
        self.scale = alpha / rank
        fan_in = rows if inputs_first else columns
        a = init.uniform(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        a_shape, b_shape = ((rows, rank), (rank, columns)) if inputs_first else ((rank, columns), (rows, rank))
        self.a = Parameter(a(a_shape, dtype))
        self.b = Parameter(init.constant(0.0)(b_shape, dtype))

    def forward(self, weight: Tensor) -> Tensor:
        left, right = (self.a, self.b) if self.inputs_first else (self.b, self.a)
        return weight + ((left * self.scale) @ right).reshape(self.shape)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}"


def adaptable(model: Module) -> dict[str, tuple[Module, str, bool]]:
    """The weights that can have an adapter: dotted name -> (module, name in it, whether inputs come first)."""
    found = {}
    for path, module in model.named_modules():
        for name, inputs_first in module.product_weights().items():
            weight = module._parameters.get(name)
            if weight is not None and weight.ndim >= 2 and weight.dtype.is_float:
                found[f"{path}.{name}" if path else name] = (module, name, bool(inputs_first))
    return found


def add_lora(model: Module, patterns: Patterns = "*", rank: int = 8, alpha: float | None = None) -> list[str]:
    """Puts adapters on chosen weights and freezes these weights.

    Args:
        model: is changed in place.
        patterns: which weights, by name or by the path of the node that multiplies by it (see `select`); only
            weights of linear layers and matrix products are chosen from.
        rank: of the adapters.
        alpha: numerator of the scale alpha / rank; default: twice the rank.

    Returns:
        The names of the adapted weights. The adapters' parameters are `NAME.lora.a` and `NAME.lora.b`.

    Raises:
        ArgumentsError: nothing to adapt, or a pattern that fits none.
        AttributeValueError: a rank below 1 or above the smaller side of a weight.
    """
    known = adaptable(model)
    if not known:
        raise ArgumentsError("the model has no weights of matrix products, so there is nothing to put LoRA on")
    alpha = 2.0 * rank if alpha is None else float(alpha)
    if rank < 1 or not alpha > 0:
        raise AttributeValueError(f"LoRA needs rank >= 1 and alpha > 0, got {rank} and {alpha:g}")
    chosen = select(model, patterns, known)
    for name in chosen:
        module, own, _ = known[name]
        shape = module._parameters[own].shape
        if rank > min(shape[0], int(np.prod(shape[1:]))):
            raise AttributeValueError(f"LoRA: rank {rank} is above the smaller side of {name}, {tuple(shape)}")
    for name in chosen:
        module, own, inputs_first = known[name]
        weight: Any = module._parameters[own]
        dtype = weight.dtype if weight.dtype.bits >= 32 else "float32"
        module.parametrize(own, KIND, LowRank(weight.shape, rank, alpha, inputs_first, dtype))
        weight.requires_grad = False
    return chosen


def adapters(model: Module) -> Iterator[tuple[str, Module, str, LowRank]]:
    """(dotted name of the weight, its module, its name there, adapter) for each adapter of a model."""
    for path, module in model.named_modules():
        for name, kind, function in list(module.parametrized()):
            if kind == KIND and isinstance(function, LowRank):
                yield (f"{path}.{name}" if path else name), module, name, function


def merge_lora(model: Module) -> list[str]:
    """Writes the adapted values into the weights and takes the adapters off; gives the names of these weights.

    They stay frozen; `unfreeze` changes that.
    """
    found = list(adapters(model))
    for _, module, name, _ in found:
        module.remove_parametrization(name, KIND, merge=True)
    return [name for name, *_ in found]


def remove_lora(model: Module) -> list[str]:
    """Takes the adapters off and leaves the weights as they were; gives the names of these weights."""
    found = list(adapters(model))
    for _, module, name, _ in found:
        module.remove_parametrization(name, KIND, merge=False)
    return [name for name, *_ in found]


def save_lora(model: Module, path: Any, also: Patterns = ()) -> None:
    """Writes the adapters alone to a safetensors file: usually a hundredth of the model.

    Args:
        model: with adapters.
        path: of the file.
        also: patterns of further parameters to keep with them, such as a head's.

    Raises:
        ArgumentsError: the model has no adapters.
        CheckpointError: the file cannot be written.
    """
    found = list(adapters(model))
    if not found:
        raise ArgumentsError("the model has no LoRA adapters to save")
    arrays: dict[str, np.ndarray] = {}
    for name, _, _, adapter in found:
        arrays |= {f"{name}.{KIND}.a": adapter.a.numpy(), f"{name}.{KIND}.b": adapter.b.numpy()}
    if also:
        known = parameters(model)
        arrays |= {name: known[name].numpy() for name in select(model, also)}
    ranks = {name: [adapter.rank, adapter.alpha] for name, _, _, adapter in found}
    write_safetensors(path, arrays, {"format": FORMAT, "adapters": json.dumps(ranks)})


def load_lora(model: Module, path: Any) -> list[str]:
    """Puts the adapters of a file by `save_lora` on a model (and further parameters kept with them into it).

    An adapter that the model has already is replaced.

    Returns:
        The names of the adapted weights.

    Raises:
        CheckpointError: the file is damaged, none of LoRA adapters, or does not fit the model.
    """
    arrays, notes = read_safetensors(path)
    if notes.get("format") != FORMAT:
        raise CheckpointError(f"{path} holds no LoRA adapters of Treadle (its format is {notes.get('format')!r})")
    ranks, known = json.loads(notes["adapters"]), adaptable(model)
    if missing := sorted(ranks.keys() - known.keys()):
        raise CheckpointError(f"{path}: the model has no weights {', '.join(missing[:5])} to adapt")
    state = dict(arrays)
    fresh: dict[str, LowRank] = {}
    for name, (rank, alpha) in ranks.items():
        module, own, inputs_first = known[name]
        weight: Any = module._parameters[own]
        fresh[name] = LowRank(weight.shape, int(rank), float(alpha), inputs_first)
        pair = {key: state.pop(f"{name}.{KIND}.{key}", np.zeros(0)) for key in ("a", "b")}
        if any(pair[k].shape != tuple(getattr(fresh[name], k).shape) for k in pair):
            raise CheckpointError(f"{path}: the adapter of {name} does not fit a weight of shape {weight.shape}")
        fresh[name].load_state_dict(pair)
    rest = parameters(model)
    for name, array in state.items():
        if name not in rest or tuple(rest[name].shape) != array.shape:
            raise CheckpointError(f"{path}: {name} with shape {array.shape} does not fit the model")
    for name, adapter in fresh.items():
        module, own, _ = known[name]
        if any(n == own and kind == KIND for n, kind, _ in module.parametrized()):
            module.remove_parametrization(own, KIND, merge=False)
        module.parametrize(own, KIND, adapter)
        module._parameters[own].requires_grad = False
    for name, array in state.items():
        rest[name].assign(Tensor(array))
    return list(fresh)
