"""Strings. No kernel computes with them: they are known while tracing, and part of a compiled program."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .node import OnnxNode
from .rules import onnx_rule
from .values import is_text


def texts(node: OnnxNode, value: Any) -> np.ndarray:
    """The strings of an operand as an object array.

    Raises:
        OnnxError: it holds none.
    """
    if not is_text(value) and not (isinstance(value, np.ndarray) and value.size == 0):
        raise node.fail("the operand holds no strings")
    made = np.empty(value.shape, object)
    made.reshape(-1)[:] = [x.decode("utf-8", "replace") if isinstance(x, bytes) else str(x) for x in value.reshape(-1)]
    return made


def _list(strings: list[str]) -> np.ndarray:
    made = np.empty(len(strings), object)
    made[:] = strings
    return made


@onnx_rule("StringNormalizer", since=10, fold=False)
def string_normalizer(node: OnnxNode, x: Any) -> Any:
    """Drops stop words, then changes the case; one empty string where nothing is left."""
    words = texts(node, x)
    if words.ndim not in (1, 2) or (words.ndim == 2 and words.shape[0] != 1):
        raise node.fail(f"the operand has the shape {list(words.shape)}; [C] or [1, C] is expected")
    stop, exact = node.attr("stopwords", None) or [], bool(node.attr("is_case_sensitive", 0))
    dropped = set(stop) if exact else {s.lower() for s in stop}
    kept = [w for w in words.reshape(-1) if (w if exact else w.lower()) not in dropped]
    change = {"LOWER": str.lower, "UPPER": str.upper}.get(node.attr("case_change_action", "NONE"), str)
    result = _list([change(w) for w in kept] or [""])
    return result if words.ndim == 1 else result[None]


@onnx_rule("StringConcat", since=20, fold=False)
def string_concat(node: OnnxNode, x: Any, y: Any) -> Any:
    return np.asarray(texts(node, x) + texts(node, y), object)


@onnx_rule("StringSplit", since=20, fold=False)
def string_split(node: OnnxNode, x: Any) -> Any:
    """The pieces along a new last axis, filled with empty strings, and how many there are."""
    words = texts(node, x)
    delimiter, most = node.attr("delimiter", None) or None, node.attr("maxsplit", None)
    pieces = [w.split(delimiter, -1 if most is None else most) for w in words.reshape(-1)]
    width = max(map(len, pieces), default=0)
    flat = _list([p for row in pieces for p in [*row, *[""] * (width - len(row))]])
    counts = np.array([len(row) for row in pieces], np.int64).reshape(words.shape)
    return flat.reshape((*words.shape, width)), counts


@onnx_rule("RegexFullMatch", since=20, fold=False)
def regex_full_match(node: OnnxNode, x: Any) -> Any:
    words = texts(node, x)
    try:
        pattern = re.compile(node.attr("pattern", ""))
    except re.error as error:
        raise node.fail(f"the pattern is no regular expression: {error}") from error
    return np.array([pattern.fullmatch(w) is not None for w in words.reshape(-1)], bool).reshape(words.shape)
