"""Records torch's answers for nn_cases.py into nn.npz: `python tests/oracle/record_nn.py`. Needs the extra `oracle`."""

import pathlib
import warnings

import numpy as np
import torch
from nn_cases import LAYERS, OPTIMIZERS, SCHEDULES, STEPS, gradient

torch.set_default_dtype(torch.float64)


def inputs(shapes, rng):
    """Normal numbers, or integers where a shape says so."""
    arrays = []
    for spec in shapes:
        if isinstance(spec[-1], str):
            arrays.append(rng.integers(0, int(spec[-1][1:]), spec[0]))
        else:
            arrays.append(rng.standard_normal(spec))
    return arrays


def tensors(result):
    """The tensors of a nested result, in order."""
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in tensors(part)]


def record_layer(name, expression, shapes, out):
    """State, inputs, outputs, and the gradients under a fixed cotangent (outputs weighted by cos of the position)."""
    rng = np.random.default_rng(len(expression))
    module = eval(expression, vars(torch.nn))
    for parameter in module.parameters():
        parameter.data = torch.from_numpy(0.5 * rng.standard_normal(tuple(parameter.shape)))
    state = {k: v.clone() for k, v in module.state_dict().items() if v.dim()}
    arrays = inputs(shapes, rng)
    args = [torch.from_numpy(a).requires_grad_(a.dtype == np.float64) for a in arrays]
    results = tensors(module(*args))
    loss = sum((y * torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape)).sum() for y in results)
    loss.backward()
    out.update({f"{name}/state/{k}": v.numpy() for k, v in state.items()})
    out.update({f"{name}/input/{i}": a for i, a in enumerate(arrays)})
    out.update({f"{name}/output/{i}": y.detach().numpy() for i, y in enumerate(results)})
    out.update({f"{name}/input_grad/{i}": a.grad.numpy() for i, a in enumerate(args) if a.requires_grad})
    out.update({f"{name}/grad/{k}": p.grad.numpy() for k, p in module.named_parameters()})
    out.update({f"{name}/after/{k}": v.numpy() for k, v in module.state_dict().items() if "running" in k})


def record_optimizer(name, expression, out):
    """Two parameters after 1, 10 and 100 steps."""
    rng = np.random.default_rng(7)
    params = [torch.from_numpy(rng.standard_normal(s)).requires_grad_() for s in ((3, 4), (5,))]
    out.update({f"{name}/start/{i}": p.detach().numpy().copy() for i, p in enumerate(params)})
    optimizer = eval(expression, {**vars(torch.optim), "params": params})
    for step in range(100):
        for p in params:
            p.grad = gradient(p.detach(), step)
        optimizer.step()
        if step + 1 in (1, 10, 100):
            out.update({f"{name}/{step + 1}/{i}": p.detach().numpy().copy() for i, p in enumerate(params)})


def record_schedule(name, expression, out):
    """The learning rate of each of STEPS steps."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = eval(expression, {**vars(torch.optim.lr_scheduler), "o": optimizer})
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    out[f"schedule/{name}"] = np.array(rates)


def main():
    warnings.simplefilter("ignore")
    out = {"torch": np.array(torch.__version__)}
    for name, expression, _, shapes in LAYERS:
        record_layer(name, expression, shapes, out)
    for name, expression, _ in OPTIMIZERS:
        record_optimizer(name, expression, out)
    for name, expression, _ in SCHEDULES:
        record_schedule(name, expression, out)
    np.savez_compressed(pathlib.Path(__file__).with_name("nn.npz"), **out)


if __name__ == "__main__":
    main()
