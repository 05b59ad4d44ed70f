"""Reads the text form of a graph (see text.py): `parse(str(graph)) == graph`.

A recursive descent over a token stream. Result types in the text are checked against the inferred
ones, so a hand-written or edited program that does not type is refused with its line.
"""

from __future__ import annotations

import base64
import math
import re
import zlib
from typing import Any

import numpy as np

from .builder import make_node
from .dims import Dim, Size
from .dtypes import DType, as_dtype
from .errors import DTypeError, ParseError, TreadleError
from .graph import ROLES, Graph, Value
from .location import Loc
from .opdef import op
from .types import TensorType

_TOKEN = re.compile(r"""
    (?P<space>\s+|\#[^\n]*)
  | (?P<value>%[A-Za-z0-9_.]+)
  | (?P<string>"(?:[^"\\]|\\.)*")
  | (?P<dim>`[^`]*`)
  | (?P<zlib><zlib\ [A-Za-z0-9+/=]*>)
  | (?P<type>[a-z]+[0-9a-z]*\[[^\]\n]*\])
  | (?P<number>[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|inf|nan)(?![A-Za-z_]))
  | (?P<word>[A-Za-z_][A-Za-z0-9_.]*)
  | (?P<mark>->|[(){}\[\]<>,:=])
""", re.VERBOSE)


def parse(text: str) -> Graph:
    """The graph that a text describes.

    Raises:
        ParseError: the text is not well formed, names an unknown op or value, or claims a wrong type;
            the message gives line and column.
    """
    parser = _Parser(text)
    graph = parser.graph()
    parser.expect_end()
    return graph


def parse_type(text: str) -> TensorType:
    """The tensor type that a text such as `f32[8,784]` describes.

    Raises:
        ParseError: it describes none.
    """
    parser = _Parser(text)
    result = parser.type()
    parser.expect_end()
    return result


