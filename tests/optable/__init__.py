"""The op table: one row tests an op in every way there is. See table.py."""
