"""Treadle: a deep-learning compiler stack in Python on Apache TVM.

A model is traced into Treadle's IR, differentiated and rewritten there, and lowered to kernels that Treadle
schedules itself. This file holds the public names and nothing else.
"""

__version__ = "0.1.0"