class _Parser:
    def __init__(self, text: str):
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        position = 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise self._error(f"unexpected character {text[position]!r}", position)
            if match.lastgroup != "space":
                self.tokens.append((str(match.lastgroup), match.group(), position))
            position = match.end()
        self.tokens.append(("end", "end of text", len(text)))
        self.at = 0

    def _error(self, message: str, position: int | None = None) -> ParseError:
        position = self.tokens[self.at][2] if position is None else position
        line = self.text.count("\n", 0, position) + 1
        column = position - self.text.rfind("\n", 0, position)
        return ParseError(f"line {line}, column {column}: {message}")

    def _peek(self) -> str:
        return self.tokens[self.at][1]

    def _next(self, kind: str | None = None) -> str:
        found, text, _ = self.tokens[self.at]
        if kind is not None and found != kind:
            raise self._error(f"expected a {kind}, found {text!r}")
        self.at += 1
        return text

    def _expect(self, mark: str) -> None:
        if self._peek() != mark:
            raise self._error(f"expected {mark!r}, found {self._peek()!r}")
        self.at += 1

    def _accept(self, mark: str) -> bool:
        if self._peek() == mark:
            self.at += 1
            return True
        return False

    def expect_end(self) -> None:
        if self.tokens[self.at][0] != "end":
            raise self._error(f"text after the graph: {self._peek()!r}")

    def graph(self) -> Graph:
        self._expect("graph")
        graph = Graph(self._next("word"))
        scope: dict[str, Value] = {}
        self._expect("(")
        while not self._accept(")"):
            name = self._define(scope)
            self._expect(":")
            value = Value(self.type(), name)
            role = self._next("word")
            if role not in ROLES:
                raise self._error(f"{role!r} is not a role; roles: {', '.join(ROLES)}")
            scope[name] = value
            graph.inputs.append(value)
            graph.roles.append(role)
            self._accept(",")
        self._expect("->")
        claimed = self._types_in_brackets()
        self._expect("{")
        while self._peek() != "return":
            self._node(graph, scope)
        self._returns(graph, scope)
        if tuple(claimed) != graph.output_types:
            raise self._error(f"graph {graph.name} claims the outputs ({', '.join(map(str, claimed))}) "
                              f"but returns ({', '.join(map(str, graph.output_types))})")
        return graph

    def _returns(self, graph: Graph, scope: dict[str, Value]) -> None:
        self._expect("return")
        while not self._accept("}"):
            graph.outputs.append(self._use(scope))
            if self._accept("->"):
                taken = self._use(scope)
                if taken not in graph.inputs:
                    raise self._error("an output can only take over the storage of an input")
                graph.aliases[len(graph.outputs) - 1] = graph.inputs.index(taken)
            self._accept(",")

    def _types_in_brackets(self) -> list[TensorType]:
        types = []
        self._expect("(")
        while not self._accept(")"):
            types.append(self.type())
            self._accept(",")
        return types

    def _define(self, scope: dict[str, Value]) -> str:
        position = self.tokens[self.at][2]
        name = self._next("value")[1:]
        if name in scope:
            raise self._error(f"%{name} is defined twice", position)
        return name

    def _use(self, scope: dict[str, Value]) -> Value:
        position = self.tokens[self.at][2]
        name = self._next("value")[1:]
        if name not in scope:
            raise self._error(f"%{name} is not defined", position)
        return scope[name]

    def _node(self, graph: Graph, scope: dict[str, Value]) -> None:
        names = [self._define(scope)]
        while self._accept(","):
            names.append(self._define(scope))
        self._expect("=")
        start = self.tokens[self.at][2]
        op_name = self._next("word")
        operands = []
        self._expect("(")
        while not self._accept(")"):
            operands.append(self._use(scope))
            self._accept(",")
        attrs = self._attrs()
        regions = []
        if self._accept("["):
            while not self._accept("]"):
                regions.append(self.graph())
        self._expect(":")
        claimed = [self.type()]
        while self._accept(","):
            claimed.append(self.type())
        line = self.text.count("\n", 0, start) + 1
        try:
            node = make_node(op(op_name), operands, attrs, regions, Loc("<text>", line))
        except TreadleError as error:
            raise self._error(error.message, start) from error
        if [v.type for v in node.results] != claimed:
            raise self._error(f"{op_name} gives {', '.join(str(v.type) for v in node.results)}, "
                              f"the text claims {', '.join(map(str, claimed))}", start)
        for name, value in zip(names, node.results, strict=True):
            value.name = "" if name.isdigit() else name
            scope[name] = value
        graph.nodes.append(node)

    def _attrs(self) -> dict[str, Any]:
        attrs = {}
        if self._accept("{"):
            while not self._accept("}"):
                name = self._next("word")
                self._expect("=")
                attrs[name] = self._attr()
                self._accept(",")
        return attrs

    def _attr(self) -> Any:
        kind, text, position = self.tokens[self.at]
        self.at += 1
        if kind == "number":
            return float(text) if re.search(r"[.einf]|nan", text) else int(text)
        if kind == "string":
            return re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], text[1:-1])
        if kind == "dim":
            return self._size(text[1:-1])
        if kind == "type":
            return self._array(self._as_type(text))
        if text == "dtype":
            return self._dtype(self._next("word"))
        if text in ("true", "false", "none", "inf", "nan"):
            return {"true": True, "false": False, "none": None, "inf": math.inf, "nan": math.nan}[text]
        if text == "(":
            items = []
            while not self._accept(")"):
                items.append(self._attr())
                self._accept(",")
            return tuple(items)
        raise self._error(f"{text!r} is not an attribute value", position)

    def _array(self, type: TensorType) -> np.ndarray:
        kind, text, _ = self.tokens[self.at]
        if kind == "zlib":
            self.at += 1
            try:
                data = zlib.decompress(base64.b64decode(text[6:-1]))
                return np.frombuffer(data, type.dtype.np).reshape(type.shape)
            except (ValueError, zlib.error) as error:
                raise self._error(f"the data of {type} is damaged: {error}") from error
        self._expect("<")
        items = []
        while not self._accept(">"):
            items.append(self._attr())
            self._accept(",")
        if len(items) != type.size:
            raise self._error(f"{type} needs {type.size} elements, found {len(items)}")
        return np.array(items, dtype=type.dtype.np).reshape(type.shape)

    def type(self) -> TensorType:
        return self._as_type(self._next("type"))

    def _as_type(self, text: str) -> TensorType:
        short, sizes = text[:-1].split("[", 1)
        return TensorType(tuple(self._size(s) for s in sizes.split(",")) if sizes else (), self._dtype(short))

    def _dtype(self, name: str) -> DType:
        try:
            return as_dtype(name)
        except DTypeError as error:
            raise self._error(error.message) from None

    def _size(self, text: str) -> Size:
        if text.strip().isdigit():
            return int(text)
        try:
            return _SizeParser(text).sum()
        except (ValueError, IndexError, TreadleError):
            raise self._error(f"{text!r} is not a size") from None


def parse_size(text: str) -> Size:
    """The size that `str` gave as `text`; ValueError for anything else."""
    try:
        return _SizeParser(text).sum()
    except (IndexError, TreadleError):
        raise ValueError(f"{text!r} is not a size") from None


class _SizeParser:
    """`2*batch*seq - (h+1)//2 + 3`: sums of products of numbers, names and floor divisions."""

    def __init__(self, text: str):
        self.tokens = re.findall(r"\d+|[A-Za-z_]\w*|//|[-+*()]", text) + [""]
        if "".join(self.tokens) != re.sub(r"\s", "", text):
            raise ValueError(text)
        self.at = 0

    def _accept(self, token: str) -> bool:
        if self.tokens[self.at] == token:
            self.at += 1
            return True
        return False

    def sum(self, closing: str = "") -> Size:
        total: Size = -self._product() if self._accept("-") else self._product()
        while not self._accept(closing):
            if self._accept("-"):
                total = total - self._product()
            elif self._accept("+"):
                total = total + self._product()
            else:
                raise ValueError(self.tokens[self.at])
            if not closing and self.at == len(self.tokens):
                break
        return total

    def _product(self) -> Size:
        product = self._factor()
        while self._accept("*"):
            product = product * self._factor()
        return product

    def _factor(self) -> Size:
        if self._accept("("):
            factor = self.sum(")")
        else:
            token = self.tokens[self.at]
            self.at += 1
            factor = int(token) if token.isdigit() else Dim(token)
        if self._accept("//"):
            divisor = int(self.tokens[self.at])
            self.at += 1
            factor = factor // divisor
        return factor
