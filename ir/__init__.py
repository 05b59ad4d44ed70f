"""Treadle's intermediate representation: types, ops, graphs, their text form, and passes over them."""
