"""Collectives call the host: the function of that name sends the program's own memory (distributed/comm.py)."""

from __future__ import annotations

from ..ir.opdef import fill
from ..ir.ops_collective import COMMUNICATION, host_name
from .lower_slots import Host

for _name in COMMUNICATION:
    fill("lower", _name, Host(host_name))
