"""Runs a script as one rank of `treadle launch`, its output in a log of its own; rank 0 also prints."""

import os
import runpy
import sys
from pathlib import Path
from typing import Any, TextIO


class _Tee:
    """Writes to several files."""

    def __init__(self, *files: TextIO):
        self.files = files

    def write(self, text: str) -> int:
        for file in self.files:
            file.write(text)
            file.flush()
        return len(text)

    def flush(self) -> None:
        for file in self.files:
            file.flush()


def main() -> None:
    rank = next((os.environ[name] for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
                 if name in os.environ), "0")
    log = open(Path(sys.argv[1]) / f"rank{rank}.log", "w")
    shown: Any = (sys.__stdout__,) if rank == "0" else ()
    sys.stdout, sys.stderr = _Tee(log, *shown), _Tee(log, sys.__stderr__)  # type: ignore[arg-type]
    sys.argv = sys.argv[2:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
