"""Records torch's answers for samples of the op table into ops.npz: `python tests/oracle/record.py`.

Needs the extra `oracle`. Inputs are recorded too (rounded to f32, computed in f64), so that the file does not
depend on NumPy's random streams; results are kept in f32. Large samples are left to the live comparison.
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
LARGEST = 700  # elements of operands and results together

if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent)]


def main() -> None:
    """Writes ops.npz: arrays op/sample/arg or result/number, and op/sample/attrs as JSON."""
    import torch_ops
    from optable.table import TABLE
    out: dict[str, np.ndarray] = {"torch": np.array(torch_ops.torch.__version__)}
    for row in TABLE:
        if row.op not in torch_ops.ANSWERS or row.variant:
            continue
        for number, sample in enumerate(row.samples("float64")):
            args = [a.astype(np.float32) if a.dtype == np.float64 else a for a in sample.args]
            if not torch_ops.comparable(row.op, sample) or not sum(a.size for a in args):
                continue
            wide = [a.astype(np.float64) if a.dtype == np.float32 else a for a in args]
            attrs = sample.graph(row.op).nodes[0].attrs
            results = torch_ops.answer(row.op, wide, attrs)
            if sum(a.size for a in (*args, *results)) > LARGEST:
                continue
            key = f"{row.op}/{number}"
            out[f"{key}/attrs"] = np.array(json.dumps(attrs))
            out.update({f"{key}/arg/{i}": a for i, a in enumerate(args)})
            out.update({f"{key}/result/{i}": np.asarray(r, np.float32 if r.dtype == np.float64 else r.dtype)
                        for i, r in enumerate(results)})
    np.savez_compressed(HERE / "ops.npz", **out)


if __name__ == "__main__":
    main()
