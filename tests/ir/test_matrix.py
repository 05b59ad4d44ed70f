"""The op x slot matrix: a hole fails."""

import functools
import importlib
import pkgutil
import warnings

import pytest

from treadle import autodiff, schedules
from treadle.ir import decompose_rules as _decompositions  # noqa: F401
from treadle.ir.opdef import SLOTS, all_ops


@functools.cache
def matrix():
    """op -> slot -> how it is filled: a mark, a reason in words, or "" for nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tvm deprecates its own names while it is imported
        for package in (autodiff, schedules):  # importing the modules of rules fills the slots
            for module in pkgutil.iter_modules(package.__path__):
                if module.name.startswith(("vjp_", "lower", "shard_", "amp")):
                    importlib.import_module(f"{package.__name__}.{module.name}")
    table = {}
    for name, record in sorted(all_ops().items()):
        table[name] = {slot: "x" if slot in record.slots else "" for slot in SLOTS}
        table[name]["vjp"] = table[name]["vjp"] or record.undifferentiable or ""
        table[name]["lower"] = table[name]["lower"] or record.unlowered or ""
    return table


def test_every_op_has_a_gradient_or_says_why_not():
    holes = [name for name, row in matrix().items() if not row["vjp"]]
    assert not holes, f"neither `vjp` nor `undifferentiable`: {holes}"


def test_every_op_can_be_lowered_or_says_why_not():
    holes = [name for name, row in matrix().items() if not row["lower"] and not row["decompose"]]
    assert not holes, f"none of `lower`, `unlowered`, `decompose`: {holes}"


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "layer_norm", "rms_norm", "group_norm", "batch_norm",
                                  "attention", "cross_entropy"])
def test_big_ops_decompose(name):
    assert matrix()[name]["decompose"] == "x"
