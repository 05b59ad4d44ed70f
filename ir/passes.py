"""The standard sequences of passes, in one place.

`TIDY` brings any graph into a simple form; run it after tracing and differentiating, and again after a pass that
leaves casts or copies. `FINISH` comes last, before lowering: from then on nothing may merge nodes, as the barriers
that keep recomputations apart are gone.
"""

from __future__ import annotations

from .cse import CSE
from .dce import DCE
from .decompose import ERASE, INLINE
from .loops import MERGE_SCANS
from .order import HOIST_UPDATES
from .pipeline import Pass
from .simplify import SIMPLIFY

# CSE comes first as MERGE_SCANS compares operands, and again as simpler nodes are equal more often.
TIDY: tuple[Pass, ...] = (INLINE, CSE, MERGE_SCANS, SIMPLIFY, CSE, DCE)
FINISH: tuple[Pass, ...] = (ERASE, DCE, HOIST_UPDATES)
