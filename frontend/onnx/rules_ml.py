"""ai.onnx.ml: scaling, thresholds, and ensembles of decision trees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...ir.dtypes import float32
from .. import functions as F
from ..dispatch import apply, as_tensor, cast, constant
from ..tensor import Tensor
from .node import OnnxNode
from .rules import onnx_rule
from .rules_index import wrapped
from .values import is_known, is_text, tensor

ML = "ai.onnx.ml"

# Features --------------------------------------------------------------------------------------------------------


@onnx_rule("Binarizer", domain=ML)
def binarizer(node: OnnxNode, x: Any) -> Tensor:
    x = tensor(x)
    return cast(x > node.attr("threshold", 0.0), x.dtype)


@onnx_rule("ArrayFeatureExtractor", domain=ML)
def array_feature_extractor(node: OnnxNode, x: Any, index: Any) -> Any:
    """Elements of the last axis."""
    if is_known(x) and is_text(x):
        return x[..., np.asarray(index).reshape(-1)]
    x = tensor(x)
    y = F.take(x, wrapped(F.ravel(tensor(index)), x.shape[-1]), axis=x.ndim - 1)
    return F.reshape(y, (1, y.shape[0])) if x.ndim == 1 else y


@onnx_rule("Scaler", domain=ML)
def scaler(node: OnnxNode, x: Any) -> Tensor:
    """(x - offset) * scale of each feature."""
    x = cast(tensor(x), float32)
    offset, scale = (np.asarray(node.attr(name, None) or [default], np.float32) for name, default in
                     (("offset", 0.0), ("scale", 1.0)))
    return (x - as_tensor(offset)) * as_tensor(scale)


# Trees -----------------------------------------------------------------------------------------------------------

LEQ, LT, GTE, GT, EQ, NEQ, MEMBER = range(7)
COMPARISONS = {LEQ: F.less_equal, LT: F.less, GTE: F.greater_equal, GT: F.greater, EQ: F.equal, NEQ: F.not_equal}
AVERAGE, SUM, MIN, MAX = range(4)


@dataclass(frozen=True)
class Forest:
    """Trees as tables: nodes come first, then the leaves, which lead to themselves.

    Attributes:
        feature, split, mode, missing: of each place; missing: whether a NaN goes the true way.
        then, otherwise: the next places.
        sets: (places, largest set), NaN where there is nothing: what a `MEMBER` node looks for.
        roots, nodes: first places, and how many places are no leaves.
    """

    feature: np.ndarray
    split: np.ndarray
    mode: np.ndarray
    missing: np.ndarray
    then: np.ndarray
    otherwise: np.ndarray
    sets: np.ndarray
    roots: np.ndarray
    nodes: int

    @property
    def depth(self) -> int:
        """Steps after which every path has come to a leaf."""
        depth, places = 0, np.unique(self.roots)
        while (places < self.nodes).any() and depth <= self.nodes:
            places = np.unique(np.concatenate([self.then[places], self.otherwise[places]]))
            depth += 1
        return depth


def forest_of(node: OnnxNode, leaves: int) -> Forest:
    """The tables of a node's attributes."""
    feature = np.asarray(node.require("nodes_featureids"), np.int64)
    count = len(feature)

    def places(way: str) -> np.ndarray:
        ids, ends = (np.asarray(node.require(f"nodes_{way}{kind}"), np.int64) for kind in ("nodeids", "leafs"))
        return np.concatenate([ids + count * ends, np.arange(count, count + leaves)])

    def padded(values: Any) -> np.ndarray:
        return np.concatenate([np.asarray(values), np.zeros(leaves, np.asarray(values).dtype)])

    mode = padded(np.asarray(node.require("nodes_modes")).astype(np.int64))
    missing = node.attr("nodes_missing_value_tracks_true", None) or np.zeros(count, np.int64)
    return Forest(padded(feature), padded(node.require("nodes_splits")), mode, padded(missing).astype(bool),
                  places("true"), places("false"), _sets(node, mode), np.asarray(node.require("tree_roots"), np.int64),
                  count)


def _sets(node: OnnxNode, mode: np.ndarray) -> np.ndarray:
    """The values of the sets, one after the other and divided by NaN in the file, for the nodes that have one."""
    values = node.attr("membership_values", None)
    if values is None:
        return np.zeros((len(mode), 0), np.float32)
    values = np.asarray(values)
    ends = np.flatnonzero(np.isnan(values))
    groups = [g[~np.isnan(g)] for g in np.split(values, ends + 1)]
    table = np.full((len(mode), max(map(len, groups))), np.nan, values.dtype)
    for place, group in zip(np.flatnonzero(mode == MEMBER), groups):
        table[place, :len(group)] = group
    return table


def leaves_of(forest: Forest, x: Tensor) -> Tensor:
    """The leaf (rows, trees) that each row of x (rows, features) comes to in each tree: all go down in step."""
    def looked_up(table: np.ndarray, at: Tensor) -> Tensor:
        found: Tensor = apply("take", as_tensor(table), at, axis=0)
        return found

    at = F.broadcast_to(as_tensor(forest.roots), (x.shape[0], len(forest.roots)))
    kinds = sorted(set(forest.mode[:forest.nodes].tolist()))
    for _ in range(forest.depth):
        value = F.take_along_axis(x, looked_up(forest.feature, at), axis=1)
        split, mode = looked_up(forest.split.astype(x.dtype.np), at), looked_up(forest.mode, at)
        go = F.logical_and(F.isnan(value), looked_up(forest.missing, at))
        for kind in kinds:
            if kind == MEMBER:
                member = F.expand_dims(value, 2) == looked_up(forest.sets.astype(x.dtype.np), at)
                holds = F.any(member, axis=2)
            else:
                holds = COMPARISONS[kind](value, split)
            go = F.logical_or(go, F.logical_and(mode == kind, holds))
        at = F.where(go, looked_up(forest.then, at), looked_up(forest.otherwise, at))
    return at - forest.nodes


@onnx_rule("TreeEnsemble", since=5, domain=ML)
def tree_ensemble(node: OnnxNode, x: Any) -> Tensor:
    """(rows, targets): the weights of the leaves that a row comes to, put together for each target."""
    x = tensor(x)
    weights, target = np.asarray(node.require("leaf_weights")), np.asarray(node.require("leaf_targetids"), np.int64)
    forest = forest_of(node, len(target))
    leaf = leaves_of(forest, x)
    mine = F.expand_dims(apply("take", as_tensor(target), leaf, axis=0), 2) == F.arange(int(node.attr("n_targets", 1)))
    weight = F.expand_dims(apply("take", as_tensor(weights.astype(x.dtype.np)), leaf, axis=0), 2)
    how = int(node.attr("aggregate_function", SUM))
    if how in (MIN, MAX):
        edge = constant(np.inf if how == MIN else -np.inf, x.dtype)
        y = (F.min if how == MIN else F.max)(F.where(mine, weight, edge), 1)
        y = F.where(F.isinf(y), constant(0, x.dtype), y)
    else:
        y = F.sum(F.where(mine, weight, constant(0, x.dtype)), 1)
        y = y / len(forest.roots) if how == AVERAGE else y
    after = int(node.attr("post_transform", 0))
    if after not in (0, 1, 2):
        raise node.fail("of the transforms after it, only none (0), softmax (1) and logistic (2) are supported")
    return F.softmax(y, axis=1) if after == 1 else F.sigmoid(y) if after == 2 else y
