"""Runs a saved artifact in a process of its own: `python -m treadle.frontend.cli.demo.reader ARTIFACT PICTURES.npy`.

Prints JSON: the digit read in each picture, the seconds that loading took, and what the process did NOT need.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from .... import load


def main(artifact: str, pictures: str) -> None:
    """Loads, runs once, prints."""
    started = time.perf_counter()
    model = load(artifact)
    loaded = time.perf_counter() - started
    logits = model(np.load(pictures, allow_pickle=False)).numpy()
    print(json.dumps({"labels": logits.argmax(1).tolist(), "load_s": loaded}))


if __name__ == "__main__":
    main(*sys.argv[1:])
