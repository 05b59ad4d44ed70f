"""Runs a saved artifact in a process of its own: `python -m treadle.frontend.cli.demo.reader ARTIFACT PICTURES.npy`.

Prints JSON: the digit read in each picture, the seconds that loading took, and whether a compiler was in the process.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from .... import load

# With neither of these a process can make no kernel: TVM's Python side, and the part of Treadle that calls it.
COMPILER = ("tvm", f"{__package__.partition('.')[0]}.schedules.lower")


def main(artifact: str, pictures: str) -> None:
    """Loads, runs once, prints."""
    started = time.perf_counter()
    model = load(artifact)
    loaded = time.perf_counter() - started
    logits = model(np.load(pictures, allow_pickle=False)).numpy()
    print(json.dumps({"labels": logits.argmax(1).tolist(), "load_s": loaded,
                      "compiler": any(name in sys.modules for name in COMPILER)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
