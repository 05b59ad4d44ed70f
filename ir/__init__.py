"""Treadle's intermediate representation: types, ops, graphs, their text form, and passes over them."""

from . import ops, text
from .parse import parse

__all__ = ["ops", "parse", "text"]
